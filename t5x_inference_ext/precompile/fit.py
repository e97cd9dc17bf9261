"""What does not fit, and what near it would: candidates by arithmetic, the answer from the compiler."""

from collections.abc import Callable, Iterator
import dataclasses

import jax
from jax.sharding import Mesh

from t5x_inference_ext.errors import MeshError, UserError
from t5x_inference_ext.precompile import slices
from t5x_inference_ext.precompile.program import CompileCase, Program, compile_case
from t5x_inference_ext.sharding import activations
from t5x_inference_ext.sharding.explain import ExplainSetting, explain_setting
from t5x_inference_ext.sharding.layout import Layout
from t5x_inference_ext.sharding.mesh import AXES
from t5x_inference_ext.sharding.mesh_choice import torus_mesh
from t5x_inference_ext.sharding.torus import TpuSlice, parse_slice

# What is tried, in this order, where no layout is asked for: see docs/layouts.md for which is for what.
CANDIDATES = {
  'decode': ('ws_2d/batch', 'ws_2d/heads', 'ws_1d/batch'),
  'prefill': ('ws_2d/batch', 'ws_2d/heads', 'wg_x/batch', 'wg_xy/batch', 'wg_xyz/batch'),
  'extend': ('ws_2d/batch', 'ws_2d/heads', 'wg_x/batch', 'wg_xy/batch', 'wg_xyz/batch'),
  'slots': ('ws_2d/batch', 'ws_2d/heads', 'ws_1d/batch'),
  'admit': ('ws_2d/batch',),
  # How long its loop turns nobody knows beforehand, so that no estimate could choose.
  'generate': ('ws_2d/batch',),
}
# Compilations that the search for each kind of alternative may spend.
TRIES = 3


@dataclasses.dataclass(frozen=True)
class Shortage:
  """A program that does not fit.

  Attributes:
    case, slice: what was to be compiled, and for what.
    needed: bytes on a chip, of arguments, results and temporaries; None where the compiler does not say.
    available: bytes that a chip has for them.
    weights, cache: bytes on a chip of these alone, by arithmetic.
    message: the compiler's first line, or why it was not asked.
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
  """A change that makes a program fit: 'layout', 'batch' or 'slice', and the program."""

  change: str
  slice: TpuSlice
  program: Program


_Say = Callable[[str], None]
# Compiles a case for a slice, or says what is missing.
Compile = Callable[[CompileCase, TpuSlice], Program | Shortage]


def try_compile(
  case: CompileCase, slice_: TpuSlice, mesh: Mesh | None = None
) -> Program | Shortage:
  """Compiles a case for a slice; a lack of memory is an answer.

  Args:
    case: what to compile.
    slice_: for what.
    mesh: over it, by default along its torus.

  Raises:
    MeshError: no such slice, or the mesh or the layout does not divide the model or the batch.
    UserError: no libtpu, or the compiler refused the program for another reason than memory.
  """
  mesh = slices.slice_mesh(slice_, case.config) if mesh is None else mesh
  available = slices.available_bytes(slice_.kind)
  case.model(mesh).decode_sharding(case.batch)
  weights, cache = held(case, dict(mesh.shape))
  if weights + cache > available:  # the compiler would say the same, some seconds later
    return Shortage(
      case,
      slice_,
      weights + cache,
      available,
      weights,
      cache,
      'weights and cache alone are more than a chip has: nothing was compiled',
    )
  try:
    return compile_case(case, mesh, available)
  except jax.errors.JaxRuntimeError as e:
    message = str(e).strip().splitlines()[0]
    if 'RESOURCE_EXHAUSTED' not in message:
      raise UserError(
        f'the TPU compiler refused {case.phase} in {case.layout} for {slice_}: {message}'
      ) from e
    needed, _ = slices.memory_limits(str(e))
    return Shortage(case, slice_, needed, available, weights, cache, message)


def held(case: CompileCase, mesh: dict[str, int]) -> tuple[int, int]:
  """(weights, cache) bytes on each device, by arithmetic alone.

  Raises:
    MeshError: the mesh does not divide the model, or the layout does not split the batch.
  """
  prefill, decode = case.layouts
  e = explain_setting(
    ExplainSetting(
      case.config,
      mesh,
      prefill,
      decode,
      dtype=case.dtype,
      cache=case.cache,
      int8=case.weights == 'int8',
      stacked=case.stacked,
      batch=case.batch,
      prompt_length=case.length,
      cache_length=case.context,
    )
  )
  return e.weight_bytes, e.cache_bytes


def alternatives(
  shortage: Shortage, compiled: Compile = try_compile, say: _Say = lambda text: None
) -> list[Alternative]:
  """The nearest layout, the largest batch and the smallest slice that make the program fit, of each kind at most one.

  Args:
    shortage: what does not fit.
    compiled: compiles.
    say: hears what is being tried.
  """
  found = []
  for change, candidates in (
    ('layout', _layouts(shortage)),
    ('batch', _batches(shortage)),
    ('slice', _larger(shortage)),
  ):
    for tries, (case, slice_) in enumerate(candidates):
      if tries == TRIES:
        break
      say(f'trying {change} {dict(layout=case.layout, batch=case.batch, slice=slice_)[change]}')
      result = compiled(case, slice_)
      if isinstance(result, Program):
        found.append(Alternative(change, slice_, result))
        break
  return found


def _promising(case: CompileCase, slice_: TpuSlice, available: int, least: int = 0) -> bool:
  """Whether weights and cache leave room, and are less than `least` where that is given."""
  mesh = dict(zip(AXES, torus_mesh(slice_.shape, slice_.wraps, case.config)))
  try:
    activations.shard_activations(case.layouts[1], case.config, mesh, case.batch, 1)
    total = sum(held(case, mesh))
  except MeshError:
    return False
  return total < available and (not least or total < least)


def _layouts(shortage: Shortage) -> Iterator[tuple[CompileCase, TpuSlice]]:
  case = shortage.case
  held_now = shortage.weights + shortage.cache
  # In prefill what differs between layouts is temporaries, in decode the cache: only one that holds less can help.
  least = held_now if case.phase in ('decode', 'slots', 'admit') else 0
  for text in CANDIDATES[case.phase]:
    layout = Layout.parse(text)
    other = dataclasses.replace(case, layout=layout, other_layout=None)
    if layout != case.layout and _promising(other, shortage.slice, shortage.available, least):
      yield other, shortage.slice


def _batches(shortage: Shortage) -> Iterator[tuple[CompileCase, TpuSlice]]:
  """From the largest batch that what is known allows, then by half."""
  case = shortage.case
  batch = case.batch
  needed = max(shortage.needed or 0, shortage.weights + shortage.cache)
  room = shortage.available - shortage.weights
  if room <= 0:
    return
  # All but the weights is taken to grow with the rows.
  share = min(room / max(needed - shortage.weights, 1), 0.999)
  most = int(batch * share)
  # Batches by halves of what was asked are what the mesh is most likely to split evenly.
  sizes = sorted(
    {batch >> i for i in range(1, batch.bit_length())} | {batch * 3 // 4}, reverse=True
  )
  for size in sizes:
    smaller = dataclasses.replace(case, batch=size)
    if 0 < size <= max(most, 1) and _promising(smaller, shortage.slice, shortage.available):
      yield smaller, shortage.slice


def _larger(shortage: Shortage) -> Iterator[tuple[CompileCase, TpuSlice]]:
  for text in slices.known_slices(shortage.slice.kind):
    slice_ = parse_slice(text)
    if slice_.chips > shortage.slice.chips and _promising(
      shortage.case, slice_, shortage.available
    ):
      yield shortage.case, slice_
