"""Sweep of latency against cost over machines and batches, as in the paper's Figure 1."""

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
  """The fastest layout of one phase that fits, on one machine with one batch.

  Attributes:
    request: The model and its work, with the batch of this point.
    cost: Cost of the pass: a prefill or a decode step.
    on_front: Whether the point is on the Pareto front of its phase and weights.
  """

  request: PlanRequest
  cost: PassCost
  on_front: bool = False

  @property
  def phase(self) -> str:
    """'prefill' or 'decode'."""
    return self.cost.case.phase

  @property
  def seconds(self) -> float:
    """Seconds of the pass."""
    return self.cost.seconds

  @property
  def chip_seconds_per_token(self) -> float:
    """Chip-seconds per token. Empty rows are not counted."""
    return self.cost.chip_seconds_per_token * self.cost.case.batch / self.request.batch


def sweep(
  request: PlanRequest,
  machines: Sequence[Machine],
  batches: Sequence[int],
  weights: Sequence[str],
  say: Callable[[str], None] = lambda text: None,
) -> list[Point]:
  """Return points of both phases, sorted by phase, weights and latency, with the front marked.

  There is no point for a machine that does not divide the model, or for a batch that does not fit.

  Args:
    request: The model and its work. Its batch and weights are ignored.
    machines: Machines to try.
    batches: Batches to try.
    weights: Dtypes of weights to try.
    say: Takes a line of progress for each machine.
  """
  points = []
  for n, machine in enumerate(machines, 1):
    say(f'sweep: {machine}, {n} of {len(machines)}')
    for batch in batches:
      for dtype in weights:
        candidate = request.replace(batch=batch, weights=dtype)
        for phase in PASSES:
          fastest = _fastest(candidate, machine, phase)
          if fastest is not None:
            points.append(Point(candidate, fastest))
  return [
    point
    for phase in PASSES
    for dtype in weights
    for point in front([p for p in points if p.phase == phase and p.request.weights == dtype])
  ]


def front(points: Iterable[Point]) -> list[Point]:
  """Sort points by latency; mark those on the Pareto front (cheaper than every faster point)."""
  least, marked = float('inf'), []
  for point in sorted(points, key=lambda p: (p.seconds, p.chip_seconds_per_token)):
    better = point.chip_seconds_per_token < least
    marked.append(dataclasses.replace(point, on_front=better))
    least = min(least, point.chip_seconds_per_token)
  return marked


def _fastest(request: PlanRequest, machine: Machine, phase: str) -> PassCost | None:
  """Return the fastest pass of a phase that fits, or None if none fits."""
  positions = request.input_length if phase == 'prefill' else request.context
  alone = request.replace(phase=phase)
  try:
    meshes = search.meshes(request, machine)
  except MeshError:
    return None
  fitting = [
    cost
    for mesh in meshes
    for rows in search.row_choices(request.batch, mesh)
    for cost in search.phase_costs(alone, machine, mesh, phase, rows)
    if memory(cost.case, positions).fits
  ]
  return min(fitting, key=lambda cost: cost.seconds, default=None)


def _csv_row(point: Point) -> dict[str, object]:
  case, request = point.cost.case, point.request
  return {
    'phase': point.phase,
    'weights': request.weights,
    'machine': case.machine,
    'chips': case.machine.chips,
    'batch': request.batch,
    'rows': case.batch,
    'mesh': case.mesh_text,
    'layout': case.layout,
    'seconds': f'{point.seconds:.6g}',
    'chip_seconds_per_token': f'{point.chip_seconds_per_token:.6g}',
    'mfu': f'{point.cost.mfu * request.batch / case.batch:.4f}',
    'limit': point.cost.limit,
    'pareto': int(point.on_front),
  }


def csv_text(points: Sequence[Point]) -> str:
  """Return points (at least one) as the text of a CSV; `pareto` is 1 on the front."""
  rows = [_csv_row(point) for point in points]
  out = io.StringIO()
  writer = csv.DictWriter(out, list(rows[0]), lineterminator='\n')
  writer.writeheader()
  writer.writerows(rows)
  return out.getvalue()
