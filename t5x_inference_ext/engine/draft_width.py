"""The choice of how many draft tokens a step checks, for all rows together.

The functions compute with JAX in the compiled loop of steps, and with numpy in a simulation.
"""

from typing import Any

from t5x_inference_ext.engine.drafting import DraftState, Outlook, expected_tokens

# Factor by which a step that checks drafts must be expected to beat a plain step: prices and
# acceptance rates are only estimates.
LEAST_GAIN = 1.1


def verify_widths(most: int) -> tuple[int, ...]:
  """Return the numbers of draft tokens that steps may check, at most `most`, in ascending order.

  With many rows, checking few tokens of each can be worthwhile where checking many is not.
  """
  return (most,) if most < 4 else (max(2, 3 * most // 8), most)


def best_width(
  widths: tuple[int, ...],
  prices: Any,
  drafting: DraftState,
  outlook: Outlook,
  left: Any,
  live: Any,
  waited: Any,
) -> Any:
  """Return the index in `widths` of the number of draft tokens to check.

  If a row waits for a slot, the number with the most new tokens per time is chosen. If none waits,
  slots that become free early are useless, and the number with which the last row ends soonest is
  chosen.

  Args:
    widths: Numbers of draft tokens that a step can check.
    prices: [W] float32. Time of a step that checks each number.
    drafting: Drafting state, with the acceptance of earlier drafts.
    outlook: The drafts that rows could get.
    left: [B] int32. Maximum number of tokens that each row gets before it ends.
    live: [B] bool. Whether the row has not ended.
    waited: Scalar bool. Whether a row waits for a slot.
  """
  xp = prices.__array_namespace__()
  gains = xp.stack([expected_tokens(drafting, outlook, width) for width in widths])  # [W, B]
  together = xp.sum(xp.where(live[None, :], gains, 0), axis=1)
  steps = xp.max(xp.where(live[None, :], left[None, :] / gains, 0), axis=1)
  rates = xp.where(waited, together, 1 / xp.maximum(steps, 1)) / prices
  rates = rates * xp.asarray([LEAST_GAIN, *[1.0] * (len(widths) - 1)], dtype=rates.dtype)
  drafted = xp.any(outlook.counts > 0)
  return xp.where(drafted, xp.argmax(rates), 0)
