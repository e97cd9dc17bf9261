"""Chats in text with a public model: first tokens with replies in the prefix cache and without.

    python -m benchmarks.chats --model=SmolLM2-135M-Instruct.Q4_1.gguf --messages free.jsonl

Run from the root of a checkout, on one device. Each line of the file is {"chat": TEXT}, a message.
A chat takes `--turns` of them in turn, and each answer has at most --max_new_tokens tokens. As in
the server, every turn's prompt is the whole chat as the model's template writes it, so an answer is
in it as text that is encoded anew. Both sides keep prompts in the prefix cache; one also keeps
replies. They take each chat one after the other, in alternating order, and must give equal answers.
"""

import argparse
import json
import pathlib
import statistics
import time
from typing import NamedTuple

import jax

from t5x_inference_ext.engine import scheduler_config
from t5x_inference_ext.engine.engine import Engine
from t5x_inference_ext.engine.request import Request
from t5x_inference_ext.engine.scheduler import Scheduler


class Turn(NamedTuple):
  """One turn of a chat.

  Attributes:
    answer: The text of the answer.
    seconds: Time to the first token.
    prefilled: Number of tokens of the prompt that were not in the prefix cache.
    length: Number of tokens of the prompt.
  """

  answer: str
  seconds: float
  prefilled: int
  length: int


def chat_tokens(engine: Engine, messages: list[dict[str, str]]) -> tuple[int, ...]:
  """Return the tokens of a chat as the model's template writes it, BOS included."""
  text, vocabulary = engine.checkpoint.text, engine.checkpoint.vocabulary
  name = lambda token: '' if token is None else vocabulary.piece(token, special=True).decode()
  names = {'bos_token': name(text.bos_id), 'eos_token': name(text.end_ids[0])}
  return tuple(vocabulary.encode(text.chat.render(messages, **names)))


def chat(
  engine: Engine, core: Scheduler, messages: list[str], new: int, salt: int, keep: bool
) -> list[Turn]:
  """Return the turns of one chat, which shares no prefix with other chats.

  Args:
    engine: The model, with a chat template.
    core: The scheduler.
    messages: The user's messages.
    new: Maximum number of tokens of an answer.
    salt: Number of the chat.
    keep: Whether replies stay in the prefix cache.
  """
  said, turns = [], []
  for message in messages:
    said.append({'role': 'user', 'content': message})
    tokens = chat_tokens(engine, said)
    ends = tuple(engine.checkpoint.end_ids)
    request = Request(tokens, limit=new, end_ids=ends, text=True, salt=salt, cache_reply=keep)
    before, start, first, answer = core.stats.prompt_tokens, time.perf_counter(), 0.0, ''
    core.submit(request)
    while not core.idle:
      for event in core.step():
        first = first or time.perf_counter() - start
        answer += event.text
    turns.append(Turn(answer, first, core.stats.prompt_tokens - before, len(tokens)))
    said.append({'role': 'assistant', 'content': answer})
  return turns


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--model', required=True, help='A checkpoint with a chat template.')
  parser.add_argument('--messages', required=True, type=pathlib.Path, help='A JSONL file.')
  parser.add_argument('--chats', type=int, default=4)
  parser.add_argument('--turns', type=int, default=4)
  parser.add_argument('--max_new_tokens', type=int, default=128)
  parser.add_argument('--dtype', default='float32')
  args = parser.parse_args()
  lines = args.messages.read_text(encoding='utf-8').splitlines()
  messages = [json.loads(line)['chat'] for line in lines]
  engine = Engine.load(args.model, mesh='1x1x1', dtype=args.dtype)
  print(f'{jax.devices()[0].device_kind}, jax {jax.__version__}, {args}', flush=True)
  config = scheduler_config.config_for(engine.model, [], slots=1, max_length=2048)
  vocabulary = engine.checkpoint.vocabulary
  cores = {
    keep: Scheduler(engine.model, engine.weights, config, vocabulary=vocabulary)
    for keep in (False, True)
  }
  cores[False].warm_up()
  found: dict[bool, list[list[Turn]]] = {False: [], True: []}
  for i in range(args.chats):
    asked = [messages[(i + turn) % len(messages)] for turn in range(args.turns)]
    for keep in (False, True) if i % 2 == 0 else (True, False):
      found[keep].append(chat(engine, cores[keep], asked, args.max_new_tokens, i, keep))
  print('| turn | prompt | prefilled, replies not kept | kept | first token, ms | kept | sooner |')
  print('|---|---|---|---|---|---|---|')
  for turn in range(args.turns):
    sides = {keep: [each[turn] for each in found[keep]] for keep in found}
    middle = {
      (keep, field): statistics.median(getattr(t, field) for t in sides[keep])
      for keep in sides
      for field in ('seconds', 'prefilled', 'length')
    }
    cells = [
      turn + 1,
      f'{middle[False, "length"]:.0f}',
      *(f'{middle[keep, "prefilled"]:.0f}' for keep in (False, True)),
      *(f'{1000 * middle[keep, "seconds"]:.0f}' for keep in (False, True)),
      f'{middle[False, "seconds"] / middle[True, "seconds"]:.2f}x',
    ]
    print('| ' + ' | '.join(map(str, cells)) + ' |')
  pairs = [(a, b) for old, new in zip(found[False], found[True]) for a, b in zip(old, new)]
  print(f'{sum(a.answer == b.answer for a, b in pairs)} of {len(pairs)} answers are equal')


if __name__ == '__main__':
  main()
