"""Random models, slices of 1 to 4096 chips and work: no crash, and more never takes less time."""

import json
import math

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from t5x_inference_ext.config import PRESETS, preset
from t5x_inference_ext.errors import MeshError, UserError
from t5x_inference_ext.planner import search
from t5x_inference_ext.planner.choose import choose
from t5x_inference_ext.planner.json_text import plan_json
from t5x_inference_ext.planner.machine import Machine, known_machines
from t5x_inference_ext.planner.report import plan_text
from t5x_inference_ext.planner.request import PLAN_PHASES, PlanRequest

MACHINES = [
  *(name for chip in ('v4', 'v5e', 'v5p', 'v6e', 'A100', 'H100') for name in known_machines(chip)),
  'v4:4x4x16',
  'v4:8x16x16',
  'v4:16x16x16',
  'v5p:16x16x16',
]
# Each example is a search: shrinking one that fails would take minutes.
NO_SHRINKING = (Phase.explicit, Phase.generate)
COUNTS = st.integers(0, 12).flatmap(lambda n: st.integers(2**n, 2 ** (n + 1)))


@st.composite
def requests(draw) -> tuple[PlanRequest, Machine]:
  """A request on one mesh of one machine; sizes are drawn by their logarithms."""
  model = preset(draw(st.sampled_from(sorted(PRESETS))))
  machine = Machine.parse(draw(st.sampled_from(MACHINES)))
  request = PlanRequest(
    model,
    draw(COUNTS),
    draw(COUNTS),
    draw(COUNTS),
    draw(st.sampled_from(['int8', 'bfloat16'])),
    draw(st.sampled_from(['int8', 'bfloat16'])),
    phase=draw(st.sampled_from(PLAN_PHASES)),
  )
  try:
    meshes = machine.meshes(model)
  except MeshError:  # told in a sentence by every command
    return request, machine
  return request.replace(mesh=draw(st.sampled_from(meshes))), machine


@settings(max_examples=40, deadline=None, derandomize=True, phases=NO_SHRINKING)
@given(requests(), st.sampled_from(['batch', 'input_length', 'output_length']), COUNTS)
def test_more_work_never_takes_less_time(case, what, more):
  request, machine = case
  if request.mesh is None:
    return
  found = search.plans(request, machine)
  assert found and all(0 < c.seconds < math.inf for plan in found for c in plan.phases)
  larger = request.replace(**{what: getattr(request, what) + more})
  after = search.plans(larger, machine)
  assert after[0].seconds >= found[0].seconds * (1 - 1e-12)


@settings(max_examples=15, deadline=None, derandomize=True, phases=NO_SHRINKING)
@given(requests())
def test_every_case_has_a_report_or_a_sentence(case):
  request, machine = case
  try:
    choice = choose(request, [machine])
  except UserError as refused:
    assert '\n' not in str(refused) and len(str(refused)) > 20
    return
  assert str(machine) in plan_text(choice)
  assert json.loads(plan_json(choice))['plan']['seconds'] == choice.plan.seconds
