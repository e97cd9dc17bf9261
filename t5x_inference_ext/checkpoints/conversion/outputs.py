"""What a conversion can write: which arrays there are, and where canonical values go in them."""

from collections.abc import Iterator
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from t5x_inference_ext import params
from t5x_inference_ext.checkpoints import manifest, serving
from t5x_inference_ext.checkpoints.arrays import Rectangle
from t5x_inference_ext.checkpoints.checkpoint import Checkpoint
from t5x_inference_ext.checkpoints.conversion.raw_array import RawArray, array_files
from t5x_inference_ext.checkpoints.conversion.t5x_output import T5xOutput
from t5x_inference_ext.checkpoints.tensor import Bounds
from t5x_inference_ext.errors import UserError

OUTPUT_DTYPES = {
  'int8': np.dtype(np.int8),
  'bfloat16': np.dtype(ml_dtypes.bfloat16),
  'float32': np.dtype(np.float32),
}
# (array, bounds in it, their values)
ArrayWrite = tuple[RawArray, Bounds, np.ndarray]


class Output(Protocol):
  """A format being written.

  Attributes:
    weights: what the matrices become: 'int8', 'bfloat16' or 'float32'.
    arrays: all that are written.
    header: the name of the file that is written last, and without which it is no checkpoint.
  """

  weights: str
  arrays: tuple[RawArray, ...]
  header: str

  def dtype(self, name: str) -> np.dtype:
    """Of the canonical tensor `name`, as written."""

  def placements(self, name: str, rectangle: Rectangle, values: np.ndarray) -> Iterator[ArrayWrite]:
    """Where canonical values [layers, rows, columns] go; scales are tensors of one row."""

  def is_layer_weight(self, array: str) -> bool:
    """Whether the array of this name holds matrices of layers, or their scales."""

  def headers(
    self, checksums: dict[str, list[int]], errors: dict[str, dict]
  ) -> Iterator[tuple[str, bytes]]:
    """The files that describe the arrays: name and content, the header last. errors: of each tensor, by name."""


class ServingOutput:
  """The serving checkpoint (docs/serving_checkpoint.md). An Output."""

  header = serving.CONFIG

  def __init__(
    self,
    source: Checkpoint,
    directory: str,
    weights: str,
    provenance: dict[str, Any],
    version: str,
    options: dict[str, Any],
  ):
    self.weights = weights
    contents = serving.serving_tensors(source.config, weights)
    self._arrays = {
      name: RawArray(
        directory,
        name,
        shape,
        OUTPUT_DTYPES[dtype],
        serving.serving_chunk_shape(name, shape, OUTPUT_DTYPES[dtype].itemsize),
      )
      for name, (shape, dtype) in contents.items()
    }
    self.arrays = tuple(self._arrays.values())
    self._header = serving.header(source.config, weights, provenance, version, options)
    self._kinds = {**params.parameters(source.config), **params.scales(source.config)}

  def dtype(self, name: str) -> np.dtype:
    return self._arrays[name].dtype

  def is_layer_weight(self, array: str) -> bool:
    return self._kinds[array].kind in ('matrix', 'scale')

  def placements(self, name: str, rectangle: Rectangle, values: np.ndarray) -> Iterator[ArrayWrite]:
    array, (layers, rows, columns) = self._arrays[name], rectangle
    if not serving.is_layered(name):
      yield (
        (array, (rows, columns), values[0])
        if len(array.shape) == 2
        else (array, (columns,), values[0, 0])
      )
    elif len(array.shape) == 3:
      yield array, (layers, rows, columns), values
    else:
      yield array, (layers, columns), values[:, 0]

  def headers(
    self, checksums: dict[str, list[int]], errors: dict[str, dict]
  ) -> Iterator[tuple[str, bytes]]:
    files = {serving.CHECKSUMS: serving.checksums_file(checksums)}
    yield from files.items()
    yield (
      serving.CONFIG,
      manifest.write({**self._header, 'errors': errors}, {**files, **array_files(self.arrays)}),
    )


OUTPUT_FORMATS = ('serving', 't5x_int8', 't5x_float')


def make_output(
  source: Checkpoint,
  directory: str,
  kind: str,
  weights: str,
  provenance: dict[str, Any],
  version: str,
  options: dict[str, Any],
) -> Output:
  """The output of a format, below a directory. Raises UserError for an unknown format, and for weights of 'serving'."""
  if kind not in OUTPUT_FORMATS:
    raise UserError(f'format must be one of {", ".join(OUTPUT_FORMATS)}, got {kind!r}')
  if kind == 'serving' and weights not in serving.SERVING_WEIGHTS:
    raise UserError(f'weights must be one of {", ".join(serving.SERVING_WEIGHTS)}, got {weights!r}')
  if kind != 'serving':
    return T5xOutput(
      source, directory, 'int8' if kind == 't5x_int8' else 'float32', provenance, version, options
    )
  return ServingOutput(source, directory, weights, provenance, version, options)
