"""Which mesh: those that lie well on a slice's torus, the best of them for a model, and what other devices get."""

from collections.abc import Sequence
import fractions
import functools
import itertools
import math

import jax

from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.errors import MeshError
from t5x_inference_ext.sharding import links
from t5x_inference_ext.sharding import mesh as device_mesh
from t5x_inference_ext.sharding.activations import shard_activations
from t5x_inference_ext.sharding.layout import Layout, check_model
from t5x_inference_ext.sharding.links import Mesh
from t5x_inference_ext.sharding.mesh import AXES
from t5x_inference_ext.sharding.traffic import layer_moves


def choose_mesh(config: ModelConfig, devices: Sequence[jax.Device]) -> Mesh:
  """The mesh shape for these devices where none is asked for: along the torus of a TPU slice, if all of it divides."""
  box = device_mesh.physical_shape(devices)
  if box is not None and not config.d_model % math.prod(box) and not config.d_ff % math.prod(box):
    return torus_mesh(box, device_mesh.wraps(devices), config)
  return default_mesh(config, len(devices))


def torus_meshes(
  shape: Sequence[int], wraps: Sequence[bool], split: bool = True
) -> tuple[Mesh, ...]:
  """Meshes (X, Y, Z) whose neighbours are neighbours on the torus, Y no smaller than Z: the other order moves the same.

  Each physical axis goes to one mesh axis, which may have several; or, a ring of 4, which is a square, half to one and half
  to another. Other parts of an axis share its links with each other.

  Args:
    shape, wraps: of the slice: chips along each physical axis, and whether its ends are linked.
    split: whether rings of 4 may be halved.
  """

  def ways(size, wrap):
    yield from ((size if i == j else 1 for j in range(3)) for i in range(3))
    if split and size == 4 and wrap:
      yield from ((1 if i == j else 2 for j in range(3)) for i in range(3))

  shares = itertools.product(
    *([tuple(w) for w in ways(size, wrap)] for size, wrap in zip(shape, wraps))
  )
  found = {tuple(map(math.prod, zip(*each))) for each in shares}
  return tuple(sorted(m for m in found if m[1] >= m[2]))


def torus_mesh(
  shape: Sequence[int], wraps: Sequence[bool], config: ModelConfig, split: bool = True
) -> Mesh:
  """(X, Y, Z) for a slice: of torus_meshes that on which a decode step in ws_2d waits least for links.

  That is what its layers move for as many rows as chips (traffic.layer_moves), over the links that each collective has
  (links.wait); hops are as many on all of them. With a larger X fewer features and more columns move; the columns over x,
  which has the fewest links. X is 1, which makes ws_2d what ws_1d is, only where two dimensions move more bytes (section
  3.2.2). Of meshes as good it is one of whole physical axes, with Y and Z as even as they can be. Nothing is checked
  against the model: whether the chips divide it is the caller's to ask.

  Args:
    shape, wraps, split: as in torus_meshes.
    config: the model.
  """
  return _torus_mesh(tuple(shape), tuple(wraps), config, split)


@functools.lru_cache(maxsize=256)
def _torus_mesh(shape, wraps, config: ModelConfig, split: bool) -> Mesh:
  found = torus_meshes(shape, wraps, split)
  moved = {m: sum(move.moved for move in _moves(config, m)) for m in found}
  one, two = ([m for m in found if (m[0] > 1) == several] for several in (False, True))
  candidates = two if two and min(map(moved.get, two)) < min(map(moved.get, one)) else one
  whole = torus_meshes(shape, wraps, split=False)

  def order(mesh):
    return (
      round(layer_bytes_through_a_link(shape, wraps, mesh, config)),
      mesh not in whole,
      fractions.Fraction(mesh[1], mesh[2]),
    )

  return min(candidates, key=order)


def layer_bytes_through_a_link(
  shape: Sequence[int], wraps: Sequence[bool], mesh: Mesh, config: ModelConfig
) -> float:
  """Bytes that go through a link, one after the other, in a layer's decode step in ws_2d of as many rows as chips."""
  return sum(
    links.bytes_through_a_link(move, links.paths(shape, wraps, mesh, move.axes))
    for move in _moves(config, mesh)
  )


def _moves(config, mesh):
  sizes, rows = dict(zip(AXES, mesh)), math.prod(mesh)
  return layer_moves(
    config, shard_activations(Layout('ws_2d', 'batch'), config, sizes, rows, 1), sizes, rows, 1
  )


def default_mesh(config: ModelConfig, devices: int) -> tuple[int, int, int]:
  """A mesh over as many devices as divide the model, shaped for the 2D weight-stationary layout.

  The activations that move are least where X = sqrt(chips * E / F), half the root of the chips for F = 4 E (the paper's
  section 3.2.2); Y and Z share the rest as evenly as they can.
  """
  for chips in range(devices, 0, -1):
    try:
      check_model(config, dict(x=chips, y=1, z=1))
    except MeshError:
      continue
    x = _nearest_divisor(chips, math.sqrt(chips * config.d_model / config.d_ff))
    y = _nearest_divisor(chips // x, math.sqrt(chips // x))
    return x, y, chips // x // y
  raise AssertionError('one device divides every model')


def _nearest_divisor(n: int, value: float) -> int:
  """The divisor of n whose ratio to `value` is nearest to 1; the larger of two as near."""
  return min(
    (d for d in range(1, n + 1) if n % d == 0),
    key=lambda d: (round(abs(math.log(d / value)), 9), -d),
  )
