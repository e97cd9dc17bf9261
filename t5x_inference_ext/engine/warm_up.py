"""Compilation of every program that a scheduler can run, before the first request arrives."""

from collections.abc import Callable
import time
from typing import Any, NamedTuple


class CompiledProgram(NamedTuple):
  """A program that is ready to run.

  Attributes:
    name: Function of engine/programs.py.
    sizes: Static sizes of this program, by name.
    seconds: Duration of its first run, on empty inputs, including compilation or reading from jax's
      persistent compilation cache.
  """

  name: str
  sizes: dict[str, int]
  seconds: float

  def __str__(self) -> str:
    sizes = ', '.join(f'{name}={size}' for name, size in self.sizes.items())
    return f'{self.name}({sizes}): {self.seconds:.2f} s'


def timed_run(
  programs: list[CompiledProgram],
  name: str,
  run: Callable[[], Any],
  wait: Callable[[], None],
  **sizes: int,
) -> Any:
  """Run a program, `wait` for it, add its time to `programs`, and return its result."""
  start = time.perf_counter()
  result = run()
  wait()
  programs.append(CompiledProgram(name, sizes, time.perf_counter() - start))
  return result
