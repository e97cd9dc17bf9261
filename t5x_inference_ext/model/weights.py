"""Weights on the chips: a pytree of global arrays. sharding/packing.py describes their shards."""

from collections.abc import Callable, Iterable, Mapping
import dataclasses
from typing import Any

import jax

from t5x_inference_ext import params
from t5x_inference_ext.sharding.packing import PackedTensor

# A tensor to make: its name, and 0 for a tensor outside the layers, else 1 + the layer's index (1
# for stacked layers).
TensorJob = tuple[str, int]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockPartWeights:
  """Weights of one block part of one layer (or of all layers, with a leading L).

  Attributes:
    norm: [E] float32. The factor to multiply by (not a stored scale around zero). None if the model
      has norms only after attention and MLP. In a parallel block with two norms, the norm that
      feeds attention.
    w_in: [E, columns], float, int8 or int4. A shard's columns are [gate | linear | query | key,
      value], as far as the block part has them.
    w_out: [rows, E], float, int8 or int4. A shard's rows are [MLP | attention].
    norm_bias: [E] float32 with layer norm, else None.
    in_scale: [columns] float32 with quantized weights, else None.
    out_scale: [E] float32 with quantized weights, else None.
    vectors: Other norms, and biases of matrices, by field name (params.vector_names). float32.
    adapters: Arrays of all loaded adapters, by name (sharding/adapter_packing.py).
  """

  norm: jax.Array | None
  w_in: jax.Array
  w_out: jax.Array
  norm_bias: jax.Array | None = None
  in_scale: jax.Array | None = None
  out_scale: jax.Array | None = None
  vectors: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
  adapters: dict[str, jax.Array] = dataclasses.field(default_factory=dict)

  @classmethod
  def of(cls, fields: Mapping[str, Any]) -> 'BlockPartWeights':
    """Build a block part from its arrays (or specs) by field name, including those in `vectors`."""
    known = {f.name for f in dataclasses.fields(cls)}
    vectors = {name: fields[name] for name in fields if name not in known}
    own = {name: fields[name] for name in fields if name in known}
    return cls(**{'norm': None, **own}, vectors=vectors)


# A layer's weights by block part: 'parallel', or 'attention' and 'mlp'.
LayerWeights = dict[str, BlockPartWeights]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights:
  """Weights of a whole model.

  Attributes:
    embedding: [V, E] in the compute dtype, or int8, with V padded to the mesh.
    final_norm: [E] float32.
    layers: A tuple of layers (the program unrolls them), or one layer whose arrays have a leading L
      (the program loops over layers; best for deep models).
    final_norm_bias: [E] float32 with layer norm, else None.
    head: [V, E] like the embedding, or None: logits are products with the embedding.
    head_bias: [V] float32, or None. Added to the scaled logits.
    embedding_norm: [E] float32, or None. Scale of a norm after the embedding.
    embedding_norm_bias: [E] float32, or None. Bias of that norm.
    position_embedding: [P, E] in the compute dtype, or None. Added to the embedding.
    relative_bias: [H, buckets] float32, or None. T5's bias of attention logits by distance.
    embedding_scale: [V] float32, or None. Scales of the rows of an int8 embedding.
    head_scale: [V] float32, or None. Scales of the rows of an int8 head.
    soft_prompts: [P, E] in the compute dtype, or None. Embeddings of the ids from V on: the soft
      prompts of all adapters.
    adapter_rows: [B] int32, or None. Number of the adapter of each row of a pass; 0, or None: no
      adapter. See `for_rows`.
  """

  embedding: jax.Array
  final_norm: jax.Array
  layers: LayerWeights | tuple[LayerWeights, ...]
  final_norm_bias: jax.Array | None = None
  head: jax.Array | None = None
  head_bias: jax.Array | None = None
  embedding_norm: jax.Array | None = None
  embedding_norm_bias: jax.Array | None = None
  position_embedding: jax.Array | None = None
  relative_bias: jax.Array | None = None
  embedding_scale: jax.Array | None = None
  head_scale: jax.Array | None = None
  soft_prompts: jax.Array | None = None
  adapter_rows: jax.Array | None = None

  def for_rows(self, adapters: Any) -> 'Weights':
    """Return the weights as a pass over rows with these adapters uses them.

    Args:
      adapters: [B] int32, of JAX or NumPy. Number of each row's adapter, from 1 on; 0: none. None:
        no row has one.
    """
    return dataclasses.replace(self, adapter_rows=adapters)

  @property
  def stacked(self) -> bool:
    """Whether the layers' arrays are stacked: one array for all layers, with a leading L."""
    return not isinstance(self.layers, tuple)

  @property
  def has_adapters(self) -> bool:
    """Whether rows may have adapters other than soft prompts."""
    layer = self.layers[0] if isinstance(self.layers, tuple) else self.layers
    return any(part.adapters for part in layer.values())

  @property
  def quantized(self) -> bool:
    """Whether the matrices are int8 or int4, with scales."""
    layer = self.layers[0] if isinstance(self.layers, tuple) else self.layers
    return next(iter(layer.values())).in_scale is not None

  @property
  def scaled(self) -> frozenset[str]:
    """The weights that have scales, as WeightFormat.scaled names them."""
    return frozenset([*([params.MATRICES] if self.quantized else []), *self.scaled_tables])

  @property
  def scaled_tables(self) -> tuple[str, ...]:
    """The names of the tables that have scales."""
    scales = zip(params.TABLES, (self.embedding_scale, self.head_scale), strict=True)
    return tuple(name for name, scale in scales if scale is not None)


def layer_weights(tensors: Mapping[str, Any]) -> LayerWeights:
  """Build a layer from its arrays (or specs).

  Args:
    tensors: Arrays by name 'block part/field', as sharding.packing.packed_tensors names them.
  """
  fields: dict[str, dict[str, Any]] = {}
  for name, value in tensors.items():
    block_part, field = name.split('/')
    fields.setdefault(block_part, {})[field] = value
  return {block_part: BlockPartWeights.of(named) for block_part, named in fields.items()}


def build_weights(
  tensors: Mapping[str, PackedTensor],
  num_layers: int,
  stacked: bool,
  make: Callable[[str, slice | int | None], Any],
  progress: Callable[[list[TensorJob]], Iterable[TensorJob]] = iter,
) -> Weights:
  """Build Weights from arrays, shapes or specs.

  Args:
    tensors: Tensors by name, from sharding.packing.packed_tensors.
    num_layers: L.
    stacked: Whether one array holds all layers; otherwise each layer has its own.
    make: Returns the array (or shape, or spec) for a tensor's name and its layers: an index, or
      slice(0, L) if stacked, or None for a tensor outside the layers.
    progress: Wraps the list of (tensor name, index) pairs to make, e.g. in a progress bar.
  """
  layers: list[slice | int] = [slice(0, num_layers)] if stacked else [*range(num_layers)]
  places: list[slice | int | None] = [None, *layers]
  made: list[dict[str, Any]] = [{} for _ in places]
  jobs = [
    (name, i)
    for i, place in enumerate(places)
    for name, tensor in tensors.items()
    if tensor.per_layer == (place is not None)
  ]
  for name, i in progress(jobs):
    made[i][name] = make(name, places[i])
  whole, *by_layer = made
  built = tuple(map(layer_weights, by_layer))
  return Weights(layers=built[0] if stacked else built, **whole)
