"""Check before weights are loaded that a run's KV cache can fit into memory."""

import os

import jax

from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.text_format import decimal_bytes

_FLOAT_BYTES = {'float32': 4, 'bfloat16': 2}
_SCALE_BYTES = 4  # an int8 cache has a scale for each position and head


def check_cache_fits(
  config: ModelConfig, mesh: jax.sharding.Mesh, cache_dtype: str, rows: int, positions: int
) -> None:
  """Raise RequestError if the cache of `rows` rows is larger than the memory of all devices.

  A cache that passes may still not fit beside weights and activations; the device then raises an
  error. On a CPU there is no such error: without this check, the system would kill the process.

  Args:
    config: Shape of the model.
    mesh: The devices.
    cache_dtype: Dtype of the KV cache.
    rows: Rows decoded together.
    positions: Positions of each row's cache.
  """
  if cache_dtype == 'int8':
    head_bytes = config.d_head + _SCALE_BYTES
  else:
    head_bytes = config.d_head * _FLOAT_BYTES[cache_dtype]
  needed = 2 * config.num_layers * config.num_kv_heads * head_bytes * rows * positions
  memory = _memory(mesh)
  if needed > memory:
    raise RequestError(
      f'too little memory: a cache of {rows} rows with {positions} positions each needs '
      f'{decimal_bytes(needed)}, and the devices have {decimal_bytes(memory)}: take a smaller '
      'batch_size, fewer new tokens, shorter prompts or more devices'
    )


def _memory(mesh: jax.sharding.Mesh) -> int:
  """Return a mesh's total memory in bytes. CPU devices of one process share their memory."""
  device = mesh.local_devices[0]
  stats = device.memory_stats() if device.platform != 'cpu' else None
  if stats and 'bytes_limit' in stats:
    return stats['bytes_limit'] * mesh.size
  processes = len({each.process_index for each in mesh.devices.flat})
  return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') * processes
