"""All plans for a request on a machine, and the best of them."""

from collections.abc import Iterable, Iterator
import itertools
import math

from t5x_inference_ext.errors import MeshError
from t5x_inference_ext.planner.case import PassCase
from t5x_inference_ext.planner.costs import PassCost, cost
from t5x_inference_ext.planner.machine import Machine, Mesh
from t5x_inference_ext.planner.network import sizes
from t5x_inference_ext.planner.request import Plan, PlanRequest
from t5x_inference_ext.sharding import activations
from t5x_inference_ext.sharding.layout import (
  ATTENTION,
  FEEDFORWARD,
  Layout,
  check_model,
  check_pair,
)

# wg_xyz splits rows over every axis, which leaves none to split heads over. Looped collectives are left out: they move
# as much, and what they hide the efficiencies hold already.
LAYOUTS = tuple(
  Layout(feedforward, attention)
  for feedforward in ('ws_2d', *(f for f in FEEDFORWARD if f != 'ws_2d'))
  for attention in ATTENTION
  if (feedforward, attention) != ('wg_xyz', 'heads')
)


def plans(request: PlanRequest, machine: Machine) -> list[Plan]:
  """Every plan: meshes, numbers of rows and pairs of layouts that can share weights; the fastest first.

  Whether they fit is theirs to say. Of plans as fast, the one whose mesh comes first in Machine.meshes.

  Raises:
    MeshError: the chips, or the mesh asked for, do not divide the model.
  """
  found = []
  for mesh in meshes(request, machine):
    for rows in row_choices(request.batch, mesh):
      prefills = phase_costs(request, machine, mesh, 'prefill', rows)
      decodes = phase_costs(request, machine, mesh, 'decode', rows)
      found += [
        Plan(request, p, d) for p, d in itertools.product(prefills, decodes) if _share_weights(p, d)
      ]
  return sorted(found, key=_speed)


def best(found: Iterable[Plan]) -> list[Plan]:
  """Of each pair of layouts its fastest plan that fits, or else that which needs least; those that fit first.

  Of a request for one phase, of each layout of that.
  """
  pairs = {}
  for plan in found:
    layouts = tuple(c.case.layout for c in plan.phases)
    held = pairs.get(layouts)
    if held is None or _order(plan) < _order(held):
      pairs[layouts] = plan
  return sorted(pairs.values(), key=_order)


def _order(plan: Plan):
  return (False, *_speed(plan)) if plan.fits else (True, plan.memory.needed)


def _speed(plan: Plan) -> tuple[float, float]:
  """Of what is asked for, and of what is not."""
  return plan.seconds, plan.prefill.seconds + plan.decode.seconds


def meshes(request: PlanRequest, machine: Machine) -> tuple[Mesh, ...]:
  """That which was asked for, or those of the machine; where one bandwidth serves all, as in the paper, of whole axes."""
  if request.mesh is None:
    return machine.meshes(request.config, split=request.convention != 'paper')
  if math.prod(request.mesh) != machine.chips:
    raise MeshError(
      f'the mesh {"x".join(map(str, request.mesh))} has {math.prod(request.mesh)} positions and '
      f'{machine} has {machine.chips} chips: a program runs on all of them'
    )
  check_model(request.config, sizes(request.mesh))
  return (request.mesh,)


def row_choices(batch: int, mesh: Mesh) -> list[int]:
  """The fewest rows, of at least `batch`, for each way that axes may split them evenly.

  A few empty rows more may save time: that they divide, or that they do not, decides what a layout splits. With one
  number for each way, a request for more rows never takes less time.
  """
  shares = sorted({math.prod(axes) for n in range(4) for axes in itertools.combinations(mesh, n)})
  found = {}
  for rows in range(batch, batch + 2 * shares[-1]):
    found.setdefault(tuple(rows % share == 0 for share in shares), rows)
  return sorted(found.values())


def phase_costs(
  request: PlanRequest, machine: Machine, mesh: Mesh, phase: str, rows: int
) -> list[PassCost]:
  """The costs of one phase in every layout that can run so many rows, the fastest first."""
  found = [
    cost(case, request.convention, request.efficiency)
    for case in _cases(request, machine, mesh, phase, rows)
  ]
  by_heads = {
    c.case.layout.feedforward: c.parts for c in found if c.case.layout.attention == 'heads'
  }
  # Where no rows are split, by batch may be by heads under another name.
  same = [
    c
    for c in found
    if c.case.layout.attention == 'batch'
    and not splits_rows(c.case)
    and by_heads.get(c.case.layout.feedforward) == c.parts
  ]
  return sorted((c for c in found if c not in same), key=lambda c: c.seconds)


def splits_rows(case: PassCase) -> bool:
  """Whether attention splits rows over more than one chip."""
  return case.size(case.sharding.attention_rows) > 1


def _cases(
  request: PlanRequest, machine: Machine, mesh: Mesh, phase: str, rows: int
) -> Iterator[PassCase]:
  length, context = (request.input_length,) * 2 if phase == 'prefill' else (1, request.mean_context)
  for layout in LAYOUTS:
    if _is_another(layout, mesh):
      continue
    if phase == 'decode' and rows != activations.padded_batch(layout, rows, sizes(mesh)):
      continue  # the runtime would take more: they are another choice
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
    if (
      request.convention == 'paper'
      and layout.attention == 'batch'
      and not splits_rows(case)
      and machine.chips > 1
    ):
      continue  # section 3.3: a batch that fills no axis is not sharded by batch
    yield case


def _is_another(layout: Layout, mesh: Mesh) -> bool:
  """Whether axes of one chip make this layout the same as a simpler one, or as one that gathers over all axes."""
  gathered = [a for a in layout.gathered_axes if sizes(mesh)[a] > 1]
  if layout.feedforward == 'ws_1d':
    return math.prod(mesh) == 1
  if layout.feedforward in ('wg_x', 'wg_xy'):
    fewer = layout.feedforward == 'wg_xy' and mesh[1] == 1
    return not gathered or fewer or math.prod(sizes(mesh)[a] for a in gathered) == math.prod(mesh)
  return layout.feedforward == 'wg_xyz' and not gathered


def _share_weights(prefill: PassCost, decode: PassCost) -> bool:
  mesh = prefill.case.mesh
  if (
    mesh[0] == 1 < math.prod(mesh)
    and prefill.case.layout.feedforward == decode.case.layout.feedforward == 'ws_2d'
  ):
    return False  # d_model is whole: that is ws_1d
  try:
    check_pair(prefill.case.layout, decode.case.layout)
  except MeshError:
    return False
  return True
