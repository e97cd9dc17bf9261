"""The plan command without its flags: choose, print, write the files."""

from collections.abc import Callable, Sequence
import math
import os
import sys

from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.planner import check as checks
from t5x_inference_ext.planner import choose, figures, gin_text, json_text, report
from t5x_inference_ext.planner import sweep as sweeps
from t5x_inference_ext.planner.machine import Machine, known_machines
from t5x_inference_ext.planner.request import PlanRequest
from t5x_inference_ext.planner.text import table
from t5x_inference_ext.sharding.mesh import parse_mesh
from t5x_inference_ext.text_files import check_plots, check_writable, write_text
from t5x_inference_ext.text_format import seconds_text


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
  phase: str = 'both',
  check: bool = False,
  sweep: bool = False,
  figure: bool = False,
  output_dir: str = '.',
  gin_output: str | None = None,
  json_file: str | None = None,
  write: Callable[[str], None] = print,
) -> None:
  """Plan, print the report, and write the requested files.

  Args:
    model: The model.
    slice_name: 'v4:4x4x4' or 'A100:16'. None: the usual slices of `chip` are all considered.
    chip: One of hardware.CHIPS, or several, separated by commas.
    batch: Rows run together. None: powers of two up to 1024 are considered.
    input_length: Tokens of each prompt.
    output_length: Tokens to generate for each prompt.
    weights: 'int8' or 'bfloat16'.
    cache: 'int8' or 'bfloat16'.
    objective: One of request.OBJECTIVES; see choose.choose.
    latency_target_ms: Milliseconds from the prompts to the last token. None: no target.
    convention: Convention of the network, one of network.CONVENTIONS.
    mesh: 'XxYxZ' over the whole slice. None: the best.
    phase: 'both', 'prefill' or 'decode': the phases that run here.
    check: Whether to compile the chosen plan too.
    sweep: Whether to draw latency against cost for all slices and batches, instead of choosing.
    figure: Whether to draw figures of the chosen plan.
    output_dir: Directory of the figures and of the sweep's CSV.
    gin_output: File for the plan as gin bindings.
    json_file: File for every number, as JSON.
    write: Takes the report's text. Progress goes to stderr.

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
  if mesh and not slice_name:
    raise RequestError(f'mesh={mesh} needs one slice: give its name')
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
  )
  kinds = dict.fromkeys(kind.strip() for kind in chip.split(','))
  names = [slice_name] if slice_name else [name for kind in kinds for name in known_machines(kind)]
  machines = [Machine.parse(name) for name in names]
  batches = choose.BATCHES if batch is None else (batch,)
  if sweep:
    for given, name in (
      (gin_output, 'gin_output'),
      (json_file, 'json'),
      (check, 'check'),
      (figure, 'figures'),
      (latency_target_ms, 'latency_target_ms'),
      (phase != 'both', 'phase'),
    ):
      if given:
        raise RequestError(f'{name} is for one plan, and sweep has many: ask for either')
    _sweep(request, machines, batches, output_dir, write)
    return
  one = len(machines) == len(batches) == 1
  choice = choose.choose(
    request,
    machines,
    objective,
    batches=batches,
    target=None if latency_target_ms is None else latency_target_ms / 1e3,
    say=(lambda text: None) if one else _say,
  )
  _write_choice(choice, check, gin_output, json_file, write)
  if figure:
    _draw(choice, output_dir, write)


def _write_choice(
  choice: choose.Choice,
  check: bool,
  gin_output: str | None,
  json_file: str | None,
  write: Callable[[str], None],
) -> None:
  """Print the report, compile the plan if asked to, and write its files."""
  if gin_output:  # before compiling, to fail early if a file can't be written
    gin = gin_text.gin_text(choice.plan)
  if check:
    checks.refuse_unchecked(choice.plan)
  write(report.plan_text(choice))
  checked: tuple[checks.Checked, ...] = ()
  if check:
    checked = checks.check_plan(choice.plan, lambda text: _say(f'{text} ...'))
    write('\n' + checks.check_text(checked))
  if gin_output:
    write_text(gin_output, gin)
    write(f'gin: {gin_output}')
  if json_file:
    write_text(json_file, json_text.plan_json(choice, checked))
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
    # `choose` raises NothingFits, whose message says how far off the nearest plan is.
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
