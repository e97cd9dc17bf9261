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
from t5x_inference_ext.engine.state import ChosenTokens, DecodeState
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
    outlook = drafter.outlook(loop.drafting.tokens, lengths)
    # A step chooses at most one token more than the draft has.
    left = jnp.asarray(slots.rows.limits) - loop.state.counts - 1
    outlook = outlook._replace(counts=jnp.where(live, jnp.clip(outlook.counts, 0, left), 0))
    index = best_width(widths, prices, loop.drafting, outlook, left + 1, live, until_free)
    width = jnp.asarray(widths)[index]
    drafts = jnp.full((count, drafter.most), -1, jnp.int32).at[:, 0].set(outlook.first)
    run: _Run = loop.cache, loop.logits, drafts, loop.drafting.own
    inputs = DraftInputs(draft_weights, slots.rows, loop.state, loop.drafting, lengths)
    for i, each in enumerate(widths):
      # `_if` is a loop of zero or one turns, because lax.cond might copy the cache.
      one = functools.partial(_pass, model, weights, drafter, inputs, outlook, each)
      run = _if(index == i, one, run)
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


def _if(flag: jax.Array, function: Callable[[Any], Any], x: Any) -> Any:
  """Return function(x) if the flag is true, else x."""
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
  """Run the model over each row's last token and `width` tokens of its draft.

  Returns:
    The cache with these tokens written beyond the rows' lengths, the logits, the drafts, and the
    drafter's own state.
  """
  cache, logits, drafts, own = run
  lengths, state = cache.lengths, inputs.state
  if width == 0:
    new, cache = decode_logits_of(model, weights, state, cache)
    new = new[:, None]
  else:
    inputs = inputs._replace(drafting=dataclasses.replace(inputs.drafting, own=own))
    own, draft = drafter.draft(inputs, outlook, width)
    own = drafter.placed(own, inputs.weights)
    tokens = jnp.concatenate([state.tokens[:, None], draft], axis=1)
    counts = jnp.where(state.ended, 0, 1 + jnp.minimum(outlook.counts, width))
    new, cache = model.verify(weights, cache, tokens, counts)
    drafts = lax.dynamic_update_slice(drafts, draft, (0, 0))
  logits = lax.dynamic_update_slice(logits, new, (0, 0, 0))
  return dataclasses.replace(cache, lengths=lengths), logits, drafts, own
