"""Asynchronous operations of a compiled program: where each starts, continues, and ends.

Two forms are found:

- Pairs of instructions such as all-gather-start and all-gather-done, some with updates between.
- Chains of fusions, which the compiler writes for v5e, v5p and v6e ("asynchronous collective
  fusion"). The first fusion starts the collective, the last one waits for it, and those between
  them compute something else, such as a product, while the collective continues. The text repeats
  the collective inside each fusion of the chain, although it runs only once.
"""

import dataclasses
import re

from t5x_inference_ext.precompile.hlo import Computation, Instruction, Module

_FUSED = '"async_collective_fusion_config":'
# Chains of one channel, such as the gathers of several matrices, differ in their chain_id.
_CHAIN = re.compile(r'\bchannel_id=\d+|\bchain_id="\d+"')
_END = 'async-collective-done'


@dataclasses.dataclass(frozen=True)
class AsyncStep:
  """One instruction's part in an asynchronous operation.

  Attributes:
    start: str. Name of the instruction that starts the operation, in the same computation.
    begins: bool. Whether this instruction is the one that starts the operation.
    ends: bool. Whether the instruction waits for the operation's end.
    computes: bool. Whether the instruction computes something of its own meanwhile.
  """

  start: str
  begins: bool = False
  ends: bool = False
  computes: bool = False

  @property
  def follows(self) -> bool:
    """Whether the instruction continues or ends an operation that another one started."""
    return not self.begins and not self.computes


def async_step(
  module: Module, computation: Computation, instruction: Instruction
) -> AsyncStep | None:
  """Return an instruction's part in an asynchronous operation, or None if it has none.

  Args:
    module: Module. The program.
    computation: Computation. The computation that contains the instruction.
    instruction: Instruction. The instruction.
  """
  i = instruction
  if i.phase == 'start':
    return AsyncStep(i.name, begins=True)
  if i.phase:
    first = i
    while first.phase != 'start' and first.operands:
      first = computation[first.operands[0]]
    return AsyncStep(first.name, begins=first is i, ends=i.phase == 'done')
  chain = _chain(module, i)
  if chain is None:
    return None
  first, before = i, _before(module, computation, i, chain)
  while before is not None:
    first, before = before, _before(module, computation, before, chain)
  begins = i is first
  ends = not begins and i.name.startswith(_END)
  return AsyncStep(first.name, begins, ends, computes=not begins and not ends)


def _chain(module: Module, i: Instruction) -> tuple[str, ...] | None:
  """Return a key of the chain that a fusion is part of, or None."""
  if i.opcode != 'fusion':
    return None
  for inner in module.inside(i):
    if _FUSED in inner.attributes:
      return tuple(_CHAIN.findall(inner.attributes))
  return None


def _before(
  module: Module, computation: Computation, i: Instruction, chain: tuple[str, ...]
) -> Instruction | None:
  """Return the previous fusion of a chain, which passes on the data received so far."""
  for name in i.operands:
    source = computation[name]
    while source.opcode in ('get-tuple-element', 'bitcast'):
      source = computation[source.operands[0]]
    if _chain(module, source) == chain:
      return source
  return None
