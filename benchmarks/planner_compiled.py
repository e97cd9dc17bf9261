"""The planner at full rate beside compiled programs, on four kinds of TPU: work, bytes and time.

    python -m benchmarks.planner_compiled [--chip=v4] [--case=SUBSTRING] [--layers=4]

Compiles each case for its slice (no TPU is needed), with a few unrolled layers in place of all, and
prices as many layers by the planner's convention 'compiled'. Layers are alike, so their number does
not matter to the comparison; the lookup and the logits weigh more than in a whole model. Both sides
are at the chip's peak rates. GFLOP are those of a chip's products with weights, MiB those that it
sends. The compiler's time is its estimate with asynchronous operations overlapped. A table row is
printed as soon as its program is compiled.
"""

import argparse
import dataclasses
from typing import NamedTuple

from t5x_inference_ext.config import preset
from t5x_inference_ext.planner.case import PassCase
from t5x_inference_ext.planner.check import sent_bytes
from t5x_inference_ext.planner.costs import cost
from t5x_inference_ext.planner.machine import Machine
from t5x_inference_ext.precompile.analysis import analyze
from t5x_inference_ext.precompile.operations import MATMUL
from t5x_inference_ext.sharding.layout import Layout
from t5x_inference_ext.sharding.mesh import parse_mesh

CONTEXT = 2048  # positions of a decode step's cache
DECODE = Layout('ws_2d', 'batch')  # of the steps that take a prefill's cache


class CompiledCase(NamedTuple):
  """A case of the table.

  Attributes:
    model: Preset.
    machine: Slice.
    mesh: 'XxYxZ'.
    phase: 'prefill' or 'decode'.
    batch: Rows.
    length: Tokens of each row in a prefill; 1 in decode.
    layout: Layout of the phase.
    weights: Dtype of weights.
  """

  model: str
  machine: str
  mesh: str
  phase: str
  batch: int
  length: int
  layout: str
  weights: str


def _case(text: str) -> CompiledCase:
  model, machine, mesh, phase, batch, length, layout, weights = text.split()
  return CompiledCase(model, machine, mesh, phase, int(batch), int(length), layout, weights)


CASES = tuple(
  map(
    _case,
    (
      'palm_540b v4:4x4x4 4x4x4 decode 64 1 ws_2d/batch int8',
      'palm_540b v4:4x4x4 4x4x4 decode 512 1 ws_2d/batch bfloat16',
      'palm_540b v4:4x4x4 4x4x4 decode 64 1 ws_1d/batch int8',
      'palm_540b v4:4x4x4 4x4x4 prefill 1 2048 ws_2d/heads int8',
      'palm_540b v4:4x4x4 4x4x4 prefill 64 1920 wg_xyz/batch int8',
      'palm_62b v4:2x2x4 2x4x2 decode 32 1 ws_2d/batch int8',
      'palm_62b v4:2x2x4 2x4x2 prefill 1 2048 ws_2d/heads int8',
      'palm_62b v4:2x2x2 2x2x2 decode 512 1 ws_2d/batch bfloat16',
      'palm_8b v4:2x2x1 1x2x2 decode 32 1 ws_1d/batch int8',
      'palm_8b v4:2x2x2 2x2x2 prefill 8 1024 ws_2d/batch bfloat16',
      'llama3_70b v5e:4x4 1x16x1 decode 8 1 ws_1d/heads int8',
      'llama3_70b v5e:4x4 4x4x1 decode 8 1 ws_2d/batch int8',
      'llama3_70b v5e:4x4 4x4x1 decode 128 1 ws_2d/batch int8',
      'llama3_70b v5e:4x4 4x4x1 prefill 4 1024 ws_2d/heads int8',
      'palm_62b v5e:4x4 4x4x1 decode 64 1 ws_2d/batch int8',
      'palm_62b v5e:4x4 4x4x1 prefill 16 512 wg_xyz/batch int8',
      'palm_8b v5e:2x4 2x4x1 decode 32 1 ws_2d/batch int8',
      'palm_8b v5e:2x4 2x4x1 decode 128 1 ws_2d/batch bfloat16',
      'palm_8b v5e:2x2 1x2x2 decode 16 1 ws_1d/heads int8',
      'palm_8b v5e:2x4 2x4x1 prefill 8 1024 wg_xyz/batch bfloat16',
      'palm_540b v5p:4x4x4 4x4x4 decode 64 1 ws_2d/batch int8',
      'palm_62b v5p:2x2x2 2x2x2 decode 32 1 ws_2d/batch int8',
      'palm_62b v5p:2x2x2 2x2x2 prefill 8 1024 ws_2d/batch bfloat16',
      'palm_62b v6e:4x4 4x4x1 decode 64 1 ws_2d/batch int8',
      'palm_8b v6e:2x4 2x4x1 decode 32 1 ws_2d/batch int8',
      'palm_8b v6e:2x4 2x4x1 prefill 8 1024 ws_2d/batch bfloat16',
    ),
  )
)


def compare(case: CompiledCase, layers: int) -> str:
  """Compile a case, and return its row of the table."""
  model = dataclasses.replace(preset(case.model), num_layers=layers)
  prefill = case.phase == 'prefill'
  context = case.length if prefill else CONTEXT
  planned = cost(
    PassCase(
      model,
      Machine.parse(case.machine),
      parse_mesh(case.mesh),
      Layout.parse(case.layout),
      case.phase,
      case.batch,
      case.length,
      context,
      case.weights,
      decode_layout=DECODE if prefill else None,
    ),
    'compiled',
  )
  answer = analyze(
    model,
    case.weights,
    case.machine,
    case.phase,
    case.batch,
    context,
    layout=case.layout,
    mesh=case.mesh,
    scan_layers=False,
    prompt=case.length if prefill else None,
    other_layout=str(DECODE) if prefill else None,
  )
  what = f'{case.model}, {case.machine}, {case.mesh}'
  work = f'{case.phase} of {case.batch}' + (f' x {case.length}' if prefill else '')
  line = f'| {what} | {work}, {case.weights} | `{case.layout}` |'
  if not answer.fits:
    return f'{line} does not fit |'
  found = answer.compiled[1]
  sent = sent_bytes(found.costs)
  moved = sum(c.count * c.collective.moved for c in planned.collectives)
  flops = planned.work.matmul_flops + planned.work.logits_flops
  products = sum(c.count * c.flops for c in found.costs if c.kind == MATMUL)
  return (
    f'{line} {flops / 1e9:.2f}, {products / 1e9:.2f} | '
    f'{moved / 2**20:.2f}, {sent / 2**20:.2f} | {moved / sent - 1:+.1%} | '
    f'{planned.seconds * 1e3:.3f}, {found.overlapped_seconds * 1e3:.3f} | '
    f'{planned.seconds / found.overlapped_seconds - 1:+.0%} |'
  )


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--chip', default='', help='only the cases of this chip: v4, v5e, v5p or v6e')
  parser.add_argument('--case', default='', help='only cases whose text holds this')
  parser.add_argument('--layers', type=int, default=4)
  args = parser.parse_args()
  print('| model, slice, mesh | pass | layout | GFLOP: planned, compiled | MiB sent | | ms | |')
  print('|---|---|---|---|---|---|---|---|')
  for case in CASES:
    if case.machine.startswith(args.chip) and args.case in ' '.join(map(str, case)):
      print(compare(case, args.layers), flush=True)


if __name__ == '__main__':
  main()
