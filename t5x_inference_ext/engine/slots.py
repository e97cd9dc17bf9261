"""Decode slots: rows of one paged cache that prompts enter and leave while the other rows go on.

The module holds device functions; engine/programs.py compiles them, and
engine/decoder.py and engine/prefilling.py call them.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from t5x_inference_ext.engine import cache_rows
from t5x_inference_ext.engine.advance import advance
from t5x_inference_ext.engine.drafting import (
  Drafter,
  DraftState,
  empty_drafting,
  enter_drafting,
  placed_drafting,
)
from t5x_inference_ext.engine.prompts import PrefillState
from t5x_inference_ext.engine.scheduler_config import SchedulerConfig
from t5x_inference_ext.engine.state import ChosenTokens, DecodeState, RowParams, initial_state
from t5x_inference_ext.engine.state_rows import constrain_state, put_state_row
from t5x_inference_ext.engine.token_choice import TokenMasks
from t5x_inference_ext.model import cache as kv_cache
from t5x_inference_ext.model.chunks import constrain_cache, empty_pages
from t5x_inference_ext.model.pages import PagedCache
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.model.weights import Weights


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
  """B slots, each of which holds a row or is free. A free slot is marked as ended.

  Attributes:
    cache: Keys and values of each row's tokens, except its last token.
    rows: Parameters of the rows.
    state: State of the rows.
    drafting: Tokens of the rows, for drafts; None in programs without drafts.
    draft_logits: [B, K + 1, V] float32. Buffer for the logits of a step that checks K tokens of
      drafts; None in programs without drafts.
  """

  cache: PagedCache
  rows: RowParams
  state: DecodeState
  drafting: DraftState | None = None
  draft_logits: jax.Array | None = None


class StepsWork(NamedTuple):
  """The work of some decode steps that may check drafts.

  Attributes:
    passes: [W] int32. Number of steps of each kind: first without drafts, then for each number of
      draft tokens that a step can check.
    rows: Scalar int32. Sum over the steps of the number of rows that took part.
    drafted: Scalar int32. Number of draft tokens that were checked.
    accepted: Scalar int32. Number of draft tokens that were accepted.
  """

  passes: jax.Array
  rows: jax.Array
  drafted: jax.Array
  accepted: jax.Array


class StepsOutput(NamedTuple):
  """The tokens of some decode steps, or of an insertion.

  Attributes:
    chosen: Chosen tokens of each step, [N, B] and [N, B, top]; 0 for rows that had ended.
    counts: [B] int32. Number of tokens that the row got: one in each of the first `counts` steps.
    ended: [B] bool. Whether the row has ended after the N steps.
    failed: [B] bool. Whether the row has ended because no token could be chosen.
    work: The work of steps that may check drafts; None for others.
  """

  chosen: ChosenTokens
  counts: jax.Array
  ended: jax.Array
  failed: jax.Array
  work: StepsWork | None = None


class SlotPages(NamedTuple):
  """The rows' page tables, as the host allocated them; see model.pages.PagedCache for the fields.

  Attributes:
    table: [B, M] int32.
    owners: [N] int32.
    starts: [N] int32.
    visible: [B, NS] bool. Shared pages of each row.
    shared_starts: [NS] int32.
  """

  table: Any
  owners: Any
  starts: Any
  visible: Any
  shared_starts: Any


class RowPages(NamedTuple):
  """Pages of a row that enters a slot.

  Attributes:
    own: [M] int32. The row's own pages, by page index in the row.
    first: Scalar int32. Page index of the first own page; earlier pages are shared.
    shared: [M] int32. Shared pages, by page index in the row.
    shared_begin: Scalar int32. Page index of the first shared page to write.
    shared_end: Scalar int32. Page index after the last shared page to write.
  """

  own: Any
  first: Any
  shared: Any
  shared_begin: Any
  shared_end: Any


def empty_slots(
  model: Model,
  weights: Weights,
  row: RowParams,
  config: SchedulerConfig,
  shards: int,
  draft_weights: Any = None,
  drafter: Drafter | None = None,
) -> Slots:
  """Return slots that are all free.

  Args:
    model: Decides mesh and layouts.
    weights: Weights, for their shapes and shardings.
    row: [1, ...]. Parameters of any row; all rows have their structure and shapes.
    config: Sizes of the slots.
    shards: Number of shards that split the rows.
    draft_weights: Weights of the drafter, if it has any.
    drafter: Makes drafts; None: there are none. Static.
  """
  rows = config.slots
  params = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], (rows, *x.shape[1:])), row)
  nothing = jnp.zeros((rows, 1), jnp.int32)
  state = initial_state(params, nothing, nothing[:, 0], model.config.vocab_size)
  state = dataclasses.replace(state, ended=jnp.ones(rows, bool))
  cache = empty_pages(
    model,
    weights,
    rows,
    pages=config.pages_of_shard(shards),
    page_size=config.page_size,
    table_width=config.pages_of_row,
    shared_pages=config.shared_pages,
  )
  slots = Slots(cache, replicated(model, params), constrain_state(model, state))
  if drafter is None:
    return slots
  drafting = empty_drafting(drafter, draft_weights, rows, config.max_length + 1)
  logits = jnp.zeros((rows, drafter.most + 1, model.config.vocab_size), jnp.float32)
  split = NamedSharding(model.mesh, P(model.sampling_axes(rows)))
  return dataclasses.replace(
    slots,
    drafting=placed_drafting(model, drafter, drafting, draft_weights),
    draft_logits=lax.with_sharding_constraint(logits, split),
  )


def insert(
  model: Model,
  slots: Slots,
  weights: Weights,
  prompts: PrefillState,
  place: jax.Array,
  slot: jax.Array,
  pages: RowPages,
  row_params: RowParams,
  prompt: jax.Array,
  length: jax.Array,
  generated: jax.Array,
  masks: TokenMasks | None = None,
  draft_weights: Any = None,
  drafter: Drafter | None = None,
) -> tuple[Slots, StepsOutput]:
  """Put a prefilled prompt into a free slot, and choose its next token.

  Args:
    model: Decides mesh and layouts.
    slots: The slots. `slot` must be free.
    weights: Weights, for their shapes and shardings.
    prompts: Prefilled prompts. They are copied, not moved: a prompt may enter several slots.
    place: Index of the prompt in `prompts`.
    slot: Slot to enter.
    pages: Pages of the row.
    row_params: [1, ...]. Parameters of the row.
    prompt: [1, T] int32. The whole prompt, BOS first. Only penalties and drafts read it.
    length: Scalar int32. Number of valid tokens in `prompt`.
    generated: Scalar int32. How many of the last tokens in `prompt` the row generated before it was
      preempted.
    masks: [1, ...]. Tokens that the row's grammar allows next; None: no row has a grammar.
    draft_weights: Weights of the drafter, if it has any.
    drafter: Makes drafts; None: there are none. Static.
  """
  one = cache_rows.gather_cache_row(model.prefilling, prompts.cache, weights, place)
  # The decode layout may repeat and pad key heads differently from the prefill layout.
  held = model.prefilling.cache_sharding(prompts.logits.shape[0]).heads.cached()
  wanted = model.cache_sharding(slots.cache.lengths.shape[0]).heads.cached()
  keys, values = jax.tree.map(
    lambda x: kv_cache.with_heads(x, held, wanted), (one.keys, one.values)
  )
  one = dataclasses.replace(one, keys=keys, values=values)
  written = pages.shared_begin, pages.shared_end
  cache = cache_rows.insert_row(
    model, slots.cache, weights, slot, one, pages.own, pages.first, pages.shared, written
  )
  cache = constrain_cache(model, cache, weights)
  axes = model.sampling_axes(prompts.logits.shape[0])
  logits = cache_rows.gather_row(model, prompts.logits, axes, place)
  state = initial_state(
    row_params,
    prompt,
    length[None],
    model.config.vocab_size,
    generated[None],
    weights.soft_prompts is not None,
  )
  state, chosen = advance(row_params, state, logits, length[None], masks=masks)
  rows, states = put_state_row(model, slots.rows, slots.state, slot, row_params, state)
  made = (~state.failed).astype(jnp.int32)
  output = StepsOutput(jax.tree.map(lambda x: x[None], chosen), made, state.ended, state.failed)
  drafting = slots.drafting
  if drafting is not None and drafter is not None:
    drafting = enter_drafting(drafter, drafting, slot, prompt, length, state.tokens)
    drafting = placed_drafting(model, drafter, drafting, draft_weights)
  slots = Slots(cache, replicated(model, rows), states, drafting, slots.draft_logits)
  return slots, replicated(model, output)


def replicated(model: Model, tree: Any) -> Any:
  """Replicate arrays on every device, so that every process can read them."""
  whole = NamedSharding(model.mesh, P())
  return jax.tree.map(lambda x: lax.with_sharding_constraint(x, whole), tree)
