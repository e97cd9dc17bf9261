"""Calibration of a conversion: GPTQ, layer by layer, resumable (docs/convert.md).

One layer's weights are in memory, and one batch of the residual stream; the stream itself is in a
file. Layers are rounded in order: the inputs of a layer come from the rounded layers before it.
"""

from collections.abc import Callable, Iterator
import dataclasses
import functools
import math

import jax
import numpy as np

from t5x_inference_ext import params
from t5x_inference_ext.checkpoints.arrays import whole_array
from t5x_inference_ext.checkpoints.calibration import passes
from t5x_inference_ext.checkpoints.calibration.layer import CalibratedLayer
from t5x_inference_ext.checkpoints.calibration.results import CalibrationResults
from t5x_inference_ext.checkpoints.calibration.rows import CALIBRATED_NOTE, CalibrationRows
from t5x_inference_ext.checkpoints.checkpoint import Checkpoint
from t5x_inference_ext.checkpoints.conversion.not_finite import NotFinite
from t5x_inference_ext.checkpoints.conversion.rounding_error import RoundingError
from t5x_inference_ext.checkpoints.load import load_tensor
from t5x_inference_ext.checkpoints.views import RoundedTable
from t5x_inference_ext.model.weights import build_weights
from t5x_inference_ext.quantization.formats import weight_format
from t5x_inference_ext.sharding.packing import packed_tensors
from t5x_inference_ext.text_format import megabytes

# Version of the results. A run can only continue from results of its own version.
_VERSION = 1
# Tokens of the rows that go through a layer together.
_BATCH_TOKENS = 4096


class Calibration:
  """The rounding of a model's matrices for the activations of a text.

  Attributes:
    rounded: The checkpoint that a conversion then writes: its matrices are quantized, and can be
      read after `run`.
    errors: The rounding errors of the matrices, after `run`.
  """

  def __init__(
    self,
    source: Checkpoint,
    rows: CalibrationRows,
    weights: str,
    search: bool,
    directory: str,
    progress: Callable[[str, int, int], None],
  ) -> None:
    """Plan a calibration.

    Args:
      source: A checkpoint of float weights.
      rows: The text.
      weights: Format of the weights to make (quantization.formats). Its tables are not calibrated,
        but layers are calibrated for the embedding that will be served.
      search: Whether the conversion searches the scales of tables.
      directory: Directory for results.
      progress: Called with a name, the bytes just rounded and all bytes.
    """
    self._source, self._rows, self._progress = source, rows, progress
    found = weight_format(weights)
    if 'embedding' in found.scaled:
      table = RoundedTable(source.tensors['embedding'], found.dtype('embedding'), search)
      self._source = dataclasses.replace(source, tensors={**source.tensors, 'embedding': table})
    self.errors: dict[str, RoundingError] = {}
    self._model = model = passes.one_device_model(source.config)
    mesh = dict(model.mesh.shape)
    self._packed = packed_tensors(source.config, model.prefill_layout, mesh, scaled=())
    names = (n for n, p in params.parameters(source.config).items() if p.kind == 'matrix')
    self._dtypes = {name: found.dtype(name) for name in names}
    shape = *rows.inputs.shape, source.config.d_model
    self._results = CalibrationResults(directory, source.config, shape)
    tensors = {**source.tensors, **self._results.tensors(self._dtypes)}
    scales = params.scales(source.config)
    self.rounded = dataclasses.replace(
      source,
      weights=str(found.with_float_tables()),
      tensors=tensors,
      arrays=tuple(
        whole_array(tensor, name, None if name in params.OUTSIDE_LAYERS else 0)
        for name, tensor in tensors.items()
        if name not in scales
      ),
      notes=(*source.notes, f'{CALIBRATED_NOTE}{rows}'),
    )

  @property
  def layers_done(self) -> int:
    """Number of layers that are rounded."""
    return self._results.layers_done

  def description(self) -> str:
    """Return a line that says what will be done."""
    rows, length = self._rows.inputs.shape
    stream = 4 * rows * length * self._source.config.d_model
    return (
      f'calibration with {self._rows}; about {megabytes(self.peak_bytes)} of memory, and '
      f'{megabytes(2 * stream + self._matrices_size // 4)} of disk until the output is finished'
    )

  @property
  def _matrices_size(self) -> int:
    """Bytes of all matrices as float32."""
    declared = params.parameters(self._source.config)
    return sum(4 * math.prod(declared[name].shape) for name in self._dtypes)

  @property
  def peak_bytes(self) -> int:
    """Estimate of the memory that the calibration takes, in bytes."""
    config = self._source.config
    shapes = [t.shape for t in self._packed.values() if t.kind == 'matrix']
    inputs, largest = max(s[0] for s in shapes), max(math.prod(s) for s in shapes)
    layer = self._matrices_size // config.num_layers
    tokens = max(_BATCH_TOKENS, self._rows.inputs.shape[1])
    activations = 4 * tokens * (2 * config.d_model + sum(s[1] for s in shapes))
    # Two copies of the layer; a Hessian in float64, and four such matrices in float32; six arrays
    # of a matrix's size.
    return 500 * 2**20 + 2 * layer + 24 * inputs * inputs + 24 * largest + activations

  def run(self) -> None:
    """Round all layers that are not yet rounded.

    Raises:
      CheckpointError: The source can't be read, or its activations are not finite.
    """
    done = self._results.layers_done
    self._results.make_directory()
    if done == 0 and not self._results.has_stream(0):
      self._write_stream(0, self._embedded())
    bias = self._relative_bias()
    for layer in range(done, self._source.config.num_layers):
      self._calibrate_layer(layer, bias)
    self.errors = self._results.errors()

  def _relative_bias(self) -> jax.Array | None:
    """Return T5's bias of attention by distance, if the model has one."""
    tensor = self._packed.get('relative_bias')
    return None if tensor is None else load_tensor(self._source, self._model, tensor, None)

  def _batches(self) -> Iterator[slice]:
    rows, length = self._rows.inputs.shape
    count = max(1, _BATCH_TOKENS // length)
    return (slice(first, min(first + count, rows)) for first in range(0, rows, count))

  def _embedded(self) -> Iterator[np.ndarray]:
    """Yield the residual stream of each batch before the first layer."""
    source, model, packed = self._source, self._model, self._packed
    used = {n: t for n, t in packed.items() if not t.per_layer and n not in ('head', 'head_bias')}
    weights = build_weights(
      used, 0, False, lambda n, _: load_tensor(source, model, packed[n], None)
    )
    for batch in self._batches():
      yield np.asarray(passes.embed_tokens(model, weights, self._rows.inputs[batch]))

  def _write_stream(self, layer: int, batches: Iterator[np.ndarray]) -> None:
    """Write the residual stream before a layer."""
    self._results.begin_stream(layer)
    for batch, values in zip(self._batches(), batches, strict=True):
      finite = np.isfinite(values).all((1, 2))
      if not finite.all():
        where = f'layer {layer - 1}' if layer else 'the embedding'
        raise NotFinite(
          f'row {batch.start + int(np.argmin(finite))} of calibration={self._rows.path} has NaN or '
          f'infinite activations after {where} of {self._source.path}: use another text, or '
          'convert without one'
        )
      self._results.write_stream(layer, batch.start, values)
    self._results.end_stream(layer)

  def _calibrate_layer(self, number: int, bias: jax.Array | None) -> None:
    """Round one layer, and write it and the residual stream after it."""
    layer = CalibratedLayer(self._source, self._model, self._packed, self._dtypes, number)
    stream = self._results.stream(number)
    run = functools.partial(passes.run_layer, self._model, self._source.config.local_layers[number])
    count = float(self._rows.counted.sum())

    def done(name: str, nbytes: int) -> None:
      self._progress(f'calibrate layer {number} {name}', nbytes, self._matrices_size)

    for product, hessians in layer.products():
      weights, sums = layer.weights(), dict[str, np.ndarray]()
      for batch in self._batches():
        _, found = run(tuple(hessians), weights, bias, stream[batch], self._rows.counted[batch])
        passes.add_hessians(sums, found)
      for name, matrices in hessians.items():
        layer.round(product, matrices, (sums[name] / count).astype(np.float32), done)
    if number + 1 < self._source.config.num_layers:
      weights = layer.weights()
      batches = (
        run((), weights, bias, stream[b], self._rows.counted[b])[0] for b in self._batches()
      )
      self._write_stream(number + 1, map(np.asarray, batches))
    self._results.write_layer(number, layer.tensors, layer.errors)
