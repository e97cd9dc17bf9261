"""Stock T5X compiled for a TPU slice: flaxformer's PaLM, T5X's model, partitioner and rules.

T5X and flaxformer are used unchanged. Importing this module raises ImportError if one is absent.

The model is flaxformer's ParallelFusedDecoderLayer, scanned, as in the test checkpoints, in
bfloat16: T5X has no int8. T5X's standard_logical_axis_rules and a model-parallel submesh decide how
the model is split; the submeshes in PARTITIONINGS are tried, and the fastest counts. No standard
rule names the KV cache: its rows are split over 'data', and it is replicated over 'model', as XLA
chooses inside T5X's own predict_batch, which does not specify a split. (If the cache were
replicated on every chip, a step of PaLM 540B at batch 64 would need 45.7 GiB, and not fit.)

decode: _compute_logits_from_slice and an argmax, with the cache donated. prefill:
_compute_kv_cache, then a decode step for the prompt's last token, which T5X runs again to get the
first new token.
"""

import dataclasses
import functools
import math
from typing import Any

from absl import logging
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
from t5x import decoding, partitioning, train_state

from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.errors import MeshError, UserError
from t5x_inference_ext.precompile import slices
from t5x_inference_ext.precompile.estimate import Estimate, estimate
from t5x_inference_ext.precompile.memory import CompiledMemory, memory_of, shard_bytes
from t5x_inference_ext.sharding.torus import TpuSlice, parse_slice
from tests.t5x_adapter import palm_flaxformer

# flaxformer and T5X warn of their own deprecations at every trace.
logging.set_verbosity(logging.ERROR)


@dataclasses.dataclass(frozen=True)
class Partitioning:
  """The partitioning that a T5X user chooses.

  Attributes:
    submesh: tuple of int. Chips along x, y, z, and cores, of a model-parallel tile ('model'); the
      other chips are 'data'.
    activation_dims: int. standard_logical_axis_rules's activation_partitioning_dims.
    parameter_dims: int. The rules' parameter_partitioning_dims; with 2, weights are also split over
      'data'.
  """

  submesh: tuple[int, int, int, int]
  activation_dims: int
  parameter_dims: int

  def __str__(self) -> str:
    tile = 'x'.join(map(str, self.submesh[:3]))
    return f'submesh {tile}, {self.activation_dims}D activations, {self.parameter_dims}D parameters'


# Slice -> the partitionings worth trying: model parallelism alone if the weights fit, else both
# axes. 'model' must divide the heads, 48 in PaLM 540B. With activation_dims 2, decode changes by
# less than 1%.
PARTITIONINGS = {
  'v4:4x4x4': (Partitioning((4, 4, 1, 1), 1, 2), Partitioning((4, 2, 1, 1), 1, 2)),
  'v4:2x2x4': (Partitioning((2, 2, 4, 1), 1, 1), Partitioning((2, 2, 1, 1), 1, 2)),
  'v4:2x2x1': (Partitioning((2, 2, 1, 1), 1, 1), Partitioning((2, 1, 1, 1), 1, 2)),
}


@dataclasses.dataclass(frozen=True)
class Stock:
  """One partitioning, compiled.

  Attributes:
    partitioning: Partitioning. The one that was compiled.
    batch: int. The program's rows: the requested rows, rounded up to a multiple of the size of
      'data', since T5X refuses other batches.
    memory: CompiledMemory or None. Bytes on one chip; None if the program does not fit.
    estimate: Estimate or None. The time; None if the program does not fit.
    needed: int or None. Bytes needed on a chip, if the program does not fit and the compiler
      reports them.
  """

  partitioning: Partitioning
  batch: int
  memory: CompiledMemory | None = None
  estimate: Estimate | None = None
  needed: int | None = None

  @property
  def fits(self) -> bool:
    return self.estimate is not None


def best(
  config: ModelConfig, slice_name: str, phase: str, batch: int, context: int
) -> tuple[Stock, tuple[Stock, ...]]:
  """Return the fastest of a slice's PARTITIONINGS (or the nearest to fitting), and all of them."""
  tried = tuple(
    analyze(config, slice_name, phase, batch, context, p) for p in PARTITIONINGS[slice_name]
  )

  def order(stock):
    return (
      (False, stock.estimate.serial_seconds) if stock.fits else (True, stock.needed or math.inf)
    )

  return min(tried, key=order), tried


def analyze(
  config: ModelConfig,
  slice_name: str,
  phase: str,
  batch: int,
  context: int,
  partitioning_: Partitioning,
) -> Stock:
  """Compile stock T5X for a slice.

  Args:
    config: ModelConfig. A PaLM: parallel block, multiquery, SwiGLU.
    slice_name: str. Such as 'v4:4x4x4'.
    phase: str. 'decode', or 'prefill' of whole prompts of `context` tokens.
    batch: int. B, rounded up to a multiple of the size of 'data'.
    context: int. S, the positions of the cache.
    partitioning_: Partitioning. How the model is split.

  Raises:
    UserError: no libtpu, no such slice, or the compiler refused for another reason than memory.
  """
  slice_ = parse_slice(slice_name)
  partitioner = slice_partitioner(slice_, partitioning_)
  rows = partitioner.mesh.shape['data']
  batch = -(-batch // rows) * rows
  function, arguments = phase_function(config, partitioner, phase, batch, context)
  available = slices.available_bytes(slice_.kind)
  held = shard_bytes(arguments[0])
  if held > available:
    return Stock(partitioning_, batch, needed=held)
  try:
    compiled = partitioner.compile(function, *arguments)
  except jax.errors.JaxRuntimeError as e:
    message = str(e).strip().splitlines()[0]
    if 'RESOURCE_EXHAUSTED' not in message:
      what = f'stock T5X, {phase} for {slice_}'
      raise UserError(f'the TPU compiler refused {what}: {message}') from e
    return Stock(partitioning_, batch, needed=slices.memory_limits(str(e))[0])
  return Stock(
    partitioning_,
    batch,
    memory_of(phase, arguments, compiled, available),
    estimate(compiled.as_text(), slice_, partitioner.mesh.shape, _chips(partitioner.mesh, slice_)),
  )


def _chips(mesh: Mesh, slice_: TpuSlice) -> list[int]:
  """Return the number of each device's chip, in row-major order of the slice's shape."""
  return [int(np.ravel_multi_index(d.coords, slice_.shape)) for d in mesh.devices.flat]


def slice_partitioner(slice_: TpuSlice, choice: Partitioning) -> partitioning.PjitPartitioner:
  """Return T5X's partitioner over the chips of a slice that is not here.

  Raises:
    MeshError: a submesh that does not divide the slice.
  """
  if any(n % m for n, m in zip(slice_.shape, choice.submesh)):
    raise MeshError(f'the submesh {choice.submesh} does not divide {slice_}')
  devices = list(slices.topology_devices(slice_))
  here = [d for d in devices if d.process_index == devices[0].process_index]
  mesh_of_slice = partitioning.get_mesh(
    choice.submesh, input_devices=devices, input_local_devices=here
  )

  class SlicePartitioner(partitioning.PjitPartitioner):
    """A partitioner with a given mesh: PjitPartitioner makes one from the devices present."""

    @functools.cached_property
    def mesh(self) -> Mesh:
      return mesh_of_slice

  return SlicePartitioner(
    model_parallel_submesh=choice.submesh,
    logical_axis_rules=partitioning.standard_logical_axis_rules(
      choice.activation_dims, choice.parameter_dims
    ),
  )


def phase_function(
  config: ModelConfig,
  partitioner: partitioning.PjitPartitioner,
  phase: str,
  batch: int,
  context: int,
) -> tuple[partitioning.PjittedFnWithContext, tuple[Any, ...]]:
  """Return T5X's partitioned function of a phase, and the shapes and shardings that it takes.

  decode: (params, cache, tokens [B, 1]) -> (next tokens [B, 1], cache).
  prefill: (params, tokens [B, T], causal attention [B, T]) -> (next tokens [B, 1], cache).
  """
  model = palm_flaxformer.stock_model(config, jnp.bfloat16)
  mesh, rows = partitioner.mesh, partitioner.data_partition_spec

  def struct(x, spec, dtype=None):
    return jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=NamedSharding(mesh, spec))

  # T5X relies on implicit broadcasting.
  with jax.numpy_rank_promotion('allow'):
    initial = jax.eval_shape(
      lambda: model.get_initial_variables(
        jax.random.PRNGKey(0), {'decoder_input_tokens': (batch, 8)}
      )
    )
    state = train_state.InferenceState.create(initial)
    specs = partitioner.get_mesh_axes(state).params
    # bfloat16 as in infer.gin.
    params = jax.tree.map(lambda x, spec: struct(x, spec, jnp.bfloat16), state.params, specs)
    tokens = jax.ShapeDtypeStruct((batch, context), jnp.int32, sharding=NamedSharding(mesh, rows))
    cache, cache_specs = _cache(model, params, tokens, partitioner)

  def step(params, cache, tokens):
    state = decoding.DecodingState(cur_index=None, sequences=None, cur_token=tokens, cache=cache)
    logits, cache = model._compute_logits_from_slice(state, params, context)
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)[:, None], cache

  def prefill(params, tokens, causal):
    cache, lengths = model._compute_kv_cache(params, tokens, causal)
    return step(params, cache, jnp.take_along_axis(tokens, lengths[:, None], axis=1))

  if phase == 'prefill':
    return (
      partitioner.partition(prefill, (specs, rows, rows), (rows, cache_specs)),
      (params, tokens, tokens),
    )
  one = jax.ShapeDtypeStruct((batch, 1), jnp.int32, sharding=NamedSharding(mesh, rows))
  return (
    partitioner.partition(
      step, (specs, cache_specs, rows), (rows, cache_specs), donate_argnums=(1,)
    ),
    (params, cache, one),
  )


def _cache(model, params, tokens, partitioner):
  """Return the cache [L, B, ..] that T5X makes before a prefill, rows over 'data', and specs."""
  made = jax.eval_shape(
    lambda p, t: model.module.apply(
      {'params': p}, t, t, enable_dropout=False, decode=True, mutable=['cache']
    )[1]['cache'],
    params,
    tokens,
  )
  specs = jax.tree.map(lambda x: P(None, *partitioner.data_partition_spec), made)
  mesh = partitioner.mesh
  cache = jax.tree.map(
    lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)),
    made,
    specs,
  )
  return cache, specs
