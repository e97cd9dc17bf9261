"""The precompile command without its flags: compile, print the report, write the files."""

from collections.abc import Callable
import json
import sys
from typing import Any

from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.engine import saved_program
from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.options import takes_options
from t5x_inference_ext.precompile.analysis import analyze
from t5x_inference_ext.precompile.case import CompileCase
from t5x_inference_ext.precompile.report import report_text
from t5x_inference_ext.precompile.report_json import report_dict
from t5x_inference_ext.text_files import check_writable, write_text


@takes_options(CompileCase, skip=('weights', 'phase', 'batch', 'context'))
def precompile(
  model: ModelConfig,
  slice_name: str,
  batch: int,
  weights: str = 'int8',
  phase: str = 'decode',
  context: int = 2048,
  *,
  layout: str | None = None,
  other_layout: str | None = None,
  mesh: str | None = None,
  sampling: SamplingParams = SamplingParams(),
  json_file: str | None = None,
  hlo_file: str | None = None,
  save_file: str | None = None,
  write: Callable[[str], None] = print,
  **options: Any,
) -> bool:
  """Compile a phase of a model for a slice, and print the report.

  Args:
    model, slice_name, batch, weights, phase, context, layout, other_layout, mesh: See
      analysis.analyze.
    sampling: SamplingParams. How 'generate', 'slots' and 'admit' choose tokens; 'prefill' and
      'decode' are greedy.
    json_file: str or None. File for the report as JSON.
    hlo_file: str or None. File for the compiled program's text.
    save_file: str or None. File for the executable; see engine.saved_program.
    write: function. Takes the report's text. Progress goes to stderr.
    **options: Other options of CompileCase.

  Returns:
    Whether the program fits.

  Raises:
    UserError: See analysis.analyze; or a file can't be written.
  """
  check_writable(json_file, hlo_file, save_file)
  answer = analyze(
    model,
    weights,
    slice_name,
    phase,
    batch,
    context,
    layout=layout,
    other_layout=other_layout,
    mesh=mesh,
    sampling=sampling,
    say=lambda text: print(f'{text} ...', file=sys.stderr, flush=True),
    **options,
  )
  write(report_text(answer))
  if json_file:
    write_text(json_file, json.dumps(report_dict(answer), indent=2) + '\n')
    write(f'report as JSON: {json_file}')
  if not answer.fits:
    if hlo_file or save_file:
      write(f'nothing to write to {hlo_file or save_file}: the program does not fit')
    return False
  program, _ = answer.compiled
  if hlo_file:
    write_text(hlo_file, program.text)
    write(f'compiled program: {hlo_file}')
  if save_file:
    header = saved_program.save(
      save_file, program.compiled, program.arguments, program.mesh, program.case.to_dict()
    )
    versions = ', '.join(
      f'{name} {header[name]}' for name in saved_program.VERSIONS if header[name]
    )
    size = f'{header["bytes"] / 2**20:.1f} MiB'
    write(f'executable: {save_file}, {size}, for {answer.slice} with {versions}')
  return True
