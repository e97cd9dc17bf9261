"""The plan command without its flags: chooses, prints, writes the files."""

from collections.abc import Callable
import functools
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
from t5x_inference_ext.runs.progress import progress
from t5x_inference_ext.sharding.mesh import parse_mesh
from t5x_inference_ext.text_files import check_plots, check_writable, write_text


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
  """Plans, and prints what came out.

  Args:
    model: the model.
    slice_name: 'v4:4x4x4' or 'A100:16'; None: the usual slices of `chip` are all considered.
    chip: one of hardware.CHIPS, or several with commas.
    batch: rows at a time; None: powers of two up to 1024 are considered.
    input_length, output_length, weights, cache, convention: see request.Request.
    objective, latency_target_ms: see choose.choose; the target in milliseconds, from the prompts to the last token.
    mesh: 'XxYxZ' over the whole slice; None: the best.
    phase: 'both', 'prefill' or 'decode': see request.Request.
    check: compile the choice, too.
    sweep: latency against cost of all slices and batches that may be chosen from, instead of a choice.
    figure: draw the figures of the choice.
    output_dir: takes them, and those of a sweep with its CSV.
    gin_output: takes the choice as gin.
    json_file: takes every number.
    write: takes the report's text. Progress goes to stderr.

  Raises:
    UserError: what is asked makes no sense, nothing fits or meets the target, or a file that can't be written.
  """
  check_writable(gin_output, json_file)
  if sweep or figure:
    check_plots()
    if not os.path.isdir(output_dir):
      raise RequestError(f"can't write figures: there is no directory {output_dir}")
  if latency_target_ms is not None and not 0 < latency_target_ms < math.inf:
    raise RequestError(f'latency_target_ms must be above 0 and finite, got {latency_target_ms!r}')
  if mesh and not slice_name:
    raise RequestError(f'mesh={mesh} is over one slice: say which')
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
        raise RequestError(f'{name} is of one plan, and sweep has many: ask for one of them')
    _sweep(request, machines, batches, output_dir, write)
    return
  quiet = len(machines) == len(batches) == 1
  choice = choose.choose(
    request,
    machines,
    objective,
    batches=batches,
    say=(lambda text: None) if quiet else _say,
    target=None if latency_target_ms is None else latency_target_ms / 1e3,
  )
  if gin_output:  # a plan that can't be written is refused before it is compiled
    text = gin_text.gin_text(choice.plan)
  if check:
    checks.refuse(choice.plan)
  write(report.plan_text(choice))
  checked = checks.check_plan(choice.plan, lambda text: _say(f'{text} ...')) if check else ()
  if check:
    write('\n' + checks.check_text(checked))
  if gin_output:
    write_text(gin_output, text)
    write(f'gin: {gin_output}')
  if json_file:
    write_text(json_file, json_text.plan_json(choice, checked))
    write(f'every number as JSON: {json_file}')
  if figure:
    _draw(choice, output_dir, write)


def _sweep(request, machines, batches, output_dir, write) -> None:
  points = sweeps.sweep(
    request,
    machines,
    batches,
    ('int8', 'bfloat16'),
    functools.partial(progress, what='sweep', total=2 * len(machines) * len(batches)),
  )
  if not points:  # says by how much
    choose.choose(request.replace(batch=min(batches), weights='int8'), machines)
  files = [os.path.join(output_dir, f'pareto.{kind}') for kind in ('csv', 'svg')]
  write_text(files[0], sweeps.csv_text(points))
  figures.pareto(files[1], points)
  write(
    f'{"phase":8} {"weights":9} {"machine":11} {"batch":>6} {"layout":13} {"latency":>12} {"chip-ms a token":>16}'
  )
  for p in points:
    if p.on_front:
      write(
        f'{p.phase:8} {p.request.weights:9} {str(p.cost.case.machine):11} {p.request.batch:6} '
        f'{str(p.cost.case.layout):13} {report.time_text(p.seconds):>12} {p.chip_seconds_per_token * 1e3:16.4g}'
      )
  on_front = sum(p.on_front for p in points)
  write(
    f'{len(points)} points, of which these {on_front} are beaten by none: {" and ".join(files)}'
  )


def _draw(choice: choose.Choice, output_dir: str, write) -> None:
  best, files = choice.plan, {}
  for name in ('communication', 'context', 'parts'):
    files[name] = os.path.join(output_dir, f'{name}.svg')
  config, at = best.request.config, best.mesh
  figures.communication(files['communication'], config, at)
  figures.contexts(files['context'], config, best.machine, at)
  figures.time_parts(files['parts'], choice.ranked[: report.ROWS])
  write(f'figures: {", ".join(files.values())}')


def _say(text: str) -> None:
  print(text, file=sys.stderr, flush=True)
