"""Decoding with drafts beside decoding without: tokens/s, tokens a step, acceptance.

    python -m benchmarks.speculation --model=SmolLM2-135M-Instruct.Q4_1.gguf \
        --prompts repeat.jsonl free.jsonl
    python -m benchmarks.speculation --model=examples/palm_tiny/checkpoint_1000 \
        --prompts examples/prompts.jsonl --speculate draft:palm_draft/checkpoint_1500:4 \
        --greedy_guesses --always --temperature 0 0.7 1

Run from the root of a checkout, on one device. Each line of a file is {"chat": TEXT}, a message to
the model, or {"prompt": TEXT}. An answer has at most --max_new_tokens tokens. With --copies, each
line is asked so often, with different seeds, so that requests wait for slots. After a round that is
not measured, both sides run in turns, --rounds times. Tokens and seconds are those of the
scheduler's steps that prefill nothing. Where requests wait, these are mostly the steps of the last
rows, and the times with prefills say more. "At most" is a bound on "times" for n-grams at the
printed prices: no choice of the lengths of drafts needs less time, even one that knows the answers,
for each row alone. "Right by position" is the share of n-gram draft tokens that are right, given
that those before them are: of the first token, the second and so on; a row without a draft counts
as one whose first token is wrong. `plan --acceptance` takes these numbers. The last column has the
number of rows whose tokens differ: where two tokens are closer than rounding errors, a row may
continue differently. With --greedy_guesses, the draft model is also tried with drafts of its most
likely tokens, instead of samples with the rows' noise. With --always, every step checks whole
drafts, whatever that costs.
"""

import argparse
from collections.abc import Sequence
import dataclasses
import itertools
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t5x_inference_ext.engine import scheduler_config
from t5x_inference_ext.engine.draft_width import verify_widths
from t5x_inference_ext.engine.drafting import DraftInputs, DraftState
from t5x_inference_ext.engine.engine import Engine
from t5x_inference_ext.engine.ngram_drafts import NgramDrafter
from t5x_inference_ext.engine.request import Request
from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.engine.scheduler import Scheduler
from t5x_inference_ext.engine.stats import DraftStats
from t5x_inference_ext.engine.step_prices import StepPrices

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
  'tokens a step',
  'accepted',
  'prices',
  'at most',
  'right by position',
  'rows that differ',
)


def read_requests(
  engine: Engine, path: pathlib.Path, limit: int, temperature: float, copies: int = 1
) -> list[Request]:
  """Return `copies` requests for each line of a file, with different seeds."""
  text, vocabulary = engine.checkpoint.text, engine.checkpoint.vocabulary
  name = lambda token: '' if token is None else vocabulary.piece(token, special=True).decode()
  requests, sampling = [], SamplingParams(temperature)
  for i, line in enumerate(path.read_text(encoding='utf-8').splitlines() * copies):
    fields = json.loads(line)
    if 'chat' in fields:
      names = {'bos_token': name(text.bos_id), 'eos_token': name(text.end_ids[0])}
      rendered = text.chat.render([{'role': 'user', 'content': fields['chat']}], **names)
      tokens = tuple(vocabulary.encode(rendered))
    else:
      tokens = (*engine.bos, *vocabulary.encode(fields['prompt']))
    ends = engine.checkpoint.end_ids
    requests.append(Request(tokens, (i,), limit, sampling, end_ids=tuple(ends)))
  return requests


def right_tokens(drafter: NgramDrafter, prompt: Sequence[int], answer: Sequence[int]) -> list[int]:
  """Return how many tokens of the draft are right after 1, 2, ... tokens of an answer."""
  whole, made = np.asarray([*prompt, *answer], np.int32), np.arange(1, len(answer))
  last = jnp.asarray(len(prompt) - 1 + made, jnp.int32)
  tokens = jnp.asarray(np.tile(whole, (len(made), 1)))
  outlook, none = drafter.outlook(tokens, last), jnp.zeros(0)
  state: Any = None  # n-grams are drafted from tokens alone
  inputs = DraftInputs(None, state, state, DraftState(tokens, none, none), last)
  drafts = np.asarray(drafter.draft(inputs, outlook, drafter.most)[1])
  right = []
  for done, draft, count in zip(made, drafts, np.asarray(outlook.counts)):
    known = np.asarray(answer[done : done + count])
    right.append(int(np.cumprod(draft[: len(known)] == known).sum()))
  return right


def right_shares(right: Sequence[int], most: int) -> list[float]:
  """Return the share of right tokens at each position of drafts, of those after right tokens.

  Args:
    right: Number of right tokens of each draft, before the first wrong one.
    most: Number of tokens of a draft.
  """
  reached = [sum(count >= i for count in right) for i in range(most + 1)]
  return [after / max(1, before) for before, after in zip(reached, reached[1:])]


def least_time(right: Sequence[int], widths: Sequence[int], prices: Sequence[float]) -> float:
  """Return the least time, in plain steps, of a row alone that knows its answer.

  Args:
    right: From `right_tokens`.
    widths: Numbers of draft tokens that a step can check.
    prices: Time of each such step, in plain steps.
  """
  times = [0.0] * (len(right) + 1)  # of the tokens from this one on
  for i in reversed(range(len(right))):
    ends = (min(i + 1 + min(right[i], width), len(right)) for width in widths)
    times[i] = min(price + times[end] for price, end in zip(prices, ends))
  return times[0]


class AlwaysCheck(StepPrices):
  """Prices at which every step checks all tokens of a draft."""

  tries_plain = False

  def next(self) -> np.ndarray:
    """Return a low price of the last kind of step, and a high one of the others."""
    return np.asarray([*[1e6] * (len(self.prices) - 1), 1.0], np.float32)


class Side:
  """One scheduler that serves the requests again and again.

  Attributes:
    seconds: Seconds of the steps that prefilled nothing, so far.
    generated: Tokens that these steps generated.
    whole: Seconds of all steps.
    tokens: The tokens of each request, from the last time that it was served.
  """

  def __init__(
    self,
    engine: Engine,
    requests: list[Request],
    slots: int,
    steps: int,
    speculate: str | None,
    *,
    greedy: bool = False,
    always: bool = False,
  ):
    config = scheduler_config.config_for(
      engine.model, requests, slots=slots, decode_steps=steps, speculate=speculate
    )
    self.scheduler = Scheduler(engine.model, engine.weights, config)
    runs = self.scheduler.executor
    if greedy:  # set this before any program is compiled
      runs._drafter = dataclasses.replace(runs._drafter, shared_noise=False)
    if always:
      most = runs._drafter.most
      self.scheduler._decoder._prices = AlwaysCheck((0, *verify_widths(most)))
    self._requests = requests
    self.tokens: list[list[int]] = []
    self.reset()

  def reset(self) -> None:
    """Forget the counts."""
    self.seconds, self.generated, self.whole, self._runs = 0.0, 0, 0.0, 0
    self._decoded = self.scheduler.stats.decoded
    self._before = self.scheduler.stats.drafts

  def run(self) -> None:
    """Serve all requests once."""
    self._runs += 1
    first = self.scheduler.submit(self._requests[0]).index
    for request in self._requests[1:]:
      self.scheduler.submit(request)
    self.tokens = [[] for _ in self._requests]
    while not self.scheduler.idle:
      prefilled, start = self.scheduler.stats.prefilled, time.perf_counter()
      events = self.scheduler.step()
      self.whole += time.perf_counter() - start
      if self.scheduler.stats.prefilled == prefilled:
        self.seconds += time.perf_counter() - start
        self.generated += sum(len(event.tokens) for event in events)
      for event in events:
        self.tokens[event.request - first] += event.tokens

  @property
  def steps(self) -> float:
    """Steps of a run of all requests."""
    decoded = self.scheduler.stats.decoded - self._decoded
    return decoded / self.scheduler.config.slots / self._runs

  def least_steps(self) -> float | None:
    """Return a lower bound on the time of a run, in plain steps; None for a draft model."""
    drafter = self.scheduler.executor._drafter
    if not isinstance(drafter, NgramDrafter):
      return None
    widths, prices = (0, *verify_widths(drafter.most)), self.scheduler._decoder._prices.prices
    times = [
      least_time(right_tokens(drafter, request.tokens, answer), widths, prices.tolist())
      for request, answer in zip(self._requests, self.tokens)
    ]
    return max(*times, sum(times) / self.scheduler.config.slots)

  def right_by_position(self) -> list[float]:
    """Return the share of right tokens at each position of a draft, of those after right ones."""
    drafter = self.scheduler.executor._drafter
    if not isinstance(drafter, NgramDrafter):
      return []
    right = [
      count
      for request, answer in zip(self._requests, self.tokens)
      for count in right_tokens(drafter, request.tokens, answer)[: -drafter.most]  # whole drafts
    ]
    return right_shares(right, drafter.most)

  @property
  def drafts(self) -> DraftStats:
    """Counters of drafts since the reset."""
    now, was = self.scheduler.stats.drafts, self._before
    return DraftStats(
      now.row_steps - was.row_steps,
      now.generated - was.generated,
      now.drafted - was.drafted,
      now.accepted - was.accepted,
    )


def row(names: list[str], sides: list[Side], rounds: int) -> str:
  """Run both sides in turns; return a row of the table, which begins with `names`."""
  for side in sides:
    side.run()
    side.reset()
  for _ in range(rounds):
    for side in sides:
      side.run()
  without, drafted = (side.generated / side.seconds for side in sides)
  drafts, prices = sides[1].drafts, sides[1].scheduler._decoder._prices.prices
  least = sides[1].least_steps()
  different = sum(a != b for a, b in zip(sides[0].tokens, sides[1].tokens))
  cells = [
    *names,
    f'{without:.1f}',
    f'{drafted:.1f}',
    f'{drafted / without:.2f}',
    f'{sides[0].whole / sides[1].whole:.2f}',
    f'{drafts.tokens_per_step:.2f}',
    f'{drafts.accepted} of {drafts.drafted}, {drafts.accepted / max(1, drafts.drafted):.0%}',
    ', '.join(f'{price:.2f}' for price in prices),
    '' if least is None else f'{sides[0].steps / least:.2f}',
    ', '.join(f'{share:.2f}' for share in sides[1].right_by_position()),
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
        side = Side(
          engine, requests, slots, args.decode_steps, speculate, greedy=greedy, always=args.always
        )
        note = ', greedy guesses' if greedy else ''
        kind = speculate.split(':')
        size = str(len(requests))
        names = [path.name, f'{temperature:g}', size, str(slots), f'{kind[0]}:{kind[-1]}{note}']
        print(row(names, [plain, side], args.rounds), flush=True)


if __name__ == '__main__':
  main()
