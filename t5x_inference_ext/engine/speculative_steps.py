"""Decode steps of slots that check drafts: several tokens of a row in one pass of the model.

Rows get the same tokens as in plain decode steps. A pass computes the logits after a row's last
token and after each token of its draft. The row's tokens are then chosen one at a time, as long as
each equals the draft's. Keys and values of rejected tokens lie beyond the row's length, where
nothing reads them and later tokens overwrite them.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from t5x_inference_ext.engine.draft_acceptance import CheckedDrafts, choose_checked
from t5x_inference_ext.engine.draft_width import best_width, verify_widths
from t5x_inference_ext.engine.drafting import (
  Drafter,
  DraftInputs,
  DraftState,
  Outlook,
  note_acceptance,
  placed_drafting,
)
from t5x_inference_ext.engine.slot_steps import (
  after_steps,
  decode_logits_of,
  empty_output,
  state_of,
  with_pages,
)
from t5x_inference_ext.engine.slots import SlotPages, Slots, StepsOutput, StepsWork, replicated
from t5x_inference_ext.engine.state import ChosenTokens, DecodeState, RowParams
from t5x_inference_ext.engine.state_rows import constrain_state
from t5x_inference_ext.model.pages import PagedCache
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.model.weights import Weights

# Cache, logits [B, K + 1, V] and drafts [B, K] of a step, and the drafter's own state.
_Run = tuple[PagedCache, jax.Array, jax.Array, Any]


class _Loop(NamedTuple):
  """State of the loop over steps. `logits` [B, K + 1, V] is only a buffer to write to."""

  state: DecodeState
  cache: PagedCache
  drafting: DraftState
  out: ChosenTokens
  logits: jax.Array
  work: StepsWork


def speculative_steps(
  model: Model,
  slots: Slots,
  weights: Weights,
  pages: SlotPages,
  alive: jax.Array,
  steps: jax.Array,
  until_free: jax.Array,
  prices: jax.Array,
  draft_weights: Any,
  drafter: Drafter,
  most: int,
  read: int,
  read_shared: int,
) -> tuple[Slots, StepsOutput]:
  """Run steps, with or without drafts, until all rows have ended or one has `steps` new tokens.

  K is the maximum number of tokens of a draft, `drafter.most`.

  Args:
    model: Decides mesh and layouts.
    slots: The slots, with a DraftState.
    weights: Weights on the mesh.
    pages: Pages of the rows, with room for steps + K tokens of each.
    alive: [B] bool. Slots that have a row. Rows in other slots were cancelled and are ended.
    steps: Scalar int32. Stop once any row has this many new tokens; at most `most`.
    until_free: Scalar bool. Whether to stop as soon as a row ends.
    prices: [W + 1] float32. Time, in any unit, of a step without drafts, then of a step that checks
      verify_widths(K)[i] tokens of each draft, for each i.
    draft_weights: Weights of the drafter, or None.
    drafter: Makes the drafts, of at most K tokens. Static.
    most: N. The output has room for N + K tokens of each row. Static.
    read: Number of pages of each shard that attention reads, from the first on. Static.
    read_shared: Number of shared pages that attention reads, from the first on. Static.
  """
  before, widths = state_of(slots, alive), (0, *verify_widths(drafter.most))
  count = len(before.ended)
  out = empty_output(count, slots.rows.top_width, most + drafter.most)
  split = NamedSharding(model.mesh, P(model.sampling_axes(count)))
  nothing = jnp.zeros((), jnp.int32)
  work = StepsWork(jnp.zeros(len(widths), jnp.int32), nothing, nothing, nothing)
  assert slots.drafting is not None and slots.draft_logits is not None

  def running(loop: _Loop) -> jax.Array:
    freed = until_free & jnp.any(loop.state.ended & ~before.ended)
    made = jnp.max(loop.state.counts - before.counts)
    return (made < steps) & ~jnp.all(loop.state.ended) & ~freed

  def step(loop: _Loop) -> _Loop:
    lengths, live = loop.cache.lengths, ~loop.state.ended
    outlook, left = look_out(drafter, slots.rows, loop.state, loop.drafting, lengths)
    index = best_width(widths, prices, loop.drafting, outlook, left, live, until_free)
    width = jnp.asarray(widths)[index]
    drafts = known_drafts(drafter, outlook)
    run: _Run = loop.cache, loop.logits, drafts, loop.drafting.own
    inputs = DraftInputs(draft_weights, slots.rows, loop.state, loop.drafting, lengths)
    for i, each in enumerate(widths):
      one = functools.partial(_pass, model, weights, drafter, inputs, outlook, each)
      run = run_if(index == i, one, run)
    cache, logits, drafts, own = run
    logits = lax.with_sharding_constraint(logits, split)
    checked = CheckedDrafts(logits, drafts, outlook.counts, width, lengths)
    first = dataclasses.replace(loop.drafting, own=own)
    choice = choose_checked(slots.rows, before, loop.state, first, loop.out, checked)
    made = choice.state.counts - loop.state.counts
    counts = choice.accepted, choice.checked
    drafting = note_acceptance(choice.drafting, outlook.grades, *counts)
    work = StepsWork(
      loop.work.passes.at[index].add(1),
      loop.work.rows + jnp.sum(live),
      loop.work.drafted + jnp.sum(jnp.minimum(outlook.counts, width)),
      loop.work.accepted + jnp.where(width > 0, jnp.sum(choice.accepted), 0),
    )
    cache = dataclasses.replace(cache, lengths=lengths + made)
    state = constrain_state(model, choice.state)
    return _Loop(
      state,
      cache,
      placed_drafting(model, drafter, drafting, draft_weights),
      choice.out,
      logits,
      work,
    )

  cache = with_pages(model, weights, slots.cache, pages, read, read_shared)
  loop = _Loop(
    constrain_state(model, before),
    cache,
    placed_drafting(model, drafter, slots.drafting, draft_weights),
    out,
    lax.with_sharding_constraint(slots.draft_logits, split),
    work,
  )
  loop = lax.while_loop(running, step, loop)
  state = loop.state
  output = StepsOutput(loop.out, state.counts - before.counts, state.ended, state.failed, loop.work)
  slots = after_steps(model, weights, slots, loop.cache, state)
  slots = dataclasses.replace(slots, drafting=loop.drafting, draft_logits=loop.logits)
  return slots, replicated(model, output)


def look_out(
  drafter: Drafter, rows: RowParams, state: DecodeState, drafting: DraftState, lengths: jax.Array
) -> tuple[Outlook, jax.Array]:
  """Return the drafts that rows could get, and the number of tokens [B] that each row still gets.

  Args:
    drafter: Makes the drafts.
    rows: Parameters of the rows.
    state: State of the rows.
    drafting: Tokens of the rows.
    lengths: [B] int32. Index of each row's last token.
  """
  outlook = drafter.outlook(drafting.tokens, lengths)
  left = jnp.asarray(rows.limits) - state.counts
  # A step chooses at most one token more than the draft has.
  counts = jnp.where(state.ended, 0, jnp.clip(outlook.counts, 0, left - 1))
  return outlook._replace(counts=counts), left


def known_drafts(drafter: Drafter, outlook: Outlook) -> jax.Array:
  """Return the tokens of drafts that are known before these are made: [B, K] int32, or -1."""
  rows = len(outlook.first)
  return jnp.full((rows, drafter.most), -1, jnp.int32).at[:, 0].set(outlook.first)


def run_if(flag: jax.Array, function: Callable[[Any], Any], x: Any) -> Any:
  """Return function(x) if the flag is true, else x.

  The conditional is a loop of zero or one turns, because lax.cond might copy the cache.
  """
  once = lambda carry: (jnp.asarray(False), function(carry[1]))
  return lax.while_loop(lambda carry: carry[0], once, (flag, x))[1]


def _pass(
  model: Model,
  weights: Weights,
  drafter: Drafter,
  inputs: DraftInputs,
  outlook: Outlook,
  width: int,
  run: _Run,
) -> _Run:
  """Make drafts of `width` tokens, and run the model over each row's last token and its draft.

  Returns:
    The cache with these tokens written beyond the rows' lengths, the logits, the drafts, and the
    drafter's own state.
  """
  cache, logits, drafts, own = run
  own, drafts = make_draft(drafter, inputs, outlook, width, (own, drafts))
  args = inputs.state, drafts, outlook.counts, width
  return *run_drafts(model, weights, *args, (cache, logits)), drafts, own


def make_draft(
  drafter: Drafter, inputs: DraftInputs, outlook: Outlook, width: int, made: tuple[Any, jax.Array]
) -> tuple[Any, jax.Array]:
  """Return the drafter's own state and the drafts [B, K], with the first `width` tokens made."""
  own, drafts = made
  if width == 0:
    return made
  inputs = inputs._replace(drafting=dataclasses.replace(inputs.drafting, own=own))
  own, draft = drafter.draft(inputs, outlook, width)
  own = drafter.placed(own, inputs.weights)
  return own, lax.dynamic_update_slice(drafts, draft, (0, 0))


def run_drafts(
  model: Model,
  weights: Weights,
  state: DecodeState,
  drafts: jax.Array,
  counts: jax.Array,
  width: int,
  run: tuple[PagedCache, jax.Array],
) -> tuple[PagedCache, jax.Array]:
  """Run the model over each row's last token and the first `width` tokens of its draft.

  Args:
    model: Decides mesh and layouts.
    weights: Weights on the mesh.
    state: State of the rows.
    drafts: [B, K] int32. The drafts.
    counts: [B] int32. Number of tokens of each row's draft.
    width: Maximum number of tokens of each draft to run.
    run: The cache, and the logits [B, K + 1, V] to write to.

  Returns:
    The cache with the tokens written beyond the rows' lengths, and the logits.
  """
  cache, logits = run
  lengths = cache.lengths
  if width == 0:
    new, cache = decode_logits_of(model, weights, state, cache)
    new = new[:, None]
  else:
    tokens = jnp.concatenate([state.tokens[:, None], drafts[:, :width]], axis=1)
    counts = jnp.where(state.ended, 0, 1 + jnp.minimum(counts, width))
    new, cache = model.verify(weights, cache, tokens, counts)
  logits = lax.dynamic_update_slice(logits, new, (0, 0, 0))
  return dataclasses.replace(cache, lengths=lengths), logits
