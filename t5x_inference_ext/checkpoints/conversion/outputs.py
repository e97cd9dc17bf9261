"""The formats that a conversion can write."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from t5x_inference_ext import params
from t5x_inference_ext.checkpoints import serving
from t5x_inference_ext.checkpoints.arrays import Rectangle
from t5x_inference_ext.checkpoints.checkpoint import Checkpoint
from t5x_inference_ext.checkpoints.conversion.options import ConvertOptions
from t5x_inference_ext.checkpoints.conversion.output import ArrayWrite, Output
from t5x_inference_ext.checkpoints.conversion.packed_array import PackedArray
from t5x_inference_ext.checkpoints.conversion.raw_array import RawArray
from t5x_inference_ext.checkpoints.conversion.t5x_output import T5xOutput
from t5x_inference_ext.errors import UserError
from t5x_inference_ext.quantization.formats import SERVED_WEIGHTS, bits_of, weight_format, with_bits


class ServingOutput(Output):
  """A serving checkpoint (docs/serving_checkpoint.md) while it is being written."""

  manifest_name = header = serving.CONFIG
  manifest_format, manifest_version = serving.SERVING_FORMAT, serving.VERSION

  def __init__(
    self, source: Checkpoint, directory: str, weights: str, record: dict[str, Any]
  ) -> None:
    self._arrays: dict[str, RawArray] = {}
    for name, (shape, dtype) in serving.serving_tensors(source.config, weights).items():
      chunk = serving.serving_chunk_shape(name, shape, dtype)
      self._arrays[name] = (
        PackedArray(directory, name, shape, chunk)
        if dtype == 'int4'
        else RawArray(directory, name, shape, dtype, chunk)
      )
    scaled = weight_format(weights).scaled
    self._kinds = {**params.parameters(source.config), **params.scales(source.config, scaled)}
    super().__init__(source, weights, tuple(self._arrays.values()), record)
    self._text = source.text
    self._manifest['text'] = source.text.to_dict()

  def index_files(self) -> dict[str, bytes]:
    return dict(self._text.files)

  def dtype(self, name: str) -> np.dtype:
    return self._arrays[name].dtype

  def is_layer_weight(self, array: str) -> bool:
    return serving.is_layered(array) and self._kinds[array].kind in ('matrix', 'scale')

  def placements(self, name: str, rectangle: Rectangle, values: np.ndarray) -> Iterator[ArrayWrite]:
    array, (layers, rows, columns) = self._arrays[name], rectangle
    is_matrix = len(self._kinds[name].shape) == 2 + serving.is_layered(name)
    bounds = (rows, columns) if is_matrix else (columns,)
    if not is_matrix:
      values = values[:, 0]
    if serving.is_layered(name):
      yield array, (layers, *bounds), values
    else:
      yield array, bounds, values[0]


def make_output(
  source: Checkpoint, directory: str, options: ConvertOptions, record: dict[str, Any]
) -> Output:
  """Make the output that `options` select, inside a directory.

  Args:
    source: Checkpoint to convert.
    directory: Directory of the output.
    options: Options of the conversion.
    record: The manifest's record of the conversion (provenance.py).

  Raises:
    UserError: The weights of a serving checkpoint are unknown.
  """
  if options.format != 'serving':
    weights = 'int8' if options.format == 't5x_int8' else 'float32'
    return T5xOutput(source, directory, weights, record)
  if options.weights not in SERVED_WEIGHTS:
    raise UserError(f'weights must be one of {", ".join(SERVED_WEIGHTS)}, got {options.weights!r}')
  weights = with_bits(options.weights, options.bits or '', source.config)
  if (name := narrowed(source, weights)) is not None:
    raise UserError(
      f'{source.path} holds {name} in {weight_format(source.weights).dtype(name).name}: rounding '
      f'it again to {weight_format(weights).dtype(name).name} would lose more than rounding it '
      'once, so convert the float checkpoint'
    )
  return ServingOutput(source, directory, weights, record)


def narrowed(source: Checkpoint, weights: str) -> str | None:
  """Return the first quantized matrix of the source that has fewer bits in `weights`, or None."""
  before, after = weight_format(source.weights), weight_format(weights)
  if not (before.quantized and after.quantized):
    return None
  matrices = (n for n, p in params.parameters(source.config).items() if p.kind == 'matrix')
  return next((n for n in matrices if bits_of(after.dtype(n)) < bits_of(before.dtype(n))), None)
