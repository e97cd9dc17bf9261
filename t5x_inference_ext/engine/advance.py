"""The step from logits to each row's next token, and to the state after it.

Static batches, slots and checks of drafts all choose tokens with `advance`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from t5x_inference_ext.engine.row_choice import below_min_new_tokens, choose_for_rows, features_of
from t5x_inference_ext.engine.sampling_arrays import ANY
from t5x_inference_ext.engine.selection import when
from t5x_inference_ext.engine.state import ChosenTokens, DecodeState, RowParams
from t5x_inference_ext.engine.state_rows import state_specs
from t5x_inference_ext.engine.token_choice import TokenMasks, perturbed
from t5x_inference_ext.model.best_tokens import BestTokens, best_tokens
from t5x_inference_ext.model.collectives import ops
from t5x_inference_ext.model.embedding import whole_rows
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.sharding.layout import Axes


def advance(
  rows: RowParams,
  state: DecodeState,
  logits: Float[Array, 'B V'],
  positions: Int[Array, ' B'],
  model: Model | None = None,
  masks: TokenMasks | None = None,
) -> tuple[DecodeState, ChosenTokens]:
  """Choose each row's next token.

  Rows that have ended keep their state; their tokens and log-probabilities are 0. A row fails, and
  ends without a token, if its logits are not finite or if every token is forbidden.

  Args:
    rows: Parameters of the rows.
    state: State before the step.
    logits: [B, V] float32.
    positions: [B] int32. Position of the chosen token in its row; BOS is at 0.
    model: Gives the mesh; each device chooses the tokens of its own rows. None: no mesh.
    masks: Tokens that grammars allow; None: no row has a grammar.

  Returns:
    The state after the step, and the chosen tokens.
  """
  if model is None:
    return _advanced(rows, state, choose_for_rows(rows, state, logits, positions, masks), ())
  # Without shard_map, XLA's partitioner would gather all logits on every device for a top_k, and
  # split the state between devices, which takes an all-reduce for each of its arrays.
  axes = model.sampling_axes(len(logits))

  def run(
    rows: RowParams, state: DecodeState, logits: jax.Array, positions: jax.Array, masks: Any
  ) -> tuple[DecodeState, ChosenTokens]:
    return _advanced(rows, state, _choose_own(rows, state, logits, positions, masks, axes), axes)

  specs = state_specs(model, state)
  return jax.shard_map(
    run,
    mesh=model.mesh,
    in_specs=(P(), specs, P(axes), P(), P()),
    out_specs=(specs, P()),
    check_vma=False,
  )(rows, state, logits, positions, masks)


def advance_on_shard(
  rows: RowParams,
  state: DecodeState,
  logits: Float[Array, 'b v'],
  positions: Int[Array, ' B'],
  model: Model,
) -> tuple[DecodeState, ChosenTokens]:
  """Choose each row's next token on one shard, inside shard_map; every shard gets all of them.

  Logits move only in a step in which some row needs whole rows of them: for top_k, top_p,
  penalties, a bias, min_new_tokens, or most likely tokens to return.

  Args:
    rows: Parameters of all rows.
    state: State of all rows before the step; of the history, the shard's rows.
    logits: [b, v] float32. This shard's part of the logits of Model.decode_locally.
    positions: [B] int32. Position of the chosen token in its row; BOS is at 0.
    model: Gives the mesh.
  """
  count, vocab_size = len(positions), model.config.vocab_size
  axes, (row_axes, vocabulary) = model.sampling_axes(count), model.local_logits_axes(count)
  features = features_of(rows, state, vocab_size)
  whole = features.penalties | features.min_new_tokens | features.bias
  whole |= features.sampled & features.limited
  if rows.top_width:
    whole |= jnp.any(~state.ended & (jnp.asarray(rows.top) > 0))

  def by_rows(logits: jax.Array) -> ChosenTokens:
    own = whole_rows(model, logits[:, None], count)[:, 0]
    return _choose_own(rows, state, own, positions, None, axes)

  def score(*of_logits: jax.Array) -> jax.Array:
    of_rows = rows.sampling.temperature, rows.seeds, positions
    own = (ops.local_slice(jnp.asarray(x), row_axes, 0) for x in of_rows)
    return perturbed(vocab_size, *own, *of_logits)

  best = functools.partial(best_tokens, rows=row_axes, vocabulary=vocabulary)

  def by_best(logits: jax.Array) -> ChosenTokens:
    drawn = functools.partial(best, score=score)
    return _most_likely(rows, state, when(features.sampled, drawn, best, logits))

  if ops.axis_size(vocabulary) == 1:
    whole = True  # nothing would move
  return _advanced(rows, state, when(whole, by_rows, by_best, logits), axes)


def _choose_own(
  rows: RowParams,
  state: DecodeState,
  logits: Float[Array, 'b V'],
  positions: Int[Array, ' B'],
  masks: TokenMasks | None,
  axes: Axes,
) -> ChosenTokens:
  """Choose tokens of the shard's own rows, which `axes` split; return those of all rows."""
  others = rows, dataclasses.replace(state, history=None), positions, masks
  rows, own, positions, masks = jax.tree.map(
    lambda x: ops.local_slice(jnp.asarray(x), axes, 0), others
  )
  own = dataclasses.replace(own, history=state.history)
  return _gathered(choose_for_rows(rows, own, logits, positions, masks), axes)


def _most_likely(rows: RowParams, state: DecodeState, best: BestTokens) -> ChosenTokens:
  """Return the best tokens as chosen ones, -1 in rows that fail."""
  made, width = ~state.ended & jnp.isfinite(best.normalizers), rows.top_width
  scores = jnp.where(made, best.logits - best.normalizers, 0)
  ids, none = jnp.where(made, best.ids, -1), jnp.zeros((len(made), width))
  return ChosenTokens(ids, scores, none.astype(jnp.int32), none)


def _advanced(
  rows: RowParams, state: DecodeState, chosen: ChosenTokens, axes: Axes
) -> tuple[DecodeState, ChosenTokens]:
  """Return the state after the chosen tokens, and the tokens; a row whose token is -1 fails.

  Under shard_map, `axes` split the rows of the history.
  """
  live, made = ~state.ended, chosen.tokens >= 0
  tokens = jnp.maximum(chosen.tokens, 0)
  counts, recent, history = state.counts + made, state.recent, state.history
  ends = jnp.any(tokens[:, None] == jnp.asarray(rows.end_ids), axis=1)
  end = ~made | ends | (counts >= rows.limits)
  if rows.sampling.stop.shape[1]:
    shifted = jnp.concatenate([recent[:, 1:], tokens[:, None]], axis=1)
    recent = jnp.where(made[:, None], shifted, recent)
    end |= _ends_in_stop(jnp.asarray(rows.sampling.stop), recent) & ~below_min_new_tokens(
      rows, state
    )
  if history is not None:
    penalties = features_of(rows, state, history.shape[1]).penalties
    added = (ops.local_slice(x, axes, 0) for x in (tokens, 2 * made))
    # The update is in place, but XLA:TPU copies the whole history into fast memory for it.
    history = when(penalties, _add_tokens, lambda x, *_: x, history, *added)
  failed, ended = state.failed | (live & ~made), state.ended | end
  state = DecodeState(tokens, counts, ended, failed, recent, history)
  return state, chosen._replace(tokens=tokens)


def _add_tokens(history: jax.Array, tokens: jax.Array, counts: jax.Array) -> jax.Array:
  """Add counts [B] of tokens [B] to the rows' histories [B, V]."""
  return jax.vmap(lambda row, token, n: row.at[token].add(n))(history, tokens, counts)


def _gathered(chosen: ChosenTokens, axes: Axes) -> ChosenTokens:
  """Gather the chosen tokens of all rows, which `axes` split, in one collective."""
  if ops.axis_size(axes) == 1:
    return chosen
  # Ids are sent as float32, which is exact below 2^24.
  parts = chosen.tokens[:, None], chosen.top_tokens, chosen.log_probs[:, None], chosen.top_log_probs
  packed = jnp.concatenate([x.astype(jnp.float32) for x in parts], axis=1)
  numbers, log_probs = jnp.split(ops.all_gather(packed, axes, 0), 2, axis=1)
  ids = numbers.astype(jnp.int32)
  return ChosenTokens(ids[:, 0], log_probs[:, 0], ids[:, 1:], log_probs[:, 1:])


def _ends_in_stop(stop: jax.Array, recent: jax.Array) -> jax.Array:
  """Return [B] bool: whether recent tokens [B, M] end in one of the stop sequences [B, N, M]."""
  return jnp.any(jnp.all((stop == ANY) | (stop == recent[:, None, :]), axis=2), axis=1)
