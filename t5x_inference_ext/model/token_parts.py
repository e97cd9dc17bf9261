"""A pass in two halves of its tokens, which take turns on the links and the matrix units.

Each half has collectives and products of its own. While one half is gathered, the other is
multiplied. Attention is computed for both halves at once, so each row of a cache and each key is
read once.
"""

from collections.abc import Sequence
import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Shaped

from t5x_inference_ext.compiler_options import overlaps_collectives
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.sharding.activations import ActivationSharding
from t5x_inference_ext.sharding.layout import num_shards

# Fewest tokens of a pass that is cut in two. A step of 512 rows in bfloat16 gained nothing from it.
MIN_TOKENS = 1024
# Fewest consecutive tokens of a half on a shard: a tile of memory.
_MIN_RUN = 8


@dataclasses.dataclass(frozen=True)
class TokenParts:
  """How activations [b, t, ..] of a pass are cut into parts.

  Attributes:
    count: Number of parts, 1 or 2.
    dim: Dimension that is cut: 0 for rows, 1 for positions.
    block: Tokens of a block. Each part takes an equal run of every block. Blocks are so small that
      no collective cuts them.
  """

  count: int = 1
  dim: int = 0
  block: int = 1

  def split(self, x: Shaped[Array, 'b t *rest']) -> tuple[jax.Array, ...]:
    """Return the parts of x [b, t, ..]. The tokens of x must fill whole blocks."""
    if self.count == 1:
      return (x,)
    lead, rest = x.shape[: self.dim], x.shape[self.dim + 1 :]
    blocks = x.reshape(*lead, -1, self.count, self.block // self.count, *rest)
    parts = (
      jax.lax.index_in_dim(blocks, i, self.dim + 1, keepdims=False) for i in range(self.count)
    )
    return tuple(part.reshape(*lead, -1, *rest) for part in parts)

  def join(self, parts: Sequence[jax.Array]) -> jax.Array:
    """Return the array that `split` cuts into these parts."""
    if self.count == 1:
      return parts[0]
    lead, rest = parts[0].shape[: self.dim], parts[0].shape[self.dim + 1 :]
    blocks = [x.reshape(*lead, -1, self.block // self.count, *rest) for x in parts]
    return jnp.stack(blocks, axis=self.dim + 1).reshape(*lead, -1, *rest)


def token_parts(
  config: ModelConfig, sharding: ActivationSharding, mesh: Mesh, batch: int, length: int
) -> TokenParts:
  """Return how a pass is cut: in halves where that is faster, else not at all.

  Halves are faster for weight-stationary products of many tokens on several TPUs that run gathers
  beside products, if the collectives of a layer split rows or positions, not features.

  Args:
    config: The model.
    sharding: Sharding of the pass's activations.
    mesh: The mesh. An AbstractMesh, whose devices are not known, gives one part.
    batch: B, rows.
    length: T, positions of each row.
  """
  layout, dim = sharding.layout, sharding.residual_dim
  hidden, embed = (num_shards(axes, mesh.shape) for axes in (layout.hidden_axes, layout.embed_axes))
  whole = TokenParts()
  if hidden * embed == 1 or not _overlaps_collectives(mesh):
    return whole
  if layout.gathered_axes or dim is None or dim == 2:
    return whole
  if embed > 1 and any(sharding.reduce_scatter_dim(part) != dim for part in config.block_parts):
    return whole
  blocks, tokens = math.lcm(hidden, embed), (batch, length)[dim]
  # A program exported for any number of rows may get few.
  if not isinstance(batch, int) or batch * length < MIN_TOKENS:
    return whole
  return whole if tokens % (2 * blocks * _MIN_RUN) else TokenParts(2, dim, tokens // blocks)


def _overlaps_collectives(mesh: Mesh) -> bool:
  return isinstance(mesh, Mesh) and overlaps_collectives(mesh.devices.flat[0])
