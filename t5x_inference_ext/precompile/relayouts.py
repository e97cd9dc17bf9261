"""Copies of weights and KV caches: instructions that write weights or caches to HBM again.

Such copies should not be needed: weights and caches are stored in the layout in which they are
used.
"""

import dataclasses

from t5x_inference_ext.precompile.hlo import Computation, Instruction, Module
from t5x_inference_ext.precompile.shapes import HBM, ArrayShape
from t5x_inference_ext.precompile.weight_flow import REARRANGES, flat_sources, follow_weights
from t5x_inference_ext.precompile.work import in_place

# Opcodes that write their result to memory.
_MATERIALISES = REARRANGES | {'fusion', 'select', 'multiply'}
# Opcodes that move elements without changing their values.
_CUTS = frozenset(('copy', 'slice', 'dynamic-slice', 'pad'))
# Opcodes to follow backwards from a fusion's result to the value that it moves.
_MOVED_WHOLE = _CUTS | {'bitcast', 'fusion'}


@dataclasses.dataclass(frozen=True)
class WeightCopy:
  """An instruction that writes a weight or a cache, or a slice of one, to HBM again.

  Attributes:
    name: str. Name of the instruction.
    computation: str. Name of the computation that contains it.
    sources: tuple of str. Names of the weights and caches that it copies.
    result: ArrayShape. The array that it writes.
    relaid: bool. Whether it changes the order of dimensions, the tiles or the element type. Plain
      slices change none of these.
  """

  name: str
  computation: str
  sources: tuple[str, ...]
  result: ArrayShape
  relaid: bool


def weight_copies(module: Module, smallest: int = 2**18) -> list[WeightCopy]:
  """Return every executed instruction that writes a weight or cache to HBM again.

  Not included are copies to on-chip memory, asynchronous copies, results of collectives, and
  in-place updates.

  Args:
    module: Module. The program.
    smallest: int. Ignore arrays with fewer bytes.
  """
  flow = follow_weights(module, smallest)
  found = []
  for computation in (module.computations[name] for name in flow.executed):
    for i in computation.instructions:
      if i.opcode not in _MATERIALISES or in_place(module, i):
        continue
      sources_of = flat_sources(flow.carried[computation.name, i.name])
      for shape, sources in zip(i.shapes, sources_of):
        if sources and shape.space == HBM and shape.bytes >= smallest:
          relaid = _relays(module, computation, i)
          found.append(WeightCopy(i.name, computation.name, tuple(sorted(sources)), shape, relaid))
          break
  return found


def relays(before: ArrayShape, after: ArrayShape) -> bool:
  """Return whether two arrays have different layouts in memory.

  Layouts differ if the orders of dimensions differ or, for equal sizes, the tiles. Dimensions of
  size 1 are ignored. An array with fewer dimensions than the other is assumed to lack the other's
  first dimensions.
  """
  if len(before.dims) == len(after.dims):
    wide = [d for d in after.minor_to_major if before.dims[d] != 1 and after.dims[d] != 1]
    kept = [d for d in before.minor_to_major if d in wide]
    return kept != wide or (before.dims == after.dims and before.tiles != after.tiles)
  orders = [_order(before), _order(after)]
  few = min(map(len, orders))
  first, second = ([d for d in order if d < few] for order in orders)
  last_sizes = [[n for n in shape.dims if n != 1][-2:] for shape in (before, after)]
  return first != second or (last_sizes[0] == last_sizes[1] and before.tiles != after.tiles)


def _relays(module: Module, computation: Computation, i: Instruction) -> bool:
  """Return whether an instruction changes its operand's layout or element type."""
  if _changes(module, computation, i):
    return True
  if i.opcode == 'fusion':
    # Slices and copies within a fusion never reach memory, so compare only its operands and
    # results.
    body = module.body(i)
    ends = [end for end in body.roots if end.opcode in _MOVED_WHOLE]
    return any(relays(_origin(body, end).shapes[0], end.shapes[0]) for end in ends)
  return i.opcode in _CUTS and relays(computation.operands(i)[0].shapes[0], i.shapes[0])


def _changes(module: Module, computation: Computation, i: Instruction) -> bool:
  """Return whether an instruction, or one inside a fusion, reorders or converts elements."""
  if i.opcode == 'fusion':
    body = module.body(i)
    return any(_changes(module, body, inner) for inner in body.instructions)
  if i.opcode in ('convert', 'reshape', 'bitcast-convert', 'reverse'):
    return i.shapes[0].elements > 1
  if i.opcode == 'transpose':
    before, after = computation.operands(i)[0].shapes[0], i.shapes[0]
    moved = i.numbers('dimensions')
    return tuple(moved[d] for d in after.order) != before.order
  return False


def _origin(body: Computation, i: Instruction) -> Instruction:
  """Return the instruction of a fusion from whose result `i` is sliced or copied."""
  while i.opcode in _MOVED_WHOLE:
    i = body.operands(i)[0]
  return i


def _order(shape: ArrayShape) -> list[int]:
  """Return the dimensions longer than 1, fastest first, each counted from the last dimension."""
  wide = [d for d, n in enumerate(shape.dims) if n != 1]
  return [len(wide) - 1 - wide.index(d) for d in shape.order]
