"""Decode steps of slots, as device functions.

`decode_steps` runs the model and chooses tokens, in a loop. While a row has a grammar, the host
must read the row's last token to know which tokens may come next. A step then consists of two
programs: `decode_logits` runs the model while the host reads tokens and makes masks, and
`choose_masked` chooses. So the devices do not wait for the host, and rows without a grammar are not
delayed.
"""

import dataclasses
import functools

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from t5x_inference_ext.engine.advance import advance, advance_on_shard
from t5x_inference_ext.engine.drafting import note_tokens
from t5x_inference_ext.engine.slots import SlotPages, Slots, StepsOutput, replicated
from t5x_inference_ext.engine.state import ChosenTokens, DecodeState, RowParams
from t5x_inference_ext.engine.state_rows import constrain_state, state_specs
from t5x_inference_ext.engine.token_choice import TokenMasks
from t5x_inference_ext.model.chunks import constrain_cache
from t5x_inference_ext.model.collectives import ops
from t5x_inference_ext.model.pages import PagedCache
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.model.weights import Weights
from t5x_inference_ext.sharding.layout import Axes

# State of the loop in decode_steps: step, state, lengths of all rows, cache, chosen tokens so far.
_Carry = tuple[jax.Array, DecodeState, jax.Array, PagedCache, ChosenTokens]


def decode_steps(
  model: Model,
  slots: Slots,
  weights: Weights,
  pages: SlotPages,
  alive: jax.Array,
  steps: jax.Array,
  until_free: jax.Array,
  most: int,
  read: int,
  read_shared: int,
) -> tuple[Slots, StepsOutput]:
  """Run decode steps until all rows have ended or `steps` of them are done.

  Args:
    model: Decides mesh and layouts.
    slots: The slots.
    weights: Weights on the mesh.
    pages: Pages of the rows, with room for the steps.
    alive: [B] bool. Slots that have a row. Rows in other slots were cancelled and are ended.
    steps: Scalar int32. Steps to run, at most `most`.
    until_free: Scalar bool. Whether to stop as soon as a row ends.
    most: N, maximum number of steps, for which the output has room. Static.
    read: Number of pages of each shard that attention reads, from the first on. Static.
    read_shared: Number of shared pages that attention reads, from the first on. Static.
  """
  before = state_of(slots, alive)
  cache = with_pages(model, weights, slots.cache, pages, read, read_shared)
  attention = model.decode_sharding(len(before.ended))
  cache_spec, specs = model.cache_spec(attention, weights, cache), state_specs(model, before)
  # The whole loop runs on shards: XLA's partitioner would split the rows' state between devices,
  # and need all-reduces in every step. The rows of the cache are split, those of the state are not.
  run = jax.shard_map(
    functools.partial(_steps_on_shard, model, attention.attention_rows, most),
    mesh=model.mesh,
    in_specs=(model.weight_specs(weights), cache_spec, P(), specs, P(), P()),
    out_specs=(cache_spec, specs, P()),
    check_vma=False,
  )
  cache, state, out = run(weights, cache, slots.rows, before, steps, until_free)
  output = StepsOutput(out, state.counts - before.counts, state.ended, state.failed)
  return after_steps(model, weights, slots, cache, state), replicated(model, output)


def _steps_on_shard(
  model: Model,
  attention_rows: Axes,
  most: int,
  weights: Weights,
  cache: PagedCache,
  rows: RowParams,
  before: DecodeState,
  steps: jax.Array,
  until_free: jax.Array,
) -> tuple[PagedCache, DecodeState, ChosenTokens]:
  """Run the loop of `decode_steps` on one shard.

  Args:
    model, most, steps, until_free: See decode_steps.
    attention_rows: Mesh axes that split the rows of the cache.
    weights: This shard's part of the weights.
    cache: This shard's part of the cache.
    rows: Parameters of all rows.
    before: State of all rows; of the history, the shard's rows.
  """

  def running(carry: _Carry) -> jax.Array:
    i, state, *_ = carry
    freed = until_free & jnp.any(state.ended & ~before.ended)
    return (i < steps) & ~jnp.all(state.ended) & ~freed

  def step(carry: _Carry) -> _Carry:
    i, state, lengths, cache, out = carry
    logits, cache = model.decode_on_shard(weights, cache, state.tokens)
    # For a free slot, the new keys are written after its end, where the next step overwrites them.
    lengths = jnp.where(state.ended, lengths, lengths + 1)
    cache = dataclasses.replace(cache, lengths=ops.local_slice(lengths, attention_rows, 0))
    state, chosen = advance_on_shard(rows, state, logits, lengths, model)
    out = jax.tree.map(
      lambda x, new: lax.dynamic_update_slice_in_dim(x, new[None], i, 0), out, chosen
    )
    return i + 1, state, lengths, cache, out

  lengths = ops.all_gather(cache.lengths, attention_rows, 0)
  out = empty_output(len(lengths), rows.top_width, most)
  carry = jnp.asarray(0), before, lengths, cache, out
  _, state, _, cache, out = lax.while_loop(running, step, carry)
  return cache, state, out


def decode_logits(
  model: Model,
  slots: Slots,
  weights: Weights,
  pages: SlotPages,
  alive: jax.Array,
  read: int,
  read_shared: int,
) -> tuple[Slots, jax.Array]:
  """Run a decode step up to its logits, from which `choose_masked` then chooses.

  Args:
    model: Decides mesh and layouts.
    slots: The slots.
    weights: Weights on the mesh.
    pages: Pages of the rows, with room for the step.
    alive: [B] bool. Slots that have a row.
    read: Number of pages of each shard that attention reads, from the first on. Static.
    read_shared: Number of shared pages that attention reads, from the first on. Static.

  Returns:
    The slots with the rows' last tokens in the cache, and logits [B, V] float32.
  """
  state = state_of(slots, alive)
  cache = with_pages(model, weights, slots.cache, pages, read, read_shared)
  logits, cache = decode_logits_of(model, weights, state, cache)
  sharding = NamedSharding(model.mesh, P(model.sampling_axes(len(logits))))
  logits = lax.with_sharding_constraint(logits, sharding)
  return after_steps(model, weights, slots, cache, state), logits


def choose_masked(
  model: Model, slots: Slots, logits: jax.Array, alive: jax.Array, masks: TokenMasks
) -> tuple[Slots, StepsOutput]:
  """Choose each row's next token from the logits of `decode_logits`.

  Args:
    model: Decides mesh and layouts.
    slots: The slots.
    logits: [B, V] float32.
    alive: [B] bool. Slots that have a row. Rows in other slots are ended.
    masks: Tokens that the rows' grammars allow next.
  """
  before = state_of(slots, alive)
  state, chosen = advance(slots.rows, before, logits, slots.cache.lengths, model, masks)
  chosen = jax.tree.map(lambda x: x[None], chosen)
  output = StepsOutput(chosen, state.counts - before.counts, state.ended, state.failed)
  slots = dataclasses.replace(slots, state=constrain_state(model, state))
  if slots.drafting is not None:
    made = output.counts > 0
    drafting = note_tokens(slots.drafting, slots.cache.lengths, state.tokens, made)
    drafting = dataclasses.replace(drafting, tokens=replicated(model, drafting.tokens))
    slots = dataclasses.replace(slots, drafting=drafting)
  return slots, replicated(model, output)


def state_of(slots: Slots, alive: jax.Array) -> DecodeState:
  """Return the state of the rows, in which rows of slots that are not alive have ended."""
  return dataclasses.replace(slots.state, ended=slots.state.ended | ~alive)


def empty_output(rows: int, top: int, room: int) -> ChosenTokens:
  """Return zeros with room for `room` tokens of each row: arrays [room, B, ...]."""
  return ChosenTokens(
    jnp.zeros((room, rows), jnp.int32),
    jnp.zeros((room, rows)),
    jnp.zeros((room, rows, top), jnp.int32),
    jnp.zeros((room, rows, top)),
  )


def with_pages(
  model: Model, weights: Weights, cache: PagedCache, pages: SlotPages, read: int, read_shared: int
) -> PagedCache:
  """Return the cache with new page tables; attention reads its first `read` pages."""
  shared = cache.shared
  if shared is not None:
    shared = dataclasses.replace(shared, visible=pages.visible, starts=pages.shared_starts)
  cache = dataclasses.replace(
    cache,
    table=pages.table,
    owners=pages.owners,
    starts=pages.starts,
    shared=shared,
    read=read,
    read_shared=read_shared,
  )
  return constrain_cache(model, cache, weights)


def decode_logits_of(
  model: Model, weights: Weights, state: DecodeState, cache: PagedCache
) -> tuple[jax.Array, PagedCache]:
  """Return the logits [B, V] after each row's last token, and the cache with this token in it."""
  lengths = cache.lengths
  logits, cache = model.decode_step(weights, cache, state.tokens)
  # For a free slot, the new keys are written after its end, where the next step overwrites them.
  lengths = jnp.where(state.ended, lengths, cache.lengths)
  return logits, dataclasses.replace(cache, lengths=lengths)


def after_steps(
  model: Model, weights: Weights, before: Slots, cache: PagedCache, state: DecodeState
) -> Slots:
  """Return the slots after decode steps, with the shardings and static fields of `before`."""
  # Shardings and static fields select the compiled program, so they must not change.
  cache, state = constrain_cache(model, cache, weights), constrain_state(model, state)
  was = before.cache
  cache = dataclasses.replace(cache, read=was.read, read_shared=was.read_shared)
  return dataclasses.replace(before, cache=cache, state=state)
