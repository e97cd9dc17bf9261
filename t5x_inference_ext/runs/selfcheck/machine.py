"""Description of the machine of a selfcheck: versions, devices, their torus and memory."""

import importlib.metadata
import os
import platform
from typing import Any

import jax

from t5x_inference_ext.runs.receipt import versions
from t5x_inference_ext.sharding import torus
from t5x_inference_ext.sharding.mesh import mesh_text, physical_shape, wraps

_DISTRIBUTIONS = ('libtpu', 'numpy', 'tensorstore')
_MOST_DEVICES = 64  # devices whose coordinates are listed


def slice_of(mesh: jax.sharding.Mesh) -> torus.TpuSlice | None:
  """Return the TPU slice that a mesh covers; None if its devices are not a whole TPU slice."""
  devices = list(mesh.devices.flat)
  shape, kind = physical_shape(devices), torus.kind_of(devices[0].device_kind)
  if shape is None or kind is None or len(devices) != len(jax.devices()):
    return None
  return torus.TpuSlice(kind, shape)


def describe_machine(mesh: jax.sharding.Mesh) -> dict[str, Any]:
  """Return the machine's versions, devices, links and memory as a JSON-ready dict."""
  devices = jax.devices()
  shape, found = physical_shape(devices), slice_of(mesh)
  return {
    'versions': {
      **versions(),
      'python': platform.python_version(),
      **{name: _version(name) for name in _DISTRIBUTIONS},
    },
    'platform': devices[0].platform,
    'devices': len(devices),
    'processes': jax.process_count(),
    'mesh': mesh_text(mesh),
    'torus': None if shape is None else 'x'.join(map(str, shape)),
    'wraps': None if shape is None else list(wraps(devices)),
    'slice': None if found is None else str(found),
    'mesh_devices': [_place(device) for device in list(mesh.devices.flat)[:_MOST_DEVICES]],
    'processors': os.cpu_count(),
    'host_memory_bytes': os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'),
  }


def device_memory() -> dict[str, int]:
  """Return the first device's memory statistics; {} if the platform has none."""
  stats = jax.local_devices()[0].memory_stats() or {}
  return {name: int(stats[name]) for name in sorted(stats) if 'bytes' in name}


def machine_text(found: dict[str, Any]) -> str:
  """Return a line about a machine, from the result of describe_machine."""
  shape = f', a torus of {found["torus"]}' if found['torus'] else ''
  kept = ', '.join(f'{name} {version}' for name, version in found['versions'].items() if version)
  return (
    f'{found["devices"]} {found["platform"]} devices{shape} in {found["processes"]} processes, '
    f'mesh {found["mesh"]}; {kept}'
  )


def _place(device: jax.Device) -> dict[str, Any]:
  coordinates = getattr(device, 'coords', None)
  return {
    'id': device.id,
    'process': device.process_index,
    'coordinates': None if coordinates is None else list(coordinates),
  }


def _version(distribution: str) -> str | None:
  try:
    return importlib.metadata.version(distribution)
  except importlib.metadata.PackageNotFoundError:
    return None
