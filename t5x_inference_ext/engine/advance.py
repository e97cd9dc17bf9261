"""The step from logits to each row's next token, and to the state after it.

Static batches, slots and checks of drafts all choose tokens with `advance`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from t5x_inference_ext.engine import selection
from t5x_inference_ext.engine.sampling_arrays import ANY, SamplingFeatures
from t5x_inference_ext.engine.selection import when
from t5x_inference_ext.engine.state import ChosenTokens, DecodeState, RowParams
from t5x_inference_ext.engine.token_choice import (
  Restrictions,
  TokenMasks,
  choose_tokens,
  live_features,
)
from t5x_inference_ext.model.best_tokens import BestTokens
from t5x_inference_ext.model.transformer import Model


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
  choose_own: Callable[..., tuple[ChosenTokens, jax.Array | None]] = _choose_tokens
  if model is not None and (axes := model.sampling_axes(len(logits))):
    # Without shard_map, XLA's partitioner would gather all logits on every device for a top_k.
    choose_own = jax.shard_map(
      _choose_tokens, mesh=model.mesh, in_specs=P(axes), out_specs=P(axes), check_vma=False
    )
  return _advanced(rows, state, *choose_own(rows, state, logits, positions, masks), model)


def advance_greedily(
  rows: RowParams, state: DecodeState, best: BestTokens, model: Model
) -> tuple[DecodeState, ChosenTokens]:
  """Take each row's most likely token, as `advance` does for rows that use no sampling feature.

  Args:
    rows: Parameters of the rows, with neither sampling features nor most likely tokens to return.
    state: State before the step.
    best: The most likely tokens.
    model: Gives the mesh.
  """
  made = ~state.ended & jnp.isfinite(best.normalizers)
  scores = jnp.where(made, best.logits - best.normalizers, 0)
  none = jnp.zeros((len(made), 0), jnp.int32)
  chosen = ChosenTokens(jnp.where(made, best.ids, -1), scores, none, none.astype(jnp.float32))
  return _advanced(rows, state, chosen, state.history, model)


def draw_tokens(
  rows: RowParams, state: DecodeState, logits: Float[Array, 'B V'], positions: Int[Array, ' B']
) -> Int[Array, ' B']:
  """Return the tokens [B] that rows would draw from logits, without changing any state.

  Args:
    rows: Parameters of the rows.
    state: State of the rows.
    logits: [B, V] float32.
    positions: [B] int32. Position of the drawn token in its row; BOS is at 0.
  """
  top = jnp.max(logits, axis=-1, keepdims=True)
  return _drawn(rows, state, logits, top, positions, None)[0]


def _advanced(
  rows: RowParams,
  state: DecodeState,
  chosen: ChosenTokens,
  history: jax.Array | None,
  model: Model | None,
) -> tuple[DecodeState, ChosenTokens]:
  """Return the state after the chosen tokens, and the tokens; a row whose token is -1 fails."""
  live, drawn = ~state.ended, chosen.tokens
  if model is not None:
    # Replicate the tokens: the next step's embedding needs all of them on every device. The state
    # computed from them is then replicated, too.
    drawn = jax.lax.with_sharding_constraint(drawn, NamedSharding(model.mesh, P()))
  tokens, made = jnp.maximum(drawn, 0), drawn >= 0
  counts, recent = state.counts + made, state.recent
  ends = jnp.any(tokens[:, None] == jnp.asarray(rows.end_ids), axis=1)
  end = ~made | ends | (counts >= rows.limits)
  if rows.sampling.stop.shape[1]:
    shifted = jnp.concatenate([recent[:, 1:], tokens[:, None]], axis=1)
    recent = jnp.where(made[:, None], shifted, recent)
    end |= _ends_in_stop(jnp.asarray(rows.sampling.stop), recent) & ~_below_min_new_tokens(
      rows, state
    )
  failed, ended = state.failed | (live & ~made), state.ended | end
  if model is not None:
    # A loop's condition reads `counts` and `ended`: if they were split, each step would need an
    # all-reduce.
    whole = NamedSharding(model.mesh, P())
    counts, ended = jax.lax.with_sharding_constraint((counts, ended), whole)
  state = DecodeState(tokens, counts, ended, failed, recent, history)
  return state, chosen._replace(tokens=tokens)


def _below_min_new_tokens(rows: RowParams, state: DecodeState) -> jax.Array:
  """Return [B] bool: whether min_new_tokens forbids the row to end at its next token."""
  return state.counts < jnp.asarray(rows.sampling.min_new_tokens)


def _choose_tokens(
  rows: RowParams,
  state: DecodeState,
  logits: jax.Array,
  positions: jax.Array,
  masks: TokenMasks | None,
) -> tuple[ChosenTokens, jax.Array | None]:
  """Return the chosen tokens (-1 in rows that fail), and the history that counts these tokens.

  Under shard_map, the arguments are those of the device's own rows.
  """
  live, top = ~state.ended, jnp.max(logits, axis=-1, keepdims=True)
  tokens, allowed, features = _drawn(rows, state, logits, top, positions, masks)
  # Computed as in jax.nn.logsumexp. Logits that are not finite make the result NaN or infinite.
  normalizer = top[:, 0] + jnp.log(jnp.sum(jnp.exp(logits - top), axis=-1))
  made = live & allowed & jnp.isfinite(normalizer)
  chosen = _with_log_probs(rows, jnp.where(made, tokens, 0), made, logits, normalizer)
  history = state.history
  if history is not None:
    # The update is in place, but XLA:TPU copies the whole history into fast memory for it.
    history = when(features.penalties, _add_tokens, lambda x, *_: x, history, chosen.tokens, made)
  return chosen._replace(tokens=jnp.where(made, tokens, -1)), history


def _drawn(
  rows: RowParams,
  state: DecodeState,
  logits: jax.Array,
  top: jax.Array,
  positions: jax.Array,
  masks: TokenMasks | None,
) -> tuple[jax.Array, jax.Array, SamplingFeatures]:
  """Return each row's draw, whether any token was allowed, and the features that live rows use."""
  live, early = ~state.ended, _below_min_new_tokens(rows, state)
  features = live_features(rows.sampling, live, early, logits.shape[1])
  if masks is not None:
    features = features._replace(masked=jnp.any(live & jnp.asarray(masks.constrained)))
  forbidden = jnp.where(early[:, None], jnp.asarray(rows.end_ids), -1)
  restrictions = Restrictions(state.history, forbidden, masks)
  tokens, allowed = choose_tokens(
    logits, top, rows.sampling, features, restrictions, rows.seeds, positions
  )
  return tokens, allowed, features


def _add_tokens(history: jax.Array, tokens: jax.Array, made: jax.Array) -> jax.Array:
  """Count tokens [B] in the rows' histories [B, V]; rows where `made` is false are skipped."""
  return jax.vmap(lambda row, token, n: row.at[token].add(n))(history, tokens, 2 * made)


def _with_log_probs(
  rows: RowParams, tokens: jax.Array, made: jax.Array, logits: jax.Array, normalizer: jax.Array
) -> ChosenTokens:
  """Return chosen tokens with their log-probabilities, and the most likely tokens."""
  log_probs = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0] - normalizer
  width = rows.top_width

  def most_likely(logits: jax.Array, normalizer: jax.Array) -> tuple[jax.Array, jax.Array]:
    top, ids = selection.most_likely(logits, width)
    return (
      jnp.where(made[:, None], ids, 0).astype(jnp.int32),
      jnp.where(made[:, None], top - normalizer[:, None], 0),
    )

  def nothing(logits: jax.Array, normalizer: jax.Array) -> tuple[jax.Array, jax.Array]:
    del normalizer
    return jnp.zeros((len(logits), width), jnp.int32), jnp.zeros((len(logits), width))

  wanted: bool | jax.Array = False
  if width:
    wanted = jnp.any(made & (jnp.asarray(rows.top) > 0))
  top_tokens, top_log_probs = when(wanted, most_likely, nothing, logits, normalizer)
  return ChosenTokens(tokens, jnp.where(made, log_probs, 0), top_tokens, top_log_probs)


def _ends_in_stop(stop: jax.Array, recent: jax.Array) -> jax.Array:
  """Return [B] bool: whether recent tokens [B, M] end in one of the stop sequences [B, N, M]."""
  return jnp.any(jnp.all((stop == ANY) | (stop == recent[:, None, :]), axis=2), axis=1)
