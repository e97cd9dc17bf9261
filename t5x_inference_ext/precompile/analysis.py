"""Compile a phase of a model for a slice, choose the phase's layout, and estimate its time.

If the program does not fit into memory, the answer lists changes that make it fit.
"""

from collections.abc import Callable
import dataclasses
import math
from typing import Any

from t5x_inference_ext.checkpoints.load import MAX_UNROLLED_LAYERS
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.errors import MeshError, UserError
from t5x_inference_ext.precompile import fit, slices
from t5x_inference_ext.precompile.case import CompileCase
from t5x_inference_ext.precompile.estimate import Estimate, estimate
from t5x_inference_ext.precompile.fit import Alternative, Say, Shortage, quiet
from t5x_inference_ext.precompile.kernel_schedule import kernel_schedules
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
    from_few_layers: bool. Whether the estimate is extrapolated from a few layers.
  """

  layout: str
  seconds: float | None
  reason: str = ''
  from_few_layers: bool = False


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
  say: Say = quiet,
  **fields: Any,
) -> Answer:
  """Compile a phase for a slice, and estimate its time there.

  Args:
    model: ModelConfig. The model.
    slice_name: str. The slice, such as 'v4:4x4x4'.
    weights, phase, batch, context: Fields of CompileCase.
    layout: str or None. 'feedforward/attention' of the phase. By default, the phase's candidate
      with the smallest serial estimate.
    other_layout: str or None. The layout of the other phase; see CompileCase.
    mesh: str or None. 'XxYxZ' over the whole slice. By default a mesh along its torus.
    say: function. Called with lines of progress.
    **fields: Other fields of CompileCase. Without scan_layers, a model with many layers is compiled
      as a loop in the search for a layout, to see in seconds whether it fits, and with a few
      unrolled layers, to estimate its time.

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
    other_layout=Layout.parse(other_layout) if other_layout else None,
    **fields,
  )
  devices = slices.slice_mesh(slice_, model, parse_mesh(mesh) if mesh else None)
  say(f'{slice_}: {slice_.chips} chips as a mesh of {"x".join(map(str, devices.devices.shape))}')

  def compiled(case: CompileCase) -> _Result:
    say(f'compiling {phase} in {case.layout}')
    program = fit.try_compile(case, slice_, devices)
    if isinstance(program, Shortage):
      return program, None
    schedules = kernel_schedules(case, slice_, devices.devices.shape)
    return program, estimate(program.text, slice_, devices.shape, schedules=schedules)

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
  """Return the case with its layers as a loop if unrolled ones would take minutes to compile."""
  many = case.config.num_layers > MAX_UNROLLED_LAYERS
  return dataclasses.replace(case, scan_layers=case.stacked or many)


def _best_layout(
  case: CompileCase, compiled: Callable[[CompileCase], _Result]
) -> tuple[_Result, tuple[Tried, ...]]:
  """Return the program with the smallest estimate, else the smallest shortage; and all tried."""
  results: list[tuple[tuple[bool, float], _Result]] = []
  tried: list[Tried] = []
  refusal: MeshError | None = None
  candidates = case.kind.layouts
  quick = _quick(case) if len(candidates) > 1 else case
  # Programs with a loop may rank layouts differently from the unrolled programs that will run.
  extrapolated = quick.stacked and not case.stacked
  for text in candidates:
    layout = Layout.parse(text)
    try:
      program, found = compiled(dataclasses.replace(quick, layout=layout))
    except MeshError as e:  # the layout can't split the rows, or share weights with the other phase
      tried.append(Tried(text, None, str(e)))
      refusal = refusal or e
      continue
    if found is None:
      assert isinstance(program, Shortage)
      tried.append(Tried(text, None, 'does not fit'))
      rank = True, float(program.needed or program.weights + program.cache)
    else:
      seconds = found.serial_seconds
      if extrapolated:
        seconds = _seconds_of_all_layers(dataclasses.replace(case, layout=layout), compiled)
      fits = seconds < math.inf
      reason = '' if fits else 'does not fit'
      tried.append(Tried(text, seconds if fits else None, reason, extrapolated))
      rank = False, seconds
    results.append((rank, (program, found)))
  if not results:
    raise UserError(f'none of the layouts {", ".join(candidates)} can be used: {refusal}')
  return min(results, key=lambda each: each[0])[1], tuple(tried)


def _seconds_of_all_layers(case: CompileCase, compiled: Callable[[CompileCase], _Result]) -> float:
  """Return the serial estimate of an unrolled program, from two programs of a few layers.

  Both hold each kind of layer equally often as the whole model, and at least 2 layers.
  """
  kinds = len(case.config.layer_pattern)
  few = -(-2 // kinds) * kinds
  if 3 * few >= case.config.num_layers:
    return _serial(compiled(case))

  def seconds(layers: int) -> float:
    config = dataclasses.replace(case.config, num_layers=layers)
    return _serial(compiled(dataclasses.replace(case, config=config)))

  first, last = seconds(few), seconds(3 * few)
  if math.isinf(last):
    return last
  return extrapolated(first, last, (few, 3 * few), case.config.num_layers)


def extrapolated(first: float, second: float, few: tuple[int, int], layers: int) -> float:
  """Return the time of all layers, from the times of two small numbers of layers.

  Args:
    first, second: Times with few[0] and with few[1] layers.
    few: The two numbers of layers.
    layers: Number of all layers.
  """
  return first + (second - first) / (few[1] - few[0]) * (layers - few[0])


def _serial(result: _Result) -> float:
  """Return a program's serial estimate; infinity if it does not fit."""
  return result[1].serial_seconds if result[1] else math.inf
