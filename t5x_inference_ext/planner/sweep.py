"""Latency against cost for machines and batches, and which of these points no other beats: the paper's Figure 1."""

from collections.abc import Callable, Iterable, Sequence
import csv
import dataclasses
import io

from t5x_inference_ext.errors import MeshError
from t5x_inference_ext.planner import search
from t5x_inference_ext.planner.case import PASSES
from t5x_inference_ext.planner.costs import PassCost
from t5x_inference_ext.planner.machine import Machine
from t5x_inference_ext.planner.memory import memory
from t5x_inference_ext.planner.request import PlanRequest


@dataclasses.dataclass(frozen=True)
class Point:
  """The fastest layout of one phase that fits, on one machine.

  Attributes:
    request: what is served, with its batch.
    cost: of the pass: a prefill, or a decode step.
    on_front: whether no other point of its phase and weights is as fast and as cheap.
  """

  request: PlanRequest
  cost: PassCost
  on_front: bool = False

  @property
  def phase(self) -> str:
    return self.cost.case.phase

  @property
  def seconds(self) -> float:
    return self.cost.seconds

  @property
  def chip_seconds_per_token(self) -> float:
    """Of the rows asked for."""
    return self.cost.chip_seconds_per_token * self.cost.case.batch / self.request.batch


def sweep(
  request: PlanRequest,
  machines: Sequence[Machine],
  batches: Sequence[int],
  weights: Sequence[str],
  progress: Callable[[Iterable], Iterable] = iter,
) -> list[Point]:
  """The points of both phases, marked, by phase, weights and latency.

  Args:
    request: what is asked, but for these.
    machines, batches, weights: to go through; what does not divide or does not fit is left out.
    progress: wraps what is gone through.
  """
  asked = [
    (machine, request.replace(batch=batch, weights=w))
    for machine in machines
    for batch in batches
    for w in weights
  ]
  points = []
  for machine, each in progress(asked):
    for phase in PASSES:
      found = _fastest(each, machine, phase)
      if found is not None:
        points.append(Point(each, found))
  marked = []
  for phase in PASSES:
    for w in weights:
      marked += front([p for p in points if p.phase == phase and p.request.weights == w])
  return marked


def front(points: Sequence[Point]) -> list[Point]:
  """The points by latency, those marked that cost less than all that are as fast."""
  least, marked = float('inf'), []
  for point in sorted(points, key=lambda p: (p.seconds, p.chip_seconds_per_token)):
    better = point.chip_seconds_per_token < least
    marked.append(dataclasses.replace(point, on_front=better))
    least = min(least, point.chip_seconds_per_token)
  return marked


def _fastest(request: PlanRequest, machine: Machine, phase: str) -> PassCost | None:
  positions = request.input_length if phase == 'prefill' else request.context
  try:
    meshes = search.meshes(request, machine)
  except MeshError:
    return None
  costs = (
    c
    for mesh in meshes
    for rows in search.row_choices(request.batch, mesh)
    for c in search.phase_costs(request, machine, mesh, phase, rows)
  )
  return min(
    (c for c in costs if memory(c.case, positions).fits), key=lambda c: c.seconds, default=None
  )


COLUMNS = (
  'phase',
  'weights',
  'machine',
  'chips',
  'batch',
  'rows',
  'mesh',
  'layout',
  'seconds',
  'chip_seconds_per_token',
  'mfu',
  'limit',
  'pareto',
)


def csv_text(points: Iterable[Point]) -> str:
  """A row for each point; `pareto` is 1 on the front."""
  out = io.StringIO()
  writer = csv.writer(out, lineterminator='\n')
  writer.writerow(COLUMNS)
  for p in points:
    case = p.cost.case
    writer.writerow(
      (
        p.phase,
        p.request.weights,
        case.machine,
        case.machine.chips,
        p.request.batch,
        case.batch,
        'x'.join(map(str, case.mesh)),
        case.layout,
        f'{p.seconds:.6g}',
        f'{p.chip_seconds_per_token:.6g}',
        f'{p.cost.mfu * p.request.batch / case.batch:.4f}',
        p.cost.limit,
        int(p.on_front),
      )
    )
  return out.getvalue()
