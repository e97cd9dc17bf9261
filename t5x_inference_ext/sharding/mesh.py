"""The mesh: devices arranged along the axes x, y and z of a torus (the paper's section 3.1)."""

from collections.abc import Sequence
import math

import jax
from jax.sharding import Mesh
import numpy as np

from t5x_inference_ext.errors import MeshError
from t5x_inference_ext.sharding import torus

AXES = ('x', 'y', 'z')


def parse_mesh(text: str) -> tuple[int, int, int]:
  """'2x2x2' -> (2, 2, 2). Raises MeshError for anything but three whole numbers above 0."""
  parts = text.lower().split('x')
  if len(parts) != 3 or not all(p.isdecimal() and int(p) > 0 for p in parts):
    raise MeshError(f'a mesh is written XxYxZ, e.g. 2x2x2 or 1x1x1, got {text!r}')
  return tuple(int(p) for p in parts)


def make_mesh(shape: Sequence[int], devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh of X*Y*Z devices with axes x, y and z.

  All chips of a TPU slice are arranged so that mesh neighbours are torus neighbours (torus.device_grid). Everything
  else (CPU, GPU, fewer devices than there are, two devices a chip) is the first X*Y*Z devices in their order.

  Raises:
    MeshError: fewer devices than the mesh needs.
  """
  devices = jax.devices() if devices is None else devices
  needed = math.prod(shape)
  if needed > len(devices):
    raise MeshError(
      f'mesh {"x".join(map(str, shape))} needs {needed} devices and there are {len(devices)}: use a smaller --mesh'
      f' (on CPU, XLA_FLAGS=--xla_force_host_platform_device_count={needed} simulates {needed})'
    )
  return Mesh(arrange(shape, devices), AXES)


def arrange(shape: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
  """[X, Y, Z] devices, as make_mesh orders them."""
  needed = math.prod(shape)
  if needed != len(devices) or physical_shape(devices) is None:
    return _array(devices[:needed]).reshape(tuple(shape))
  return _array(devices)[torus.device_grid(_coordinates(devices), shape, wraps(devices))]


def physical_shape(devices: Sequence[jax.Device]) -> tuple[int, int, int] | None:
  """The box of the torus that TPU devices fill, one device a chip: what mesh_choice.torus_mesh asks for.

  None for other platforms, for two devices a chip, and for chips that leave holes or belong to several slices.
  """
  if not all(d.device_kind.startswith('TPU') and hasattr(d, 'coords') for d in devices):
    return None
  box = torus.box_of(_coordinates(devices))
  return box and box[1]


def mesh_links(mesh: Mesh) -> dict[str, str] | None:
  """Axis -> 'ring', 'chain' or 'broken' on the torus (torus.axis_links); None where the devices have no torus."""
  devices = mesh.devices.ravel().tolist()
  if physical_shape(devices) is None:
    return None
  grid = np.arange(mesh.size).reshape(mesh.devices.shape)
  return dict(zip(mesh.axis_names, torus.axis_links(_coordinates(devices), grid, wraps(devices))))


def single_device_mesh(device: jax.Device | None = None) -> Mesh:
  return make_mesh((1, 1, 1), [device or jax.devices()[0]])


def mesh_shape(mesh: Mesh | jax.sharding.AbstractMesh) -> tuple[int, int, int]:
  """(X, Y, Z); an axis that the mesh lacks counts 1."""
  return tuple(mesh.shape.get(a, 1) for a in AXES)


def mesh_text(mesh: Mesh) -> str:
  return 'x'.join(map(str, mesh_shape(mesh)))


def _coordinates(devices: Sequence[jax.Device]) -> np.ndarray:
  return np.asarray([tuple(d.coords) for d in devices])


def wraps(devices: Sequence[jax.Device]) -> tuple[bool, bool, bool]:
  """Whether the ends of each physical axis are linked, of devices that have a physical_shape."""
  corner, shape = torus.box_of(_coordinates(devices))
  # A box that starts elsewhere is a part of a larger slice: its ends are not linked to each other.
  return (
    (False,) * 3 if any(corner) else torus.wraparound(shape, torus.kind_of(devices[0].device_kind))
  )


def _array(devices: Sequence[jax.Device]) -> np.ndarray:
  array = np.empty(len(devices), object)
  array[:] = devices
  return array
