"""Detection of broken rows: logits become NaN once a row's residual stream was not finite.

Keys and values are made finite before they are cached (quantization.kv.to_cache), so that a broken
row breaks no other. The row itself may then look sound at its later positions. So these functions
overwrite the row's residual stream with NaN at the positions whose logits are computed; the final
norm and the product with the embedding carry the NaN to every logit, also where features are split.
A decode step of one token needs no mark: its logits come from the very residual stream that is not
finite.
"""

from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from t5x_inference_ext.model.collectives import ops
from t5x_inference_ext.sharding.layout import Axes


def broken_positions(x: Float[Array, 'b t e']) -> Bool[Array, 'b t']:
  """Return a mask of the positions at which this shard's residual stream is not finite."""
  return jnp.any(~jnp.isfinite(x), axis=-1)


def mark_broken_before(x: Float[Array, 'b t e'], axes: Axes) -> Float[Array, 'b t e']:
  """Write NaN over every position of a row from its first broken position on.

  Args:
    x: [b, t, e]. This shard's part of the residual stream.
    axes: Mesh axes that split positions.
  """
  broken = broken_positions(x)
  so_far = lax.cummax(broken.astype(jnp.int32), axis=1) > 0
  if ops.axis_size(axes) > 1:
    # [b, shards]: whether each shard's positions include a broken one.
    shards = ops.all_gather(jnp.any(broken, axis=1, keepdims=True).astype(jnp.int32), axes, 1)
    before = jnp.arange(shards.shape[1]) < ops.shard_index(axes)
    so_far |= jnp.any((shards > 0) & before[None, :], axis=1, keepdims=True)
  return jnp.where(so_far[:, :, None], jnp.asarray(jnp.nan, x.dtype), x)


def broken_rows(
  x: Float[Array, 'b t e'], lengths: Int[Array, ' b'], first: Int[Array, ''] | int
) -> Bool[Array, ' b']:
  """Return which rows are broken at one of their valid positions on this shard.

  Args:
    x: [b, t, e]. This shard's part of the residual stream.
    lengths: [b] int32. Valid positions of each row, on all shards.
    first: Position in the row of the shard's first position.
  """
  valid = jnp.arange(x.shape[1])[None, :] < lengths[:, None] - first
  return jnp.any(broken_positions(x) & valid, axis=1)


def mark_rows(x: Float[Array, 'b t e'], broken: Bool[Array, ' b']) -> Float[Array, 'b t e']:
  """Write NaN over all positions of the broken rows."""
  return jnp.where(broken[:, None, None], jnp.asarray(jnp.nan, x.dtype), x)
