"""Corrections of estimates by category of operations, for chips on which programs were measured.

Two published programs were compiled unchanged, and their times estimated. Comparison with their
published measured times gave a factor for each category of operations:

  v4    The layer of Pope et al. (2022), rebuilt operation by operation: nine cases of PaLM 62B and
        540B, prefill and decode (their Table 2 and appendix C). Products take their estimated
        time; a collective takes about 3 us more than estimated; copies and elementwise operations
        take a quarter to a third of the estimate. Five numbers are fitted to nine cases, with
        errors of -8 to +5%; predicted from the other eight, each case has an error of -10 to +12%.
  v5e   Llama 3.1 70B of jax-llm-examples (llama3/README.md: 6.29 to 25.4 ms a step on 16 chips), a
        profile of one layer, and gathers measured in "How to Scale Your Model". Measured
        times as a share of the estimate: products of few rows with prefetched weights, two
        thirds; operations below 2.1 us, three tenths; collectives of 4 chips, 1.2 times
        (megabytes) to 1.5 times (below 200 kB). The errors in seven published cases are -6 to
        +12%.

The factors do not cover prefetches in unrolled programs, collectives of 32 chips, or the host. No
measurements are known for v5p and v6e: they have no calibrated time.
"""

from collections.abc import Callable, Sequence
import dataclasses
import math

from t5x_inference_ext.hardware import Chip
from t5x_inference_ext.precompile.loops import Executed
from t5x_inference_ext.precompile.operations import COPY, OperationCost
from t5x_inference_ext.precompile.schedule import exposed_seconds


@dataclasses.dataclass(frozen=True)
class CalibratedTime:
  """A program's time, corrected by category.

  Attributes:
    serial_seconds: float. Time with nothing overlapped.
    overlapped_seconds: float. Time if asynchronous operations overlap as in the schedule.
    spread: tuple of float. Lowest and highest relative error of the corrected times of the measured
      programs: (-0.1, 0.12) is 10% too low to 12% too high.
    source: str. The programs that the factors come from.
  """

  serial_seconds: float
  overlapped_seconds: float
  spread: tuple[float, float]
  source: str


@dataclasses.dataclass(frozen=True)
class _Calibration:
  """The factors of a chip: `corrected` returns the seconds of one run of an operation."""

  corrected: Callable[[OperationCost, float], float]
  spread: tuple[float, float]
  source: str


def calibrated_time(
  runs: Sequence[Executed], costs: Sequence[OperationCost], chip: Chip
) -> CalibratedTime | None:
  """Return a program's times corrected by category, or None for a chip without measurements.

  Args:
    runs: sequence of Executed. The instructions in the order of the schedule.
    costs: sequence of OperationCost. The cost of each instruction.
    chip: hardware.Chip. The chip.
  """
  calibration = _CALIBRATIONS.get(chip.name)
  if calibration is None:
    return None

  def corrected(cost: OperationCost, total: float) -> float:
    if not total:
      return 0.0
    floor = cost.flops / chip.bf16_flops  # no correction makes a product faster than the chip
    return cost.count * max(calibration.corrected(cost, total / cost.count), floor)

  def alone(cost: OperationCost) -> float:
    return corrected(cost, cost.seconds)

  def busy(cost: OperationCost) -> float:
    return corrected(cost, cost.busy_seconds) if cost.collective else cost.busy_seconds

  exposed = exposed_seconds(runs, costs, alone, busy)
  return CalibratedTime(
    sum(map(alone, costs)), sum(exposed), calibration.spread, calibration.source
  )


def _on_v4(cost: OperationCost, seconds: float) -> float:
  if cost.collective:
    return 0.96 * seconds + 3e-6
  if cost.flops:
    return seconds
  return (0.25 if cost.kind == COPY else 0.3) * seconds


def _on_v5e(cost: OperationCost, seconds: float) -> float:
  if cost.collective:
    if cost.collective.kind == 'all-reduce':
      return 1.09 * seconds
    # From 1.5 at 200 kB to 1.2 at 1 MB, linear in the logarithm of the bytes.
    small, large = math.log(200e3), math.log(1e6)
    share = (math.log(max(cost.bytes, 1)) - small) / (large - small)
    return (1.5 - 0.3 * min(max(share, 0.0), 1.0)) * seconds
  if cost.flops:
    return 0.68 * seconds
  return (0.3 if seconds < 2.1e-6 else 1.0) * seconds


_CALIBRATIONS = {
  'v4': _Calibration(_on_v4, (-0.10, 0.12), "nine measured cases of the paper's own program"),
  'v5e': _Calibration(_on_v5e, (-0.06, 0.12), 'seven measured cases of jax-llm-examples'),
}
