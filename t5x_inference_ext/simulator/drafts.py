"""Drafts in virtual time: which tokens are right, and how many a step checks.

A trace does not show how often drafts are right, so the probability is given. How many tokens a
step checks is chosen as in the compiled steps, by the functions that they use.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from t5x_inference_ext.engine.draft_width import best_width, verify_widths
from t5x_inference_ext.engine.drafting import USUAL_TOKENS, DraftState, Outlook, note_acceptance
from t5x_inference_ext.speculation import Speculation


class DraftedStep(NamedTuple):
  """A step that may check drafts.

  Attributes:
    width: Number of draft tokens that the step checks.
    kind: Index of that number among those that a step can check, 0 for none.
    made: [B] int32. Number of new tokens of each row.
    drafted: Number of draft tokens that are checked.
    accepted: Number of these that are right.
  """

  width: int
  kind: int
  made: np.ndarray
  drafted: int
  accepted: int


class SimulatedDrafts:
  """Drafts for the rows of B slots, each of the full length that the row has room for.

  Args:
    speculation: Kind and length of the drafts.
    acceptance: Probability that each token of a draft is right, given that those before it are: of
      the first, the second and so on; the last number is for all further tokens.
    slots: B.
    seed: Seed of the random choice of right tokens.
  """

  def __init__(
    self, speculation: Speculation, acceptance: Sequence[float], slots: int, seed: int = 0
  ) -> None:
    self.widths = (0, *verify_widths(speculation.most))
    self._most, self._slots = speculation.most, slots
    # A plain step shows whether the first token of an n-gram's draft would be right.
    self._least_checked = int(speculation.kind == 'ngram')
    self._shares = np.asarray(
      [acceptance[min(i, len(acceptance) - 1)] for i in range(speculation.most)]
    )
    self._rng = np.random.default_rng(seed)
    # Acceptance is not counted by grade, and it is expected to be right from the beginning.
    usual = np.asarray([[self._shares.mean(), 1.0]], np.float32) * np.float32(USUAL_TOKENS)
    none = np.zeros((slots, 0), np.int32)
    self._state = DraftState(none, np.tile(usual, (slots, 1, 1)), usual)  # type: ignore[arg-type]  # numpy in place of JAX

  def enter(self, slot: int) -> None:
    """Let a new row enter a slot: it starts with the usual acceptance."""
    usual = self._state.usual
    self._state.seen[slot] = usual / usual[:, 1:] * USUAL_TOKENS

  def step(self, prices: np.ndarray, left: np.ndarray, waited: bool) -> DraftedStep:
    """Run a step of all rows.

    Args:
      prices: [W] float32. Time of a step that checks each of `widths`, in any unit.
      left: [B] int. Number of tokens that each row gets before it ends; 0 in free slots.
      waited: Whether a row waits for a slot.
    """
    live, zeros = left > 0, np.zeros(self._slots, np.int32)
    counts = np.where(live, np.minimum(self._most, left - 1), 0).astype(np.int32)
    outlook = Outlook(counts, zeros, zeros, zeros)  # type: ignore[arg-type]  # numpy's
    ask = self.widths, prices, self._state, outlook, np.maximum(left, 1), live, np.bool_(waited)
    kind = int(best_width(*ask))
    width = self.widths[kind]
    guesses = self._rng.random((self._slots, self._most)) < self._shares
    right = np.cumprod(guesses, axis=1).sum(axis=1)
    limit = np.minimum(counts, max(width, self._least_checked))
    accepted = np.minimum(right, limit).astype(np.int32)
    checked = np.minimum(right + 1, limit).astype(np.int32)
    self._state = note_acceptance(self._state, zeros, accepted, checked)
    taken = np.minimum(accepted, width)
    made = np.where(live, 1 + taken, 0).astype(np.int32)
    return DraftedStep(width, kind, made, int(np.minimum(counts, width).sum()), int(taken.sum()))
