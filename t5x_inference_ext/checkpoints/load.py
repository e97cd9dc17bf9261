"""Load weights from a checkpoint, shard by shard, so that no host holds a whole model."""

from collections.abc import Callable, Iterable

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from t5x_inference_ext.checkpoints.checkpoint import Checkpoint
from t5x_inference_ext.errors import CheckpointError
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.model.weights import Weights, build_weights
from t5x_inference_ext.quantization.formats import weight_format
from t5x_inference_ext.quantization.nibbles import INT4
from t5x_inference_ext.sharding.packing import PackedTensor, packed_tensors, tensor_dtype

# On CPU, models with at most this many layers are unrolled, which avoids copying each layer's
# weights. With more layers, a loop keeps programs small and compilation short.
MAX_UNROLLED_LAYERS = 8


def scans_layers(num_layers: int, choice: bool | None = None, platform: str = 'tpu') -> bool:
  """Return whether the program loops over stacked layers.

  The default is True on CPU for more than MAX_UNROLLED_LAYERS layers, and False on accelerators. On
  a GPU, each iteration of a loop copies the layer's weights out of the stack, which more than
  doubles the bytes of a decode step. A TPU prefetches whole arrays into on-chip memory, but not
  slices of a stack: without the loop a decode step takes a fifth less time (docs/tpu_v4_tuning.md),
  and compiling takes a minute or two for 100 layers.

  Args:
    num_layers: Number of layers of the model.
    choice: The user's choice; None: the default.
    platform: JAX's name for the platform of the devices.
  """
  if choice is not None:
    return choice
  return platform == 'cpu' and num_layers > MAX_UNROLLED_LAYERS


def load_weights(
  checkpoint: Checkpoint,
  model: Model,
  *,
  stacked: bool | None = None,
  progress: Callable[[list], Iterable] = iter,
) -> Weights:
  """Read the shards of all tensors that belong on this process's devices.

  Args:
    checkpoint: An open checkpoint of any format. int8 and int4 weights stay as they are; float
      weights become model.dtype.
    model: The model, which decides mesh and layout.
    stacked: True makes one array for all layers, False one per layer; None follows scans_layers.
    progress: Wraps the list of tensors to read, e.g. tqdm.

  Returns:
    The weights, sharded over model.mesh.

  Raises:
    MeshError: The mesh does not divide the model.
    CheckpointError: A tensor can't be read, or holds NaN or infinite values.
  """
  scaled = weight_format(checkpoint.weights).scaled
  tensors = packed_tensors(model.config, model.prefill_layout, dict(model.mesh.shape), scaled)
  num_layers = model.config.num_layers
  stacked = scans_layers(num_layers, stacked, model.mesh.devices.flat[0].platform)

  def make(name: str, layers: slice | int | None) -> jax.Array:
    return load_tensor(checkpoint, model, tensors[name], layers)

  return build_weights(tensors, num_layers, stacked, make, progress)


def load_tensor(
  checkpoint: Checkpoint, model: Model, tensor: PackedTensor, layers: slice | int | None
) -> jax.Array:
  """Load one array, sharded over the mesh.

  Args:
    checkpoint: The checkpoint.
    model: The model, which decides the mesh.
    tensor: The array to make.
    layers: Index of the layer; or a slice of layers, to stack along a new first axis; or None for
      an array outside the layers.
  """
  dtype = tensor_dtype(tensor, checkpoint.weights, model.dtype)
  # Norm scales may be stored centred at zero. Add 1 here, since the program multiplies by the scale
  # itself.
  offset = 1 if tensor.kind == 'norm' and model.config.norm_scale == 'zero' else 0

  def read_layer(layer: int | None, index: tuple[slice, ...] | None) -> np.ndarray:
    assert index is not None
    values = tensor.read(lambda name, where: _read(checkpoint, name, where), layer, index)
    if dtype == INT4:
      return values.view(INT4)
    return (values + offset if offset else values).astype(dtype, copy=False)

  if not isinstance(layers, slice):
    sharding = NamedSharding(model.mesh, tensor.spec)
    return jax.make_array_from_callback(
      tensor.shape, sharding, lambda index: read_layer(layers, index)
    )
  num_layers = layers.stop

  def read_stack(index: tuple[slice, ...] | None) -> np.ndarray:
    assert index is not None
    stack = range(*index[0].indices(num_layers))
    sizes = [len(range(*s.indices(n))) for s, n in zip(index[1:], tensor.shape)]
    # Fill the stack layer by layer, to hold the source values of only one layer at a time.
    out = np.empty((len(stack), *sizes), dtype)
    for i, layer in enumerate(stack):
      out[i] = read_layer(layer, index[1:])
    return out

  sharding = NamedSharding(model.mesh, P(None, *tensor.spec))
  return jax.make_array_from_callback((num_layers, *tensor.shape), sharding, read_stack)


def _read(checkpoint: Checkpoint, name: str, where: tuple[slice, ...]) -> np.ndarray:
  """Read a tensor's values, and check that they are finite. int4 values are returned as int8.

  Matrices of a fused array may have different dtypes, and NumPy can't join int4 with another.

  A serving checkpoint's values are not checked: they were checked when written, and have checksums.

  Raises:
    CheckpointError: The values are NaN or infinite.
  """
  tensor = checkpoint.tensors[name]
  values = tensor.read(where)
  if values.dtype == INT4:
    return values.astype(np.int8)
  if checkpoint.format != 'serving' and values.dtype.kind != 'i' and not np.isfinite(values).all():
    raise CheckpointError(
      f'{name}: NaN or infinite values, read from {tensor.path}: take a checkpoint from before '
      'training diverged'
    )
  return values
