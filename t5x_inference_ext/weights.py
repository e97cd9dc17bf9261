"""The weights on the chips, as a pytree. Shapes are global; layouts/arrangement.py says what a shard's block holds."""

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerWeights:
  """One layer (or all of them, with a leading L).

  Attributes:
    norm: [E] float32, the value applied.
    w_in: [E, columns], float or int8; per shard [gate | linear | query | key, value].
    w_out: [rows, E]; per shard [MLP | attention].
    in_scale: [columns] float32 with int8 weights, else None.
    out_scale: [E] float32 with int8 weights, else None.
  """

  norm: jax.Array
  w_in: jax.Array
  w_out: jax.Array
  in_scale: jax.Array | None = None
  out_scale: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights:
  """A whole model.

  Attributes:
    embedding: [V padded to the mesh, E], in the compute dtype.
    final_norm: [E] float32.
    layers: a tuple of LayerWeights, one a layer (the program unrolls them), or one LayerWeights with leading L (the
      program loops: the form for deep models).
  """

  embedding: jax.Array
  final_norm: jax.Array
  layers: LayerWeights | tuple[LayerWeights, ...]

  @property
  def is_int8(self) -> bool:
    layers = self.layers[0] if isinstance(self.layers, tuple) else self.layers
    return layers.in_scale is not None
