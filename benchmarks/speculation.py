"""Decoding with drafts beside decoding without: tokens/s, tokens a step, acceptance.

    python -m benchmarks.speculation --model=SmolLM2-135M-Instruct.Q4_1.gguf \
        --prompts repeat.jsonl free.jsonl
    python -m benchmarks.speculation --model=examples/palm_tiny/checkpoint_1000 \
        --prompts examples/prompts.jsonl --speculate draft:palm_draft/checkpoint_1500:4 \
        --greedy_guesses --always --temperature 0 0.7 1

Run from the root of a checkout, on one device. Each line of a file is {"chat": TEXT}, a message to
the model, or {"prompt": TEXT}. An answer has at most --max_new_tokens tokens. With --copies, each
line is asked so often, with different seeds, so that requests wait for slots. After a round that is
not measured, both sides run in turns, --rounds times, in alternating order. Seconds are those of
decode steps, each program's from the end of the one before it. "Times" is the ratio of the medians
of both sides; in parentheses is the range of the ratios of the rounds.

"Prices" are the times of steps that check none, some and all tokens of drafts, in steps of the side
without drafts. They are medians of runs in the same rounds, in which all steps are of one kind.
"Learned" are the prices by which the last steps were chosen. "At most" is a bound on "times" for
n-grams at the measured prices: no choice of the lengths of drafts needs less time, even one that
knows the answers, for each row alone. "Right by position" is the share of n-gram draft tokens that
are right, given that those before them are: of the first token, the second and so on; a row without
a draft counts as one whose first token is wrong. `plan --acceptance` takes these numbers. The last
column has the number of rows whose tokens differ: where two tokens are closer than rounding errors,
a row may continue differently. With --greedy_guesses, the draft model is also tried with drafts of
its most likely tokens, instead of samples with the rows' noise. With --always, every step checks
whole drafts, whatever that costs.
"""

import argparse
from collections.abc import Sequence
import itertools
import json
import pathlib
import statistics

import jax

from benchmarks.chats import chat_tokens
from benchmarks.draft_sides import Side
from t5x_inference_ext.engine.engine import Engine
from t5x_inference_ext.engine.request import Request
from t5x_inference_ext.engine.sampling import SamplingParams

TITLES = (
  'prompts',
  'temperature',
  'requests',
  'rows',
  'drafts',
  'tokens/s without',
  'with',
  'times',
  'times, with prefills',
  'of processor time, with prefills',
  'tokens a step',
  'accepted',
  'prices',
  'learned',
  'at most',
  'right by position',
  'rows that differ',
)


def read_requests(
  engine: Engine, path: pathlib.Path, limit: int, temperature: float, copies: int = 1
) -> list[Request]:
  """Return `copies` requests for each line of a file, with different seeds."""
  requests, sampling = [], SamplingParams(temperature)
  for i, line in enumerate(path.read_text(encoding='utf-8').splitlines() * copies):
    fields = json.loads(line)
    if 'chat' in fields:
      tokens = chat_tokens(engine, [{'role': 'user', 'content': fields['chat']}])
    else:
      tokens = (*engine.bos, *engine.checkpoint.vocabulary.encode(fields['prompt']))
    ends = engine.checkpoint.end_ids
    requests.append(Request(tokens, (i,), limit, sampling, end_ids=tuple(ends)))
  return requests


def step_prices(plain: Side, priced: Sequence[Sequence[float]]) -> list[float]:
  """Return the median time of a step of each kind, in steps of a side without drafts.

  Args:
    plain: The side without drafts.
    priced: Seconds of a step in each run, for each kind.
  """
  unit = statistics.median(plain.seconds) / plain.steps
  return [statistics.median(each) / unit for each in priced]


def row(names: list[str], sides: list[Side], one_kind: Side, rounds: int) -> str:
  """Run both sides in turns; return a row of the table, which begins with `names`.

  Args:
    names: First cells of the row.
    sides: The side without drafts, and the side with drafts.
    one_kind: Another side with drafts, for runs whose steps are all of one kind.
    rounds: Number of runs of each.
  """
  for side in (*sides, one_kind):
    side.run()
    side.reset()
  priced: list[list[float]] = [[] for _ in one_kind.widths]
  for turn in range(rounds):
    for side in sides if turn % 2 == 0 else reversed(sides):
      side.run()
    for kind, found in enumerate(priced):
      one_kind.check_only(kind)
      one_kind.reset()
      one_kind.run()
      found.append(one_kind.seconds[0] / one_kind.steps)
  plain, drafted = sides
  rounds_of = lambda name: [a / b for a, b in zip(getattr(plain, name), getattr(drafted, name))]
  median_of = lambda side, name: statistics.median(getattr(side, name))
  times = [
    f'{median_of(plain, name) / median_of(drafted, name):.2f}'
    f' ({min(rounds_of(name)):.2f} to {max(rounds_of(name)):.2f})'
    for name in ('seconds', 'whole', 'processor')
  ]
  drafts, prices = drafted.drafts, step_prices(plain, priced)
  learned, least = drafted.scheduler._decoder._prices.prices, drafted.least_steps(prices)
  different = sum(a != b for a, b in zip(plain.tokens, drafted.tokens))
  cells = [
    *names,
    f'{plain.tokens_per_second:.1f}',
    f'{drafted.tokens_per_second:.1f}',
    *times,
    f'{drafts.tokens_per_step:.2f}',
    f'{drafts.accepted} of {drafts.drafted}, {drafts.accepted / max(1, drafts.drafted):.0%}',
    ', '.join(f'{price:.2f}' for price in prices),
    ', '.join(f'{price:.2f}' for price in learned),
    '' if least is None else f'{plain.steps / least:.2f}',
    ', '.join(f'{share:.2f}' for share in drafted.right_by_position()),
    different,
  ]
  return '| ' + ' | '.join(map(str, cells)) + ' |'


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--model', required=True, help='A checkpoint with a vocabulary.')
  parser.add_argument('--prompts', nargs='+', required=True, type=pathlib.Path, help='JSONL files.')
  parser.add_argument('--rows', nargs='+', type=int, default=[1, 8], help='Rows decoded together.')
  parser.add_argument('--speculate', nargs='+', default=['ngram:8'])
  parser.add_argument('--max_new_tokens', type=int, default=96)
  parser.add_argument('--copies', nargs='+', type=int, default=[1], help='Requests for each line.')
  parser.add_argument('--decode_steps', type=int, default=16, help='1 as in a server.')
  parser.add_argument('--rounds', type=int, default=2)
  parser.add_argument('--temperature', nargs='+', type=float, default=[0.0])
  parser.add_argument('--greedy_guesses', action='store_true')
  parser.add_argument('--always', action='store_true', help='Check whole drafts in every step.')
  parser.add_argument('--dtype', default='float32')
  args = parser.parse_args()
  engine = Engine.load(args.model, mesh='1x1x1', dtype=args.dtype)
  print(f'{jax.devices()[0].device_kind}, jax {jax.__version__}, {args}')
  print('| ' + ' | '.join(TITLES) + ' |\n' + '|---' * len(TITLES) + '|', flush=True)
  guesses = (False, True) if args.greedy_guesses else (False,)
  for path, temperature, copies in itertools.product(args.prompts, args.temperature, args.copies):
    requests = read_requests(engine, path, args.max_new_tokens, temperature, copies)
    for slots in args.rows:
      plain = Side(engine, requests, slots, args.decode_steps, None)
      for speculate, greedy in itertools.product(args.speculate, guesses):
        side, one_kind = (
          Side(engine, requests, slots, args.decode_steps, speculate, greedy=greedy)
          for _ in range(2)
        )
        if args.always:
          side.check_only(len(side.widths) - 1)
        note = ', greedy guesses' if greedy else ''
        kind = speculate.split(':')
        size = str(len(requests))
        names = [path.name, f'{temperature:g}', size, str(slots), f'{kind[0]}:{kind[-1]}{note}']
        print(row(names, [plain, side], one_kind, args.rounds), flush=True)


if __name__ == '__main__':
  main()
