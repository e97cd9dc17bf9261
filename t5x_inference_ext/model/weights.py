"""The weights on the chips, as a pytree. Shapes are global; sharding/packing.py says what a shard's block holds."""

from collections.abc import Callable, Iterable, Mapping
import dataclasses
from typing import Any

import jax

from t5x_inference_ext.sharding.packing import PackedTensor


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockPartWeights:
  """One sublayer of one layer (or of all layers, with a leading L).

  Attributes:
    norm: [E] float32, the value applied.
    w_in: [E, columns], float or int8; per shard [gate | linear | query | key, value], of what the sublayer has.
    w_out: [rows, E]; per shard [MLP | attention].
    norm_bias: [E] float32 with layer norm, else None.
    in_scale: [columns] float32 with int8 weights, else None.
    out_scale: [E] float32 with int8 weights, else None.
  """

  norm: jax.Array
  w_in: jax.Array
  w_out: jax.Array
  norm_bias: jax.Array | None = None
  in_scale: jax.Array | None = None
  out_scale: jax.Array | None = None


# A layer: its sublayers by name, 'parallel', or 'attention' and 'mlp'.
LayerWeights = dict[str, BlockPartWeights]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights:
  """A whole model.

  Attributes:
    embedding: [V padded to the mesh, E], in the compute dtype.
    final_norm: [E] float32.
    layers: a tuple of layers (the program unrolls them), or one layer whose arrays have a leading L (the program loops:
      the form for deep models).
    final_norm_bias: [E] float32 with layer norm, else None.
  """

  embedding: jax.Array
  final_norm: jax.Array
  layers: LayerWeights | tuple[LayerWeights, ...]
  final_norm_bias: jax.Array | None = None

  @property
  def stacked(self) -> bool:
    return not isinstance(self.layers, tuple)

  @property
  def is_int8(self) -> bool:
    layer = self.layers if self.stacked else self.layers[0]
    return next(iter(layer.values())).in_scale is not None


def layer_weights(tensors: Mapping[str, Any]) -> LayerWeights:
  """A layer from its arrays (or specs) called 'sublayer/field', as sharding.packing.packed_tensors calls them."""
  fields: dict[str, dict[str, Any]] = {}
  for name, value in tensors.items():
    block_part, field = name.split('/')
    fields.setdefault(block_part, {})[field] = value
  return {block_part: BlockPartWeights(**named) for block_part, named in fields.items()}


def build_weights(
  tensors: Mapping[str, PackedTensor],
  num_layers: int,
  stacked: bool,
  make: Callable[[str, slice | int | None], Any],
  progress: Callable[[list], Iterable] = iter,
) -> Weights:
  """Weights of arrays, shapes or specs.

  Args:
    tensors: as sharding.packing.packed_tensors has them.
    num_layers: L.
    stacked: one array for all layers, or one per layer.
    make: gives that of a tensor's name and its layers: a number, slice(0, L) if stacked, or None for what no layer
      owns.
    progress: wraps the list of what is to be made, names first.
  """
  places = [None, *([slice(0, num_layers)] if stacked else range(num_layers))]
  made = [{} for _ in places]
  jobs = [
    (name, i)
    for i, layers in enumerate(places)
    for name, tensor in tensors.items()
    if tensor.per_layer == (layers is not None)
  ]
  for name, i in progress(jobs):
    made[i][name] = make(name, places[i])
  whole, *layers = made
  layers = tuple(map(layer_weights, layers))
  return Weights(layers=layers[0] if stacked else layers, **whole)
