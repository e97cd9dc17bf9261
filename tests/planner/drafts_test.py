"""Where drafts pay, by the planner's model."""

import dataclasses

import pytest

from t5x_inference_ext.config import preset
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.planner import choose, drafts
from t5x_inference_ext.planner.machine import Machine
from t5x_inference_ext.planner.request import PlanRequest
from t5x_inference_ext.sharding.layout import Layout

LAYOUTS = (Layout(), Layout())


def plan(batch, model='palm_540b', slice_name='v4:4x4x4'):
  request = PlanRequest(preset(model), batch, phase='decode', layouts=LAYOUTS)
  return choose.choose(request, [Machine.parse(slice_name)]).plan


def test_a_step_of_one_position_is_a_decode_step():
  """But for attention, which computes the positions that a mask hides, and for logits.

  A step that checks drafts moves all of them, a decode step only the most likely tokens.
  """
  step = plan(64).decode
  (checked,) = drafts.checking_steps(plan(64), 1)
  one = dataclasses.replace(step.case, phase='verify')
  assert dataclasses.replace(checked.cost.case, length=1, context=step.case.context) == one
  assert drafts.cost(one, step.convention, step.efficiency).parts == pytest.approx(
    step.parts, rel=5e-3
  )


def test_drafts_pay_with_few_rows_and_not_with_many():
  few, many = (drafts.checking_steps(plan(rows), 8) for rows in (8, 256))
  assert [step.width for step in few] == [1, 2, 4, 8]
  for some in (few, many):
    times = [step.times for step in some]
    assert times == sorted(times) and times[0] > 1
  assert few[-1].times < 1.5 < 3 < many[-1].times
  assert few[-1].break_even < 0.3 and many[-1].break_even > 0.6
  for step in (*few, *many):
    if step.break_even is not None:
      gained = drafts.tokens_of_step(step.break_even, step.width)
      assert gained == pytest.approx(step.times, rel=1e-6)
    assert step.seconds_per_token(0) == step.cost.seconds
    assert step.seconds_per_token(1) == pytest.approx(step.cost.seconds / (step.width + 1))


def test_a_step_that_takes_longer_than_it_can_give_never_pays():
  (step,) = drafts.checking_steps(plan(8), 1)
  assert dataclasses.replace(step, plain=step.cost.seconds / 2).break_even is None
  assert dataclasses.replace(step, plain=step.cost.seconds / 1.9).break_even == pytest.approx(0.9)


def test_all_positions_have_logits():
  decode = plan(64, 'palm_8b', 'v4:2x2x1').decode
  (one, *_, checked) = drafts.checking_steps(plan(64, 'palm_8b', 'v4:2x2x1'), 8)
  assert checked.cost.work.logits_flops == 9 * decode.work.logits_flops
  sent = [
    sum(c.collective.bytes for c in each.collectives if c.collective.name == 'logits')
    for each in (decode, one.cost, checked.cost)
  ]
  # A decode step sums the logits, but moves only the best tokens after that.
  assert 2 * sent[2] == 9 * sent[1] and 0 < 2 * sent[0] < sent[1]


def test_the_report_says_where_drafts_pay():
  steps = drafts.checking_steps(plan(8), 8)
  text = drafts.drafts_text(steps)
  assert 'Checking 1 pays from an acceptance of 0.0' in text
  assert [line.split()[0] for line in text.splitlines()[-4:]] == ['1', '2', '4', '8']
  found = drafts.drafts_dict(steps)
  assert [step['draft'] for step in found] == [1, 2, 4, 8]
  assert found[3]['seconds_per_token_at_0.65'] < found[3]['seconds']


@pytest.mark.parametrize('most', [0, 17])
def test_drafts_of_too_many_tokens_are_refused(most):
  with pytest.raises(RequestError, match=f'1 to 16 tokens of a draft, got {most}'):
    drafts.checking_steps(plan(8), most)
