"""One question, answered: a phase of a model on a slice. Compiles it, looks for what would fit, chooses a layout."""

from collections.abc import Callable
import dataclasses

from t5x_inference_ext.checkpoints.load import MAX_UNROLLED_LAYERS
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.errors import MeshError, UserError
from t5x_inference_ext.precompile import fit, slices
from t5x_inference_ext.precompile.estimate import Estimate, estimate
from t5x_inference_ext.precompile.fit import Alternative, Shortage, _Say
from t5x_inference_ext.precompile.program import CompileCase, Program
from t5x_inference_ext.sharding.layout import Layout
from t5x_inference_ext.sharding.mesh import parse_mesh
from t5x_inference_ext.sharding.torus import TpuSlice, parse_slice


@dataclasses.dataclass(frozen=True)
class Tried:
  """A layout that was compiled when the best was looked for: its serial seconds, or why it has none; whether as a loop."""

  layout: str
  seconds: float | None
  reason: str = ''
  stacked: bool = False


@dataclasses.dataclass(frozen=True)
class Answer:
  """What came out.

  Attributes:
    slice: for what.
    program: compiled, or what is missing.
    estimate: of a program that fits, else None.
    tried: the candidates where no layout was asked for, else ().
    alternatives: where it does not fit, what near it would.
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
  sampling: SamplingParams = SamplingParams(),
  say: _Say = lambda text: None,
) -> Answer:
  """Compiles a phase for a slice and estimates its time there.

  Args:
    model: the model.
    weights: 'int8' or 'bfloat16'.
    slice_name: 'v4:4x4x4'.
    phase: one of program.PHASES.
    batch: B.
    context: S, the positions of each row's cache.
    layout: of the phase, 'feedforward/attention'; None: the one of fit.CANDIDATES with the least serial estimate.
    other_layout: of the other phase; see program.Case.
    mesh: 'XxYxZ' over the whole slice; None: along its torus.
    cache: what the KV cache holds: 'int8', or None: bfloat16.
    scan_layers: one loop over all layers, or code for each, as by default. What others are chosen from is compiled as loops,
      in seconds, where layers are many.
    prompt: tokens of each row that one pass takes; see program.Case.
    max_new_tokens: of a generation.
    sampler: of a generation, of slots and of what enters them.
    say: hears what is being done.

  Raises:
    UserError: a slice, mesh, layout or number that makes no sense; no libtpu; a program that the compiler refuses for
      another reason than memory.
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
    max_new_tokens=max_new_tokens,
    sampling=sampling,
    stacked=scan_layers,
  )
  mesh = slices.slice_mesh(slice_, model, parse_mesh(mesh) if mesh else None)
  say(f'{slice_}: {slice_.chips} chips as a mesh of {"x".join(map(str, mesh.devices.shape))}')

  def compiled(case: CompileCase) -> Program | Shortage:
    say(f'compiling {phase} in {case.layout}')
    return fit.try_compile(case, slice_, mesh)

  tried = ()
  if layout:
    program = compiled(case)
    found = _estimate(program, slice_)
  else:
    program, found, tried = _best(case, slice_, compiled)
    if isinstance(program, Program) and program.case.stacked != case.stacked:
      program = compiled(dataclasses.replace(program.case, stacked=case.stacked))
      found = _estimate(program, slice_)
  if isinstance(program, Program):
    return Answer(slice_, program, found, tried)
  say('it does not fit; looking for what would')
  shortage = dataclasses.replace(program, case=_quick(program.case))
  return Answer(slice_, program, None, tried, tuple(fit.alternatives(shortage, say=say)))


def _quick(case: CompileCase) -> CompileCase:
  """The same as a loop, where writing many layers out would take minutes."""
  return dataclasses.replace(
    case, stacked=case.stacked or case.config.num_layers > MAX_UNROLLED_LAYERS
  )


def _best(
  case: CompileCase, slice_: TpuSlice, compiled: Callable[[CompileCase], Program | Shortage]
):
  """The program with the least serial estimate, or the least shortage; its estimate; all that was tried."""
  results, tried, refusal = [], [], None
  candidates = fit.CANDIDATES[case.phase]
  case = _quick(case) if len(candidates) > 1 else case
  for text in candidates:
    try:
      program = compiled(dataclasses.replace(case, layout=Layout.parse(text)))
    except MeshError as e:  # rows that this layout can't split, or weights that the other phase's layout can't share
      tried.append(Tried(text, None, str(e), case.stacked))
      refusal = refusal or e
      continue
    found = _estimate(program, slice_)
    results.append((program, found))
    seconds, reason = (found.serial_seconds, '') if found else (None, 'does not fit')
    tried.append(Tried(text, seconds, reason, case.stacked))
  if not results:
    raise UserError(f'none of the layouts {", ".join(candidates)} can be used: {refusal}')

  def order(result):
    program, found = result
    return (
      (False, found.serial_seconds)
      if found
      else (True, program.needed or program.weights + program.cache)
    )

  program, found = min(results, key=order)
  return program, found, tuple(tried)


def _estimate(program: Program | Shortage, slice_: TpuSlice) -> Estimate | None:
  return estimate(program.text, slice_, program.mesh) if isinstance(program, Program) else None
