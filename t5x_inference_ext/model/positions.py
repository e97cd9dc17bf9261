"""Rotary position embedding by halves: dimension i is rotated with dimension i + R/2.

The first R dimensions of a head are rotated, usually all Q. xPos also multiplies queries by a scale
to the power of their position, and keys by the inverse.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.model.collectives import ops
from t5x_inference_ext.sharding.layout import Axes

# (sin, cos), each [b, t, R/2] float32.
Angles = tuple[Float[Array, 'b t half'], Float[Array, 'b t half']]


class RotaryAngles(NamedTuple):
  """Rotary angles of the new tokens of one pass, on one shard.

  Attributes:
    queries: Angles at the positions of this shard's queries.
    keys: Angles of all new positions.
  """

  queries: Angles
  keys: Angles


def pass_angles(
  positions: Int[Array, 'b t'], config: ModelConfig, query_axes: Axes
) -> tuple[RotaryAngles, RotaryAngles] | None:
  """Return the rotary angles of a pass in global and in local layers; None if nothing is rotated.

  Args:
    positions: [b, t]. Positions of the new tokens.
    config: The model.
    query_axes: Mesh axes that split the positions of queries.
  """
  if config.positions != 'rotary':
    return None
  one_kind = config.global_rotary and config.local_rope_max_timescale is None
  angles = _kind_angles(positions, config, query_axes, local=False)
  return angles, angles if one_kind else _kind_angles(positions, config, query_axes, local=True)


def _kind_angles(
  positions: jax.Array, config: ModelConfig, query_axes: Axes, local: bool
) -> RotaryAngles:
  """Return the angles of one kind of layers."""
  keys = queries = rotary_angles(positions, config, local)
  if config.xpos_scale_base is not None and (local or config.global_rotary):
    size = config.rotary_size
    scale = (jnp.arange(0, size, 2, dtype=jnp.float32) + 0.4 * size) / (1.4 * size)  # [R/2]
    power = positions[:, :, None].astype(jnp.float32) / config.xpos_scale_base
    scale = scale[None, None, :] ** power
    queries, keys = (keys[0] * scale, keys[1] * scale), (keys[0] / scale, keys[1] / scale)
  sin, cos = (ops.local_slice(a, query_axes, 1) for a in queries)
  # Without the barrier every layer computes the angles again.
  return RotaryAngles(*jax.lax.optimization_barrier(((sin, cos), keys)))


def rotary_angles(positions: Int[Array, 'b t'], config: ModelConfig, local: bool = False) -> Angles:
  """Return (sin, cos), each [b, t, R/2] float32, for integer positions [b, t].

  Args:
    positions: [b, t].
    config: The model.
    local: Whether to return the angles of local layers, which may have another base.
  """
  size = config.rotary_size
  if not local and not config.global_rotary:
    shape = (*positions.shape, size // 2)
    return jnp.zeros(shape, jnp.float32), jnp.ones(shape, jnp.float32)  # nothing is rotated
  own_base = config.local_rope_max_timescale if local else None
  base = config.rope_max_timescale if own_base is None else own_base
  timescale = base ** (jnp.arange(0, size, 2, dtype=jnp.float32) / size)  # [R/2]
  timescale = _stretched(timescale, config) if own_base is None else timescale
  angles = positions[:, :, None].astype(jnp.float32) / timescale[None, None, :]
  return jnp.sin(angles), jnp.cos(angles)


def chosen_angles(
  kinds: tuple[RotaryAngles, RotaryAngles] | None, local: Bool[Array, ''] | bool
) -> RotaryAngles | None:
  """Return the angles of a layer.

  Args:
    kinds: Angles of global and of local layers, or None for a model without rotary positions.
    local: Whether the layer is local.
  """
  if kinds is None or isinstance(local, bool) or kinds[0] is kinds[1]:
    return kinds and kinds[local is True]
  return jax.tree.map(lambda x, y: jnp.where(local, y, x), *kinds)


def _stretched(timescale: jax.Array, config: ModelConfig) -> jax.Array:
  """Return a model's timescales after rope_scaling.

  With 'llama3', let n be how often a wavelength fits into the original context length. It is
  multiplied by rope_factor if n < rope_low_factor, kept if n >= rope_high_factor, and interpolated
  in between.
  """
  c = config
  if c.rope_scaling == 'none':
    return timescale
  kept: jax.Array | float = 0.0  # share of the original frequency
  if c.rope_scaling == 'llama3':
    waves = c.rope_original_length / (2 * np.pi * timescale)
    kept = (waves - c.rope_low_factor) / (c.rope_high_factor - c.rope_low_factor)
    kept = jnp.clip(kept, 0, 1)
  return timescale / (kept + (1 - kept) / c.rope_factor)


def rotate(
  x: Float[Array, 'b t heads q'], sin: Float[Array, 'b t half'], cos: Float[Array, 'b t half']
) -> Float[Array, 'b t heads q']:
  """Rotate the first dimensions of queries or keys by the angles of their positions.

  The result has x's dtype.
  """
  size = 2 * sin.shape[-1]
  x, rest = x[..., :size], x[..., size:]
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  sin, cos = sin[:, :, None, :], cos[:, :, None, :]
  y = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
  return jnp.concatenate([y, rest], axis=-1) if rest.shape[-1] else y
