"""How long a compiled TPU program takes, from the compiler's own estimates and the links' speed.

The serial estimate runs everything in sequence and overlaps nothing:

- An instruction that the compiler puts estimated cycles on takes these over the chip's clock. One without (custom
  calls, kernels, plain copies) takes the longer of its bytes, read and written, over the HBM bandwidth and its FLOPs
  over the bf16 peak, and is listed by name; an in-place dynamic-update-slice reads and writes its update alone.
  Asynchronous copies into on-chip memory take nothing: they are what hides.
- A link carries one way what hardware.Chip says. A torus axis with wraparound carries twice that and needs size/2 hops;
  one without carries it once and needs size-1 hops. Collectives: collective_cost.seconds. Of two collective-permutes
  that run in opposite directions in the same step, which are those under way together, the longer counts.
- Loops multiply by their trip counts. Of a conditional the longest branch counts.

The overlapped estimate is the same sum with each asynchronous collective shortened by the compute that the schedule
puts between its start and its done.

An estimate is not a TPU: it ranks programs, and shows where they spend.
"""

import collections
from collections.abc import Mapping
import dataclasses
import re
from typing import Any

from t5x_inference_ext import hardware
from t5x_inference_ext.precompile import collective_cost, loops
from t5x_inference_ext.precompile.collective_cost import HloCollective
from t5x_inference_ext.precompile.hlo import Instruction, Module, parse_hlo
from t5x_inference_ext.precompile.relayouts import WeightCopy, relays, weight_copies
from t5x_inference_ext.precompile.work import flops, is_free, traffic
from t5x_inference_ext.sharding.torus import TpuSlice

MATMUL, ATTENTION, COPY, RELAYOUT, COLLECTIVE, OTHER = OPERATION_KINDS = (
  'matmul',
  'attention',
  'copy',
  'relayout',
  'collective',
  'other',
)

# Functions that attend: this package's attend, flaxformer's and flax's dot_product_attention.
_ATTENDS = re.compile(r'(?:^|\.)_?(?:attend|dot_product_attention\w*)(?:\.|$)')
_COPIES = ('copy', 'slice', 'dynamic-slice', 'dynamic-update-slice', 'concatenate', 'pad')
_RELAYOUTS = ('transpose', 'reshape')
_NAMES_ONLY = ('bitcast', 'parameter', 'constant', 'tuple', 'get-tuple-element')


@dataclasses.dataclass(frozen=True)
class OperationCost:
  """What one instruction costs in one run of the program.

  Attributes:
    kind: one of KINDS. 'matmul': a matrix product outside attention. 'attention': whatever attends. 'copy': moves bytes
      as they lie, 'relayout': moves them to lie otherwise.
    count: how often it runs.
    seconds: all runs together, in the serial estimate.
    hidden_seconds: of these, what the schedule hides behind compute.
    bytes: read and written in one run; of a collective, what its time is counted from.
    flops: of the matrix products of one run.
    estimated: whether the compiler's cycles give the time.
    in_layer_loop: inside the longest loop, or any within it.
  """

  name: str
  opcode: str
  op_name: str
  kind: str
  count: int
  seconds: float
  hidden_seconds: float
  bytes: int
  flops: int
  estimated: bool
  in_layer_loop: bool
  collective: HloCollective | None = None
  functions: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A program's time on one slice.

  Attributes:
    costs: every instruction that runs, in the order of the schedule; the end of an asynchronous one is left out.
    unknown_loops: loops whose trip count the text does not tell: they count once, so that the sums are too small.
    weight_copies: weights and caches that the program writes to HBM again (relayouts.weight_copies).
  """

  costs: tuple[OperationCost, ...]
  unknown_loops: tuple[str, ...]
  weight_copies: tuple[WeightCopy, ...]

  @property
  def serial_seconds(self) -> float:
    return sum(c.seconds for c in self.costs)

  @property
  def overlapped_seconds(self) -> float:
    return sum(c.seconds - c.hidden_seconds for c in self.costs)

  @property
  def turn_seconds(self) -> tuple[float, float]:
    """Serial and overlapped seconds inside the longest loop: of one turn, if it does not tell how often it turns."""
    inside = [c for c in self.costs if c.in_layer_loop]
    return sum(c.seconds for c in inside), sum(c.seconds - c.hidden_seconds for c in inside)

  @property
  def flops(self) -> int:
    """Of all matrix products, per chip."""
    return sum(c.flops * c.count for c in self.costs)

  @property
  def by_kind(self) -> dict[str, float]:
    """Kind -> serial seconds, the longest first."""
    return _totals((c.kind, c.seconds) for c in self.costs)

  @property
  def by_collective(self) -> dict[tuple[str, tuple[str, ...]], float]:
    """(kind, mesh axes) -> serial seconds, the longest first."""
    return _totals(
      ((c.collective.kind, c.collective.axes), c.seconds) for c in self.costs if c.collective
    )

  @property
  def without_cycles(self) -> tuple[OperationCost, ...]:
    """What the compiler puts no cycles on and is no collective, the longest first."""
    found = [c for c in self.costs if not c.estimated and c.kind != COLLECTIVE and c.seconds]
    return tuple(sorted(found, key=lambda c: -c.seconds))

  @property
  def offending_relayouts(self) -> tuple[WeightCopy, ...]:
    """Weights and caches written to HBM in another layout or type."""
    return tuple(c for c in self.weight_copies if c.relaid)

  def longest(self, count: int) -> tuple[OperationCost, ...]:
    return tuple(sorted(self.costs, key=lambda c: -c.seconds)[:count])


def estimate(program: Any, slice_: TpuSlice, mesh: Any) -> Estimate:
  """The time of one run.

  Args:
    program: compiled.as_text(), the compiled program itself, or hlo.parse of its text.
    slice_: the chips that it was compiled for.
    mesh: axis -> size, in the order of the devices; or a jax Mesh.

  Raises:
    HloError: text that is no compiled program, or a collective in a form that is not known here.
  """
  if not isinstance(program, Module):
    program = parse_hlo(program if isinstance(program, str) else program.as_text())
  mesh = dict(mesh.items() if isinstance(mesh, Mapping) else mesh.shape.items())
  chip = hardware.chip(slice_.kind)
  found, unknown = loops.executed(program)
  costs = [_cost(program, e, chip, slice_, mesh) for e in found]
  _pair_permutes(found, costs)
  _keep_longest_branches(found, costs)
  _hide(found, costs)
  _mark_layer_loop(found, costs)
  kept = tuple(
    c
    for e, c in zip(found, costs)
    if not is_free(e.instruction) and e.instruction.phase not in ('done', 'update')
  )
  return Estimate(kept, tuple(unknown), tuple(weight_copies(program)))


def _cost(module, e, chip, slice_, mesh) -> OperationCost:
  i = e.instruction
  collective = collective_cost.find_collectives(module, e.computation, i, mesh)
  work, moved = flops(module, e.computation, i), traffic(module, e.computation, i)
  if collective:
    each, moved = collective_cost.seconds(collective, chip, slice_), collective.bytes
  elif is_free(i) or i.phase in ('update', 'done') or _prefetches(module, i):
    each = 0.0
  elif i.cycles is not None:
    each = i.cycles / chip.clock_hz
  else:
    each = max(moved / chip.hbm_bandwidth, work / chip.bf16_flops)
  kind = COLLECTIVE if collective else _kind(module, e.computation, i, work)
  return OperationCost(
    name=i.name,
    opcode=i.opcode,
    op_name=i.op_name,
    kind=kind,
    count=e.times,
    seconds=each * e.times,
    hidden_seconds=0.0,
    bytes=moved,
    flops=work,
    estimated=i.cycles is not None,
    in_layer_loop=False,
    collective=collective,
    functions=module.functions(i),
  )


def _prefetches(module: Module, i: Instruction) -> bool:
  """Whether this starts an asynchronous copy, or slice, into on-chip memory."""
  if i.phase != 'start':
    return False
  body = module.called(i)
  runs = body.instructions if body else (i,)
  return all(r.operation in (*_COPIES, *_NAMES_ONLY) for r in runs) and all(
    s.on_chip for s in i.results
  )


def _kind(module, computation, i, work) -> str:
  # A fusion takes its name from its root: what it multiplies says more.
  product = next((p for p in module.inside(i) if p.opcode in ('dot', 'convolution')), i)
  if any(_ATTENDS.search(f) for f in (*module.functions(product), *module.functions(i))):
    return ATTENTION
  if work:
    return MATMUL
  inside = [p for p in module.inside(i) if p.opcode not in (*_NAMES_ONLY, 'fusion')]
  if not inside or any(p.operation not in (*_COPIES, *_RELAYOUTS) for p in inside):
    return OTHER
  return RELAYOUT if any(_moves_order(module, computation, i, p) for p in inside) else COPY


def _moves_order(module, computation, i, p) -> bool:
  if p.opcode in _RELAYOUTS:
    return True
  where = (
    computation
    if p is i
    else next(c for c in module.computations.values() if c.by_name.get(p.name) is p)
  )
  return p.opcode == 'copy' and relays(where[p.operands[0]].shapes[0], p.shapes[0])


def _pair_permutes(found, costs) -> None:
  """Of two permutes in opposite directions that are under way together, the shorter takes nothing."""
  open_, paired = collections.defaultdict(list), set()
  for n, e in enumerate(found):
    i, where = e.instruction, (e.computation.name, e.loops, e.branches)
    if i.phase == 'done':
      open_[where] = [m for m in open_[where] if found[m].instruction.name not in i.operands]
    c = costs[n].collective
    if c and c.kind == 'collective-permute' and i.phase == 'start':
      partner = next(
        (
          m
          for m in open_[where]
          if m not in paired and collective_cost.opposite(costs[m].collective, c)
        ),
        None,
      )
      if partner is None:
        open_[where].append(n)
      else:
        paired |= {n, partner}
        shorter = min(n, partner, key=lambda m: costs[m].seconds)
        costs[shorter] = dataclasses.replace(costs[shorter], seconds=0.0)


def _keep_longest_branches(found, costs) -> None:
  totals = collections.defaultdict(lambda: collections.defaultdict(float))
  for e, c in zip(found, costs):
    for conditional, branch in e.branches:
      totals[e.loops, conditional][branch] += c.seconds
  for n, e in enumerate(found):
    for conditional, branch in e.branches:
      branches = totals[e.loops, conditional]
      if branch != max(branches, key=branches.get):
        costs[n] = dataclasses.replace(costs[n], seconds=0.0, count=0)


def _hide(found, costs) -> None:
  """Sets hidden_seconds: for each asynchronous collective the compute between its start and its done."""
  under_way = {}
  for n, e in enumerate(found):
    i = e.instruction
    where = e.computation.name, e.loops, e.branches
    if i.phase == 'start' and costs[n].collective:
      under_way[where, i.name] = [n, 0.0]
    elif i.phase == 'done' and (done := under_way.pop((where, i.operands[0]), None)):
      start, compute = done
      hidden = min(costs[start].seconds, compute)
      costs[start] = dataclasses.replace(costs[start], hidden_seconds=hidden)
    elif not costs[n].collective:
      for entry in under_way.values():
        entry[1] += costs[n].seconds


def _mark_layer_loop(found, costs) -> None:
  totals = collections.defaultdict(float)
  for e, c in zip(found, costs):
    if e.loops:
      totals[e.loops[0]] += c.seconds
  longest = max(totals, key=totals.get, default=None)
  for n, e in enumerate(found):
    if e.loops and e.loops[0] == longest:
      costs[n] = dataclasses.replace(costs[n], in_layer_loop=True)


def _totals(pairs) -> dict:
  totals = collections.defaultdict(float)
  for key, seconds in pairs:
    totals[key] += seconds
  return dict(sorted(totals.items(), key=lambda item: -item[1]))
