"""The parameters of a model as T5X sees them: a flax module that declares the arrays on the chips, and nothing else.

The tree is weights.Weights as nested dicts: embedding, final_norm, final_norm_bias (with layer norm), and either
`layers` (each array with a leading L) or one subtree a layer, `layers_0`, `layers_1`, ...; in these one subtree a
sublayer, `parallel`, or `attention` and `mlp`.
"""

from collections.abc import Iterable, Mapping
import dataclasses
from typing import Any

from flax import linen as nn
from flax.linen import partitioning as flax_partitioning
import jax
import jax.numpy as jnp
import numpy as np

from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.model.weights import BlockPartWeights, Weights
from t5x_inference_ext.params import LAYERS_AXIS
from t5x_inference_ext.sharding.packing import PackedTensor, packed_tensors, tensor_dtype

STACK = 'layers'
ParamPath = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Declaration:
  """One parameter.

  Attributes:
    tensor: what it is; its shape and spec are those of one layer.
    layers: the layers in it: a number, a slice (stacked in front), or None for what no layer owns.
    dtype: on the chips.
  """

  tensor: PackedTensor
  layers: slice | int | None
  dtype: np.dtype

  @property
  def shape(self) -> tuple[int, ...]:
    return (
      (self.layers.stop, *self.tensor.shape)
      if isinstance(self.layers, slice)
      else self.tensor.shape
    )

  @property
  def logical_axes(self) -> tuple[str, ...]:
    stack = (LAYERS_AXIS,) if isinstance(self.layers, slice) else ()
    return (*stack, *self.tensor.axes)

  def initial(self, key: jax.Array) -> jax.Array:
    """Random values that keep activations of order 1. For trying out speed and memory; inference loads its weights."""
    kind, fan_in = self.tensor.kind, self.shape[-2] if len(self.shape) > 1 else 1
    if kind == 'norm':
      return jnp.ones(self.shape, self.dtype)
    if kind == 'bias':
      return jnp.zeros(self.shape, self.dtype)
    if kind == 'scale':  # of uniform int8 values, whose standard deviation is 73
      return jnp.full(self.shape, self.shape[-1] ** -0.5 / 73, self.dtype)
    if self.dtype == np.int8:
      return jax.random.randint(key, self.shape, -127, 128, jnp.int8)
    return jax.random.normal(key, self.shape, self.dtype) * (
      1.0 if kind == 'embedding' else fan_in**-0.5
    )


def declarations(model: Model, int8: bool, stacked: bool) -> dict[ParamPath, Declaration]:
  """The parameters of a model, by their path in T5X's tree.

  Raises:
    MeshError: the mesh does not divide the model.
  """
  count = model.config.num_layers
  groups: dict[ParamPath, slice | int] = {(f'{STACK}_{i}',): i for i in range(count)}
  if stacked:
    groups = {(STACK,): slice(0, count)}
  declared = {}
  for name, tensor in packed_tensors(
    model.config, model.prefill_layout, model.mesh.shape, int8
  ).items():
    dtype = tensor_dtype(tensor, 'int8' if int8 else 'float', model.dtype)
    for path, layers in (groups if tensor.per_layer else {(): None}).items():
      declared[*path, *name.split('/')] = Declaration(tensor, layers, dtype)
  return declared


def weights_from_params(params: Mapping[str, Any]) -> Weights:
  """T5X's parameters as the model's functions take them."""

  def layer(subtree):
    return {block_part: BlockPartWeights(**fields) for block_part, fields in subtree.items()}

  rest = {name: value for name, value in params.items() if not name.startswith(STACK)}
  if STACK in params:
    return Weights(layers=layer(params[STACK]), **rest)
  names = sorted(params.keys() - rest.keys(), key=lambda n: int(n.removeprefix(f'{STACK}_')))
  return Weights(layers=tuple(layer(params[n]) for n in names), **rest)


class _Subtree(nn.Module):
  """Parameters by their paths below this one."""

  declared: tuple[tuple[ParamPath, Declaration], ...]

  @nn.compact
  def __call__(self):
    _declare(self.declared)


def _declare(declared: Iterable[tuple[ParamPath, Declaration]]) -> None:
  """In the module that is running."""
  subtrees: dict[str, list] = {}
  for (name, *below), d in declared:
    if below:
      subtrees.setdefault(name, []).append((tuple(below), d))
    else:
      flax_partitioning.param_with_axes(name, d.initial, axes=d.logical_axes)
  for name, below in subtrees.items():
    _Subtree(tuple(below), name=name)()


class InferenceModule(nn.Module):
  """Declares a model's parameters with their logical axes.

  Attributes:
    model: its functions and mesh.
    int8: whether its matrices are int8.
    scan_layers: whether one array holds all layers. T5X reads this to find the batch axis of the KV cache.
  """

  model: Model
  int8: bool
  scan_layers: bool

  @nn.compact
  def __call__(self) -> None:
    _declare(declarations(self.model, self.int8, self.scan_layers).items())
