"""The time of a compiled TPU program, from the compiler's estimates and the links' speed.

The serial estimate assumes that everything runs in sequence, without overlap:

- The cycles that the compiler estimates for an instruction are divided by the chip's clock. An
  instruction without cycles (custom calls, kernels, plain copies) takes the longer of two times:
  its bytes, read and written, over the HBM bandwidth, and its FLOPs over the bf16 peak. Reports
  list such instructions by name. An in-place dynamic-update-slice reads and writes only its update.
  Asynchronous copies into on-chip memory count as no time: they overlap with the rest.
- A Pallas kernel takes the longer of its schedule and its memory traffic (kernel_cost.py).
- A link carries hardware.Chip's bytes per second in each direction. If a collective's groups fill a
  ring of the torus, each chip has two links and data takes size/2 hops. In a chain, or a part of a
  ring, each chip has one link and data takes size-1 hops. The planner and the choice of a mesh use
  this model too (sharding.links). If two collective-permutes run at the same time in opposite
  directions, only the longer one counts.
- A collective that continues inside several fusions counts once, where it starts; what the fusions
  compute counts as compute.
- Instructions in a loop count once per turn. Only the longest branch of a conditional counts.

The overlapped estimate simulates the schedule in order: asynchronous collectives and copies run
beside other instructions (schedule.py).

Estimates are not measurements: they rank programs, and show where time is spent. For chips on which
programs were measured, calibration.py corrects the estimates by category of operations.
"""

import collections
from collections.abc import Iterable, Mapping, Sequence
import dataclasses
from typing import TypeVar

from t5x_inference_ext import hardware
from t5x_inference_ext.precompile import collective_cost, loops
from t5x_inference_ext.precompile.calibration import CalibratedTime, calibrated_time
from t5x_inference_ext.precompile.collective_cost import PERMUTE
from t5x_inference_ext.precompile.hlo_parser import parse_hlo
from t5x_inference_ext.precompile.kernel_schedule import KernelSchedule
from t5x_inference_ext.precompile.loops import Executed
from t5x_inference_ext.precompile.operations import OperationCost, operation_cost
from t5x_inference_ext.precompile.relayouts import WeightCopy, weight_copies
from t5x_inference_ext.precompile.schedule import exposed_seconds, stretch
from t5x_inference_ext.precompile.work import is_free
from t5x_inference_ext.sharding import links
from t5x_inference_ext.sharding.torus import TpuSlice

_Key = TypeVar('_Key')


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A program's estimated time on one slice.

  Attributes:
    costs: tuple of OperationCost. Every instruction that runs, in the order of the schedule, except
      the ends of asynchronous ones.
    unknown_loops: tuple of str. Loops whose trip count is not in the text. They count as one turn,
      so that the sums are too small.
    weight_copies: tuple of WeightCopy. Weights and caches that the program writes to HBM again.
    calibrated: CalibratedTime or None. Times corrected by measurements on this kind of chip.
  """

  costs: tuple[OperationCost, ...]
  unknown_loops: tuple[str, ...]
  weight_copies: tuple[WeightCopy, ...]
  calibrated: CalibratedTime | None = None

  @property
  def serial_seconds(self) -> float:
    return sum(c.seconds for c in self.costs)

  @property
  def overlapped_seconds(self) -> float:
    return sum(c.exposed_seconds for c in self.costs)

  @property
  def turn_seconds(self) -> tuple[float, float]:
    """(serial, overlapped) seconds of the longest loop, or of one turn if its length is unknown."""
    inside = [c for c in self.costs if c.in_layer_loop]
    return sum(c.seconds for c in inside), sum(c.exposed_seconds for c in inside)

  @property
  def flops(self) -> int:
    """FLOPs of all matrix products on one chip."""
    return sum(c.flops * c.count for c in self.costs)

  @property
  def by_kind(self) -> dict[str, float]:
    """Kind of operation -> serial seconds, longest first."""
    totals = _totals((c.kind, c.seconds) for c in self.costs)
    return dict(sorted(totals.items(), key=lambda item: -item[1]))

  @property
  def offending_relayouts(self) -> tuple[WeightCopy, ...]:
    """Copies of weights and caches to HBM in another layout or element type."""
    return tuple(c for c in self.weight_copies if c.relaid)


def estimate(
  text: str,
  slice_: TpuSlice,
  mesh: Mapping[str, int],
  chips: Sequence[int] | None = None,
  schedules: Mapping[str, KernelSchedule] | None = None,
) -> Estimate:
  """Estimate the time of one run of a compiled program.

  Args:
    text: str. compiled.as_text().
    slice_: TpuSlice. The chips that it was compiled for.
    mesh: mapping of axis to size, in the order of the devices.
    chips: sequence of int or None. The chip at each position of the mesh, in row-major order, as a
      number in row-major order of the slice's shape. By default as make_mesh arranges them.
    schedules: mapping of kernel name to KernelSchedule, or None: no kernel's schedule is known.

  Raises:
    HloError: The text is not a compiled program, or has a collective in an unknown form.
  """
  program, chip = parse_hlo(text), hardware.chip(slice_.kind)
  runs, unknown = loops.executed(program)
  if chips is None:
    chips = links.grid(slice_.shape, slice_.wraps, tuple(mesh.values())).ravel().tolist()
  costs = [
    operation_cost(program, run, chip, slice_, mesh, tuple(chips), schedules or {}) for run in runs
  ]
  _pair_permutes(runs, costs)
  _keep_longest_branches(runs, costs)
  exposed = exposed_seconds(runs, costs, lambda c: c.seconds, lambda c: c.busy_seconds)
  costs = [dataclasses.replace(c, exposed_seconds=e) for c, e in zip(costs, exposed)]
  _mark_layer_loop(runs, costs)
  kept = tuple(
    cost
    for run, cost in zip(runs, costs)
    if not is_free(run.instruction) and not (cost.step and cost.step.follows)
  )
  return Estimate(
    kept, tuple(unknown), tuple(weight_copies(program)), calibrated_time(runs, costs, chip)
  )


def _pair_permutes(runs: Sequence[Executed], costs: list[OperationCost]) -> None:
  """Set the shorter of two opposite simultaneous collective-permutes to 0 seconds."""
  under_way: dict[tuple[object, ...], list[int]] = collections.defaultdict(list)
  for n, run in enumerate(runs):
    i, waiting = run.instruction, under_way[stretch(run)]
    if i.phase == 'done':
      waiting[:] = [m for m in waiting if runs[m].instruction.name not in i.operands]
    sent = costs[n].collective
    if not sent or sent.kind != PERMUTE or i.phase != 'start':
      continue
    for m in waiting:
      other = costs[m].collective
      if other and collective_cost.opposite(other, sent):
        waiting.remove(m)
        shorter = min(n, m, key=lambda each: costs[each].seconds)
        costs[shorter] = dataclasses.replace(costs[shorter], seconds=0.0, busy_seconds=0.0)
        break
    else:
      waiting.append(n)


def _keep_longest_branches(runs: Sequence[Executed], costs: list[OperationCost]) -> None:
  """Set all branches of a conditional except the longest to 0 seconds."""
  totals: dict[tuple[object, str], dict[int, float]] = collections.defaultdict(dict)
  for run, cost in zip(runs, costs):
    for conditional, branch in run.branches:
      branches = totals[run.loops, conditional]
      branches[branch] = branches.get(branch, 0.0) + cost.seconds
  for n, run in enumerate(runs):
    for conditional, branch in run.branches:
      branches = totals[run.loops, conditional]
      if branch != max(branches, key=lambda b: branches[b]):
        costs[n] = dataclasses.replace(costs[n], seconds=0.0, busy_seconds=0.0, count=0)


def _mark_layer_loop(runs: Sequence[Executed], costs: list[OperationCost]) -> None:
  """Set in_layer_loop for all instructions in the outermost loop that takes longest."""
  totals = _totals((run.loops[0], cost.seconds) for run, cost in zip(runs, costs) if run.loops)
  longest = max(totals, key=lambda loop: totals[loop], default=None)
  for n, run in enumerate(runs):
    if run.loops and run.loops[0] == longest:
      costs[n] = dataclasses.replace(costs[n], in_layer_loop=True)


def _totals(pairs: Iterable[tuple[_Key, float]]) -> dict[_Key, float]:
  """Return the sum of seconds for each key."""
  totals: dict[_Key, float] = {}
  for key, seconds in pairs:
    totals[key] = totals.get(key, 0.0) + seconds
  return totals
