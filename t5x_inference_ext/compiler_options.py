"""Compiler options for each kind of device, equal for all programs of this package; int4 arguments.

`infer`, the server, the T5X adapter and precompile all use them, so that precompile's reports hold
for the programs that run.
"""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp

from t5x_inference_ext import params

# Each option makes a collective asynchronous: a start and an end, with other work between. Without
# the options, v4 and v5p run all-gathers and all-to-alls synchronously (docs/tpu_v4_tuning.md has
# the times). By default v5e and v6e run all-gathers asynchronously. v5e does not support
# asynchronous all-to-alls.
_ASYNCHRONOUS: dict[str, str | bool] = {
  'xla_enable_async_all_gather': True,
  'xla_tpu_enable_async_all_to_all': True,
}
# XLA:TPU keeps one weight in on-chip memory from a program's beginning on. If it is an int8 head,
# which may fit just so, it leaves the layers' weights no room to be prefetched: a decode step of
# PaLM 540B then takes a tenth more than with a bfloat16 head, in place of less.
_NO_WEIGHT_IS_KEPT: dict[str, str | bool] = {'xla_max_cross_program_prefetches': '0'}
_OF_KIND = {'TPU v4': _ASYNCHRONOUS, 'TPU v5': _ASYNCHRONOUS, 'TPU v5p': _ASYNCHRONOUS}


def overlaps_collectives(device: jax.Device) -> bool:
  """Return whether the options let a kind of device run gathers and permutes beside products.

  No option lets a device run reduce-scatters beside products.

  Args:
    device: A device of that kind. It need not exist on this machine.
  """
  return compiler_options(device) is _ASYNCHRONOUS


def compiler_options(
  device: jax.Device, scaled: Collection[str] = ()
) -> dict[str, str | bool] | None:
  """Return the options for programs on a kind of device; None: the compiler's defaults.

  Args:
    device: A device of that kind. It need not exist on this machine.
    scaled: The quantized weights of the program's model (WeightFormat.scaled).
  """
  options = _OF_KIND.get(device.device_kind)
  if device.device_kind.startswith('TPU') and any(table in scaled for table in params.TABLES):
    return {**(options or {}), **_NO_WEIGHT_IS_KEPT}
  return options


def take_int4(compiled: jax.stages.Compiled) -> jax.stages.Compiled:
  """Let a program that was compiled ahead, or loaded, take int4 arrays; return it.

  Such a program compares the memory layouts of arrays with its own ones. JAX leaves the bits of an
  element out of the layout of an int4 array, and not out of that of a program, so they always
  differ. A jitted function compares none, and runs with these arrays.
  """
  executable: Any = compiled._executable
  executable._xla_in_layouts = [
    None if argument.dtype == jnp.int4 else layout
    for argument, layout in zip(executable.in_avals, executable._xla_in_layouts)
  ]
  return compiled
