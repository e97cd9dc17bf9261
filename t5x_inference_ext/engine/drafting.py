"""Drafts of the tokens that rows may get next, on the devices, and counts of accepted tokens.

Drafts do not change a row's tokens: a draft token is accepted only if it equals the token that the
row would get without drafts. engine/speculative_steps.py checks drafts; a Drafter makes them.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from t5x_inference_ext.engine.state import DecodeState, RowParams
from t5x_inference_ext.model.transformer import Model

AnyArray = jax.Array | np.ndarray  # numpy's are for simulations

# A new row starts with the usual acceptance rate, as if this many draft tokens had been checked.
USUAL_TOKENS = 4.0
# Factors on the counts of a row, and of all rows, in each step that adds to them.
DECAY, USUAL_DECAY = 0.9, 0.98
# In a step that adds nothing to a row's counts, they move towards the usual ones by this share.
RETURN = 0.005
# Acceptance rate to expect of drafts that a grammar forces, which have the last grade. Only how the
# forced text is split into tokens is a guess.
FORCED_RATE = 0.9
# Highest acceptance rate to expect: a row may accept everything for a while, but not forever.
HIGHEST_RATE = 0.98


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DraftState:
  """The data from which drafts for B rows are made.

  Attributes:
    tokens: [B, S] int32. Each row's prompt and new tokens, including the last one.
    seen: [B, G, 2] float32. For each of G grades of drafts, the numbers of accepted tokens and of
      checked tokens. Older steps weigh less.
    usual: [G, 2] float32. Like `seen`, but over all rows, including those that have left.
    own: The drafter's own state, such as a draft model's cache; None if it has none.
  """

  tokens: jax.Array
  seen: jax.Array
  usual: jax.Array
  own: Any = None


class Outlook(NamedTuple):
  """The drafts that B rows could get now.

  Attributes:
    counts: [B] int32. Number of tokens of the draft; 0 if the row gets none.
    grades: [B] int32. Grade of the draft, 0 to G - 1: acceptance is counted for each grade. Drafts
      that a grammar forces have grade G - 1, all others one below.
    sources: [B] int32. Values that `outlook` passes to `draft`, such as the position in the row
      after which the draft is copied.
    first: [B] int32. The first token of the draft; -1 if it is not known before it is made.
  """

  counts: jax.Array
  grades: jax.Array
  sources: jax.Array
  first: jax.Array


class DraftInputs(NamedTuple):
  """The inputs of Drafter.draft.

  Attributes:
    weights: Weights of the drafter; None if it has none.
    rows: Parameters of the B rows.
    state: State of the rows.
    drafting: The rows' tokens, and the drafter's own state.
    last: [B] int32. Index of each row's last token.
  """

  weights: Any
  rows: RowParams
  state: DecodeState
  drafting: DraftState
  last: jax.Array


class Drafter(Protocol):
  """Makes drafts. A drafter is hashable: each one gets compiled programs of its own."""

  @property
  def most(self) -> int:
    """K, the maximum number of tokens of a draft."""

  @property
  def expected(self) -> tuple[float, ...]:
    """For each grade but the last, the acceptance rate to expect before any token was checked."""

  def start(self, weights: Any, rows: int, size: int) -> Any:
    """Return the drafter's own state for `rows` rows of up to `size` tokens, or None."""

  def enter(self, own: Any, slot: jax.Array) -> Any:
    """Return the own state with the row of a slot reset, before a new row enters the slot."""

  def placed(self, own: Any, weights: Any) -> Any:
    """Return the own state, constrained to the shardings that it has in all programs."""

  def outlook(self, tokens: Int[Array, 'B S'], last: Int[Array, ' B']) -> Outlook:
    """Return which drafts could be made. Must be cheap: every step calls it.

    Args:
      tokens: [B, S] int32. The rows' tokens.
      last: [B] int32. Index of each row's last token.
    """

  def draft(
    self, inputs: DraftInputs, outlook: Outlook, width: int
  ) -> tuple[Any, Int[Array, 'B K']]:
    """Return the new own state, and the first `width` tokens of each draft, [B, width] int32."""


def empty_drafting(drafter: Drafter, weights: Any, rows: int, size: int) -> DraftState:
  """Return the state of rows without tokens.

  Args:
    drafter: Makes the drafts.
    weights: Weights of the drafter, or None.
    rows: B.
    size: S, the maximum number of tokens of a row.
  """
  tokens = jnp.zeros((rows, size), jnp.int32)
  expected: Any = jnp.asarray([*drafter.expected, FORCED_RATE], jnp.float32)
  usual = jnp.stack([expected, jnp.ones_like(expected)], axis=1) * USUAL_TOKENS
  seen = jnp.broadcast_to(usual, (rows, *usual.shape))
  return DraftState(tokens, seen, usual, drafter.start(weights, rows, size))


def enter_drafting(
  drafter: Drafter,
  drafting: DraftState,
  slot: jax.Array,
  prompt: Int[Array, '1 T'],
  length: jax.Array,
  token: Int[Array, '1'],
) -> DraftState:
  """Replace the row in a slot by a new row.

  Args:
    drafter: Makes the drafts.
    drafting: State of the rows.
    slot: Scalar int32. Index of the slot.
    prompt: [1, T] int32. The row's tokens so far, right-padded; T at most S.
    length: Scalar int32. Number of valid tokens in `prompt`.
    token: [1] int32. The row's next token.
  """
  padding = drafting.tokens.shape[1] - prompt.shape[1]
  tokens = jnp.pad(prompt, ((0, 0), (0, padding)))
  tokens = lax.dynamic_update_slice(tokens, token[None, :], (0, length))
  return DraftState(
    lax.dynamic_update_slice_in_dim(drafting.tokens, tokens, slot, 0),
    lax.dynamic_update_slice_in_dim(drafting.seen, _as_usual(drafting)[None], slot, 0),
    drafting.usual,
    drafter.enter(drafting.own, slot),
  )


def placed_drafting(
  model: Model, drafter: Drafter, drafting: DraftState, weights: Any
) -> DraftState:
  """Return the state, constrained to the shardings that it has in all programs.

  Args:
    model: Gives the mesh.
    drafter: Makes the drafts.
    drafting: State of the rows.
    weights: Weights of the drafter, or None.
  """
  whole = NamedSharding(model.mesh, P())
  own = drafter.placed(drafting.own, weights)
  drafting = dataclasses.replace(drafting, own=None)
  drafting = jax.tree.map(lambda x: lax.with_sharding_constraint(x, whole), drafting)
  return dataclasses.replace(drafting, own=own)


def note_tokens(
  drafting: DraftState,
  positions: Int[Array, ' B'],
  tokens: Int[Array, ' B'],
  made: Bool[Array, ' B'],
) -> DraftState:
  """Write a new token of each row at its position; rows where `made` is false are skipped."""
  rows = jnp.arange(len(tokens))
  positions = jnp.where(made, positions, drafting.tokens.shape[1])
  return dataclasses.replace(
    drafting, tokens=drafting.tokens.at[rows, positions].set(tokens, mode='drop')
  )


def note_acceptance(
  drafting: DraftState,
  grades: Int[AnyArray, ' B'],
  accepted: Int[AnyArray, ' B'],
  checked: Int[AnyArray, ' B'],
) -> DraftState:
  """Add the accepted and the checked tokens of each row's draft to the counts.

  Counts of a row and grade for which nothing was checked move slowly towards the usual ones. The
  arrays may also be numpy's, as in a simulation.
  """
  xp = drafting.seen.__array_namespace__()
  mine = xp.arange(drafting.seen.shape[1])[None, :] == grades[:, None]
  mine &= (checked > 0)[:, None]
  new = xp.stack([accepted, checked], axis=1).astype(xp.float32)[:, None, :]
  new = xp.where(mine[:, :, None], new, 0)  # [B, G, 2]
  others = drafting.seen + RETURN * (_as_usual(drafting)[None] - drafting.seen)
  kept = xp.where(xp.any(mine, axis=0)[:, None], USUAL_DECAY, 1.0) * drafting.usual
  return dataclasses.replace(
    drafting,
    seen=xp.where(mine[:, :, None], DECAY * drafting.seen + new, others),
    usual=kept + xp.sum(new, axis=0),
  )


def expected_tokens(drafting: DraftState, outlook: Outlook, width: int) -> Float[AnyArray, ' B']:
  """Return each row's expected number of new tokens in a step that checks `width` draft tokens.

  The arrays may also be numpy's, as in a simulation.
  """
  xp = drafting.seen.__array_namespace__()
  mine = xp.take_along_axis(drafting.seen, outlook.grades[:, None, None], axis=1)[:, 0]
  rate = xp.minimum(mine[:, 0] / mine[:, 1], HIGHEST_RATE)
  power, total = xp.ones_like(rate), xp.ones_like(rate)
  for position in range(width):
    power = xp.where(position < outlook.counts, power * rate, 0)
    total = total + power
  return total


def _as_usual(drafting: DraftState) -> jax.Array:
  """Return [G, 2]: the counts with which a new row starts; see DraftState.seen."""
  return drafting.usual / drafting.usual[:, 1:] * USUAL_TOKENS
