"""The program of one phase at full size, without weights, compiled for a mesh of devices."""

import dataclasses
import functools
import pathlib
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from t5x_inference_ext.compiler_options import compiler_options
from t5x_inference_ext.engine.programs import generation_program
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.model.cache import KVCache
from t5x_inference_ext.model.chunks import abstract_cache
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.model.weights import Weights, build_weights
from t5x_inference_ext.precompile.case import CompileCase
from t5x_inference_ext.precompile.memory import CompiledMemory, memory_of
from t5x_inference_ext.precompile.slot_programs import slot_program
from t5x_inference_ext.quantization.formats import weight_format
from t5x_inference_ext.sharding.packing import packed_tensors, tensor_dtype


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled phase.

  Attributes:
    case: CompileCase. The case that was compiled.
    mesh: Mesh. The mesh that it was compiled for.
    compiled: jax.stages.Compiled. Has as_text(), memory_analysis() and cost_analysis().
    arguments: tuple of trees of ShapeDtypeStruct with shardings. Shapes of its arguments.
    memory: CompiledMemory. Bytes on one chip.
    seconds: float. Seconds that compiling took.
  """

  case: CompileCase
  mesh: Mesh
  compiled: jax.stages.Compiled
  arguments: tuple[Any, ...]
  memory: CompiledMemory
  seconds: float

  @functools.cached_property
  def text(self) -> str:
    """The scheduled HLO after partitioning.

    Raises:
      RequestError: Neither jaxlib nor the compiler can write this program as text.
    """
    try:
      return self.compiled.as_text() or ''
    except jax.errors.JaxRuntimeError as e:
      if text := _dumped_text(self.case, self.mesh):
        return text
      reason = str(e).splitlines()[0]
      raise RequestError(
        f'{self.case.phase} in {self.case.layout} was compiled, but this jaxlib cannot write the '
        f'text that the report is made from ({reason}): ask for another layout or batch'
      ) from e


def _dumped_text(case: CompileCase, mesh: Mesh) -> str | None:
  """Compile again, and return the text that the compiler dumps to a file, or None.

  jaxlib can't convert some programs of a newer compiler to text, such as those with lookups on the
  SparseCores of v5p and v6e.
  """
  function, arguments = phase_function(case, mesh)
  with tempfile.TemporaryDirectory() as directory:
    dump: dict[str, str | bool] = {'xla_dump_to': directory, 'xla_dump_hlo_as_text': True}
    options = (_options(case, mesh) or {}) | dump
    function.lower(*arguments).compile(compiler_options=options)
    texts = list(pathlib.Path(directory).glob('*.after_codegen.txt'))
    largest = max(texts, key=lambda path: path.stat().st_size, default=None)
    return largest.read_text(encoding='utf-8') if largest else None


def compile_case(case: CompileCase, mesh: Mesh, available: int | None = None) -> Program:
  """Compile a phase for a mesh. The devices need not exist on this machine.

  Args:
    case: CompileCase. What to compile.
    mesh: Mesh with axes x, y, z.
    available: int or None. Bytes of a chip that a program may take; goes into Program.memory.

  Raises:
    MeshError: The mesh does not divide the model, or the layout can't split the batch.
    jax.errors.JaxRuntimeError: The compiler refused the program. RESOURCE_EXHAUSTED means lack of
      memory.
  """
  function, arguments = phase_function(case, mesh)
  start = time.monotonic()
  compiled = function.lower(*arguments).compile(compiler_options=_options(case, mesh))
  seconds = time.monotonic() - start
  memory = memory_of(case.phase, arguments, compiled, available)
  return Program(case, mesh, compiled, arguments, memory, seconds)


def _options(case: CompileCase, mesh: Mesh) -> dict[str, str | bool] | None:
  return compiler_options(mesh.devices.flat[0], weight_format(case.weights).scaled)


def phase_function(case: CompileCase, mesh: Mesh) -> tuple[jax.stages.Wrapped, tuple[Any, ...]]:
  """Return the jitted function of a phase, and the shapes of its arguments.

  decode: (weights, cache, tokens [B]) -> (next tokens [B], cache), updating the cache in place.
  prefill: (weights, tokens [B, T], lengths [B]) -> (next tokens [B], cache).
  generate: (weights, tokens [B, T], lengths [B], seeds [B]) -> engine.static_batch.Generation.
  extend, slots, verify, admit: see slot_programs.slot_program.
  """
  model = case.model(mesh)
  weights = abstract_weights(model, case.weights, case.stacked)
  if case.phase == 'generate':
    return generation_program(model, case.generation, weights)
  if case.kind.slot_refill:
    return slot_program(
      case.phase, model, weights, case.batch, case.context, case.length, case.sampling
    )
  whole = NamedSharding(mesh, P())
  row_of_ints = jax.ShapeDtypeStruct((case.batch,), jnp.int32, sharding=whole)

  def choose(logits: jax.Array) -> jax.Array:
    tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # Replicate the tokens: the next step's embedding needs all of them on every device.
    return jax.lax.with_sharding_constraint(tokens, whole)

  if case.phase == 'prefill':

    def prefill(
      weights: Weights, tokens: jax.Array, lengths: jax.Array
    ) -> tuple[jax.Array, KVCache]:
      logits, cache = model.prefill(weights, tokens, lengths, case.context)
      return choose(logits), cache

    tokens = jax.ShapeDtypeStruct((case.batch, case.length), jnp.int32, sharding=whole)
    return jax.jit(prefill), (weights, tokens, row_of_ints)

  def decode(weights: Weights, cache: KVCache, tokens: jax.Array) -> tuple[jax.Array, KVCache]:
    best, cache = model.decode_greedily(weights, cache, tokens)
    return best.ids, cache

  cache = abstract_decode_cache(model, weights, case.batch, case.context)
  return jax.jit(decode, donate_argnames='cache'), (weights, cache, row_of_ints)


def abstract_weights(model: Model, weights: str, stacked: bool = True) -> Weights:
  """Return the shapes and shardings that checkpoints.load gives to a model's weights.

  Args:
    model: Model. Decides mesh and layout.
    weights: str. Format of the matrices (quantization.formats); float ones take the compute dtype.
    stacked: bool. Whether one array holds all layers.

  Raises:
    MeshError: The mesh does not divide the model.
  """
  scaled = weight_format(weights).scaled
  tensors = packed_tensors(model.config, model.prefill_layout, dict(model.mesh.shape), scaled)
  layers = model.config.num_layers

  def struct(name: str, owners: slice | int | None) -> jax.ShapeDtypeStruct:
    tensor, lead = tensors[name], (layers,) if isinstance(owners, slice) else ()
    sharding = NamedSharding(model.mesh, P(*(None,) * len(lead), *tensor.spec))
    dtype = tensor_dtype(tensor, weights, model.dtype)
    return jax.ShapeDtypeStruct(lead + tensor.shape, dtype, sharding=sharding)

  return build_weights(tensors, layers, stacked, struct)


def abstract_decode_cache(model: Model, weights: Weights, batch: int, context: int) -> KVCache:
  """Return the shapes and shardings of the cache that prefill passes to a decode step.

  Raises:
    MeshError: The decode layout can't split the rows.
  """

  def prefilled_cache(weights: Weights, tokens: jax.Array, lengths: jax.Array) -> KVCache:
    return model.prefill(weights, tokens, lengths, context)[1]

  tokens, row = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((batch, 1), (batch,)))
  made = jax.eval_shape(prefilled_cache, weights, tokens, row)
  return abstract_cache(model, made, weights)
