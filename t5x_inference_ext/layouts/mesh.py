"""The mesh: devices arranged along the axes x, y and z of a torus (the paper's section 3.1)."""

import math
from typing import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from t5x_inference_ext.errors import MeshError

AXES = ('x', 'y', 'z')


def parse_mesh(text: str) -> tuple[int, int, int]:
  """'2x2x2' -> (2, 2, 2). Raises MeshError for anything but three whole numbers above 0."""
  parts = text.lower().split('x')
  if len(parts) != 3 or not all(p.isdecimal() and int(p) > 0 for p in parts):
    raise MeshError(f'a mesh is written XxYxZ, e.g. 2x2x2 or 1x1x1, got {text!r}')
  return tuple(int(p) for p in parts)


def make_mesh(shape: Sequence[int], devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh of the first X*Y*Z devices, in their order, with axes x, y and z.

  Raises:
    MeshError: fewer devices than the mesh needs.
  """
  devices = jax.devices() if devices is None else devices
  needed = math.prod(shape)
  if needed > len(devices):
    raise MeshError(
        f'mesh {"x".join(map(str, shape))} needs {needed} devices and there are {len(devices)}: use a smaller --mesh'
        f' (on CPU, XLA_FLAGS=--xla_force_host_platform_device_count={needed} simulates {needed})')
  return Mesh(np.asarray(devices[:needed]).reshape(tuple(shape)), AXES)


def single_device_mesh(device: jax.Device | None = None) -> Mesh:
  return make_mesh((1, 1, 1), [device or jax.devices()[0]])


def mesh_shape(mesh: Mesh | jax.sharding.AbstractMesh) -> tuple[int, int, int]:
  """(X, Y, Z); an axis that the mesh lacks counts 1."""
  return tuple(mesh.shape.get(a, 1) for a in AXES)


def mesh_text(mesh: Mesh) -> str:
  return 'x'.join(map(str, mesh_shape(mesh)))
