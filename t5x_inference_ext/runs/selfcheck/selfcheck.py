"""The selfcheck: runs its parts in order; if one fails, the others still run."""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import tempfile
import time
import traceback
from typing import Any

import jax

from t5x_inference_ext import distributed
from t5x_inference_ext.checkpoints import Checkpoint, open_checkpoint
from t5x_inference_ext.checkpoints.convert import convert
from t5x_inference_ext.checkpoints.identity import weights_identity
from t5x_inference_ext.errors import RequestError, UserError, printable
from t5x_inference_ext.options import check_options, option
from t5x_inference_ext.precompile.case import CompileCase
from t5x_inference_ext.runs import output
from t5x_inference_ext.runs.progress import print_on_main
from t5x_inference_ext.runs.selfcheck import golden, machine, serving, timing
from t5x_inference_ext.sharding.layout import check_model
from t5x_inference_ext.sharding.mesh import make_mesh, parse_mesh
from t5x_inference_ext.sharding.mesh_choice import choose_mesh
from t5x_inference_ext.text_files import check_writable
from t5x_inference_ext.text_format import seconds_text

REPORT_FORMAT, REPORT_VERSION = 't5x_inference_ext selfcheck', 1
_BUNDLED = pathlib.Path('examples', 'palm_tiny', 'checkpoint_1000')
_CHECKOUT = pathlib.Path(__file__).resolve().parents[3]
# Configurations to serve requests with: (weights, activations, cache, prefill and decode layout).
_SERVED = (
  ('int8', 'float32', 'float32', 'wg_xyz/batch', 'ws_2d/batch'),
  ('int8', 'bfloat16', 'int8', 'ws_2d/batch', 'ws_2d/batch'),
  ('int4', 'float32', 'float32', 'ws_2d/batch', 'ws_2d/batch'),
)


@dataclasses.dataclass(frozen=True)
class SelfcheckOptions:
  """Options of the selfcheck command."""

  mesh: str | None = option(
    None, help='Mesh XxYxZ. By default over all devices that divide the bundled model.'
  )
  output: str | None = option(
    None, help='File for the whole report, as JSON. An existing file is replaced.'
  )
  checkpoint: str | None = option(
    None,
    help=f'The bundled checkpoint, {_BUNDLED} of the source code. By default it is looked for '
    'beside the package, and in this directory.',
  )

  def __post_init__(self) -> None:
    check_options(self)


class _Parts:
  """Runs the parts of the check, and collects results and problems.

  Attributes:
    found: Results by part, JSON-ready.
    problems: One sentence for each problem found.
  """

  def __init__(self) -> None:
    self.found: dict[str, Any] = {}
    self.problems: list[str] = []

  def run(self, name: str, part: Callable[[], Any]) -> None:
    """Run a part. An exception in it is recorded as a problem; the check goes on."""
    begin = time.perf_counter()
    try:
      self.found[name] = part()
    except Exception as error:  # any error: the report must show all failures on a new machine
      self.problem(f'{name}: {type(error).__name__}: {printable(str(error))}')
      self.found[name] = {'error': traceback.format_exc()}
    self.found.setdefault('seconds', {})[name] = time.perf_counter() - begin

  def problem(self, text: str) -> None:
    """Record and print a problem."""
    self.problems.append(text)
    print_on_main(f'WRONG: {text}')


def selfcheck(options: SelfcheckOptions) -> bool:
  """Check this package on these devices, print a summary, and write the report.

  Returns:
    Whether nothing is wrong: no golden token differs, and no part failed.

  Raises:
    UserError: The checkpoint, mesh or output can't be used. Raised before any part runs.
  """
  with distributed.together():
    check_writable(options.output)
    checkpoint = open_checkpoint(options.checkpoint or _find_bundled())
    goldens = golden.read_goldens()
    if weights_identity(checkpoint).sha256 != goldens.checkpoint:
      raise RequestError(
        f'{checkpoint.path} is not the bundled checkpoint {_BUNDLED}: only that has golden tokens'
      )
    shape = parse_mesh(options.mesh) if options.mesh else None
    mesh = make_mesh(shape or choose_mesh(checkpoint.config, jax.devices()))
    distributed.check_mesh(mesh)
    check_model(checkpoint.config, mesh.shape)
  parts = _Parts()
  with contextlib.ExitStack() as stack:
    stack.enter_context(few_optimizations(mesh))
    rounded = functools.cache(lambda weights: _rounded(checkpoint.path, weights, stack))
    parts.run('machine', lambda: _machine(mesh))
    for weights in golden.DTYPES:
      source = lambda kind=weights: checkpoint if kind == 'float32' else rounded(kind)
      name = f'golden tokens, {weights} weights'
      parts.run(name, functools.partial(_golden, parts, source, mesh, goldens))
    for served in _SERVED:
      source = functools.partial(rounded, served[0])
      name = f'serving, {served[0]} weights, {served[1]} activations, {served[2]} cache'
      parts.run(name, functools.partial(_serving, parts, source, mesh, goldens, served))
    for model, case in timing.timed_cases(mesh):
      name = f'time of {case.phase}, {case.weights}, batch {case.batch}'
      parts.run(name, functools.partial(_time, model, case, mesh))
  parts.run('memory', machine.device_memory)
  _write(options.output, parts)
  wrong = len(parts.problems)
  print_on_main(
    'nothing is wrong' if not wrong else f'{wrong} problems were found: see WRONG above'
  )
  return not wrong


@contextlib.contextmanager
def few_optimizations(mesh: jax.sharding.Mesh) -> Iterator[None]:
  """Context manager: compile with few optimizations on CPUs, where the check is a rehearsal."""
  name = 'jax_disable_most_optimizations'
  before = jax.config.read(name)
  jax.config.update(name, before or mesh.devices.flat[0].platform == 'cpu')
  try:
    yield
  finally:
    jax.config.update(name, before)


def _find_bundled() -> str:
  for directory in (_CHECKOUT, pathlib.Path()):
    if (directory / _BUNDLED).is_dir():
      return str(directory / _BUNDLED)
  raise UserError(
    f'the bundled checkpoint is missing: the package was installed without its source: give '
    f'--checkpoint=DIR, {_BUNDLED} of the source code'
  )


def _rounded(source: str, weights: str, stack: contextlib.ExitStack) -> Checkpoint:
  """Return a converted checkpoint, in a directory that is removed when `stack` closes."""
  directory = stack.enter_context(tempfile.TemporaryDirectory())
  converted = os.path.join(directory, weights)
  convert(source, converted, weights)
  return open_checkpoint(converted)


def _machine(mesh: jax.sharding.Mesh) -> dict[str, Any]:
  found = machine.describe_machine(mesh)
  print_on_main(machine.machine_text(found))
  return found


def _golden(
  parts: _Parts, source: Callable[[], Checkpoint], mesh: jax.sharding.Mesh, goldens: golden.Goldens
) -> list[dict[str, Any]]:
  checkpoint, pairs = source(), golden.layout_pairs()
  if checkpoint.weights != 'float32':  # resharding the cache does not depend on the weights' dtype
    pairs = [(prefill, decode) for prefill, decode in pairs if prefill == decode]
  print_on_main(f'{checkpoint.weights} weights: {len(pairs)} pairs of layouts ...')
  results = []
  for result in golden.check_goldens(checkpoint, mesh, goldens, pairs):
    results.append(dataclasses.asdict(result))
    if result.different:
      parts.problem(f'{result.name}: {result.different}')
  skipped = sum(bool(result['impossible']) for result in results)
  equal = sum(not result['different'] for result in results) - skipped
  note = f'; this mesh can not have {skipped}' if skipped else ''
  print_on_main(
    f'{checkpoint.weights} weights: golden tokens in {equal} of {len(pairs)} pairs of layouts{note}'
  )
  return results


def _serving(
  parts: _Parts,
  source: Callable[[], Checkpoint],
  mesh: jax.sharding.Mesh,
  goldens: golden.Goldens,
  served: tuple[str, str, str, str, str],
) -> dict[str, Any]:
  _, dtype, cache, prefill, decode = served
  found = serving.check_serving(
    source(), mesh, goldens, dtype=dtype, cache=cache, prefill_layout=prefill, decode_layout=decode
  )
  text = (
    f'served with {found["weights"]} weights, {dtype} activations, {cache} cache: '
    f'{found["equal_share"]:.1%} of tokens as golden'
  )
  if found['golden'] and found['different_rows']:
    parts.problem(f'{text}; rows {found["different_rows"]} differ')
  else:
    rounded = '' if found['golden'] else ' (it rounds, so tokens may differ from the golden ones)'
    print_on_main(f'{text}{rounded}, {found["tokens_per_second"]:.0f} tokens/s')
  return found


def _time(model: str, case: CompileCase, mesh: jax.sharding.Mesh) -> dict[str, Any]:
  found = timing.time_case(model, case, mesh)
  estimated = ''
  if found['estimated_seconds']:
    overlapped, serial = map(seconds_text, found['estimated_seconds'])
    estimated = f', estimated {overlapped} to {serial}'
  print_on_main(
    f'{case.phase} of {model}, {case.weights}, batch {case.batch}: measured '
    f'{seconds_text(found["seconds"])}{estimated}; compiled in {found["compile_seconds"]:.1f} s'
  )
  return found


def _write(path: str | None, parts: _Parts) -> None:
  if path is None:
    return
  with output.whole_file(path) as file:
    json.dump(
      {
        'format': REPORT_FORMAT,
        'version': REPORT_VERSION,
        'right': not parts.problems,
        'problems': parts.problems,
        **parts.found,
      },
      file,
      indent=1,
    )
    file.write('\n')
  print_on_main(f'report to send back: {path}')
