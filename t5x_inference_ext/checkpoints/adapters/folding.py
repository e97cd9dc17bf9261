"""Folding of an adapter into a checkpoint's matrices, for a conversion where one task is all."""

import dataclasses

import numpy as np

from t5x_inference_ext import params
from t5x_inference_ext.checkpoints.adapters.adapter import Adapter, Floats, LowRank
from t5x_inference_ext.checkpoints.arrays import whole_array
from t5x_inference_ext.checkpoints.checkpoint import Checkpoint
from t5x_inference_ext.checkpoints.tensor import Bounds, Tensor
from t5x_inference_ext.errors import CheckpointError
from t5x_inference_ext.quantization.formats import weight_format

FOLDED_NOTE = 'adapter folded in: '


class Folded(Tensor):
  """A canonical matrix [L, in, out], or a bias [L, out], with an adapter folded in, as float32."""

  def __init__(
    self,
    source: Tensor,
    low_rank: LowRank | None = None,
    inputs: Floats | None = None,
    outputs: Floats | None = None,
  ) -> None:
    """Wrap a tensor.

    Args:
      source: The tensor without the adapter.
      low_rank: Term to add to a matrix.
      inputs: [L, in]. Factors of a matrix's inputs.
      outputs: [L, out]. Factors of the outputs.
    """
    super().__init__(source.shape, np.float32, source.path)
    self._source, self._low_rank, self._inputs, self._outputs = source, low_rank, inputs, outputs
    self.chunk = source.chunk

  def uncached(self) -> 'Folded':
    return Folded(self._source.uncached(), self._low_rank, self._inputs, self._outputs)

  def _read(self, bounds: Bounds) -> np.ndarray:
    layers, *others = (slice(*b) for b in bounds)
    values = self._source.read((layers, *others)).astype(np.float32)
    if self._low_rank is not None:
      rows, columns = others
      values += self._low_rank.a[layers, rows] @ self._low_rank.b[layers, :, columns]
    if self._inputs is not None:
      values *= self._inputs[layers, others[0]][:, :, None]
    if self._outputs is not None:
      factors = self._outputs[layers, others[-1]]
      values *= factors[:, None] if len(others) == 2 else factors
    return values


def fold_adapter(source: Checkpoint, adapter: Adapter) -> Checkpoint:
  """Return a checkpoint whose matrices and biases have a LoRA, or (IA)^3, folded in.

  Args:
    source: A checkpoint of float weights.
    adapter: An adapter that was read for it.

  Raises:
    CheckpointError: The adapter has a soft prompt, or the weights are quantized.
  """
  if adapter.prompt is not None:
    raise CheckpointError(
      f'{adapter.path} is a soft prompt, which is no part of the weights: load it beside the '
      'model, with --adapters=NAME=PATH'
    )
  if weight_format(source.weights).scaled:
    raise CheckpointError(
      f"{adapter.path} can't be folded into the {source.weights} weights of {source.path}: convert "
      'the float model that they were made from'
    )
  tensors = dict(source.tensors)
  for name, low_rank in adapter.low_rank.items():
    tensors[name] = Folded(tensors[name], low_rank)
  for name, factors in adapter.scaling.items():
    if name == 'mlp_output':
      tensors[name] = Folded(tensors[name], inputs=factors)
      continue
    for each in (name, params.bias_name(name)):
      if each in tensors:
        tensors[each] = Folded(tensors[each], outputs=factors)
  arrays = tuple(
    whole_array(tensor, name, None if name in params.OUTSIDE_LAYERS else 0)
    for name, tensor in tensors.items()
  )
  notes = (*source.notes, f'{FOLDED_NOTE}{adapter.path}, CRC-32 {adapter.crc32:08x}')
  return dataclasses.replace(source, tensors=tensors, arrays=arrays, notes=notes)
