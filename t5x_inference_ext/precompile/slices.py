"""Devices of a TPU slice that is not present, as described by libtpu (which has the compiler)."""

from collections.abc import Sequence
import functools
import importlib.util
import math
import os
import re

import jax
from jax.experimental import topologies
import jax.numpy as jnp
from jax.sharding import Mesh

from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.errors import MeshError, UserError
from t5x_inference_ext.sharding.cloud_names import cloud_name
from t5x_inference_ext.sharding.layout import check_model
from t5x_inference_ext.sharding.mesh import AXES, make_mesh
from t5x_inference_ext.sharding.mesh_choice import torus_mesh
from t5x_inference_ext.sharding.torus import GENERATIONS, TpuSlice

# libtpu aborts the process for boxes that no pod has, such as v4:1x2x2, so such boxes are refused
# earlier. Small boxes are listed here; larger slices of v4 and v5p are boxes of whole 4x4x4 cubes.
_BOXES = {
  3: ((1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4)),
  2: ((1, 1, 1), (2, 2, 1), (2, 4, 1), (4, 4, 1), (4, 8, 1), (8, 8, 1), (8, 16, 1), (16, 16, 1)),
}
_USUAL_CUBES = ((4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8), (8, 8, 16))
_CUBE = 4
_MAX_CHIPS = {'v4': 4096, 'v5p': 6144}

_AVAILABLE = re.compile(
  r'available HBM \(([\d.]+)([KMGT])\)|of ([\d.]+)([KMGT]) hbm', re.IGNORECASE
)
_NEEDED = re.compile(r'required[^(]*\(([\d.]+)([KMGT])\)|used ([\d.]+)([KMGT]) of', re.IGNORECASE)
_UNITS = {'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


def check_slice(slice_: TpuSlice) -> None:
  """Raise MeshError for a slice that does not exist: the compiler would crash.

  Raises:
    MeshError: There is no such slice. The message lists the usual ones of its generation.
  """
  in_3d = GENERATIONS[slice_.kind] == 3
  shape = tuple(sorted(slice_.shape)) if in_3d else slice_.shape
  boxes = {tuple(sorted(box)) for box in _BOXES[3]} if in_3d else set(_BOXES[2])
  # Only the last axis may be one chip thick: v4:2x2x1.
  is_box = shape in boxes and (1 not in slice_.shape[:2] or slice_.chips == 1)
  is_cubes = (
    in_3d and all(n % _CUBE == 0 for n in shape) and slice_.chips <= _MAX_CHIPS[slice_.kind]
  )
  if not is_box and not is_cubes:
    raise MeshError(
      f'there is no {slice_.kind} slice {slice_}; known: {", ".join(known_slices(slice_.kind))}'
      + (', and any box of 4x4x4 cubes' if in_3d else '')
    )


def known_slices(kind: str) -> list[str]:
  """Return the usual slices of a generation, smallest first: ['v4:1x1x1', 'v4:2x2x1', ...]."""
  dimensions = GENERATIONS[kind]
  cubes = _USUAL_CUBES if dimensions == 3 else ()
  return [str(TpuSlice(kind, box)) for box in (*_BOXES[dimensions], *cubes)]


def topology_devices(slice_: TpuSlice) -> Sequence[jax.Device]:
  """Return the slice's devices, one per chip. Programs can be compiled for them, but not run.

  Sets environment variables that libtpu reads when it is loaded, unless the user has set them.

  Raises:
    MeshError: There is no such slice.
    UserError: libtpu is not installed, or is too old for this slice.
  """
  check_slice(slice_)
  if importlib.util.find_spec('libtpu') is None:
    raise UserError(
      "the TPU compiler is not installed: pip install 't5x_inference_ext[tpu]' (libtpu; it needs "
      'no TPU)'
    )
  for name, value in (
    ('TPU_SKIP_MDS_QUERY', '1'),
    ('TPU_WORKER_HOSTNAMES', 'localhost'),
    ('ALLOW_MULTIPLE_LIBTPU_LOAD', '1'),
    ('TPU_ACCELERATOR_TYPE', cloud_name(slice_.kind, slice_.chips)),
    # Silence the compiler's long logs; its errors reach the user as exceptions.
    ('TPU_STDERR_LOG_LEVEL', '3'),
    ('TPU_MIN_LOG_LEVEL', '3'),
  ):
    os.environ.setdefault(name, value)
  # On these generations, one device is two cores. Without this name, v4 would have two devices per
  # chip.
  options = {'chip_config_name': 'megacore'} if GENERATIONS[slice_.kind] == 3 else {}
  try:
    devices = topologies.get_topology_desc(
      platform='tpu', topology_name=str(slice_), **options
    ).devices
  except Exception as e:  # libtpu can't list its slices, and raises many kinds of errors
    reason = ' '.join(str(e).split())
    raise UserError(f'the installed libtpu knows no slice {slice_}: {reason}') from e
  if len(devices) != slice_.chips:
    raise UserError(
      f'the installed libtpu describes {slice_} with {len(devices)} devices for {slice_.chips} '
      'chips; libtpu 0.0.52 has one per chip'
    )
  return devices


def slice_mesh(slice_: TpuSlice, config: ModelConfig, shape: Sequence[int] | None = None) -> Mesh:
  """Return the mesh over a whole slice, along its torus.

  Args:
    slice_: TpuSlice. The devices.
    config: ModelConfig. Decides the shape if none is given (mesh_choice.torus_mesh).
    shape: (X, Y, Z) or None. Its product must be the number of chips.

  Raises:
    MeshError: There is no such slice, or the mesh has another size or does not divide the model.
    UserError: libtpu is missing.
  """
  shape = torus_mesh(slice_.shape, slice_.wraps, config) if shape is None else tuple(shape)
  if math.prod(shape) != slice_.chips:
    raise MeshError(
      f'the mesh {"x".join(map(str, shape))} has {math.prod(shape)} positions and {slice_} has '
      f'{slice_.chips} chips: a program runs on all of them'
    )
  check_model(config, dict(zip(AXES, shape)))
  return make_mesh(shape, topology_devices(slice_))


@functools.cache
def available_bytes(kind: str) -> int:
  """Return the bytes of a chip's memory that a program may take, as the compiler counts them.

  The number is not published, but the compiler states it when it refuses a program. So this
  function compiles a program that no chip could hold.

  Raises:
    UserError: The compiler does not state it.
  """
  device = topology_devices(TpuSlice(kind, (1, 1, 1)))[0]
  x = jax.ShapeDtypeStruct(
    (2**20, 2**24), jnp.bfloat16, sharding=jax.sharding.SingleDeviceSharding(device)
  )
  try:
    jax.jit(lambda x: x + x).lower(x).compile()
  except jax.errors.JaxRuntimeError as e:
    _, available = memory_limits(str(e))
    if available:
      return available
    raise UserError(
      f'the installed libtpu does not say how much memory a {kind} chip has: {e}'
    ) from e
  raise AssertionError(f'{kind} took a program of {x.size * 4} bytes')


def memory_limits(message: str) -> tuple[int | None, int | None]:
  """Return (bytes needed, bytes available) from an out-of-memory message; None if missing."""
  return _bytes(_NEEDED.search(message)), _bytes(_AVAILABLE.search(message))


def _bytes(match: re.Match[str] | None) -> int | None:
  if match is None:
    return None
  number, unit = (group for group in match.groups() if group)
  return round(float(number) * _UNITS[unit.upper()])
