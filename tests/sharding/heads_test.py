"""Heads over shards: every head beside its key head, and padding only where it must be."""

import collections

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest

from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.sharding.heads import (
  AttentionHeads,
  HeadSplit,
  kv_columns,
  query_columns,
  stored_heads,
  vocabulary_rows,
)

many = settings(deadline=None, derandomize=True, max_examples=300)
groups = st.integers(1, 24)
queries = st.integers(1, 12)
shards = st.integers(1, 64)


@many
@given(groups, queries, shards)
def test_every_query_head_is_on_one_shard(groups, queries, shards):
  split = HeadSplit.of(groups, queries, shards)
  ranges = [split.query_range(s) for s in range(shards)]
  assert [h for start, stop in ranges for h in range(start, stop)] == list(range(groups * queries))
  assert all(
    0 <= start <= stop <= groups * queries and stop - start <= split.local_heads
    for start, stop in ranges
  )


@many
@given(groups, queries, shards)
def test_a_key_head_is_on_every_shard_that_has_its_queries(groups, queries, shards):
  split = HeadSplit.of(groups, queries, shards)
  held = collections.Counter()
  for shard in range(shards):
    start, stop = split.group_range(shard)
    assert 0 <= stop - start <= split.local_groups
    held.update(range(start, stop))
    first, last = split.query_range(shard)
    # By slots: the n-th query of a shard attends to its (n // local_queries)-th group.
    for slot, head in enumerate(range(first, last)):
      assert start + slot // split.local_queries == head // queries < stop
  # As many copies of each, and no head left out.
  assert held == dict.fromkeys(range(groups), split.copies)


@many
@given(groups, queries, shards)
def test_padding_is_less_than_a_round(groups, queries, shards):
  """Where heads divide there is none, neither of groups nor of the queries of a shared group."""
  split = HeadSplit.of(groups, queries, shards)
  assert split.padded_groups * split.copies == shards * split.local_groups
  assert split.padded_groups >= groups and split.padded_queries >= queries
  assert split.local_heads * shards == split.padded_groups * split.padded_queries
  if groups >= shards:
    assert split.copies == 1 and split.padded_queries == queries
    assert split.padded_groups - groups < shards
    assert groups % shards or split.padded_groups == groups
  else:
    assert split.local_groups == 1
    assert split.padded_queries - queries < split.copies
    # No number of groups between would have divided the shards.
    assert all(shards % g for g in range(groups, split.padded_groups))
    assert split.padded_groups == shards // split.copies


@pytest.mark.parametrize(
  'groups, queries, shards, local_groups, local_queries, copies',
  [
    (1, 48, 64, 1, 1, 64),  # PaLM 540B: 48 heads as 64, the paper's section 4
    (1, 48, 16, 1, 3, 16),
    (48, 1, 64, 1, 1, 1),
    (128, 1, 64, 2, 1, 1),  # Megatron 530B
    (8, 6, 64, 1, 1, 8),
    (8, 8, 16, 1, 4, 2),
    (3, 2, 4, 1, 2, 1),
    (3, 2, 8, 1, 1, 2),
    (6, 1, 4, 2, 1, 1),
    (2, 4, 3, 1, 4, 1),
  ],
)
def test_splits_of_known_models(groups, queries, shards, local_groups, local_queries, copies):
  assert HeadSplit.of(groups, queries, shards) == HeadSplit(
    groups, queries, shards, local_groups, local_queries, copies
  )


def model(**fields) -> ModelConfig:
  sizes = dict(num_layers=1, d_model=8, d_ff=8, num_heads=16, d_head=2, vocab_size=16)
  return ModelConfig(**{**sizes, **fields})


@pytest.mark.parametrize(
  'shards, vocabulary, rows',
  [
    # 8 tiles of 128 for each of 16 shards are 16384: from there on, rows are whole tiles.
    (16, 16384, 1024),
    (16, 16385, 1152),
    (16, 16384 - 17, 1023),
    (16, 101, 7),
    (1, 1024, 1024),
    (1, 1025, 1152),
    (1, 1023, 1023),
  ],
)
def test_rows_of_the_vocabulary(shards, vocabulary, rows):
  """Padding to whole tiles costs an eighth at most, else it is left out."""
  assert vocabulary_rows(model(vocab_size=vocabulary), shards) == rows
  assert shards * rows >= vocabulary


@pytest.mark.parametrize(
  'heads, d_head, kv_heads, columns',
  [
    # On 16 shards a single key head of 2 Q columns, keys and values, is 2 Q / 16 each.
    (16 * 3, 128, 1, (16, 128)),  # 3 tiles of queries: a tile
    (16 * 2, 128, 1, (16, 16)),  # 2 tiles
    (16 * 191, 2, 1, (1, 1)),  # 382 columns of queries
    (16 * 192, 2, 1, (1, 128)),  # 384
    (16 * 3, 1032, 1, (129, 256)),
    (16 * 3, 128, 16, (256, 256)),  # several key heads: whole ones
    (16 * 3, 128, 2, (256, 256)),
  ],
)
def test_columns_of_keys_and_values(heads, d_head, kv_heads, columns):
  config = model(num_heads=heads, d_head=d_head, num_kv_heads=kv_heads)
  assert kv_columns(config, stored_heads(config, 16)) == columns


@pytest.mark.parametrize(
  'heads, d_head, kv_heads, shards, pieces, columns',
  [
    (48, 256, 1, 32, 2, 384),
    (48, 256, 1, 64, 1, 256),  # 192 columns are no whole tiles: padded to a head
    (48, 128, 1, 32, 1, 256),  # 192 again: two heads
    (48, 256, 1, 16, 1, 768),  # nothing to pad
    (48, 256, 48, 32, 1, 512),  # several key heads
    (48, 256, 2, 32, 1, 512),
    (20, 512, 1, 16, 4, 640),
  ],
)
def test_heads_are_cut_where_they_would_be_padded(heads, d_head, kv_heads, shards, pieces, columns):
  config = model(num_heads=heads, d_head=d_head, num_kv_heads=kv_heads)
  stored = stored_heads(config, shards)
  assert (stored.pieces, query_columns(config, stored)) == (pieces, columns)


def slots(split: HeadSplit, shard: int) -> list[int | None]:
  """The query head in each of a shard's slots, None for padding, as w_in lays them out."""
  start, stop = split.query_range(shard)
  return [start + i if start + i < stop else None for i in range(split.local_heads)]


@st.composite
def attention_heads(draw):
  """Blocks of a split together on a device, or one block cut again: what placements make."""
  split = HeadSplit.of(
    draw(groups, label='groups'), draw(queries, label='queries'), draw(shards, label='shards')
  )
  blocks = draw(
    st.sampled_from([b for b in range(1, split.shards + 1) if split.shards % b == 0]),
    label='blocks',
  )
  cut = draw(st.integers(1, 8), label='cut') if blocks == 1 else 1
  return AttentionHeads(split, blocks, cut, split.groups == 1)


@many
@given(attention_heads())
def test_the_queries_of_a_device_meet_their_key_heads(heads):
  """Over all devices that split heads, in the order of the cache."""
  split, seen = heads.stored, []
  cached = heads.cached()
  devices = split.shards // heads.blocks * heads.shards
  if not heads.multiquery:
    assert len(cached) == devices * heads.kv_heads
  assert heads.heads % heads.kv_heads == 0
  for device in range(devices):
    if heads.shards == 1:
      mine = [
        h for block in range(heads.blocks) for h in slots(split, device * heads.blocks + block)
      ]
    else:
      # A block's slots as [groups, queries], padded, flattened and cut.
      block, cut = slots(split, device // heads.shards), heads.cut
      grid = [[None] * cut.padded_queries for _ in range(cut.padded_groups)]
      for i, head in enumerate(block):
        grid[i // split.local_queries][i % split.local_queries] = head
      flat = [h for row in grid for h in row]
      part = device % heads.shards
      mine = flat[part * heads.heads : (part + 1) * heads.heads]
    assert len(mine) == heads.heads
    keys = (
      (0,) if heads.multiquery else cached[device * heads.kv_heads : (device + 1) * heads.kv_heads]
    )
    for slot, head in enumerate(mine):
      if head is not None:
        assert keys[slot * heads.kv_heads // heads.heads] == head // split.queries
        seen.append(head)
  assert sorted(seen) == list(range(split.groups * split.queries))


@many
@given(attention_heads())
def test_a_cache_holds_every_key_head(heads):
  """So that the cache of any placement can be made from that of any other."""
  assert {h for h in heads.cached() if h is not None} == set(range(heads.stored.groups))
