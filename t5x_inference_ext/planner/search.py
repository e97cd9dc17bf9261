"""All plans for a request on a machine, the best of them, and whether any plan fits."""

from collections.abc import Iterable, Iterator
import dataclasses
import functools
import itertools
import math

from t5x_inference_ext.errors import MeshError
from t5x_inference_ext.planner.case import PassCase
from t5x_inference_ext.planner.costs import PassCost, cost
from t5x_inference_ext.planner.machine import Machine, Mesh
from t5x_inference_ext.planner.memory import memory
from t5x_inference_ext.planner.network import axis_sizes
from t5x_inference_ext.planner.request import Plan, PlanRequest, pair_memories, tightest_phase
from t5x_inference_ext.sharding import activations
from t5x_inference_ext.sharding.layout import (
  ATTENTION,
  FEEDFORWARD,
  Layout,
  check_model,
  check_pair,
)

# wg_xyz/heads is left out, because wg_xyz splits rows over every axis, and no axis is left for
# heads.
LAYOUTS = tuple(
  Layout(feedforward, attention)
  for feedforward in ('ws_2d', *(f for f in FEEDFORWARD if f != 'ws_2d'))
  for attention in ATTENTION
  if (feedforward, attention) != ('wg_xyz', 'heads')
)


def plans(request: PlanRequest, machine: Machine) -> list[Plan]:
  """Return every plan, fastest first, whether it fits or not.

  A plan is a mesh, a number of rows and a pair of layouts that can share weights. Equally fast
  plans are in the order of their meshes in Machine.meshes.

  Raises:
    MeshError: The chips, or the requested mesh, do not divide the model.
  """
  found = []
  for mesh in meshes(request, machine):
    for rows in row_choices(request.batch, mesh):
      prefills = phase_costs(request, machine, mesh, 'prefill', rows)
      decodes = phase_costs(request, machine, mesh, 'decode', rows)
      found += [
        Plan(request, p.into(d.case.layout) if request.phase == 'both' else p, d)
        for p, d in itertools.product(prefills, decodes)
        if share_weights(p.case, d.case)
      ]
  return sorted(found, key=_speed)


def best(found: Iterable[Plan]) -> list[Plan]:
  """Return the best plan of each pair of layouts: fitting plans by time, then others by memory.

  The best plan of a pair is the fastest one that fits, or else the one that needs the least memory.
  If the request is for one phase, there is one plan for each layout of that phase.
  """
  by_layouts: dict[tuple[Layout, ...], Plan] = {}
  for plan in found:
    layouts = tuple(c.case.layout for c in plan.phases)
    held = by_layouts.get(layouts)
    if held is None or _order(plan) < _order(held):
      by_layouts[layouts] = plan
  return sorted(by_layouts.values(), key=_order)


def _order(plan: Plan) -> tuple[float, ...]:
  return (0, *_speed(plan)) if plan.fits else (1, plan.memory.needed)


def _speed(plan: Plan) -> tuple[float, float]:
  """Return a sort key: the time of the requested phases, then the time of both."""
  return plan.seconds, plan.prefill.seconds + plan.decode.seconds


def fits(request: PlanRequest, machine: Machine) -> bool:
  """Return whether any plan fits, without computing times.

  Raises:
    MeshError: The chips, or the requested mesh, do not divide the model.
  """
  available = machine.chip.usable_bytes
  for mesh in meshes(request, machine):
    for rows in row_choices(request.batch, mesh):
      # A pair needs at least as much memory as either of its phases. Often no prefill fits, and
      # then decode need not be searched.
      prefills = _fitting_cases(request, machine, mesh, 'prefill', rows)
      decodes = prefills and _fitting_cases(request, machine, mesh, 'decode', rows)
      for prefill, decode in itertools.product(prefills, decodes):
        if share_weights(prefill, decode) and _needed(request, prefill, decode) <= available:
          return True
  return False


def _fitting_cases(
  request: PlanRequest, machine: Machine, mesh: Mesh, phase: str, rows: int
) -> list[PassCase]:
  """Return a phase's cases that fit, one per layout; all cases if the phase runs elsewhere."""
  cases = list(_cases(request, machine, mesh, phase, rows))
  if request.phase not in ('both', phase):
    return cases
  positions = request.input_length if phase == 'prefill' else request.context
  return [case for case in cases if memory(case, positions).fits]


def least_memory(request: PlanRequest, machine: Machine) -> tuple[float, PassCase, PassCase]:
  """Return (bytes on one chip, prefill, decode) of the plan that needs the least memory.

  Raises:
    MeshError: The chips, or the requested mesh, do not divide the model, or the requested layouts
      can't run the rows.
  """
  least = min(_pairs(request, machine), key=lambda pair: pair[0], default=None)
  if least is None:
    raise MeshError(
      f'no mesh of {machine} lets these layouts run {request.batch} rows: ask for other layouts, '
      'another mesh or another batch'
    )
  return least


def _pairs(request: PlanRequest, machine: Machine) -> Iterator[tuple[float, PassCase, PassCase]]:
  """Yield the bytes that each plan needs on one chip, its prefill and its decode step."""
  for mesh in meshes(request, machine):
    for rows in row_choices(request.batch, mesh):
      decodes = list(_cases(request, machine, mesh, 'decode', rows))
      for prefill in _cases(request, machine, mesh, 'prefill', rows):
        for decode in decodes:
          if share_weights(prefill, decode):
            yield _needed(request, prefill, decode), prefill, decode


def _needed(request: PlanRequest, prefill: PassCase, decode: PassCase) -> float:
  """Return the bytes that a pair of passes needs on one chip."""
  memories = pair_memories(request, prefill, decode)
  return memories[tightest_phase(request, memories)].needed


def meshes(request: PlanRequest, machine: Machine) -> tuple[Mesh, ...]:
  """Return the requested mesh, or every candidate mesh.

  The paper's convention allows whole torus axes only.

  Raises:
    MeshError: The chips, or the requested mesh, do not divide the model.
  """
  if request.mesh is None:
    return machine.meshes(request.config, split=request.convention != 'paper')
  if math.prod(request.mesh) != machine.chips:
    raise MeshError(
      f'the mesh {"x".join(map(str, request.mesh))} has {math.prod(request.mesh)} positions and '
      f'{machine} has {machine.chips} chips: a program runs on all of them'
    )
  check_model(request.config, axis_sizes(request.mesh))
  return (request.mesh,)


@functools.lru_cache(maxsize=4096)
def row_choices(batch: int, mesh: Mesh) -> tuple[int, ...]:
  """Return the numbers of rows, or of positions, to try: `batch` rounded up for each set of axes.

  A few empty ones may save time, since a layout splits rows only if the chips divide them evenly.
  One number is tried for each set of axes, so that a request for more rows never takes less time.
  """
  shares = sorted({math.prod(axes) for n in range(4) for axes in itertools.combinations(mesh, n)})
  found: dict[tuple[bool, ...], int] = {}
  for rows in range(batch, batch + 2 * shares[-1]):
    found.setdefault(tuple(rows % share == 0 for share in shares), rows)
  return tuple(sorted(found.values()))


def phase_costs(
  request: PlanRequest, machine: Machine, mesh: Mesh, phase: str, rows: int
) -> list[PassCost]:
  """Return the costs of one phase in every layout that can run `rows` rows, fastest first.

  A layout with attention by batch is left out if it splits no rows and costs as much as attention
  by heads.
  """
  found = [
    min(
      (cost(c, request.convention, request.efficiency) for c in _with_padding(case)),
      key=lambda c: c.seconds,
    )
    for case in _cases(request, machine, mesh, phase, rows)
  ]
  by_heads = {
    c.case.layout.feedforward: c.parts for c in found if c.case.layout.attention == 'heads'
  }

  def repeats_heads(c: PassCost) -> bool:
    layout = c.case.layout
    return (
      layout.attention == 'batch'
      and not splits_rows(c.case)
      and by_heads.get(layout.feedforward) == c.parts
    )

  return sorted((c for c in found if not repeats_heads(c)), key=lambda c: c.seconds)


def _with_padding(case: PassCase) -> Iterator[PassCase]:
  """Yield a case, and if it is a prefill, also cases with a few empty positions that fit as well.

  As with empty rows, one number is tried for each set of axes that it lets split the positions, so
  that a request for longer prompts never takes less time.
  """
  yield case
  if case.phase != 'prefill':
    return
  tried, fits = {case.padded}, memory(case, case.padded).fits
  for length in row_choices(case.length, case.mesh):
    padded = dataclasses.replace(case, least_padded=length)
    if padded.padded not in tried and memory(padded, padded.padded).fits == fits:
      tried.add(padded.padded)
      yield padded


def splits_rows(case: PassCase) -> bool:
  """Return whether attention splits rows over more than one chip."""
  return case.size(case.sharding.attention_rows) > 1


def _cases(
  request: PlanRequest, machine: Machine, mesh: Mesh, phase: str, rows: int
) -> Iterator[PassCase]:
  """Yield one phase in every layout that can run `rows` rows."""
  length, context = (request.input_length,) * 2 if phase == 'prefill' else (1, request.mean_context)
  pinned = request.layouts
  layouts = LAYOUTS if pinned is None else (pinned[phase == 'decode'],)
  for layout in layouts:
    if pinned is None and _repeats_another(layout, mesh, alone=request.phase == phase):
      continue
    if phase == 'decode' and rows != _rows_that_run(layout, rows, mesh):
      continue  # needs another number of rows, which row_choices includes
    case = PassCase(
      request.config,
      machine,
      mesh,
      layout,
      phase,
      rows,
      length,
      context,
      request.weights,
      request.cache,
    )
    by_batch = layout.attention == 'batch' and machine.chips > 1
    if request.convention == 'paper' and by_batch and not splits_rows(case):
      continue  # section 3.3: attention by batch needs a batch that fills an axis
    yield case


@functools.lru_cache(maxsize=65536)
def _rows_that_run(layout: Layout, rows: int, mesh: Mesh) -> int:
  """Return how many rows, padding included, the engine decodes for `rows` requested ones."""
  return activations.padded_batch(layout, rows, axis_sizes(mesh))


def _repeats_another(layout: Layout, mesh: Mesh, alone: bool) -> bool:
  """Return whether axes of size 1 make this layout equal to another one.

  Args:
    layout: The layout.
    mesh: The mesh.
    alone: Whether no other phase shares the layout's weights. Then ws_2d may equal ws_1d.
  """
  sizes = axis_sizes(mesh)
  gathered = [a for a in layout.gathered_axes if sizes[a] > 1]
  if layout.feedforward == 'ws_1d':
    return math.prod(mesh) == 1
  if layout.feedforward in ('wg_x', 'wg_xy'):
    is_wg_x = layout.feedforward == 'wg_xy' and mesh[1] == 1
    is_wg_xyz = math.prod(sizes[a] for a in gathered) == math.prod(mesh)
    return not gathered or is_wg_x or is_wg_xyz
  if layout.feedforward == 'ws_2d':
    return alone and mesh[0] == 1 < math.prod(mesh)
  return layout.feedforward == 'wg_xyz' and not gathered


def share_weights(prefill: PassCase, decode: PassCase) -> bool:
  """Return whether both phases can share one copy of the weights."""
  mesh, layouts = prefill.mesh, (prefill.layout, decode.layout)
  if mesh[0] == 1 < math.prod(mesh) and all(x.feedforward == 'ws_2d' for x in layouts):
    return False  # ws_2d with one chip along x is ws_1d
  try:
    check_pair(*layouts)
  except MeshError:
    return False
  return True
