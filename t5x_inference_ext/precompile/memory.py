"""What a compiled program takes of a chip's memory, as the compiler counts it."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class CompiledMemory:
  """Bytes of one chip.

  Attributes:
    weights: of these arguments.
    cache: where it is an argument, as of a decode step, or of a prefill, where it is a result. A whole generation has it
      among its temporaries.
    other: tokens, lengths and logits that go in and out, and the program's code.
    temporaries: what the program needs besides while it runs.
    available: what a program may take in all, or None where nobody says (CPU).
  """

  weights: int
  cache: int
  other: int
  temporaries: int
  available: int | None = None

  @property
  def needed(self) -> int:
    return self.weights + self.cache + self.other + self.temporaries


def memory_of(
  phase: str, arguments: tuple[Any, ...], compiled: jax.stages.Compiled, available: int | None
) -> CompiledMemory:
  """Shares out what the compiler says: `other` is what its sum has beyond the plain bytes of weights and cache.

  Args:
    phase: of the program.
    arguments: what it was lowered with; weights, and the cache or what holds it, come first.
    compiled: the program.
    available: bytes of a chip.
  """
  found = compiled.memory_analysis()
  results = found.output_size_in_bytes - found.alias_size_in_bytes
  total = found.argument_size_in_bytes + results + found.generated_code_size_in_bytes
  weights = shard_bytes(arguments[0])
  held = lambda: shard_bytes(arguments[1].cache)
  cache = {
    'decode': lambda: shard_bytes(arguments[1]),
    'prefill': lambda: results,
    'generate': lambda: 0,
  }.get(phase, held)()
  return CompiledMemory(
    weights, cache, total - weights - cache, found.temp_size_in_bytes, available
  )


def shard_bytes(tree: Any) -> int:
  """What one device holds of a tree of arrays, or of shapes with shardings."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * jnp.dtype(x.dtype).itemsize
    for x in jax.tree.leaves(tree)
  )
