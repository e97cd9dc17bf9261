"""Acceptance of drafts: each row gets the tokens that its draft had right, and one more.

A row's tokens are chosen one at a time, exactly as in plain decode steps, so that penalties, ends
and limits see all earlier tokens. Another token is chosen while the last one equals the draft's.
"""

import dataclasses
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from t5x_inference_ext.engine.advance import advance
from t5x_inference_ext.engine.drafting import DraftState, note_tokens
from t5x_inference_ext.engine.state import ChosenTokens, DecodeState, RowParams
from t5x_inference_ext.engine.token_choice import TokenMasks


class CheckedDrafts(NamedTuple):
  """Drafts of B rows, and the model's logits after each of their tokens.

  Attributes:
    logits: [B, K + 1, V] float32. Logits after the last token and each token of the draft.
    drafts: [B, K] int32. The drafts; -1 where a token is not known.
    counts: [B] int32. Number of tokens of each row's draft.
    width: Scalar int32. Number of tokens of each draft that the model has run.
    lengths: [B] int32. Index of each row's last token.
  """

  logits: jax.Array
  drafts: jax.Array
  counts: jax.Array
  width: jax.Array
  lengths: jax.Array


class DraftChoice(NamedTuple):
  """State of the choice of one step's tokens.

  Attributes:
    step: Scalar int32. Number of tokens chosen so far in this step, in rows that go on.
    going: [B] bool. Whether the row gets another token.
    state: State of the rows.
    drafting: Drafting state, with the rows' new tokens.
    out: Tokens of each row since the program began, [N, B].
    accepted: [B] int32. Number of tokens of the draft that were right.
    checked: [B] int32. Number of tokens of the draft that were compared.
  """

  step: jax.Array
  going: jax.Array
  state: DecodeState
  drafting: DraftState
  out: ChosenTokens
  accepted: jax.Array
  checked: jax.Array


def choose_checked(
  rows: RowParams,
  before: DecodeState,
  state: DecodeState,
  drafting: DraftState,
  out: ChosenTokens,
  checked: CheckedDrafts,
  masks: TokenMasks | None = None,
) -> DraftChoice:
  """Choose each row's tokens, up to the first one that differs from its draft.

  Args:
    rows: Parameters of the rows.
    before: State before the first step of the program.
    state: State before this step.
    drafting: Tokens of the rows.
    out: Tokens of each row since the program began; new tokens are added to them.
    checked: Drafts and logits.
    masks: Tokens that grammars allow, with `allowed` [K + 1, B, W]: next, and after each token of
      the draft. None: no row has a grammar.
  """
  logits, drafts, counts, width, lengths = checked
  row = jnp.arange(len(counts))

  def going(choice: DraftChoice) -> jax.Array:
    return jnp.any(choice.going)

  def choose(choice: DraftChoice) -> DraftChoice:
    step, was, position = choice.step, choice.state, lengths + 1 + choice.step
    now = lax.dynamic_index_in_dim(logits, step, 1, keepdims=False)
    state = dataclasses.replace(was, ended=was.ended | ~choice.going)
    may = masks and masks._replace(allowed=lax.dynamic_index_in_dim(masks.allowed, step, 0, False))
    state, chosen = advance(rows, state, now, position, masks=may)
    made = state.counts > was.counts
    ended = jnp.where(choice.going, state.ended, was.ended)
    tokens = jnp.where(choice.going, state.tokens, was.tokens)
    place = jnp.where(made, was.counts - before.counts, len(choice.out.tokens))
    index = jnp.minimum(step, drafts.shape[1] - 1)
    drafted = lax.dynamic_index_in_dim(drafts, index, 1, keepdims=False)
    # A step that checks no drafts also shows whether a draft's first token would be right.
    known = made & (drafted >= 0) & (step < jnp.minimum(counts, jnp.maximum(width, 1)))
    right = known & (chosen.tokens == drafted)
    return DraftChoice(
      step + 1,
      right & (step < width) & ~ended,
      dataclasses.replace(state, ended=ended, tokens=tokens),
      note_tokens(choice.drafting, position, chosen.tokens, made),
      jax.tree.map(lambda x, new: x.at[place, row].set(new, mode='drop'), choice.out, chosen),
      choice.accepted + right,
      choice.checked + known,
    )

  nothing = jnp.zeros_like(counts)
  first = DraftChoice(
    jnp.zeros((), jnp.int32), ~state.ended, state, drafting, out, nothing, nothing
  )
  return lax.while_loop(going, choose, first)
