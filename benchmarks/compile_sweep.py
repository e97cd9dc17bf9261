"""Sixty compiled programs beside the least time that they can take, on four kinds of TPU. No TPU.

    python -m benchmarks.compile_sweep --results=FILE.jsonl [--case=SUBSTRING] [--minutes=4]
    python -m benchmarks.compile_sweep --results=FILE.jsonl --table

Compiles each case for its slice with the layers as a loop, and appends one line of JSON to the
results. Cases that have a line are skipped, so a run that ended goes on where it stopped; with
--minutes no case begins later than that. --table prints the results and the exceptions instead, and
compiles nothing.

The bound of a case is the longer of its FLOPs at the matrix units' peak and its weights and cache
at the memory's rate, and the hops of its collectives in addition. Bytes on links are not in it.
Times are the serial estimates of `python -m t5x_inference_ext.precompile`. An exception takes more
than three times its bound, or has a ratio of more than 1.5 times that of a neighbour: in a series
one quantity grows from case to case.
"""

import argparse
import dataclasses
import json
import os
import time
from typing import Any, NamedTuple

os.environ['JAX_PLATFORMS'] = 'cpu'  # before jax is imported: nothing is computed here

from t5x_inference_ext.config import preset  # noqa: E402
from t5x_inference_ext.errors import UserError  # noqa: E402
from t5x_inference_ext.planner.case import PassCase  # noqa: E402
from t5x_inference_ext.planner.machine import Machine, Mesh  # noqa: E402
from t5x_inference_ext.planner.network import Network  # noqa: E402
from t5x_inference_ext.precompile.analysis import analyze  # noqa: E402
from t5x_inference_ext.precompile.summary import time_bounds  # noqa: E402
from t5x_inference_ext.sharding.layout import Layout  # noqa: E402

MOST_TIMES_BOUND = 3.0
MOST_TIMES_NEIGHBOUR = 1.5


class SweepCase(NamedTuple):
  """A program of the sweep.

  Attributes:
    model: Preset.
    slice_name: The slice, such as 'v4:4x4x4'.
    weights: Dtype of weights.
    phase: 'prefill' or 'decode'.
    layout: Layout of the phase.
    batch: Rows.
    positions: Positions of each row's cache; in a prefill, tokens of each prompt.
  """

  model: str
  slice_name: str
  weights: str
  phase: str
  layout: str
  batch: int
  positions: int

  def __str__(self) -> str:
    """Return the case's name, by which results know it."""
    return ' '.join(map(str, self))


# Each line: model, slice, weights, phase, layout, rows, positions. One of the last five, or the
# slice, is a list, along which a series grows. A case may be in several series.
_SERIES = """
palm_540b v4:4x4x4 int8 decode ws_2d/batch 1,4,16,64,128,512 2048
palm_540b v4:4x4x4 int8 decode ws_2d/batch 128 512,2048,8192,16384,43008
palm_540b v4:2x4x4,v4:4x4x4,v4:4x4x8,v4:4x8x8,v4:8x8x8 int8 decode ws_2d/batch 64 2048
palm_540b v4:4x4x4 bfloat16 decode ws_2d/batch 512 512,2048,10704
palm_540b v4:4x4x4 bfloat16 prefill ws_2d/batch 1,8,64 2048
palm_540b v4:4x4x4 bfloat16 prefill wg_xyz/batch 512 2048
palm_62b v4:2x2x4 int8 decode ws_2d/batch 1,8,32,128,512 2048
palm_62b v4:2x2x4 int8 prefill ws_2d/heads 1,8,32 2048
palm_8b v4:2x2x1 int8 decode ws_2d/batch 1,8,32,128 2048
palm_8b v4:2x2x1 int8 decode ws_2d/batch 32 2048,8192
palm_8b v4:2x2x2 bfloat16 prefill ws_2d/batch 1,8 1024
llama3_70b v5e:4x4 int8 decode ws_2d/batch 1,8,32,128 2048
llama3_70b v5e:4x4 int8 decode ws_2d/batch 8 2048,8192
llama3_70b v5e:4x4 int8 prefill ws_2d/heads 4 1024
palm_62b v5e:4x4 int8 decode ws_2d/batch 16,64 2048
palm_8b v5e:2x2 int8 decode ws_1d/heads 16 2048
palm_8b v5e:2x4 int8 decode ws_2d/batch 32,128 2048
palm_540b v5p:4x4x4 int8 decode ws_2d/batch 64,256 2048
palm_62b v5p:2x2x2 int8 decode ws_2d/batch 32,128 2048
palm_62b v5p:2x2x2 bfloat16 prefill ws_2d/batch 8 1024
llama3_70b v5p:2x2x2 int8 decode ws_2d/batch 32 2048
palm_540b v6e:8x8 int8 decode ws_2d/batch 64 2048
palm_62b v6e:4x4 int8 decode ws_2d/batch 16,64 2048
palm_8b v6e:2x4 int8 decode ws_2d/batch 32,128 2048
palm_8b v6e:2x4 bfloat16 prefill ws_2d/batch 8 1024
llama3_70b v6e:4x4 int8 decode ws_2d/batch 32 2048
"""


def series(text: str = _SERIES) -> list[list[SweepCase]]:
  """Return the cases of each line of a text, in the line's order."""
  found = []
  for line in text.split('\n'):
    fields = [field.split(',') for field in line.split()]
    if fields:
      length = max(map(len, fields))
      columns = [field if len(field) > 1 else field * length for field in fields]
      found.append(
        [
          SweepCase(*row[:5], batch=int(row[5]), positions=int(row[6]))
          for row in zip(*columns, strict=True)
        ]
      )
  return found


def cases() -> list[SweepCase]:
  """Return every case once, in the order of the series."""
  return list(dict.fromkeys(case for some in series() for case in some))


def compile_case(case: SweepCase) -> dict[str, Any]:
  """Compile a case; return its results, JSON-ready, with times in milliseconds."""
  prompt = case.positions if case.phase == 'prefill' else None
  start = time.perf_counter()
  try:
    answer = analyze(
      preset(case.model),
      case.weights,
      case.slice_name,
      case.phase,
      case.batch,
      case.positions,
      layout=case.layout,
      scan_layers=True,
      prompt=prompt,
    )
  except UserError as error:
    return {'case': str(case), 'error': str(error)}
  if not answer.fits:
    return {'case': str(case), 'error': 'does not fit'}
  program, found = answer.compiled
  mesh, bounds = tuple(program.mesh.shape.values()), time_bounds(answer)
  return {
    'case': str(case),
    'mesh': 'x'.join(map(str, mesh)),
    'flops': bounds.flops * 1e3,
    'memory': bounds.memory * 1e3,
    'hops': hop_seconds(case, mesh) * 1e3,
    'serial': found.serial_seconds * 1e3,
    'overlapped': found.overlapped_seconds * 1e3,
    'kinds': {kind: seconds * 1e3 for kind, seconds in found.by_kind.items()},
    'compiled_in': time.perf_counter() - start,
  }


def hop_seconds(case: SweepCase, mesh: Mesh) -> float:
  """Return the latency, in seconds, of all collectives of a case: their time without bytes."""
  machine = Machine.parse(case.slice_name)
  length = 1 if case.phase == 'decode' else case.positions
  planned = PassCase(
    preset(case.model),
    machine,
    mesh,
    Layout.parse(case.layout),
    case.phase,
    case.batch,
    length,
    case.positions,
    case.weights,
  )
  network = Network(machine, mesh, 'compiled')
  layer, rest = (
    sum(network.seconds(dataclasses.replace(c, bytes=0)) for c in run)
    for run in planned.collectives
  )
  return layer * planned.config.num_layers + rest


def bound(result: dict[str, Any]) -> float:
  """Return the least time of a case in milliseconds, from its results."""
  return float(max(result['flops'], result['memory']) + result['hops'])


def exceptions(results: dict[str, dict[str, Any]]) -> dict[str, str]:
  """Return what is exceptional about each case that breaks a limit, by the case's name.

  Args:
    results: Name of a case -> its results. Cases without times are ignored.
  """
  ratios = {name: r['serial'] / bound(r) for name, r in results.items() if 'serial' in r}
  found = {
    name: f'{ratio:.1f} times its bound'
    for name, ratio in ratios.items()
    if ratio > MOST_TIMES_BOUND
  }
  for some in series():
    names = [str(case) for case in some if str(case) in ratios]
    for one, other in (*zip(names, names[1:]), *zip(names[1:], names)):
      times = ratios[one] / ratios[other]
      if times > MOST_TIMES_NEIGHBOUR:
        found.setdefault(one, f'{times:.1f} times the ratio of {other}')
  return found


def table(results: dict[str, dict[str, Any]]) -> str:
  """Return the results as a table in Markdown, and a list of the exceptions."""
  odd = exceptions(results)
  lines = [
    '| model, slice, mesh | pass | layout | FLOPs | memory | hops | bound | ms | ratio | |',
    '|---|---|---|---|---|---|---|---|---|---|',
  ]
  for case in cases():
    if (r := results.get(str(case))) is None:
      continue
    work = f'{case.phase} of {case.batch} x {case.positions}, {case.weights} | `{case.layout}`'
    place = f'{case.model}, {case.slice_name}'
    if 'serial' not in r:
      lines.append(f'| {place} | {work} | | | | | | | {r["error"]} |')
      continue
    parts = ' | '.join(f'{r[name]:.4g}' for name in ('flops', 'memory', 'hops'))
    lines.append(
      f'| {place}, {r["mesh"]} | {work} | {parts} | {bound(r):.4g} | {r["serial"]:.4g} | '
      f'{r["serial"] / bound(r):.2f} | {"!" if str(case) in odd else ""} |'
    )
  lines.append('')
  for name, reason in odd.items():
    kinds = sorted(results[name]['kinds'].items(), key=lambda kind: -kind[1])[:4]
    most = ', '.join(f'{kind} {ms:.3g} ms' for kind, ms in kinds)
    lines.append(f'- {name}: {reason} ({most})')
  return '\n'.join(lines)


def read_results(path: str) -> dict[str, dict[str, Any]]:
  """Return the results in a file by the case's name; none if there is no file."""
  if not os.path.exists(path):
    return {}
  with open(path) as lines:
    return {result['case']: result for result in map(json.loads, lines)}


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--results', required=True, help='file with a line of JSON for each case')
  parser.add_argument('--case', default='', help='only cases whose name holds this')
  parser.add_argument('--minutes', type=float, default=float('inf'))
  parser.add_argument('--table', action='store_true', help='print the results; compile nothing')
  args = parser.parse_args()
  results, start = read_results(args.results), time.perf_counter()
  if args.table:
    print(table(results))
    return
  for case in cases():
    if args.case not in str(case) or str(case) in results:
      continue
    if time.perf_counter() - start > 60 * args.minutes:
      print('more cases are left')
      return
    result = compile_case(case)
    with open(args.results, 'a') as out:
      out.write(json.dumps(result) + '\n')
    print(result['case'], result.get('error') or f'{result["serial"]:.4g} ms', flush=True)


if __name__ == '__main__':
  main()
