"""Compile a phase of a model for a slice, choose its layout, and estimate its time.

If the phase does not fit, the answer lists changes that would make it fit.
"""

from collections.abc import Callable
import dataclasses

from t5x_inference_ext.checkpoints.load import MAX_UNROLLED_LAYERS
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.errors import MeshError, UserError
from t5x_inference_ext.precompile import fit, slices
from t5x_inference_ext.precompile.case import GREEDY, CompileCase
from t5x_inference_ext.precompile.estimate import Estimate, estimate
from t5x_inference_ext.precompile.fit import Alternative, Say, Shortage, quiet
from t5x_inference_ext.precompile.program import Program
from t5x_inference_ext.sharding.layout import Layout
from t5x_inference_ext.sharding.mesh import parse_mesh
from t5x_inference_ext.sharding.torus import TpuSlice, parse_slice


@dataclasses.dataclass(frozen=True)
class Tried:
  """A layout that was compiled in the search for the best one.

  Attributes:
    layout: str. 'feedforward/attention'.
    seconds: float or None. The layout's serial estimate.
    reason: str. The reason why there is no estimate, else ''.
    stacked: bool. Whether it was compiled with its layers as a loop.
  """

  layout: str
  seconds: float | None
  reason: str = ''
  stacked: bool = False


@dataclasses.dataclass(frozen=True)
class Answer:
  """The answer: a compiled phase and its time; or the memory it lacks, and alternatives.

  Attributes:
    slice: TpuSlice. The chips.
    program: Program, or a Shortage if it does not fit.
    estimate: Estimate or None. The program's time, if it fits.
    tried: tuple of Tried. The candidates if no layout was requested, else ().
    alternatives: tuple of Alternative. If the program does not fit, changes that make it fit.
  """

  slice: TpuSlice
  program: Program | Shortage
  estimate: Estimate | None
  tried: tuple[Tried, ...] = ()
  alternatives: tuple[Alternative, ...] = ()

  @property
  def fits(self) -> bool:
    return isinstance(self.program, Program)

  @property
  def case(self) -> CompileCase:
    return self.program.case

  @property
  def compiled(self) -> tuple[Program, Estimate]:
    """The program and its time, for a program that fits."""
    assert isinstance(self.program, Program) and self.estimate is not None
    return self.program, self.estimate


# A program and its estimate, or a shortage and None.
_Result = tuple[Program | Shortage, Estimate | None]


def analyze(
  model: ModelConfig,
  weights: str,
  slice_name: str,
  phase: str,
  batch: int,
  context: int,
  *,
  layout: str | None = None,
  other_layout: str | None = None,
  mesh: str | None = None,
  cache: str | None = None,
  scan_layers: bool | None = None,
  prompt: int | None = None,
  max_new_tokens: int = 64,
  sampling: SamplingParams = GREEDY,
  say: Say = quiet,
) -> Answer:
  """Compile a phase for a slice, and estimate its time there.

  Args:
    model: ModelConfig. The model.
    weights: str. 'int8' or 'bfloat16'.
    slice_name: str. The slice, such as 'v4:4x4x4'.
    phase: str. One of phases.COMPILE_PHASES.
    batch: int. B.
    context: int. S, the positions of each row's cache.
    layout: str or None. 'feedforward/attention' of the phase. By default, the phase's candidate
      with the smallest serial estimate.
    other_layout: str or None. The layout of the other phase; see CompileCase.
    mesh: str or None. 'XxYxZ' over the whole slice. By default a mesh along its torus.
    cache: str or None. Dtype of the KV cache: 'int8', or None for bfloat16.
    scan_layers: bool or None. True for one loop over all layers; by default the layers are
      unrolled. In the search for a layout, models with many layers are compiled as loops, which
      takes seconds.
    prompt: int or None. Tokens of each row in one pass; see CompileCase.
    max_new_tokens: int. New tokens of each row in 'generate'.
    sampling: SamplingParams. How 'generate', 'slots' and 'admit' choose tokens.
    say: function. Called with lines of progress.

  Raises:
    UserError: A slice, mesh, layout or number is invalid, libtpu is missing, or the compiler
      refuses the program for a reason other than memory.
  """
  slice_ = parse_slice(slice_name)
  slices.check_slice(slice_)
  case = CompileCase(
    model,
    weights,
    phase,
    batch,
    context,
    Layout.parse(layout) if layout else Layout(),
    prompt,
    Layout.parse(other_layout) if other_layout else None,
    cache=cache,
    scan_layers=scan_layers,
    max_new_tokens=max_new_tokens,
    sampling=sampling,
  )
  devices = slices.slice_mesh(slice_, model, parse_mesh(mesh) if mesh else None)
  say(f'{slice_}: {slice_.chips} chips as a mesh of {"x".join(map(str, devices.devices.shape))}')

  def compiled(case: CompileCase) -> _Result:
    say(f'compiling {phase} in {case.layout}')
    program = fit.try_compile(case, slice_, devices)
    if isinstance(program, Shortage):
      return program, None
    return program, estimate(program.text, slice_, devices.shape)

  tried: tuple[Tried, ...] = ()
  if layout:
    program, found = compiled(case)
  else:
    (program, found), tried = _best_layout(case, compiled)
    if found and program.case.stacked != case.stacked:
      program, found = compiled(dataclasses.replace(program.case, scan_layers=case.stacked))
  if isinstance(program, Program):
    return Answer(slice_, program, found, tried)
  say('it does not fit; looking for changes that would')
  shortage = dataclasses.replace(program, case=_quick(program.case))
  return Answer(slice_, program, None, tried, tuple(fit.alternatives(shortage, say=say)))


def _quick(case: CompileCase) -> CompileCase:
  """Return the case with its layers as a loop, if compiling them unrolled would take minutes."""
  many = case.config.num_layers > MAX_UNROLLED_LAYERS
  return dataclasses.replace(case, scan_layers=case.stacked or many)


def _best_layout(
  case: CompileCase, compiled: Callable[[CompileCase], _Result]
) -> tuple[_Result, tuple[Tried, ...]]:
  """Return the program with the smallest estimate, or the smallest shortage; and all candidates."""
  results: list[_Result] = []
  tried: list[Tried] = []
  refusal: MeshError | None = None
  candidates = case.kind.layouts
  case = _quick(case) if len(candidates) > 1 else case
  for text in candidates:
    try:
      program, found = compiled(dataclasses.replace(case, layout=Layout.parse(text)))
    except MeshError as e:  # can't split rows, or share weights with the other phase
      tried.append(Tried(text, None, str(e), case.stacked))
      refusal = refusal or e
      continue
    results.append((program, found))
    seconds, reason = (found.serial_seconds, '') if found else (None, 'does not fit')
    tried.append(Tried(text, seconds, reason, case.stacked))
  if not results:
    raise UserError(f'none of the layouts {", ".join(candidates)} can be used: {refusal}')
  return min(results, key=_rank), tuple(tried)


def _rank(result: _Result) -> tuple[bool, float]:
  """Return a sort key: programs that fit by time, then other programs by bytes."""
  program, found = result
  if isinstance(program, Shortage):
    return True, program.needed or program.weights + program.cache
  assert found is not None
  return False, found.serial_seconds
