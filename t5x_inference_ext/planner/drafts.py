"""Predicts when speculative decoding pays: the time of decode steps that check draft tokens.

A step that checks K draft tokens of each row is one pass over K + 1 positions of each row, with
logits at every position. If a draft token is right with probability a whenever all earlier tokens
of the draft are, a step gives a row 1 + a + ... + a^K tokens on average. The time of making drafts
is not included.
"""

from collections.abc import Sequence
import dataclasses
import functools

from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.planner.costs import PassCost, cost
from t5x_inference_ext.planner.request import Plan
from t5x_inference_ext.planner.text import table, wrap
from t5x_inference_ext.speculation import MOST_DRAFT
from t5x_inference_ext.text_format import milliseconds

# Probabilities that a draft token is right: the last columns of the table.
ACCEPTANCES = (0.5, 0.65, 0.8, 0.9)


@dataclasses.dataclass(frozen=True)
class CheckingStep:
  """A decode step that checks drafts, beside a plain one.

  Attributes:
    width: K, the number of draft tokens of each row.
    cost: Cost of the step.
    plain: Seconds of a decode step without drafts.
  """

  width: int
  cost: PassCost
  plain: float

  @property
  def times(self) -> float:
    """Time of the step divided by the time of a step without drafts."""
    return self.cost.seconds / self.plain

  @functools.cached_property
  def break_even(self) -> float | None:
    """Lowest probability of a right draft token at which the step pays; None: it never pays."""
    if self.times >= self.width + 1:
      return None
    low, high = 0.0, 1.0
    for _ in range(40):
      middle = (low + high) / 2
      low, high = (
        (middle, high) if tokens_of_step(middle, self.width) < self.times else (low, middle)
      )
    return high

  def seconds_per_token(self, acceptance: float) -> float:
    """Return seconds per token of a row if a draft token is right with this probability."""
    return self.cost.seconds / tokens_of_step(acceptance, self.width)


def tokens_of_step(acceptance: float, width: int) -> float:
  """Return the mean number of tokens that a row gets from a step that checks `width` drafts."""
  return sum(acceptance**i for i in range(width + 1))


def checking_steps(plan: Plan, most: int) -> list[CheckingStep]:
  """Return the steps that check 1, 2, 4, ... and at last `most` tokens of each row.

  Raises:
    RequestError: `most` is out of its range.
  """
  if not 1 <= most <= MOST_DRAFT:
    raise RequestError(f'speculate must be 1 to {MOST_DRAFT} tokens of a draft, got {most}')
  widths = sorted({*(2**i for i in range(5) if 2**i < most), most})
  step = plan.decode
  return [
    CheckingStep(
      width,
      cost(
        dataclasses.replace(
          step.case, phase='verify', length=width + 1, context=step.case.context + width
        ),
        step.convention,
        step.efficiency,
      ),
      step.seconds,
    )
    for width in widths
  ]


def drafts_text(steps: Sequence[CheckingStep]) -> str:
  """Return a table of steps that check drafts, and a sentence that says where they pay."""
  rows = [['draft', 'a step', 'times', 'pays from', *(f'at {a:g}' for a in ACCEPTANCES)]]
  for step in steps:
    pays = step.break_even
    rows.append(
      [
        str(step.width),
        milliseconds(step.cost.seconds),
        f'{step.times:.2f}',
        'never' if pays is None else f'{pays:.2f}',
        *(milliseconds(step.seconds_per_token(a)) for a in ACCEPTANCES),
      ]
    )
  paying = [step for step in steps if step.break_even is not None]
  text = f'drafts: a plain step takes {milliseconds(steps[0].plain)}. '
  if not paying:
    text += 'Checking drafts never pays here: a step takes more times as long than it can give.'
  else:
    first = min(paying, key=lambda step: (step.break_even, step.width))
    text += (
      f'Checking {first.width} pays from an acceptance of {first.break_even:.2f} for each draft '
      'token on. Last columns: time of a token of a row, by acceptance. The time of making drafts '
      'is not included.'
    )
  return '\n'.join(['', *wrap(text), *table(rows)])


def drafts_dict(steps: Sequence[CheckingStep]) -> list[dict[str, float | None]]:
  """Return the numbers of drafts_text, JSON-ready."""
  return [
    {
      'draft': step.width,
      'seconds': step.cost.seconds,
      'times': step.times,
      'break_even': step.break_even,
      **{f'seconds_per_token_at_{a:g}': step.seconds_per_token(a) for a in ACCEPTANCES},
    }
    for step in steps
  ]
