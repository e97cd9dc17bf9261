"""The time of Pallas kernels in a compiled program."""

from collections.abc import Mapping
import dataclasses
import re

from t5x_inference_ext.hardware import Chip
from t5x_inference_ext.precompile.hlo import Instruction
from t5x_inference_ext.precompile.kernel_schedule import KernelSchedule

# Share of the memory's full rate at which a kernel reads.
READ_RATE = 0.85
_METADATA = re.compile(r'kernel_metadata=\{([^}]*)\}')
_FIELD = re.compile(r'"(\w+)":\s*"(\d+)"')


@dataclasses.dataclass(frozen=True)
class KernelCost:
  """The time of one run of a kernel: the longer of its schedule and its memory traffic.

  Attributes:
    name: str. Name of the kernel.
    schedule_seconds: float or None. Time of the compiler's schedule of bundles, without waiting for
      memory; None if the compiler did not show one.
    memory_seconds: float. Time to read and write its operands, as far as it reads them, and results
      once, at READ_RATE of the memory's full rate.
  """

  name: str
  schedule_seconds: float | None
  memory_seconds: float

  @property
  def seconds(self) -> float:
    return max(self.schedule_seconds or 0.0, self.memory_seconds)


def kernel_cost(
  instruction: Instruction, moved: int, chip: Chip, schedules: Mapping[str, KernelSchedule]
) -> KernelCost | None:
  """Return the cost of a kernel of this package, or None for any other instruction.

  Args:
    instruction: Instruction. Its metadata says how many steps the kernel's grid has, into how many
      parts it can be split between cores, and how many bytes of its operands it does not read.
    moved: int. Bytes of its operands and results.
    chip: hardware.Chip. The rates of a chip.
    schedules: Mapping of kernel name to KernelSchedule.
  """
  found = _METADATA.search(instruction.attributes)
  grid = {name: int(value) for name, value in _FIELD.findall(found[1])} if found else {}
  if 'steps' not in grid:
    return None
  name = instruction.name.partition('.')[0]
  schedule, cores = schedules.get(name), min(chip.cores, grid['parallel'])
  seconds = None
  if schedule and chip.clock_hz:
    seconds = schedule.cycles(-(-grid['steps'] // cores)) / chip.clock_hz
  moved -= grid.get('unread', 0)
  return KernelCost(name, seconds, moved / (READ_RATE * chip.hbm_bandwidth))
