"""The mesh: devices arranged along the axes x, y and z of a torus (the paper's section 3.1)."""

from collections.abc import Sequence
import math

import jax
from jax.sharding import Mesh
import numpy as np

from t5x_inference_ext.errors import MeshError
from t5x_inference_ext.sharding import torus
from t5x_inference_ext.text_format import parse_sizes

AXES = ('x', 'y', 'z')
MeshShape = tuple[int, int, int]  # (X, Y, Z)


def parse_mesh(text: str) -> MeshShape:
  """Return the mesh shape that a text names: '2x2x2' -> (2, 2, 2).

  Raises:
    MeshError: The text is not three whole numbers above 0.
  """
  sizes = parse_sizes(text.lower()) if isinstance(text, str) else ()
  if len(sizes) != 3:
    got = text[:99] if isinstance(text, str) else text
    raise MeshError(f'a mesh is written XxYxZ, e.g. 2x2x2 or 1x1x1, got {got!r}')
  return sizes


def make_mesh(shape: Sequence[int], devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Return a mesh of X*Y*Z devices with axes x, y and z.

  If the devices are all chips of a TPU slice, mesh neighbours are torus neighbours
  (torus.device_grid). Otherwise (CPU, GPU, fewer devices than exist, two devices per chip) the mesh
  is the first X*Y*Z devices in their order.

  Args:
    shape: (X, Y, Z).
    devices: The devices; by default all devices of the default platform.

  Raises:
    MeshError: There are fewer devices than the mesh needs.
  """
  devices = jax.devices() if devices is None else devices
  needed = math.prod(shape)
  if needed > len(devices):
    raise MeshError(
      f'mesh {"x".join(map(str, shape))} needs {needed} devices and there are {len(devices)}: '
      'use a smaller --mesh '
      f'(on CPU, XLA_FLAGS=--xla_force_host_platform_device_count={needed} simulates {needed})'
    )
  return Mesh(arrange(shape, devices), AXES)


def arrange(shape: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
  """Return [X, Y, Z] devices, arranged as described in make_mesh."""
  needed = math.prod(shape)
  if needed != len(devices) or physical_shape(devices) is None:
    return _array(devices[:needed]).reshape(tuple(shape))
  return _array(devices)[torus.device_grid(_coordinates(devices), shape, wraps(devices))]


def physical_shape(devices: Sequence[jax.Device]) -> tuple[int, int, int] | None:
  """Return the box of the torus that TPU devices fill, one device per chip.

  Return None for other platforms, for two devices per chip, and for chips that leave holes or
  belong to several slices.
  """
  box = _torus_box(devices)
  return None if box is None else box[1]


def mesh_links(mesh: Mesh) -> dict[str, str] | None:
  """Return the links of each mesh axis on the torus: 'ring', 'chain' or 'broken'.

  Defined in torus.axis_links. Return None if the devices are not on a torus.
  """
  devices = mesh.devices.ravel().tolist()
  if physical_shape(devices) is None:
    return None
  grid = np.arange(mesh.size).reshape(mesh.devices.shape)
  links = torus.axis_links(_coordinates(devices), grid, wraps(devices))
  return dict(zip(mesh.axis_names, links, strict=True))


def mesh_shape(mesh: Mesh | jax.sharding.AbstractMesh) -> MeshShape:
  """Return (X, Y, Z). An axis that the mesh lacks has size 1."""
  x, y, z = (mesh.shape.get(a, 1) for a in AXES)
  return x, y, z


def mesh_text(mesh: Mesh) -> str:
  """Return the mesh's shape as text, 'XxYxZ'."""
  return 'x'.join(map(str, mesh_shape(mesh)))


def wraps(devices: Sequence[jax.Device]) -> tuple[bool, bool, bool]:
  """Return whether the ends of each physical axis are linked, for devices with a physical_shape."""
  box = _torus_box(devices)
  # A box that does not start at 0 is part of a larger slice: its ends are not linked to each other.
  if box is None or any(box[0]):
    return False, False, False
  return torus.wraparound(box[1], torus.kind_of(devices[0].device_kind))


def _torus_box(
  devices: Sequence[jax.Device],
) -> tuple[tuple[int, int, int], tuple[int, int, int]] | None:
  """Return the lowest corner and the shape of the box that TPU devices fill, or None."""
  if not all(d.device_kind.startswith('TPU') and hasattr(d, 'coords') for d in devices):
    return None
  return torus.box_of(_coordinates(devices))


def _coordinates(devices: Sequence[jax.Device]) -> np.ndarray:
  """Return the [n, 3] physical coordinates of TPU devices."""
  return np.asarray([tuple(d.coords) for d in devices])


def _array(devices: Sequence[jax.Device]) -> np.ndarray:
  """Return an object array [n] of devices, without letting numpy iterate over a device."""
  array = np.empty(len(devices), object)
  array[:] = devices
  return array
