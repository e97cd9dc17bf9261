"""The best plan for a request, on one machine or the machine that best suits the objective."""

from collections.abc import Callable, Sequence
import dataclasses
import functools

from t5x_inference_ext.errors import MeshError, UserError
from t5x_inference_ext.planner import search
from t5x_inference_ext.planner.advice import nothing_fits, nothing_meets
from t5x_inference_ext.planner.costs import cost
from t5x_inference_ext.planner.machine import Machine
from t5x_inference_ext.planner.request import OBJECTIVES, Plan, PlanRequest

# Batches to try if none is requested. Those that do not fit are left out.
BATCHES = tuple(2**i for i in range(11))
_RANKED_BY: dict[str, Callable[[Plan], float]] = {
  'latency': lambda plan: plan.seconds,
  'throughput': lambda plan: -plan.tokens_per_second,
  'cost': lambda plan: plan.chip_seconds_per_token,
}


@dataclasses.dataclass(frozen=True)
class Choice:
  """The chosen plan, and the plans that it was chosen from.

  Attributes:
    plan: The best plan.
    ranked: The best plan of each pair of layouts on the same machine and batch, best first. Plans
      that do not fit come last.
    others: The best plan of each other machine and batch that fits and meets the target, best
      first.
    objective: The objective of the choice, one of OBJECTIVES.
    target: Time limit in seconds that all these plans meet. None: no limit.
  """

  plan: Plan
  ranked: tuple[Plan, ...]
  others: tuple[Plan, ...]
  objective: str
  target: float | None

  @functools.cached_property
  def paper_plan(self) -> Plan | None:
    """The plan that the paper's convention would choose, with costs in the request's convention.

    None if it is the chosen plan itself. Cached, because both the report and the JSON file need it.
    """
    plan = self.plan
    request = plan.request
    if request.convention == 'paper' or plan.machine.chips == 1:
      return None
    in_paper = request.replace(convention='paper', efficiency=None)
    ranked = search.best(search.plans(in_paper, plan.machine))
    theirs = next((p for p in ranked if p.fits), None)
    if theirs is None:
      return None
    if theirs.mesh == plan.mesh and [c.case.layout for c in theirs.phases] == [
      c.case.layout for c in plan.phases
    ]:
      return None
    prefill, decode = (
      cost(c.case, request.convention, request.efficiency) for c in (theirs.prefill, theirs.decode)
    )
    return Plan(request, prefill, decode)


def choose(
  request: PlanRequest,
  machines: Sequence[Machine],
  objective: str = 'latency',
  *,
  batches: Sequence[int] = (),
  target: float | None = None,
  say: Callable[[str], None] = lambda text: None,
) -> Choice:
  """Return the best plan, and the plans that it was chosen from.

  On one machine with one batch, the fastest plan is chosen. Among several, the objective decides:
  'latency' takes the fastest plan, 'throughput' the one with the most tokens/s, 'cost' the one with
  the fewest chip-seconds per token. With a target the objective is ignored: the cheapest plan that
  meets the target is chosen.

  Args:
    request: The model and its work.
    machines: Machines to choose from.
    objective: One of OBJECTIVES.
    batches: Batches to choose from, smallest first. Empty: the request's own.
    target: Seconds, from the prompts to the last token. None: no target.
    say: Takes a line of progress for each machine and batch.

  Raises:
    NothingFits: No plan fits, or none meets the target.
    MeshError: None of the machines divides the model.
    UserError: The objective is unknown.
  """
  if objective not in OBJECTIVES:
    raise UserError(f'objective must be one of {", ".join(OBJECTIVES)}, got {objective!r}')
  candidates: list[list[Plan]] = []
  refusal = None
  for machine in machines:
    for batch in batches or (request.batch,):
      candidate = request.replace(batch=batch)
      try:
        fits = search.fits(candidate, machine)
      except MeshError as e:
        refusal = refusal or e
        break
      if not fits:  # larger batches will not fit either
        say(f'{machine}, batch {batch}: does not fit')
        break
      candidates.append(search.best(search.plans(candidate, machine)))
      say(f'{machine}, batch {batch}: {candidates[-1][0].seconds:.3g} s')
  if not candidates:
    if refusal and len(machines) == 1:
      raise refusal
    raise nothing_fits(
      request.replace(batch=min(batches, default=request.batch)), machines, refusal
    )
  if target is not None:
    fastest = min((ranked[0] for ranked in candidates), key=lambda plan: plan.seconds)
    if fastest.seconds > target:
      raise nothing_meets(target, fastest)
    candidates = [ranked for ranked in candidates if ranked[0].seconds <= target]
    objective = 'cost'
  candidates.sort(key=lambda ranked: _RANKED_BY[objective](ranked[0]))
  best, *others = candidates
  return Choice(best[0], tuple(best), tuple(ranked[0] for ranked in others), objective, target)
