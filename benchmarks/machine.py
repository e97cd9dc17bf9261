"""Measured rates of this machine, memory bandwidth and products, and the benchmarks' clock."""

from collections.abc import Callable
import os
import statistics
import time

# jax reads this when it first looks for devices. By default jax takes most of a GPU's memory, and
# leaves none for PyTorch.
os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402


def seconds(run: Callable[[], object]) -> float:
  """Return the time of one call, until its result is computed."""
  start = time.perf_counter()
  jax.block_until_ready(run())
  return time.perf_counter() - start


def median_seconds(run: Callable[[], object], repeats: int) -> float:
  """Return the median time of `repeats` calls, after one that compiles and warms up."""
  seconds(run)
  return statistics.median(seconds(run) for _ in range(repeats))


def matmul_rate(dtype: str, size: int = 2048, repeats: int = 5) -> float:
  """Return FLOP/s of a size^3 product, the best of `repeats`.

  The numbers are random: a chip runs faster on zeros.
  """
  x = jax.random.normal(jax.random.key(0), (size, size), dtype)
  return 2 * size**3 / best_seconds(jax.jit(lambda x: x @ x), x, repeats)


def copy_bandwidth(size: int, repeats: int = 5) -> float:
  """Return bytes/s, read and written, of a copy of `size` bytes, the best of `repeats`."""
  x = jnp.zeros(size // 4, jnp.float32)
  # An addition, because XLA may drop a plain copy.
  return 2 * x.nbytes / best_seconds(jax.jit(lambda x: x + 1), x, repeats)


def best_seconds(function, x, repeats: int, calls: int = 10) -> float:
  """Return the time of a call, the best of `repeats`.

  `calls` calls are started in a row, so that a call runs while the next one is started.
  """
  jax.block_until_ready(function(x))
  return (
    min(seconds(lambda: [function(x) for _ in range(calls)][-1]) for _ in range(repeats)) / calls
  )
