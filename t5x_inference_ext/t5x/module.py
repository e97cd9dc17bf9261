"""A flax module for T5X that declares a model's parameters, the arrays on the devices.

The tree is model.weights.Weights as nested dicts: embedding, final_norm, final_norm_bias (with
layer norm), and the layers. The layers are either one subtree `layers`, whose arrays have a leading
axis L, or one subtree for each layer: `layers_0`, `layers_1` and so on. A layer's subtree has a
subtree for each block part: `parallel`, or `attention` and `mlp`.
"""

from collections.abc import Iterable
import dataclasses

from flax import linen as nn
from flax.linen import partitioning as flax_partitioning
import jax
import jax.numpy as jnp
import numpy as np

from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.model.weights import BlockPartWeights, LayerWeights, Weights
from t5x_inference_ext.params import LAYERS_AXIS, VOCAB_AXIS
from t5x_inference_ext.quantization.formats import is_quantized, weight_format
from t5x_inference_ext.quantization.rounding import largest_unit
from t5x_inference_ext.sharding.packing import PackedTensor, packed_tensors, tensor_dtype
from t5x_inference_ext.t5x.types import Params

STACK = 'layers'
ParamPath = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Declaration:
  """One parameter.

  Attributes:
    tensor: The packed tensor; its shape and spec are those of one layer.
    layers: The layers that the array holds: one layer's index; a slice, for layers stacked along a
      leading axis; or None for a parameter outside the layers.
    dtype: Dtype of the array on the devices.
  """

  tensor: PackedTensor
  layers: slice | int | None
  dtype: np.dtype

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the array, stacked layers included."""
    stacked = (self.layers.stop,) if isinstance(self.layers, slice) else ()
    return (*stacked, *self.tensor.shape)

  @property
  def logical_axes(self) -> tuple[str, ...]:
    """Logical names of the array's axes."""
    stack = (LAYERS_AXIS,) if isinstance(self.layers, slice) else ()
    return (*stack, *self.tensor.axes)

  def initial(self, key: jax.Array) -> jax.Array:
    """Return random values, scaled so that activations stay of order 1.

    They are used to measure speed and memory without a checkpoint.
    """
    kind, fan_in = self.tensor.kind, self.shape[-2] if len(self.shape) > 1 else 1
    if kind == 'norm':
      return jnp.ones(self.shape, self.dtype)
    if kind == 'bias':
      return jnp.zeros(self.shape, self.dtype)
    if kind == 'scale':  # uniform int8 values have a standard deviation of 73
      deviation = 1.0 if VOCAB_AXIS in self.tensor.axes else self.shape[-1] ** -0.5
      return jnp.full(self.shape, deviation / 73, self.dtype)
    if is_quantized(self.dtype):
      unit = largest_unit(self.dtype)
      return jax.random.randint(key, self.shape, -unit, unit + 1, jnp.int8).astype(self.dtype)
    deviation = 1.0 if kind == 'embedding' else fan_in**-0.5
    return jax.random.normal(key, self.shape, self.dtype) * deviation


def declarations(model: Model, weights: str, stacked: bool) -> dict[ParamPath, Declaration]:
  """Return the declarations of a model's parameters, by path in T5X's tree.

  Args:
    model: The model.
    weights: Format of the matrices (quantization.formats).
    stacked: Whether one array holds all layers.

  Raises:
    MeshError: The mesh does not divide the model.
  """
  count = model.config.num_layers
  groups: dict[ParamPath, slice | int] = {(f'{STACK}_{i}',): i for i in range(count)}
  if stacked:
    groups = {(STACK,): slice(0, count)}
  tensors = packed_tensors(
    model.config, model.prefill_layout, model.mesh.shape, weight_format(weights).scaled
  )
  declared = {}
  for name, tensor in tensors.items():
    dtype = tensor_dtype(tensor, weights, model.dtype)
    for path, layers in (groups if tensor.per_layer else {(): None}).items():
      declared[*path, *name.split('/')] = Declaration(tensor, layers, dtype)
  return declared


def weights_from_params(params: Params) -> Weights:
  """Convert T5X's parameters to Weights, which the model's functions take."""

  def layer(subtree: Params) -> LayerWeights:
    return {block_part: BlockPartWeights.of(fields) for block_part, fields in subtree.items()}

  rest = {name: value for name, value in params.items() if not name.startswith(STACK)}
  if STACK in params:
    return Weights(layers=layer(params[STACK]), **rest)
  names = sorted(params.keys() - rest.keys(), key=lambda n: int(n.removeprefix(f'{STACK}_')))
  return Weights(layers=tuple(layer(params[n]) for n in names), **rest)


class _Subtree(nn.Module):
  """Declares the parameters of a subtree.

  Attributes:
    declared: Pairs (path within the subtree, declaration).
  """

  declared: tuple[tuple[ParamPath, Declaration], ...]

  @nn.compact
  def __call__(self) -> None:
    _declare(self.declared)


def _declare(declared: Iterable[tuple[ParamPath, Declaration]]) -> None:
  """Declare parameters in the flax module whose method is being called."""
  subtrees: dict[str, list[tuple[ParamPath, Declaration]]] = {}
  for (name, *below), declaration in declared:
    if below:
      subtrees.setdefault(name, []).append((tuple(below), declaration))
    else:
      flax_partitioning.param_with_axes(name, declaration.initial, axes=declaration.logical_axes)
  for name, subtree in subtrees.items():
    _Subtree(tuple(subtree), name=name)()


class InferenceModule(nn.Module):
  """Declares a model's parameters with their logical axes.

  Attributes:
    model: Model. Its config, mesh and layouts determine the parameters.
    weights: Format of the matrices (quantization.formats).
    scan_layers: Whether one array holds all layers. T5X reads this to find the batch axis of the KV
      cache.
  """

  model: Model
  weights: str
  scan_layers: bool

  @nn.compact
  def __call__(self) -> None:
    _declare(declarations(self.model, self.weights, self.scan_layers).items())
