"""The memory that a compiled program takes on a chip, as reported by the compiler."""

import dataclasses
import math
from typing import Any

import jax

from t5x_inference_ext.quantization.formats import stored_size


@dataclasses.dataclass(frozen=True)
class CompiledMemory:
  """Bytes on one chip, for one program.

  Attributes:
    weights: int. The weights, which are arguments.
    cache: int. The KV cache, if it is an argument or a result. The cache of 'generate' is among the
      temporaries.
    other: int. Tokens, lengths and logits that are arguments or results, and the program's code.
    temporaries: int. Further memory that the program needs while it runs.
    available: int or None. Memory that a program may take in total; None if unknown (CPU).
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
  """Return a program's memory as the compiler reports it.

  The field `other` is what the compiler counts as arguments, results and code, without weights and
  cache.

  Args:
    phase: str. The program's phase, one of phases.COMPILE_PHASES.
    arguments: tuple of trees. The arguments that the program was lowered with: weights first, then
      the cache or its container.
    compiled: The compiled program.
    available: int or None. Bytes that a program may take on a chip.
  """
  found: Any = compiled.memory_analysis()
  results = found.output_size_in_bytes - found.alias_size_in_bytes
  total = found.argument_size_in_bytes + results + found.generated_code_size_in_bytes
  weights = shard_bytes(arguments[0])
  if phase in ('decode', 'verify'):
    cache = shard_bytes(arguments[1])
  elif phase == 'prefill':
    cache = results
  elif phase == 'generate':
    cache = 0
  else:
    cache = shard_bytes(arguments[1].cache)
  other = total - weights - cache
  return CompiledMemory(weights, cache, other, found.temp_size_in_bytes, available)


def shard_bytes(tree: Any) -> int:
  """Return the bytes on one device of a tree of arrays, or of shapes with shardings."""
  return sum(
    stored_size(math.prod(x.sharding.shard_shape(x.shape)), x.dtype) for x in jax.tree.leaves(tree)
  )
