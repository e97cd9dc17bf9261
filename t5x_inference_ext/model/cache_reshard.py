"""Keys and values of one sharding brought to another, on one shard (sharding/cache_moves.py)."""

from collections.abc import Mapping, Sequence

import jax
from jax import lax
import jax.numpy as jnp

from t5x_inference_ext.model.collectives import ops
from t5x_inference_ext.sharding.cache_moves import CacheMove, CacheMoves, permutation

_ROWS, _HEADS = -4, -3  # dimensions of [.., B, K, S, Q]


def reshard_local(x: jax.Array, moves: CacheMoves) -> jax.Array:
  """Return this shard's part of keys or values after the moves.

  Args:
    x: [.., b, k, S, Q], this shard's part before; or int8 scales [.., b, k, S, 1].
    moves: The moves.
  """
  x = _moved(x, moves.before)
  if moves.heads:
    taken = jnp.asarray(moves.heads)[ops.shard_index(moves.head_axes)]
    x = jnp.take(x, taken, axis=_HEADS)
  return _moved(x, moves.after)


def _moved(x: jax.Array, steps: Sequence[CacheMove]) -> jax.Array:
  for step in steps:
    dim, other = (_ROWS, _HEADS) if step.dim == 'rows' else (_HEADS, _ROWS)
    dim, other = dim % x.ndim, other % x.ndim
    if step.kind == 'slice':
      x = ops.local_slice(x, step.axes, dim)
    elif step.kind == 'all_gather':
      x = ops.all_gather(x, step.axes, dim)
    elif step.kind == 'all_to_all':
      x = ops.all_to_all(x, step.axes, other, dim)
    else:
      x = _permuted(x, step)
  return x


def _permuted(x: jax.Array, step: CacheMove) -> jax.Array:
  # lax.ppermute numbers shards by the mesh's order of axes, whatever the order of its argument.
  mesh: Mapping[str, int] = dict(jax.sharding.get_abstract_mesh().shape)
  axes = tuple(a for a in mesh if a in step.axes)
  return lax.ppermute(x, axes, permutation(step, mesh, axes))
