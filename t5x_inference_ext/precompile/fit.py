"""Programs that do not fit a slice, and changes that make them fit.

Estimates by arithmetic propose candidates; the compiler decides whether they fit.
"""

from collections.abc import Callable, Iterator
import dataclasses

import jax
from jax.sharding import Mesh

from t5x_inference_ext.errors import MeshError, UserError
from t5x_inference_ext.precompile import slices
from t5x_inference_ext.precompile.case import CompileCase
from t5x_inference_ext.precompile.program import Program, compile_case
from t5x_inference_ext.sharding import activations
from t5x_inference_ext.sharding.explain import ExplainSetting, explain_setting
from t5x_inference_ext.sharding.layout import Layout
from t5x_inference_ext.sharding.mesh import AXES
from t5x_inference_ext.sharding.mesh_choice import torus_mesh
from t5x_inference_ext.sharding.torus import TpuSlice, parse_slice

# Maximum number of compilations in the search for each kind of alternative.
TRIES = 3


@dataclasses.dataclass(frozen=True)
class Shortage:
  """A program that does not fit.

  Attributes:
    case: CompileCase. The case that was to be compiled.
    slice: TpuSlice. The chips that it was to run on.
    needed: int or None. Bytes of arguments, results and temporaries on a chip; None if the compiler
      does not report them.
    available: int. Bytes of a chip that a program may use.
    weights: int. Bytes of the weights on a chip, by arithmetic.
    cache: int. Bytes of the KV cache on a chip, by arithmetic.
    message: str. The first line of the compiler's message, or why the compiler was not run.
  """

  case: CompileCase
  slice: TpuSlice
  needed: int | None
  available: int
  weights: int
  cache: int
  message: str


@dataclasses.dataclass(frozen=True)
class Alternative:
  """A change that makes a program fit.

  Attributes:
    change: str. 'layout', 'batch' or 'slice'.
    slice: TpuSlice. The chips that the program fits.
    program: Program. The changed program, compiled.
  """

  change: str
  slice: TpuSlice
  program: Program


# Function that compiles a case for a slice; returns a Program or a Shortage.
Compile = Callable[[CompileCase, TpuSlice], Program | Shortage]
# Function that is called with lines of progress.
Say = Callable[[str], None]
_Candidates = Iterator[tuple[CompileCase, TpuSlice]]


def quiet(text: str) -> None:
  """Ignore a line of progress."""


def try_compile(
  case: CompileCase, slice_: TpuSlice, mesh: Mesh | None = None
) -> Program | Shortage:
  """Compile a case for a slice; return a Shortage if memory is short.

  Args:
    case: CompileCase. What to compile.
    slice_: TpuSlice. The chips.
    mesh: Mesh or None. The mesh over the slice; by default a mesh along its torus.

  Raises:
    MeshError: There is no such slice, or the mesh or layout does not divide the model or batch.
    UserError: libtpu is missing, or the compiler refused the program for a reason other than
      memory.
  """
  mesh = slices.slice_mesh(slice_, case.config) if mesh is None else mesh
  available = slices.available_bytes(slice_.kind)
  case.model(mesh).decode_sharding(case.batch)
  weights, cache = held_bytes(case, dict(mesh.shape))

  def shortage(needed: int | None, message: str) -> Shortage:
    return Shortage(case, slice_, needed, available, weights, cache, message)

  if weights + cache > available:  # obviously too large: skip the compilation
    reason = 'weights and cache alone are more than a chip has: nothing was compiled'
    return shortage(weights + cache, reason)
  try:
    return compile_case(case, mesh, available)
  except jax.errors.JaxRuntimeError as e:
    message = str(e).strip().splitlines()[0]
    if 'RESOURCE_EXHAUSTED' not in message:
      raise UserError(
        f'the TPU compiler refused {case.phase} in {case.layout} for {slice_}: {message}'
      ) from e
    return shortage(slices.memory_limits(str(e))[0], message)


def held_bytes(case: CompileCase, mesh: dict[str, int]) -> tuple[int, int]:
  """Return the bytes of (weights, cache) on each device, computed without compiling.

  Args:
    case: CompileCase. The case.
    mesh: dict. Axis -> size.

  Raises:
    MeshError: The mesh does not divide the model, or the layout does not split the batch.
  """
  prefill, decode = case.layouts
  explained = explain_setting(
    ExplainSetting(
      case.config,
      mesh,
      prefill,
      decode,
      dtype=case.dtype,
      cache=case.cache,
      weights=case.weights,
      stacked=case.stacked,
      batch=case.batch,
      prompt_length=case.length,
      cache_length=case.context,
    )
  )
  return explained.weight_bytes, explained.cache_bytes


def alternatives(
  shortage: Shortage, compiled: Compile = try_compile, say: Say = quiet
) -> list[Alternative]:
  """Return the nearest layout, largest batch and smallest slice that make a program fit.

  There is at most one alternative of each kind.

  Args:
    shortage: Shortage. The program that does not fit.
    compiled: function. Compiles a case.
    say: function. Called with lines of progress.
  """
  found = []
  for change, candidates in (
    ('layout', _other_layouts(shortage)),
    ('batch', _smaller_batches(shortage)),
    ('slice', _larger_slices(shortage)),
  ):
    for _, (case, slice_) in zip(range(TRIES), candidates):
      say(f'trying {change} {dict(layout=case.layout, batch=case.batch, slice=slice_)[change]}')
      result = compiled(case, slice_)
      if isinstance(result, Program):
        found.append(Alternative(change, slice_, result))
        break
  return found


def _promising(case: CompileCase, slice_: TpuSlice, limit: int) -> bool:
  """Return whether weights and cache take less than `limit` bytes of a chip."""
  mesh = dict(zip(AXES, torus_mesh(slice_.shape, slice_.wraps, case.config)))
  try:
    activations.shard_activations(case.layouts[1], case.config, mesh, case.batch, 1)
    return sum(held_bytes(case, mesh)) < limit
  except MeshError:
    return False


def _other_layouts(shortage: Shortage) -> _Candidates:
  case, limit = shortage.case, shortage.available
  if case.kind.cache_decides:  # temporaries are about equal: only a smaller cache can help
    limit = min(limit, shortage.weights + shortage.cache)
  for text in case.kind.layouts:
    layout = Layout.parse(text)
    other = dataclasses.replace(case, layout=layout, other_layout=None)
    if layout != case.layout and _promising(other, shortage.slice, limit):
      yield other, shortage.slice


def _smaller_batches(shortage: Shortage) -> _Candidates:
  """Yield smaller batches: the largest that may fit, then halves of the requested batch."""
  case, batch = shortage.case, shortage.case.batch
  room = shortage.available - shortage.weights
  if room <= 0:
    return
  # Everything except the weights is assumed to be proportional to the number of rows.
  needed = max(shortage.needed or 0, shortage.weights + shortage.cache) - shortage.weights
  most = int(batch * min(room / max(needed, 1), 0.999))
  # Halves of the requested batch are the most likely to be split evenly by a mesh.
  sizes = {batch >> i for i in range(1, batch.bit_length())} | {batch * 3 // 4}
  for size in sorted(sizes, reverse=True):
    if 0 < size <= max(most, 1):
      smaller = dataclasses.replace(case, batch=size)
      if _promising(smaller, shortage.slice, shortage.available):
        yield smaller, shortage.slice


def _larger_slices(shortage: Shortage) -> _Candidates:
  for slice_ in map(parse_slice, slices.known_slices(shortage.slice.kind)):
    larger = slice_.chips > shortage.slice.chips
    if larger and _promising(shortage.case, slice_, shortage.available):
      yield shortage.case, slice_
