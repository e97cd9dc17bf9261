"""Drafts copied from a row's own tokens: those after the longest match of its last tokens."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from t5x_inference_ext.engine.drafting import DraftInputs, Outlook


@dataclasses.dataclass(frozen=True)
class NgramDrafter:
  """Copies the tokens that followed an earlier occurrence of a row's last tokens.

  The earlier occurrence may be in the prompt or the output. The longest match is used; among
  equally long ones, the latest. If fewer tokens follow it than the draft may have, these tokens are
  repeated, as in a text that repeats itself.

  Attributes:
    most: K, the maximum number of tokens of a draft.
    longest: Maximum number of tokens of a match.
    expected: See drafting.Drafter. A draft's grade is the length of its match minus 1, at most
      len(expected) - 1.
  """

  most: int
  longest: int = 8
  expected: tuple[float, ...] = (0.1, 0.2, 0.3, 0.5)

  def outlook(self, tokens: Int[Array, 'B S'], last: Int[Array, ' B']) -> Outlook:
    """Find each row's last tokens earlier in the row. See drafting.Drafter."""
    size = tokens.shape[1]
    at = jnp.arange(size)[None, :]
    equal = at < last[:, None]  # whether the tokens up to here match the row's last ones
    matched = jnp.zeros(tokens.shape, jnp.int32)
    for back in range(min(self.longest, size)):
      index = jnp.maximum(last - back, 0)[:, None]
      wanted = jnp.take_along_axis(tokens, index, axis=1)
      equal &= (at >= back) & (jnp.roll(tokens, back, axis=1) == wanted)
      matched += equal
    # The longest match; among equally long ones, the latest.
    best = jnp.max(matched * size + at, axis=1)
    length, place = best // size, best % size
    follows = jnp.take_along_axis(tokens, jnp.minimum(place + 1, size - 1)[:, None], axis=1)[:, 0]
    return Outlook(
      counts=jnp.where(length > 0, self.most, 0).astype(jnp.int32),
      grades=jnp.clip(length, 1, len(self.expected)) - 1,
      sources=place,
      first=jnp.where(length > 0, follows, -1),
    )

  def draft(
    self, inputs: DraftInputs, outlook: Outlook, width: int
  ) -> tuple[None, Int[Array, 'B K']]:
    """Return the first tokens of each row's draft. See drafting.Drafter."""
    tokens, last, place = inputs.drafting.tokens, inputs.last[:, None], outlook.sources[:, None]
    period = jnp.maximum(last - place, 1)
    at = place + 1 + jnp.arange(width)[None, :] % period
    return None, jnp.take_along_axis(tokens, jnp.minimum(at, tokens.shape[1] - 1), axis=1)

  def start(self, weights: None, rows: int, size: int) -> None:
    """Return None: the rows' tokens are all that is needed."""

  def enter(self, own: None, slot: jax.Array) -> None:
    """Return None."""

  def placed(self, own: None, weights: None) -> None:
    """Return None."""
