"""Choice of a mesh: the meshes that fit a slice's torus, the best one for a model, the default."""

from collections.abc import Iterator, Sequence
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
from t5x_inference_ext.sharding.collective import Collective
from t5x_inference_ext.sharding.layout import Layout, check_model
from t5x_inference_ext.sharding.mesh import AXES, MeshShape
from t5x_inference_ext.sharding.traffic import layer_collectives


def choose_mesh(config: ModelConfig, devices: Sequence[jax.Device]) -> MeshShape:
  """Return the default mesh shape for devices.

  If all chips of a TPU slice divide the model, the mesh lies along the slice's torus.
  """
  box = device_mesh.physical_shape(devices)
  if box is not None and not config.d_model % math.prod(box) and not config.d_ff % math.prod(box):
    return torus_mesh(box, device_mesh.wraps(devices), config)
  return default_mesh(config, len(devices))


def torus_meshes(
  shape: Sequence[int], wraps: Sequence[bool], split: bool = True
) -> tuple[MeshShape, ...]:
  """Return the meshes (X, Y, Z) whose neighbours are neighbours on the torus.

  Each physical axis is assigned to one mesh axis; a mesh axis may get several. A physical ring of 4
  chips is a 2x2 square, so its halves may go to two mesh axes; halves of other axes would share
  links. Y is at least Z, since swapping Y and Z does not change the bytes.

  Args:
    shape: Chips of the slice along each physical axis.
    wraps: For each physical axis, whether its ends are linked.
    split: Whether rings of 4 may be halved.
  """

  def shares(size: int, wrap: bool) -> Iterator[MeshShape]:
    """Yield the factors (x, y, z) that one physical axis may contribute to the mesh axes."""
    yield from ((size, 1, 1), (1, size, 1), (1, 1, size))
    if split and size == 4 and wrap:
      yield from ((1, 2, 2), (2, 1, 2), (2, 2, 1))

  choices = itertools.product(
    *(list(shares(size, wrap)) for size, wrap in zip(shape, wraps, strict=True))
  )
  found = set()
  for choice in choices:
    x, y, z = (math.prod(factors) for factors in zip(*choice, strict=True))
    if y >= z:
      found.add((x, y, z))
  return tuple(sorted(found))


def torus_mesh(
  shape: Sequence[int], wraps: Sequence[bool], config: ModelConfig, split: bool = True
) -> MeshShape:
  """Return the torus_meshes mesh on which a ws_2d decode step spends the least time on links.

  The time counts the collectives of one layer (traffic.layer_collectives) with as many rows as
  chips, by the bytes through the busiest link (links.bytes_through_a_link). Hops are not counted,
  because all meshes have equally many. A larger X reduces the bytes of features that are sent, and
  increases those of columns, which travel along x, the axis with the fewest links. X = 1, where
  ws_2d equals ws_1d, is chosen only if splitting two dimensions sends more bytes (section 3.2.2).
  Among equally good meshes, the function prefers whole physical axes, then Y and Z as equal as
  possible.

  The function does not check that the chips divide the model.

  Args:
    shape: Chips of the slice along each physical axis.
    wraps: For each physical axis, whether its ends are linked.
    config: The model.
    split: Whether rings of 4 may be halved.
  """
  return _torus_mesh(tuple(shape), tuple(wraps), config, split)


@functools.lru_cache(maxsize=256)
def _torus_mesh(
  shape: tuple[int, ...], wraps: tuple[bool, ...], config: ModelConfig, split: bool
) -> MeshShape:
  def moved(mesh: MeshShape) -> float:
    return sum(collective.moved for collective in _decode_collectives(config, mesh))

  found = torus_meshes(shape, wraps, split)
  one = [mesh for mesh in found if mesh[0] == 1]
  two = [mesh for mesh in found if mesh[0] > 1]
  whole = torus_meshes(shape, wraps, split=False)

  def order(mesh: MeshShape) -> tuple[int, bool, fractions.Fraction]:
    waits = layer_bytes_through_a_link(shape, wraps, mesh, config)
    return round(waits), mesh not in whole, fractions.Fraction(mesh[1], mesh[2])

  return min(two if two and min(map(moved, two)) < min(map(moved, one)) else one, key=order)


def layer_bytes_through_a_link(
  shape: Sequence[int], wraps: Sequence[bool], mesh: MeshShape, config: ModelConfig
) -> float:
  """Return the bytes that the busiest link carries in a layer of torus_mesh's decode step.

  Args:
    shape: Chips of the slice along each physical axis.
    wraps: For each physical axis, whether its ends are linked.
    mesh: (X, Y, Z).
    config: The model.
  """
  return sum(
    links.bytes_through_a_link(collective, links.paths(shape, wraps, mesh, collective.axes))
    for collective in _decode_collectives(config, mesh)
  )


def _decode_collectives(config: ModelConfig, mesh: MeshShape) -> list[Collective]:
  """Return the collectives of a layer in a ws_2d/batch decode step with as many rows as chips."""
  sizes, rows = dict(zip(AXES, mesh, strict=True)), math.prod(mesh)
  sharding = shard_activations(Layout('ws_2d', 'batch'), config, sizes, rows, 1)
  return layer_collectives(config, sharding, sizes, rows, 1)


def default_mesh(config: ModelConfig, devices: int) -> MeshShape:
  """Return a mesh over the largest number of devices that divides the model, shaped for ws_2d.

  The fewest bytes of activations are sent if X = sqrt(devices * E / F), which for F = 4 E is
  sqrt(devices) / 2 (section 3.2.2). Y and Z divide the rest as equally as possible.
  """
  for count in range(devices, 0, -1):
    try:
      check_model(config, dict(x=count, y=1, z=1))
    except MeshError:
      continue
    x = _nearest_divisor(count, math.sqrt(count * config.d_model / config.d_ff))
    y = _nearest_divisor(count // x, math.sqrt(count // x))
    return x, y, count // x // y
  raise AssertionError('one device divides every model')


def _nearest_divisor(n: int, value: float) -> int:
  """Return the divisor of n nearest to `value` in ratio; of two equally near, the larger."""
  return min(
    (d for d in range(1, n + 1) if n % d == 0),
    key=lambda d: (round(abs(math.log(d / value)), 9), -d),
  )
