"""The TPU compiler's schedule of Pallas kernels: how many instruction bundles a step takes.

The compiler estimates no cycles for a kernel. But it writes the bundles that the kernel is compiled
to into files, if LIBTPU_INIT_ARGS asks for them when libtpu is loaded. So another process compiles
the program with one layer of each kind, and reads those files.
"""

import dataclasses
import functools
import os
import pathlib
import pickle
import re
import subprocess
import sys
import tempfile

from t5x_inference_ext.precompile.case import CompileCase
from t5x_inference_ext.sharding.torus import TpuSlice

_DUMP = (
  '--xla_jf_dump_to={} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final_bundles'
)
_FILE = re.compile(r'\d+-([a-z_]+)[.\d]*-\d+-final_bundles\.txt')
# A bundle: its address, marks of control flow such as LB, and one '>' for each loop around it.
_BUNDLE = re.compile(r'\s*(?:0x[0-9a-f]+|0)\s*(?:[A-Z]{2})?\s*:\s*(>*)\s*(?:> )*\{')
_SECONDS = 600


@dataclasses.dataclass(frozen=True)
class KernelSchedule:
  """The bundles of a kernel. A core executes one bundle a cycle, if it waits for nothing.

  Attributes:
    once: int. Bundles outside the loop over the kernel's grid.
    step: int. Bundles of one step of the grid, as if every conditional part ran.
  """

  once: int
  step: int

  def cycles(self, steps: int) -> int:
    """Return the cycles of a core that runs this many steps."""
    return self.once + self.step * steps


def kernel_schedules(
  case: CompileCase, slice_: TpuSlice, mesh: tuple[int, ...]
) -> dict[str, KernelSchedule]:
  """Return the schedule of each kernel in a case's program, by name; {} without kernels.

  A kernel that the compiler's files don't show is missing. So is every kernel if the other process
  fails: the program itself was compiled before, and its report then says that a price is missing.
  """
  if case.attention == 'xla':
    return {}
  layers = len(case.config.layer_pattern)
  few = dataclasses.replace(
    case, config=dataclasses.replace(case.config, num_layers=layers), scan_layers=False
  )
  return _compiled_schedules(few, slice_, mesh)


@functools.lru_cache(maxsize=64)
def _compiled_schedules(
  case: CompileCase, slice_: TpuSlice, mesh: tuple[int, ...]
) -> dict[str, KernelSchedule]:
  """Compile a case of few layers in another process, and return the schedules of its kernels.

  Cached, since the search for a layout compiles each layout with several numbers of layers.
  """
  with tempfile.TemporaryDirectory() as directory:
    environment = {**os.environ, 'LIBTPU_INIT_ARGS': _DUMP.format(directory)}
    try:
      ran = subprocess.run(
        [sys.executable, '-m', __name__],
        input=pickle.dumps((case, slice_, mesh)),
        env=environment,
        capture_output=True,
        timeout=_SECONDS,
      )
    except subprocess.TimeoutExpired:
      return {}
    return read_schedules(pathlib.Path(directory)) if ran.returncode == 0 else {}


def read_schedules(directory: pathlib.Path) -> dict[str, KernelSchedule]:
  """Return the schedule of each instruction whose bundles are in a directory, by its name.

  Names are without their number. If several instructions then have one name, the longest schedule
  is taken.
  """
  found: dict[str, KernelSchedule] = {}
  for path in directory.iterdir():
    match = _FILE.fullmatch(path.name)
    if not match:
      continue
    schedule = _schedule(path.read_text(encoding='utf-8', errors='replace'))
    before = found.get(match[1])
    if before is None or schedule.step > before.step:
      found[match[1]] = schedule
  return found


def _schedule(text: str) -> KernelSchedule:
  """Count the bundles outside of loops, and inside."""
  counts = [0, 0]
  for line in text.splitlines():
    if match := _BUNDLE.match(line):
      counts[min(len(match[1]), 1)] += 1
  return KernelSchedule(*counts)


def _main() -> None:
  """Compile the pickled (case, slice, mesh) on stdin; the compiler writes its files."""
  from t5x_inference_ext.precompile import slices
  from t5x_inference_ext.precompile.program import compile_case

  case, slice_, mesh = pickle.load(sys.stdin.buffer)
  compile_case(case, slices.slice_mesh(slice_, case.config, mesh))


if __name__ == '__main__':
  _main()
