"""Check before weights are loaded that weights and KV caches of a run can fit into memory."""

import math
import os
from typing import NamedTuple

import jax

from t5x_inference_ext import params
from t5x_inference_ext.checkpoints import Checkpoint
from t5x_inference_ext.errors import RequestError, printable
from t5x_inference_ext.quantization.formats import stored_size
from t5x_inference_ext.runs.infer_options import InferOptions
from t5x_inference_ext.runs.loading import OpenModel
from t5x_inference_ext.sharding.packing import canonical_dtype
from t5x_inference_ext.text_format import decimal_bytes

_SCALE_BYTES = 4  # an int8 cache has a scale for each position and head


class HeldMemory(NamedTuple):
  """Bytes that a model holds on all devices together, at least: padding and copies come on top."""

  weights: int
  cache: int


def held_memory(
  checkpoint: Checkpoint, options: InferOptions, rows: int, positions: int
) -> HeldMemory:
  """Return the bytes of a model's weights and KV cache.

  Args:
    checkpoint: The model.
    options: Give the dtypes.
    rows: Rows decoded together.
    positions: Positions of each row's cache.
  """
  config, cache = checkpoint.config, options.cache or options.dtype
  head_bytes = stored_size(config.d_head, cache) + _SCALE_BYTES * (cache == 'int8')
  heads = 2 * config.num_layers * config.num_kv_heads
  weights = sum(
    stored_size(
      math.prod(p.shape), canonical_dtype(p.kind, [name], checkpoint.weights, options.dtype)
    )
    for name, p in params.parameters(config).items()
  )
  return HeldMemory(weights, heads * head_bytes * rows * positions)


def check_fits(options: InferOptions, model: OpenModel, rows: int, positions: int) -> None:
  """Raise RequestError if weights and cache need more than the memory of all devices.

  Weights and cache of a draft model count, too. Activations do not: a run that passes may still
  need too much, and the device then raises an error. On a CPU there is no such error: without this
  check, the system would kill the process.

  Args:
    options: Options of the run.
    model: The model, and its draft model.
    rows: Rows decoded together.
    positions: Positions of each row's cache.
  """
  held = held_memory(model.checkpoint, options, rows, positions)
  needed, memory, draft = sum(held), _memory(model.mesh), ''
  if model.draft is not None:
    drafting = held_memory(model.draft, options, rows, positions)
    needed += sum(drafting)
    draft = (
      f', the draft model {printable(model.draft.path)} {decimal_bytes(drafting.cache)} beside '
      f'{decimal_bytes(drafting.weights)}'
    )
  if needed > memory:
    smaller = 'a smaller draft model, ' if model.draft is not None else ''
    raise RequestError(
      f'too little memory: a cache of {rows} rows with {positions} positions each needs '
      f'{decimal_bytes(held.cache)} beside weights of {decimal_bytes(held.weights)}{draft}, and '
      f'the devices have {decimal_bytes(memory)}: take {smaller}a smaller batch_size, fewer new '
      'tokens, shorter prompts or more devices'
    )


def _memory(mesh: jax.sharding.Mesh) -> int:
  """Return a mesh's total memory in bytes. CPU devices of one process share their memory."""
  device = mesh.local_devices[0]
  stats = device.memory_stats() if device.platform != 'cpu' else None
  if stats and 'bytes_limit' in stats:
    return stats['bytes_limit'] * mesh.size
  processes = len({each.process_index for each in mesh.devices.flat})
  return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') * processes
