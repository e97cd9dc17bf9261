"""Measure the times of a few programs, beside the compiler's estimates if there are any."""

import dataclasses
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from t5x_inference_ext.config import ModelConfig, preset
from t5x_inference_ext.precompile.case import CompileCase
from t5x_inference_ext.precompile.estimate import estimate
from t5x_inference_ext.precompile.program import Program, compile_case
from t5x_inference_ext.runs.selfcheck.machine import device_memory, slice_of
from t5x_inference_ext.sharding.mesh import AXES, mesh_shape

REPEATS, STEPS = 5, 5  # each repeat runs this many steps in a row


def timed_cases(mesh: jax.sharding.Mesh) -> list[tuple[str, CompileCase]]:
  """Return the programs to time, each with its model's name.

  The model is small on CPUs, else a quarter of PaLM 8B.
  """
  if mesh.devices.flat[0].platform == 'cpu':
    tiny = ModelConfig(num_layers=2, d_model=256, d_ff=1024, num_heads=8, d_head=32, vocab_size=512)
    name, config, batch, context, prompt = 'a model of 2 layers', tiny, mesh.size, 128, 32
  else:
    few = dataclasses.replace(preset('palm_8b'), num_layers=8)
    name, config, batch, context, prompt = '8 layers of PaLM 8B', few, 64, 2048, 512
  cases = [
    *(CompileCase(config, dtype, 'decode', batch, context) for dtype in ('int8', 'bfloat16')),
    CompileCase(config, 'int8', 'prefill', mesh.size, context, prompt=prompt),
  ]
  return [(name, case) for case in cases]


def time_case(name: str, case: CompileCase, mesh: jax.sharding.Mesh) -> dict[str, Any]:
  """Compile and time a program on zeros; return its times and its estimate, JSON-ready.

  Args:
    name: Name of the model.
    case: The program.
    mesh: The devices.
  """
  program = compile_case(case, mesh)
  measured = _measure(program)
  return {
    'model': name,
    **{name: value for name, value in case.to_dict().items() if name != 'model'},
    'compile_seconds': program.seconds,
    'seconds': statistics.median(measured),
    'all_seconds': measured,
    'estimated_seconds': _estimate(program, mesh),
    'program_bytes': program.memory.needed,
    'memory': device_memory(),
  }


def _measure(program: Program) -> list[float]:
  """Return the seconds of one step (or one prefill) in each repeat, on arguments of zeros."""
  weights, *state = jax.tree.map(
    lambda like: jnp.zeros(like.shape, like.dtype, device=like.sharding), program.arguments
  )
  found = []
  for repeat in range(REPEATS + 1):
    begin = time.perf_counter()
    for _ in range(STEPS):
      if program.case.phase == 'decode':  # the cache is an argument and a result
        cache, tokens = state
        tokens, cache = program.compiled(weights, cache, tokens)
        state = [cache, tokens]
      else:
        tokens, _ = program.compiled(weights, *state)
    jax.block_until_ready(tokens)
    if repeat:  # the first repeat is slower: not counted
      found.append((time.perf_counter() - begin) / STEPS)
  return found


def _estimate(program: Program, mesh: jax.sharding.Mesh) -> list[float] | None:
  """Return the estimated seconds, [with overlap, without]; None if there is no estimate."""
  slice_ = slice_of(mesh)
  if slice_ is None:
    return None
  found = estimate(program.text, slice_, dict(zip(AXES, mesh_shape(mesh))))
  return [found.overlapped_seconds, found.serial_seconds]
