"""Weights from a checkpoint straight onto their shards: no host ever holds a whole model."""

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from t5x_inference_ext.checkpoints.checkpoint import Checkpoint
from t5x_inference_ext.errors import CheckpointError
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.model.weights import Weights, build_weights
from t5x_inference_ext.sharding.packing import PackedTensor, packed_tensors, tensor_dtype

# On CPU, up to this depth the program unrolls its layers, which spares a copy of each layer's weights; beyond it, a loop
# keeps programs small and compiles quick.
MAX_UNROLLED_LAYERS = 8


def scans_layers(num_layers: int, asked: bool | None = None, platform: str = 'tpu') -> bool:
  """Whether the program loops over stacked layers: as asked, or by default on CPU beyond MAX_UNROLLED_LAYERS layers.

  On accelerators by default never. Each turn of a loop copies the layer's weights out of the stack on a GPU, which more than
  doubles the bytes of a decode step; a TPU prefetches whole arrays into on-chip memory, but no slices of a stack, and a
  decode step takes a fifth less without (docs/tpu_v4_tuning.md). Compiling then takes a minute or two for 100 layers.

  Args:
    num_layers: of the model.
    asked: what the user wants; None: nothing.
    platform: jax's name for that of the devices.
  """
  if asked is not None:
    return asked
  return platform == 'cpu' and num_layers > MAX_UNROLLED_LAYERS


def load_weights(
  checkpoint: Checkpoint, model: Model, *, stacked: bool | None = None, progress=iter
) -> Weights:
  """Reads every shard of every tensor that this process's devices hold.

  Args:
    checkpoint: an open one, of any format. Int8 weights stay int8; float ones become model.dtype.
    model: decides mesh and layout.
    stacked: one array for all layers, or (False) one per layer; by default as scans_layers says.
    progress: wraps the iterator over tensors, e.g. tqdm.

  Returns:
    The weights, sharded over model.mesh.

  Raises:
    MeshError: the mesh does not divide the model.
    CheckpointError: a tensor can't be read, or holds NaN or infinite values.
  """
  tensors = packed_tensors(
    model.config, model.prefill_layout, dict(model.mesh.shape), checkpoint.weights == 'int8'
  )
  layers = model.config.num_layers
  stacked = scans_layers(layers, stacked, model.mesh.devices.flat[0].platform)
  make = lambda name, layers: load_tensor(checkpoint, model, tensors[name], layers)
  return build_weights(tensors, layers, stacked, make, progress)


def load_tensor(
  checkpoint: Checkpoint, model: Model, tensor: PackedTensor, layers: slice | int | None
) -> jax.Array:
  """One array onto its shards: of one layer, of a range of layers (stacked in front), or of the model (None)."""
  dtype = tensor_dtype(tensor, checkpoint.weights, model.dtype)
  # Norms are applied as scale or 1 + scale; the program knows only the value applied.
  offset = 1 if tensor.kind == 'norm' and model.config.norm_scale == 'zero' else 0

  def read(layer, index):
    values = tensor.read(lambda name, where: _read(checkpoint, name, where), layer, index)
    return (values + offset if offset else values).astype(dtype, copy=False)

  def read_stack(index):
    stack = range(*index[0].indices(layers.stop))
    shape = [len(stack)] + [len(range(*s.indices(n))) for s, n in zip(index[1:], tensor.shape)]
    out = np.empty(
      shape, dtype
    )  # filled layer by layer: one layer's float source is the most held beside it
    for i, layer in enumerate(stack):
      out[i] = read(layer, index[1:])
    return out

  if isinstance(layers, slice):
    shape, spec, callback = (layers.stop, *tensor.shape), P(None, *tensor.spec), read_stack
  else:
    shape, spec, callback = tensor.shape, tensor.spec, lambda index: read(layers, index)
  return jax.make_array_from_callback(shape, NamedSharding(model.mesh, spec), callback)


def _read(checkpoint: Checkpoint, name: str, where: tuple[slice, ...]) -> np.ndarray:
  """A tensor's values, which are finite: a serving checkpoint's were when it was made, and have checksums."""
  tensor = checkpoint.tensors[name]
  values = tensor.read(where)
  if checkpoint.format != 'serving' and values.dtype.kind != 'i' and not np.isfinite(values).all():
    raise CheckpointError(
      f'{name}: NaN or infinite values, read from {tensor.path}: take a checkpoint from before '
      'training diverged'
    )
  return values
