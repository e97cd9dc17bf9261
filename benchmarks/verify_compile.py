"""Steps that check drafts, compiled for a TPU slice: milliseconds a token, by acceptance. No TPU.

    python -m benchmarks.verify_compile --model=palm_540b --slice=v4:4x4x4 --rows 1 8 64
    python -m benchmarks.verify_compile --model=palm_540b --slice=v4:4x4x4 --draft_model=palm_8b

For each number of rows and of draft tokens, the model is compiled twice with few layers, and the
time of all layers extrapolated from the two serial estimates of `python -m
t5x_inference_ext.precompile`: everything in sequence, nothing overlapped. A draft of 0 is a plain
decode step. The most likely token after each position is chosen; the choice by temperature,
penalties and ends is left out. A draft token is right with a fixed probability, given that those
before it are. With --draft_model, a step includes a decode step of that model for each draft token,
on the same slice with the same dtype of weights. Needs libtpu.
"""

import functools
import itertools

from benchmarks.few_layers import FEW_LAYERS, case_parser, extrapolated_times
from t5x_inference_ext.errors import UserError
from t5x_inference_ext.planner.drafts import ACCEPTANCES, tokens_of_step

TITLES = ('rows', 'draft', 'ms a step', 'of which drafts', 'times')


@functools.cache
def step_seconds(
  model: str, weights: str, slice_name: str, layout: str, rows: int, draft: int, context: int
) -> float:
  """Return the estimate of a step that checks `draft` tokens of each row; 0: a plain decode step.

  Args:
    model: Name of a preset.
    weights: Dtype of the weights.
    slice_name: The slice, such as 'v4:4x4x4'.
    layout: Layout of the step.
    rows: Rows decoded together.
    draft: Number of draft tokens.
    context: Positions of each row's cache.
  """
  phase, fields = ('verify', {'prompt': draft + 1}) if draft else ('decode', {})
  return extrapolated_times(
    model, weights, slice_name, phase, rows, context, layout, **fields
  ).serial


def table_row(rows: int, draft: int, step: float, drafts: float, plain: float) -> str:
  """Return a row of the table.

  Args:
    rows: Rows decoded together.
    draft: Number of draft tokens.
    step: Seconds of a step, with its drafts.
    drafts: Seconds of these drafts.
    plain: Seconds of a plain step.
  """
  cells = [rows, draft, f'{step * 1e3:.2f}', f'{drafts * 1e3:.2f}', f'{step / plain:.2f}']
  cells += [f'{step * 1e3 / tokens_of_step(a, draft):.2f}' for a in ACCEPTANCES]
  return '| ' + ' | '.join(map(str, cells)) + ' |'


def main() -> None:
  parser = case_parser(__doc__, 'palm_540b', 'v4:4x4x4')
  parser.add_argument('--rows', nargs='+', type=int, default=[1, 8, 64])
  parser.add_argument('--drafts', nargs='+', type=int, default=[1, 2, 4, 8, 16])
  parser.add_argument('--context', type=int, default=2048)
  parser.add_argument('--draft_model', help='A preset. By default drafts cost nothing.')
  args = parser.parse_args()
  titles = [*TITLES, *(f'ms a token at {a:g}' for a in ACCEPTANCES)]
  print(f'{args.model} {args.weights} {args.slice} {args.layout}, context {args.context}', end=', ')
  print(f'extrapolated from {FEW_LAYERS[0]} and {FEW_LAYERS[1]} layers')
  print('| ' + ' | '.join(titles) + ' |\n' + '|---' * len(titles) + '|', flush=True)

  def seconds(model: str, rows: int, draft: int) -> float:
    return step_seconds(model, args.weights, args.slice, args.layout, rows, draft, args.context)

  try:
    for rows, draft in itertools.product(args.rows, (0, *args.drafts)):
      plain = seconds(args.model, rows, 0)
      drafts = draft * seconds(args.draft_model, rows, 0) if args.draft_model and draft else 0.0
      step = seconds(args.model, rows, draft) + drafts
      print(table_row(rows, draft, step, drafts, plain), flush=True)
  except UserError as error:
    raise SystemExit(f'error: {error}') from error


if __name__ == '__main__':
  main()
