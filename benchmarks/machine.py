"""What this machine can do, measured: memory bandwidth and matrix rate. And the clock that the benchmarks share."""

from collections.abc import Callable
import os
import statistics
import time

# Read when jax first looks for devices: by default it takes most of a GPU's memory, and PyTorch, beside it, finds none.
os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402


def seconds(run: Callable[[], object]) -> float:
  """Of one call, until what it returns is there."""
  start = time.perf_counter()
  jax.block_until_ready(run())
  return time.perf_counter() - start


def median_seconds(run: Callable[[], object], repeats: int) -> float:
  """The median of `repeats` calls, after one that compiles and warms up."""
  seconds(run)
  return statistics.median(seconds(run) for _ in range(repeats))


def matmul_rate(dtype: str, size: int = 2048, repeats: int = 5) -> float:
  """FLOP/s of a size^3 product of random numbers (a chip runs faster on zeros), the best of `repeats`."""
  x = jax.random.normal(jax.random.key(0), (size, size), dtype)
  return 2 * size**3 / best_seconds(jax.jit(lambda x: x @ x), x, repeats)


def copy_bandwidth(size: int, repeats: int = 5) -> float:
  """Bytes/s, read and written, of a copy of `size` bytes, the best of `repeats`."""
  x = jnp.zeros(size // 4, jnp.float32)
  # An addition: a plain copy may be no operation at all.
  return 2 * x.nbytes / best_seconds(jax.jit(lambda x: x + 1), x, repeats)


def best_seconds(function, x, repeats: int, calls: int = 10) -> float:
  """Of one of `calls` calls in a row, so that starting them hides behind running them; the best of `repeats`."""
  jax.block_until_ready(function(x))
  return (
    min(seconds(lambda: [function(x) for _ in range(calls)][-1]) for _ in range(repeats)) / calls
  )
