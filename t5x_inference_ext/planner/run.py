"""The plan command without its flags: choose, print, write the files."""

from collections.abc import Callable, Sequence
import math
import os
import sys
from typing import Any

from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.options import takes_options
from t5x_inference_ext.planner import check as checks
from t5x_inference_ext.planner import choose, drafts, figures, gin_text, json_text, report
from t5x_inference_ext.planner import sweep as sweeps
from t5x_inference_ext.planner.machine import Machine, known_machines
from t5x_inference_ext.planner.request import PlanRequest
from t5x_inference_ext.planner.service_options import ServiceOptions
from t5x_inference_ext.planner.text import table
from t5x_inference_ext.sharding.layout import Layout
from t5x_inference_ext.sharding.mesh import parse_mesh
from t5x_inference_ext.speculation import Speculation, parse_speculation
from t5x_inference_ext.text_files import check_plots, check_writable, write_text
from t5x_inference_ext.text_format import seconds_text


@takes_options(ServiceOptions)
def plan(
  model: ModelConfig,
  slice_name: str | None = None,
  chip: str = 'v4',
  batch: int | None = None,
  input_length: int = 1920,
  output_length: int = 64,
  weights: str = 'int8',
  cache: str = 'bfloat16',
  objective: str = 'latency',
  latency_target_ms: float | None = None,
  convention: str = 'torus',
  mesh: str | None = None,
  layout: str | None = None,
  phase: str = 'both',
  check: bool = False,
  sweep: bool = False,
  figure: bool = False,
  output_dir: str = '.',
  gin_output: str | None = None,
  json_file: str | None = None,
  speculate: int | str | None = None,
  write: Callable[[str], None] = print,
  **service: Any,
) -> None:
  """Plan, print the report, and write the requested files.

  Args:
    model: The model.
    slice_name: 'v4:4x4x4' or 'A100:16', or several, with commas. None: the usual slices of `chip`
      are all considered.
    chip: One of hardware.CHIPS, or several with commas.
    batch: Rows run together, or slots of a service. None: powers of two up to 1024 are considered,
      for a service SLOTS.
    input_length: Tokens of each prompt.
    output_length: Tokens to generate for each prompt.
    weights: Format of the weights, as in PlanRequest.
    cache: 'int8' or 'bfloat16'.
    objective: One of request.OBJECTIVES; see choose.choose.
    latency_target_ms: Milliseconds from the prompts to the last token. None: no target.
    convention: Convention of the network, one of network.CONVENTIONS.
    mesh: 'XxYxZ' over the whole slice. None: the best.
    layout: 'PREFILL,DECODE', or one for both phases: the only layouts to consider. None: all.
    phase: 'both', 'prefill' or 'decode': the phases that run here.
    check: Whether to compile the chosen plan too.
    sweep: Whether to draw latency against cost for all slices and batches, instead of choosing.
    figure: Whether to draw figures of the chosen plan.
    output_dir: Directory of the figures and of the sweep's CSV.
    gin_output: File for the plan as gin bindings.
    json_file: File for every number, as JSON.
    speculate: Most tokens of a draft, or drafts such as 'ngram:8': print where drafts pay. For a
      service, the drafts that its steps check. None: drafts are left out.
    write: Takes the report's text. Progress goes to stderr.
    **service: Options of ServiceOptions: a service to simulate instead of a plan.

  Raises:
    UserError: The request is invalid, nothing fits or meets the target, or a file can't be written.
  """
  check_writable(gin_output, json_file)
  if sweep or figure:
    check_plots()
    if not os.path.isdir(output_dir):
      raise RequestError(f"can't write figures: there is no directory {output_dir}")
  if latency_target_ms is not None and not 0 < latency_target_ms < math.inf:
    raise RequestError(f'latency_target_ms must be above 0 and finite, got {latency_target_ms!r}')
  kinds = dict.fromkeys(kind.strip() for kind in chip.split(','))
  names = [
    *dict.fromkeys(name.strip() for name in (slice_name or '').split(',') if name.strip())
  ] or [name for kind in kinds for name in known_machines(kind)]
  if mesh and len(names) > 1:
    raise RequestError(f'mesh={mesh} needs one slice: give its name')
  options = ServiceOptions(**service)
  request = PlanRequest(
    model,
    1 if batch is None else batch,
    input_length,
    output_length,
    weights,
    cache,
    convention,
    mesh=parse_mesh(mesh) if mesh else None,
    phase=phase,
    layouts=_parse_layouts(layout) if layout else None,
  )
  machines = [Machine.parse(name) for name in names]
  batches = choose.BATCHES if batch is None else (batch,)
  many = {
    'gin_output': gin_output,
    'check': check,
    'latency_target_ms': latency_target_ms,
    'phase': phase != 'both',
  }
  if options.is_enabled:
    _refuse({**many, 'sweep': sweep}, 'this run simulates a service')
    drafts_of_service = None if speculate is None else parse_speculation(str(speculate))
    figure_dir = output_dir if figure else None
    _serve(request, machines, batch, options, drafts_of_service, figure_dir, json_file, write)
    return
  if sweep:
    single = {'json': json_file, 'figures': figure, 'speculate': speculate}
    _refuse({**many, **single}, 'sweep makes many')
    _sweep(request, machines, batches, output_dir, write)
    return
  if speculate is not None and phase == 'prefill':
    raise RequestError('speculate is for decode steps, and phase=prefill has none')
  most = None if speculate is None else _draft_length(speculate)
  one = len(machines) == len(batches) == 1
  choice = choose.choose(
    request,
    machines,
    objective,
    batches=batches,
    target=None if latency_target_ms is None else latency_target_ms / 1e3,
    say=(lambda text: None) if one else _say,
  )
  _write_choice(choice, check, gin_output, json_file, most, write)
  if figure:
    _draw(choice, output_dir, write)


def _parse_layouts(text: str) -> tuple[Layout, Layout]:
  """Return the layouts (prefill, decode) in 'PREFILL,DECODE', or in one layout for both."""
  names = [name.strip() for name in text.split(',')]
  if len(names) > 2:
    raise RequestError(f'layout must be PREFILL,DECODE or one layout for both, got {text!r}')
  return Layout.parse(names[0]), Layout.parse(names[-1])


def _draft_length(speculate: int | str) -> int:
  """Return the most tokens of a draft, from their number or from drafts such as 'ngram:8'."""
  text = str(speculate)
  if text.isascii() and text.lstrip('-').isdigit():
    return int(text)
  return parse_speculation(text).most


def _refuse(given: dict[str, Any], why: str) -> None:
  """Raise RequestError if an option was given that applies only to a single plan."""
  for name, value in given.items():
    if value:
      raise RequestError(f'{name} applies to a single plan, and {why}: leave one of them out')


def _serve(
  request: PlanRequest,
  machines: Sequence[Machine],
  slots: int | None,
  options: ServiceOptions,
  speculate: Speculation | None,
  figure_dir: str | None,
  json_file: str | None,
  write: Callable[[str], None],
) -> None:
  """Simulate a service, print its report and write its files."""
  # Imported here: these modules import the scheduler, which a plan does not need.
  from t5x_inference_ext.planner import service, service_report

  study = service.study_service(request, machines, slots, options, _say, speculate)
  write(service_report.study_text(study))
  if json_file:
    write_text(json_file, service_report.study_json(study))
    write(f'every number as JSON: {json_file}')
  if figure_dir is not None:
    path = os.path.join(figure_dir, 'service.svg')
    figures.service_latencies(path, service_report.requests_text(study), study.runs)
    write(f'figure: {path}')


def _write_choice(
  choice: choose.Choice,
  check: bool,
  gin_output: str | None,
  json_file: str | None,
  speculate: int | None,
  write: Callable[[str], None],
) -> None:
  """Print the report, compile the plan if asked to, and write its files."""
  steps = drafts.checking_steps(choice.plan, speculate) if speculate is not None else ()
  if gin_output:  # before compiling, to fail early if a file can't be written
    gin = gin_text.gin_text(choice.plan)
  if check:
    checks.refuse_unchecked(choice.plan)
  write(report.plan_text(choice))
  if steps:
    write(drafts.drafts_text(steps))
  checked: tuple[checks.Checked, ...] = ()
  if check:
    checked = checks.check_plan(choice.plan, lambda text: _say(f'{text} ...'))
    write('\n' + checks.check_text(checked))
  if gin_output:
    write_text(gin_output, gin)
    write(f'gin: {gin_output}')
  if json_file:
    write_text(json_file, json_text.plan_json(choice, checked, steps))
    write(f'every number as JSON: {json_file}')


def _sweep(
  request: PlanRequest,
  machines: Sequence[Machine],
  batches: Sequence[int],
  output_dir: str,
  write: Callable[[str], None],
) -> None:
  """Write the sweep's CSV and figure, and print its front."""
  points = sweeps.sweep(request, machines, batches, ('int8', 'bfloat16'), _say)
  if not points:
    # Nothing fits: `choose` raises NothingFits, whose message says how far off the nearest plan is.
    choose.choose(request.replace(batch=min(batches), weights='int8'), machines)
  csv_file, figure_file = (os.path.join(output_dir, f'pareto.{kind}') for kind in ('csv', 'svg'))
  write_text(csv_file, sweeps.csv_text(points))
  figures.pareto(figure_file, points)
  rows = [('phase', 'weights', 'machine', 'batch', 'layout', 'latency', 'chip-ms a token')]
  rows += [
    (
      p.phase,
      p.request.weights,
      str(p.cost.case.machine),
      str(p.request.batch),
      str(p.cost.case.layout),
      seconds_text(p.seconds),
      f'{p.chip_seconds_per_token * 1e3:.4g}',
    )
    for p in points
    if p.on_front
  ]
  write('\n'.join(table(rows, left=5)))
  write(
    f'{len(points)} points, and these {len(rows) - 1} are on the front: {csv_file} and '
    f'{figure_file}'
  )


def _draw(choice: choose.Choice, output_dir: str, write: Callable[[str], None]) -> None:
  """Draw the figures of a choice."""
  best = choice.plan
  communication, context, parts = files = [
    os.path.join(output_dir, f'{name}.svg') for name in ('communication', 'context', 'parts')
  ]
  figures.communication(communication, best.request.config, best.mesh)
  figures.contexts(context, best.request.config, best.machine, best.mesh)
  figures.time_parts(parts, choice.ranked[: report.ROWS])
  write(f'figures: {", ".join(files)}')


def _say(text: str) -> None:
  print(text, file=sys.stderr, flush=True)
