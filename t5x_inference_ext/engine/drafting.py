"""Drafts of the tokens that rows may get next, on the devices, and how well earlier ones fared.

A row's tokens are a function of its seed and their positions, so a draft is right exactly where it
equals the tokens that the row gets anyway. engine/speculative_steps.py checks drafts; a kind of
draft is a Drafter.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from t5x_inference_ext.engine.state import DecodeState, RowParams
from t5x_inference_ext.model.transformer import Model

# Weight of what is usual, in draft tokens, when a row begins; and of what was seen of the row, and
# of all rows, after each step that saw more.
USUAL_TOKENS = 4.0
DECAY, USUAL_DECAY = 0.9, 0.98
# How far, in each step, what was seen of a row returns to what is usual where nothing more is seen.
RETURN = 0.005
# A row may accept everything for a while, but not forever.
HIGHEST_RATE = 0.98


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DraftState:
  """What drafts for B rows are made from.

  Attributes:
    tokens: [B, S] int32. Each row's tokens: prompt and new ones, the last one too.
    seen: [B, G, 2] float32. For drafts of each grade, the accepted tokens and the checked ones.
      Older steps weigh less.
    usual: [G, 2] float32. The same of all rows, those that have left, too.
    own: State of the drafter's own, such as the cache of a model; None if it has none.
  """

  tokens: jax.Array
  seen: jax.Array
  usual: jax.Array
  own: Any = None


class Outlook(NamedTuple):
  """The drafts that B rows could get now.

  Attributes:
    counts: [B] int32. Number of tokens of the draft; 0 for none.
    grades: [B] int32. The kind of draft, among those of which acceptance differs.
    sources: [B] int32. Where the drafter found the draft.
    first: [B] int32. The first token of the draft; -1 if it is not known before it is made.
  """

  counts: jax.Array
  grades: jax.Array
  sources: jax.Array
  first: jax.Array


class DraftInputs(NamedTuple):
  """What a drafter may look at.

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
  """Makes drafts. It is hashable: each drafter has programs of its own."""

  @property
  def most(self) -> int:
    """K, the most tokens of a draft."""

  @property
  def expected(self) -> tuple[float, ...]:
    """Expected acceptance of a token of each grade's drafts, before any was checked."""

  def start(self, weights: Any, rows: int, size: int) -> Any:
    """Return the drafter's own state for `rows` rows of up to `size` tokens, or None."""

  def enter(self, own: Any, slot: jax.Array) -> Any:
    """Return the own state with the row in a slot replaced by one of which nothing is known."""

  def placed(self, own: Any, weights: Any) -> Any:
    """Return the own state, constrained to the shardings that it has in all programs."""

  def outlook(self, tokens: Int[Array, 'B S'], last: Int[Array, ' B']) -> Outlook:
    """Return which drafts could be made; cheap, as it is called in every step.

    Args:
      tokens: [B, S] int32. The rows' tokens.
      last: [B] int32. Index of each row's last token.
    """

  def draft(
    self, inputs: DraftInputs, outlook: Outlook, width: int
  ) -> tuple[Any, Int[Array, 'B K']]:
    """Return the own state, and the first `width` tokens of each row's draft, [B, width] int32."""


def empty_drafting(drafter: Drafter, weights: Any, rows: int, size: int) -> DraftState:
  """Return the state of rows without tokens.

  Args:
    drafter: Makes the drafts.
    weights: Weights of the drafter, or None.
    rows: B.
    size: S, the most tokens of a row.
  """
  tokens = jnp.zeros((rows, size), jnp.int32)
  expected: Any = jnp.asarray(drafter.expected, jnp.float32)
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
  """Replace the row in a slot.

  Args:
    drafter: Makes the drafts.
    drafting: State of the rows.
    slot: Scalar int32. Number of the row.
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
  grades: Int[Array, ' B'],
  accepted: Int[Array, ' B'],
  checked: Int[Array, ' B'],
) -> DraftState:
  """Count the accepted and the checked tokens of each row's draft.

  A row's grades of which nothing was checked return slowly to what is usual.
  """
  mine = jnp.arange(drafting.seen.shape[1])[None, :] == grades[:, None]
  mine &= (checked > 0)[:, None]
  new = jnp.stack([accepted, checked], axis=1).astype(jnp.float32)[:, None, :]
  new = jnp.where(mine[:, :, None], new, 0)  # [B, G, 2]
  others = drafting.seen + RETURN * (_as_usual(drafting)[None] - drafting.seen)
  kept = jnp.where(jnp.any(mine, axis=0)[:, None], USUAL_DECAY, 1.0) * drafting.usual
  return dataclasses.replace(
    drafting,
    seen=jnp.where(mine[:, :, None], DECAY * drafting.seen + new, others),
    usual=kept + jnp.sum(new, axis=0),
  )


def expected_tokens(drafting: DraftState, outlook: Outlook, width: int) -> Float[Array, ' B']:
  """Return the tokens that each row may expect of a step that checks `width` of its draft."""
  mine = jnp.take_along_axis(drafting.seen, outlook.grades[:, None, None], axis=1)[:, 0]
  rate = jnp.minimum(mine[:, 0] / mine[:, 1], HIGHEST_RATE)
  power, total = jnp.ones_like(rate), jnp.ones_like(rate)
  for position in range(width):
    power = jnp.where(position < outlook.counts, power * rate, 0)
    total = total + power
  return total


def _as_usual(drafting: DraftState) -> jax.Array:
  """Return [G, 2]: what counts as seen of a row of which no draft was checked."""
  return drafting.usual / drafting.usual[:, 1:] * USUAL_TOKENS
