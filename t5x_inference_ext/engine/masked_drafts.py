"""Decode steps that check drafts while some row has a grammar, as device functions.

Such a step consists of three programs. `make_drafts` makes drafts as speculative_steps does. The
host reads them and the rows' last tokens, cuts each draft at the first token that the row's grammar
forbids, or replaces it by the text that the grammar forces, and decides how many tokens to check.
`verify_drafts` runs the model over the drafts; meanwhile the host makes the masks after each token.
`choose_drafted` chooses.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from t5x_inference_ext.engine.draft_acceptance import CheckedDrafts, choose_checked
from t5x_inference_ext.engine.draft_width import best_width, verify_widths
from t5x_inference_ext.engine.drafting import Drafter, DraftInputs, note_acceptance, placed_drafting
from t5x_inference_ext.engine.slot_steps import after_steps, empty_output, state_of, with_pages
from t5x_inference_ext.engine.slots import SlotPages, Slots, StepsOutput, StepsWork, replicated
from t5x_inference_ext.engine.speculative_steps import (
  known_drafts,
  look_out,
  make_draft,
  run_drafts,
  run_if,
)
from t5x_inference_ext.engine.state_rows import constrain_state
from t5x_inference_ext.engine.token_choice import TokenMasks
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.model.weights import Weights


class MadeDrafts(NamedTuple):
  """Drafts of B rows, of at most K tokens each, and what decides how many tokens to check.

  Attributes:
    tokens: [B, K] int32. The drafts; -1 where a token is not known.
    counts: [B] int32. Number of tokens of each row's draft.
    grades: [B] int32. Grade of each row's draft; see drafting.Outlook.
    seen: [B, G, 2] float32. See drafting.DraftState.
    left: [B] int32. Number of tokens that each row still gets.
  """

  tokens: Any
  counts: Any
  grades: Any
  seen: Any
  left: Any


def make_drafts(
  model: Model,
  slots: Slots,
  alive: jax.Array,
  until_free: jax.Array,
  prices: jax.Array,
  draft_weights: Any,
  drafter: Drafter,
) -> tuple[Slots, MadeDrafts]:
  """Make the rows' drafts.

  Args:
    model: Gives the mesh.
    slots: The slots, with a DraftState.
    alive: [B] bool. Slots that have a row.
    until_free, prices, draft_weights, drafter: See speculative_steps.speculative_steps. They decide
      how many tokens of each draft a draft model makes.
  """
  drafting, state, lengths = slots.drafting, state_of(slots, alive), slots.cache.lengths
  assert drafting is not None
  widths = (0, *verify_widths(drafter.most))
  outlook, left = look_out(drafter, slots.rows, state, drafting, lengths)
  index = best_width(widths, prices, drafting, outlook, left, ~state.ended, until_free)
  inputs = DraftInputs(draft_weights, slots.rows, state, drafting, lengths)
  made = drafting.own, known_drafts(drafter, outlook)
  for i, width in enumerate(widths):
    one = lambda made, width=width: make_draft(drafter, inputs, outlook, width, made)
    made = run_if(index == i, one, made)
  own, tokens = made
  drafting = dataclasses.replace(drafting, own=own)
  slots = dataclasses.replace(
    slots, drafting=placed_drafting(model, drafter, drafting, draft_weights)
  )
  drafts = MadeDrafts(tokens, outlook.counts, outlook.grades, drafting.seen, left)
  return slots, replicated(model, drafts)


def verify_drafts(
  model: Model,
  slots: Slots,
  weights: Weights,
  pages: SlotPages,
  alive: jax.Array,
  drafts: jax.Array,
  counts: jax.Array,
  index: jax.Array,
  read: int,
  read_shared: int,
) -> tuple[Slots, None]:
  """Run the model over the rows' last tokens and drafts; keep the logits in the slots.

  Args:
    model: Decides mesh and layouts.
    slots: The slots, with a DraftState.
    weights: Weights on the mesh.
    pages: Pages of the rows, with room for the drafts.
    alive: [B] bool. Slots that have a row.
    drafts: [B, K] int32. The drafts.
    counts: [B] int32. Number of tokens of each row's draft.
    index: Scalar int32. Index in (0, *verify_widths(K)) of the number of tokens to check.
    read: Number of pages of each shard that attention reads, from the first on. Static.
    read_shared: Number of shared pages that attention reads, from the first on. Static.
  """
  state = state_of(slots, alive)
  cache = with_pages(model, weights, slots.cache, pages, read, read_shared)
  assert slots.draft_logits is not None
  split = NamedSharding(model.mesh, P(model.sampling_axes(len(counts))))
  run = cache, lax.with_sharding_constraint(slots.draft_logits, split)
  for i, width in enumerate((0, *verify_widths(drafts.shape[1]))):
    one = lambda run, width=width: run_drafts(model, weights, state, drafts, counts, width, run)
    run = run_if(index == i, one, run)
  cache, logits = run
  logits = lax.with_sharding_constraint(logits, split)
  slots = after_steps(model, weights, slots, cache, slots.state)
  return dataclasses.replace(slots, draft_logits=logits), None


def choose_drafted(
  model: Model,
  slots: Slots,
  alive: jax.Array,
  drafts: jax.Array,
  counts: jax.Array,
  grades: jax.Array,
  index: jax.Array,
  masks: TokenMasks,
  draft_weights: Any,
  drafter: Drafter,
) -> tuple[Slots, StepsOutput]:
  """Choose each row's tokens from the logits of `verify_drafts`, as long as its draft is right.

  Args:
    model: Decides mesh and layouts.
    slots: The slots, with the logits of the drafts.
    alive: [B] bool. Slots that have a row. Rows in other slots are ended.
    drafts: [B, K] int32. The drafts; -1 where a token is not known.
    counts: [B] int32. Number of tokens of each row's draft, after which all masks are known.
    grades: [B] int32. Grade of each row's draft.
    index: Scalar int32. Index in (0, *verify_widths(K)) of the number of tokens that were checked.
    masks: Tokens that the rows' grammars allow, with `allowed` [K + 1, B, W]: next, and after each
      token of the draft.
    draft_weights: Weights of the drafter, or None.
    drafter: Makes the drafts, of at most K tokens. Static.
  """
  before, lengths = state_of(slots, alive), slots.cache.lengths
  drafting, logits = slots.drafting, slots.draft_logits
  assert drafting is not None and logits is not None
  widths = (0, *verify_widths(drafter.most))
  width = jnp.asarray(widths)[index]
  counts = jnp.where(before.ended, 0, counts)
  checked = CheckedDrafts(logits, drafts, counts, width, lengths)
  out = empty_output(len(before.ended), slots.rows.top_width, drafter.most + 1)
  choice = choose_checked(slots.rows, before, before, drafting, out, checked, masks)
  state = constrain_state(model, choice.state)
  made = state.counts - before.counts
  work = StepsWork(
    jnp.zeros(len(widths), jnp.int32).at[index].set(1),
    jnp.sum(~before.ended),
    jnp.sum(jnp.minimum(counts, width)),
    jnp.where(width > 0, jnp.sum(choice.accepted), 0),
  )
  drafting = note_acceptance(choice.drafting, grades, choice.accepted, choice.checked)
  slots = dataclasses.replace(
    slots,
    cache=dataclasses.replace(slots.cache, lengths=lengths + made),
    state=state,
    drafting=placed_drafting(model, drafter, drafting, draft_weights),
  )
  output = StepsOutput(choice.out, made, state.ended, state.failed, work)
  return slots, replicated(model, output)
