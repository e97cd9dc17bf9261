"""A slice's devices without the slice: the TPU compiler, libtpu, runs on a CPU machine and describes them."""

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
from t5x_inference_ext.sharding.layout import check_model
from t5x_inference_ext.sharding.mesh import AXES, make_mesh
from t5x_inference_ext.sharding.mesh_choice import torus_mesh
from t5x_inference_ext.sharding.torus import GENERATIONS, TpuSlice

# libtpu aborts the process on boxes that no pod has (v4:1x2x2), so that only real ones reach it. Smaller ones by name;
# larger ones of v4 and v5p are boxes of whole 4x4x4 cubes, and cubes in a row.
_BOXES = {
  3: ((1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4)),
  2: ((1, 1, 1), (2, 2, 1), (2, 4, 1), (4, 4, 1), (4, 8, 1), (8, 8, 1), (8, 16, 1), (16, 16, 1)),
}
_CUBE = 4
_MAX_CHIPS = {'v4': 4096, 'v5p': 6144}
# What an accelerator type is called, and what its number counts: cores or chips.
_TYPES = {'v4': ('v4', 2), 'v5p': ('v5p', 2), 'v5e': ('v5litepod', 1), 'v6e': ('v6e', 1)}

_OUT_OF_MEMORY = re.compile(
  r'available HBM \(([\d.]+)([KMGT])\)|of ([\d.]+)([KMGT]) hbm', re.IGNORECASE
)
_UNITS = {'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


def check_slice(slice_: TpuSlice) -> None:
  """Raises MeshError for a slice that can't be rented, and that the compiler would crash on, listing those near it."""
  dimensions = GENERATIONS[slice_.kind]
  shape = tuple(sorted(slice_.shape)) if dimensions == 3 else slice_.shape
  boxes = {tuple(sorted(box)) for box in _BOXES[3]} if dimensions == 3 else set(_BOXES[2])
  cubes = (
    dimensions == 3
    and all(n % _CUBE == 0 for n in shape)
    and slice_.chips <= _MAX_CHIPS[slice_.kind]
  )
  # One chip thick is only ever the last axis: v4:2x2x1.
  if (shape in boxes and (1 not in slice_.shape[:2] or slice_.chips == 1)) or cubes:
    return
  raise MeshError(
    f'there is no {slice_.kind} slice {slice_}; known: {", ".join(known_slices(slice_.kind))}'
    + (', and any box of 4x4x4 cubes' if dimensions == 3 else '')
  )


def known_slices(kind: str) -> list[str]:
  """The usual slices of a generation, smallest first: ['v4:1x1x1', 'v4:2x2x1', ...]."""
  cubes = ((4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8), (8, 8, 16)) if GENERATIONS[kind] == 3 else ()
  return [str(TpuSlice(kind, box)) for box in (*_BOXES[GENERATIONS[kind]], *cubes)]


def accelerator_type(slice_: TpuSlice) -> str:
  """'v4-128' for v4:4x4x4: what the cloud calls the slice."""
  name, each = _TYPES[slice_.kind]
  return f'{name}-{each * slice_.chips}'


def topology_devices(slice_: TpuSlice) -> Sequence[jax.Device]:
  """The slice's devices, one a chip: programs can be compiled for them, not run.

  Sets what libtpu reads from the environment when it loads, where the user has not.

  Raises:
    MeshError: no such slice.
    UserError: libtpu is not installed, or too old for this slice.
  """
  check_slice(slice_)
  if importlib.util.find_spec('libtpu') is None:
    raise UserError(
      "the TPU compiler is not installed: pip install 't5x_inference_ext[tpu]' (libtpu; it needs no TPU)"
    )
  for name, value in (
    ('TPU_SKIP_MDS_QUERY', '1'),
    ('TPU_WORKER_HOSTNAMES', 'localhost'),
    ('ALLOW_MULTIPLE_LIBTPU_LOAD', '1'),
    ('TPU_ACCELERATOR_TYPE', accelerator_type(slice_)),
    # The compiler logs what it does at length; its errors reach the user as exceptions.
    ('TPU_STDERR_LOG_LEVEL', '3'),
    ('TPU_MIN_LOG_LEVEL', '3'),
  ):
    os.environ.setdefault(name, value)
  # Two cores work as one device on these, which is how they are used; without the name v4 shows two devices a chip.
  options = {'chip_config_name': 'megacore'} if GENERATIONS[slice_.kind] == 3 else {}
  try:
    devices = topologies.get_topology_desc(
      platform='tpu', topology_name=str(slice_), **options
    ).devices
  except (
    Exception
  ) as e:  # JaxRuntimeError of many kinds: only the compiler knows which slices it knows
    raise UserError(
      f'the installed libtpu knows no slice {slice_}: {" ".join(str(e).split())}'
    ) from e
  if len(devices) != slice_.chips:
    raise UserError(
      f'the installed libtpu describes {slice_} with {len(devices)} devices for {slice_.chips} chips; '
      'libtpu 0.0.52 has one a chip'
    )
  return devices


def slice_mesh(slice_: TpuSlice, config: ModelConfig, shape: Sequence[int] | None = None) -> Mesh:
  """The mesh over a whole slice, along its torus.

  Args:
    slice_: whose devices.
    config: decides the shape where none is given (mesh_choice.torus_mesh).
    shape: (X, Y, Z), of as many devices as the slice has chips.

  Raises:
    MeshError: no such slice, a mesh of another size, or one that does not divide the model.
    UserError: no libtpu.
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
  """The bytes of a chip's memory that a program may take, as the compiler counts them.

  Not in any table: it says so when it refuses a program, so it is given one that nothing could hold.
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
  """(bytes needed, bytes available) of an out-of-memory message; None for what it does not say."""
  found = _OUT_OF_MEMORY.search(message)
  available = None
  if found:
    number, unit = (found[1], found[2]) if found[1] else (found[3], found[4])
    available = round(float(number) * _UNITS[unit.upper()])
  needed = re.search(
    r'required[^(]*\(([\d.]+)([KMGT])\)|used ([\d.]+)([KMGT]) of', message, re.IGNORECASE
  )
  if not needed:
    return None, available
  number, unit = (needed[1], needed[2]) if needed[1] else (needed[3], needed[4])
  return round(float(number) * _UNITS[unit.upper()]), available
