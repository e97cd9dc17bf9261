"""The way of keys and values from one sharding to another: moves between devices, and their bytes.

A prefill and the decode steps after it may split rows and key heads over different mesh axes. XLA's
partitioner gathers the whole cache onto every device for some such pairs. So the moves are chosen
here, axis by axis; model/cache_reshard.py runs them, and the planner prices them.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import itertools
import math

import numpy as np

from t5x_inference_ext.sharding.activations import ActivationSharding
from t5x_inference_ext.sharding.collective import Collective
from t5x_inference_ext.sharding.layout import Axes, num_shards


@dataclasses.dataclass(frozen=True)
class CacheMove:
  """One step of keys and values [.., B, K, S, Q].

  Attributes:
    kind: 'all_gather': `dim` is no longer split over the axes. 'all_to_all': the axes split the
      other one of rows and heads instead. 'slice': the axes split `dim` from now on, each device
      keeps its part. 'permute': the axes split `dim` in the order of `order` instead.
    dim: 'rows' or 'heads'.
    axes: The mesh axes.
    order: Of 'permute', the axes in their new order.
  """

  kind: str
  dim: str
  axes: Axes
  order: Axes = ()


@dataclasses.dataclass(frozen=True)
class CacheMoves:
  """All moves from one sharding to another.

  Attributes:
    before: Moves before heads are taken.
    heads: For each device along `head_axes`, the heads that it takes from those it has then; () if
      all devices keep their heads as they are.
    head_axes: Mesh axes, the first slowest.
    after: Moves after heads are taken.
  """

  before: tuple[CacheMove, ...]
  heads: tuple[tuple[int, ...], ...]
  head_axes: Axes
  after: tuple[CacheMove, ...]


def cache_moves(
  held: ActivationSharding, wanted: ActivationSharding, mesh: Mapping[str, int]
) -> CacheMoves:
  """Return the moves of keys and values from the cache sharding of `held` to that of `wanted`.

  Axes that split heads in `held` and rows in `wanted` move by all-to-all, as do those that split
  rows and then heads. Axes that only `held` has are gathered, and those that only `wanted` has cost
  nothing. Heads that a device has already are not sent.

  Args:
    held, wanted: Shardings of two passes over equally many rows.
    mesh: Axis name -> size.
  """
  return _cache_moves(held, wanted, tuple(mesh.items()))


@functools.lru_cache(maxsize=4096)
def _cache_moves(
  held: ActivationSharding, wanted: ActivationSharding, sizes: tuple[tuple[str, int], ...]
) -> CacheMoves:
  mesh = dict(sizes)

  def used(axes: Axes) -> Axes:
    return tuple(a for a in axes if mesh[a] > 1)

  rows, to_rows = used(held.attention_rows), used(wanted.attention_rows)
  heads, to_heads = used(held.axes['kv_heads']), used(wanted.axes['kv_heads'])
  before: list[CacheMove] = []
  common = _common(rows, to_rows)
  leaving, new = rows[common:], to_rows[common:]
  kept = tuple(itertools.takewhile(leaving.__contains__, new))
  if kept:
    order = kept + tuple(a for a in leaving if a not in kept)
    before.append(CacheMove('permute', 'rows', leaving, order))
    leaving, new = order[len(kept) :], new[len(kept) :]
  into_rows = tuple(a for a in new if a in heads)
  if leaving and into_rows:  # both at once: rare, so the simple way
    before.append(CacheMove('all_gather', 'rows', leaving))
    leaving = ()
  split = [
    CacheMove('all_to_all', 'heads', axes) if axes[0] in heads else CacheMove('slice', 'rows', axes)
    for axes in _runs(new, heads)
  ]
  # From the fastest axes on: then the rows of a device stay consecutive.
  joined = [
    CacheMove('all_to_all' if axes[0] in to_heads else 'all_gather', 'rows', axes)
    for axes in reversed(_runs(leaving, to_heads))
  ]
  into_heads = tuple(a for move in joined if move.kind == 'all_to_all' for a in move.axes)
  remaining = tuple(a for a in heads if a not in into_rows)
  ids, wanted_ids = held.heads.cached(), wanted.heads.cached()
  for stay in (tuple(a for a in remaining if a in to_heads), ()):
    gathered = tuple(a for a in remaining if a not in stay)
    # Each gather and all-to-all puts other devices' heads around those that a device has.
    order = gathered + tuple(
      a for move in reversed(split) if move.kind == 'all_to_all' for a in move.axes
    )
    table = _taken(ids, heads, order, wanted_ids, to_heads, into_heads, mesh)
    if table is not None:
      break
  else:
    raise AssertionError('a device that has all heads has those that are wanted')
  before += [] if leaving else split
  before += [CacheMove('all_gather', 'heads', gathered)] if gathered else []
  head_axes = tuple(a for a in to_heads if a not in into_heads)
  local = len(ids) * num_shards(order, mesh) // num_shards(heads, mesh)
  if set(table) == {tuple(range(local))}:
    table = ()
  return CacheMoves(tuple(before), table, head_axes, (*joined, *(split if leaving else ())))


def _common(first: Sequence[str], second: Sequence[str]) -> int:
  """Return the length of the longest common prefix."""
  return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second))))


def _runs(axes: Axes, others: Axes) -> list[Axes]:
  """Cut axes into runs that are among some others, and runs that are not."""
  return [tuple(run) for _, run in itertools.groupby(axes, others.__contains__)]


def _coordinates(axes: Axes, mesh: Mapping[str, int]) -> list[dict[str, int]]:
  """Return the coordinates along some axes, the first axis slowest."""
  return [
    dict(zip(axes, where)) for where in itertools.product(*(range(mesh[axis]) for axis in axes))
  ]


def _block(
  ids: Sequence[int | None], axes: Axes, where: Mapping[str, int], mesh: Mapping[str, int]
) -> Sequence[int | None]:
  """Return the heads of the device at some coordinates, of heads that the axes split."""
  width = len(ids) // num_shards(axes, mesh)
  index = 0
  for axis in axes:
    index = index * mesh[axis] + where[axis]
  return ids[index * width : (index + 1) * width]


def _taken(
  ids: Sequence[int | None],
  axes: Axes,
  order: Axes,
  wanted: Sequence[int | None],
  to_axes: Axes,
  into_heads: Axes,
  mesh: Mapping[str, int],
) -> tuple[tuple[int, ...], ...] | None:
  """Return CacheMoves.heads; None if some device lacks a head that it needs.

  Args:
    ids: The model's key head of each head before the moves; None for padding.
    axes: Axes that split them.
    order: Those of the axes along which each device has the heads of all, the first slowest.
    wanted: `ids` after the moves.
    to_axes: Axes that split those.
    into_heads: Those of to_axes that split rows until heads are taken, the first moved first.
    mesh: Axis name -> size.
  """
  table = []
  for device in _coordinates(tuple(a for a in to_axes if a not in into_heads), mesh):
    local = [
      head
      for where in _coordinates(order, mesh)
      for head in _block(ids, axes, {**device, **where}, mesh)
    ]
    taken = []
    for where in _coordinates(into_heads, mesh):
      for head in _block(wanted, to_axes, {**device, **where}, mesh):
        if head is not None and head not in local:
          return None
        taken.append(0 if head is None else local.index(head))
    table.append(tuple(taken))
  return tuple(table)


def cache_collectives(
  held: ActivationSharding,
  wanted: ActivationSharding,
  mesh: Mapping[str, int],
  batch: int,
  length: int,
  position_bytes: float,
) -> list[Collective]:
  """Return the collectives that bring the keys and values of one layer from `held` to `wanted`.

  Args:
    held, wanted: See cache_moves.
    mesh: Axis name -> size.
    batch: B, rows.
    length: Positions of each.
    position_bytes: Bytes of one position of one key head: d_head elements, and an int8 scale.
  """
  moves = cache_moves(held, wanted, mesh)
  # On one device.
  count = {
    'rows': batch / num_shards(held.attention_rows, mesh),
    'heads': len(held.heads.cached()) / num_shards(held.axes['kv_heads'], mesh),
  }
  found: list[Collective] = []

  def run(steps: Sequence[CacheMove]) -> None:
    for step in steps:
      chips, other = num_shards(step.axes, mesh), 'heads' if step.dim == 'rows' else 'rows'
      if step.kind == 'slice':
        count[step.dim] /= chips
        continue
      if step.kind in ('all_gather', 'all_to_all'):
        count[step.dim] *= chips
      if step.kind == 'all_to_all':
        count[other] /= chips
      size = 2 * length * position_bytes * math.prod(count.values())  # keys and values
      found.append(Collective('cache', step.kind, step.axes, chips, math.ceil(size)))

  run(moves.before)
  if moves.heads:
    count['heads'] = len(moves.heads[0])
  run(moves.after)
  return found


def permutation(move: CacheMove, mesh: Mapping[str, int], axes: Axes) -> list[tuple[int, int]]:
  """Return the (sender, receiver) pairs of a 'permute', as indices along `axes`, first slowest."""
  position = dict(zip(axes, np.indices([mesh[a] for a in axes]).reshape(len(axes), -1)))

  def device_of_chunk(order: Axes) -> np.ndarray:
    chunk = np.zeros(num_shards(axes, mesh), int)
    for axis in order:
      chunk = chunk * mesh[axis] + position[axis]
    return np.argsort(chunk)

  senders, receivers = device_of_chunk(move.axes), device_of_chunk(move.order)
  return list(zip(senders.tolist(), receivers.tolist()))
