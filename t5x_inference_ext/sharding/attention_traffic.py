"""Attention's traffic in a layer: resharding of projection columns, and back (section 3.3).

This module counts the collectives of model/attention_columns.py. Notation as in traffic.py.
"""

from t5x_inference_ext.sharding.activations import ActivationSharding
from t5x_inference_ext.sharding.collective import FLOAT32, Collective, Pass
from t5x_inference_ext.sharding.heads import kv_columns, query_columns


def to_attention(p: Pass, sharding: ActivationSharding, summed: bool) -> list[Collective]:
  """Return the collectives from columns `BLH_yzQ(partialsum-x)` to queries, keys and values.

  Args:
    p: The pass.
    sharding: Sharding of its activations.
    summed: Whether the columns are already summed over the embed axes.
  """
  layout, heads, d_head = p.layout, sharding.heads, p.config.d_head
  embed, rows = layout.embed_axes, sharding.hidden_rows
  block = p.tokens * p.blocks
  query = block * query_columns(p.config, heads.stored)
  kv, kv_padded = (block * width for width in kv_columns(p.config, heads.stored))
  together, split = 'query, keys and values', _embed_split(sharding)
  collectives: list[Collective] = []
  if split == 'heads':
    # Query heads are padded to divide over the embed axes; so are key heads, unless several devices
    # share one.
    cut = heads.cut
    query = p.tokens * cut.padded_groups * cut.padded_queries * d_head
    collectives += p.activations('query', 'reduce_scatter', embed, query)
    if not heads.multiquery and cut.copies == 1:
      count = 2 * p.tokens * cut.padded_groups * d_head
      collectives += p.activations('keys and values', 'reduce_scatter', embed, count)
    else:
      collectives += p.activations('keys and values', 'all_reduce', embed, kv)
    query //= p.size(embed)
    kv = kv if heads.multiquery else 2 * p.tokens * cut.local_groups * d_head
  elif split is None:
    collectives += p.activations(together, 'all_reduce', embed, query + kv_padded)
  else:
    if not summed:
      collectives += p.activations(together, 'reduce_scatter', embed, query + kv_padded)
    query, kv, kv_padded = (count // p.size(embed) for count in (query, kv, kv_padded))
  if split != 'heads':
    collectives += p.activations(together, 'all_to_all', rows, query + kv_padded)
  else:
    collectives += p.activations('query', 'all_to_all', rows, query)
    collectives += p.activations('keys and values', 'all_to_all', rows, kv)
  collectives += p.activations('query', 'all_to_all', sharding.hidden_positions, query)
  collectives += p.activations(
    'query', 'all_gather', sharding.joined, query * p.size(sharding.joined)
  )
  if heads.multiquery:
    other = tuple(a for a in layout.hidden_axes if a not in rows)
    kv *= p.size(other)
    collectives += p.activations('keys and values', 'all_gather', other, kv)
  elif split != 'heads':
    kv //= heads.stride  # one copy of a key head that blocks share
  # Every query needs all keys. Over hidden axes, the keys were gathered above.
  positions = tuple(a for a in sharding.attention_positions if a not in sharding.hidden_positions)
  return collectives + p.activations(
    'keys and values', 'all_gather', positions, kv * p.size(positions)
  )


def from_attention(p: Pass, sharding: ActivationSharding, summed: bool) -> list[Collective]:
  """Return the collectives from attention's outputs back to columns `BLH_yzQ`.

  The arguments are those of to_attention.
  """
  layout, heads = p.layout, sharding.heads
  split = _embed_split(sharding)
  columns = p.tokens * p.blocks * query_columns(p.config, heads.stored)
  if split == 'heads':
    columns = p.tokens * heads.cut.padded_groups * heads.cut.padded_queries * p.config.d_head
  local = columns // p.size(layout.embed_axes) if split else columns
  collectives = p.activations('attention', 'all_to_all', sharding.hidden_positions, local)
  collectives += p.activations('attention', 'all_to_all', sharding.hidden_rows, local)
  if split and not summed:
    collectives += p.activations('attention', 'all_gather', layout.embed_axes, columns)
  return collectives


def head_norms(p: Pass, sharding: ActivationSharding, batch: int, length: int) -> list[Collective]:
  """Return the all-reduces of norms over all heads of queries and keys (model/heads.py)."""
  if not p.config.qk_norm.endswith('_all'):
    return []
  moments = 2 if p.config.qk_norm.startswith('layer') else 1
  queries = length // p.size(sharding.attention_positions)
  keys = 0 if sharding.heads.multiquery else length  # every device has the only key head
  tokens = batch // p.size(sharding.attention_rows) * (queries + keys)
  return moments * p.collective(
    'head norms', 'all_reduce', sharding.attention_heads, tokens, FLOAT32
  )


def _embed_split(sharding: ActivationSharding) -> str | None:
  """Return the dimension that attention splits over embed: 'heads', 'positions', 'rows' or None."""
  embed = set(sharding.layout.embed_axes)
  for name, axes in (
    ('heads', sharding.attention_heads),
    ('positions', sharding.attention_positions),
    ('rows', sharding.attention_rows),
  ):
    if embed & set(axes):
      return name
  return None
