"""A server under load: 64 clients, some of which leave; a burst of prompts that nobody waits for.

    python -m benchmarks.server_load --case=mixed [--clients=64] [--seconds=120]
    python -m benchmarks.server_load --case=burst [--clients=200] [--tokens=10000]

Run from the root of a checkout. The clients run in a process of their own (load_clients.py).

`mixed`: each client sends one request after the other, of mixed lengths; a tenth leaves within 0.3
s. The server's resident memory is read meanwhile. Afterwards every answer is compared with the
tokens of Engine.generate, which uses no slots.

`burst`: all clients send a long prompt and leave after 0.5 s; then a short request is timed.

The exit code is 1 if an answer differs or is lost, a program was compiled, the scheduler's records
are inconsistent, or a slot or a place in the queue stays taken.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time

import jax

from benchmarks.load_clients import LONGEST, MOST_NEW
from benchmarks.server import ServedService
from benchmarks.soak import resident
from t5x_inference_ext.engine import programs
from t5x_inference_ext.engine.engine import Engine
from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.runs.infer_options import InferOptions
from t5x_inference_ext.server.launch import compile_programs, make_served, make_service
from t5x_inference_ext.server.options import ServerOptions
from t5x_inference_ext.server.request_log import RequestLog
from t5x_inference_ext.server.service import Service

BATCH = 63  # requests that Engine.generate answers together
FIRST_SHARE = 0.2  # share of the time after which memory should not grow


class Memory:
  """Reads the resident memory of this process every half second, in a thread."""

  def __init__(self):
    self._found, self._stop = [resident()], threading.Event()
    self._thread = threading.Thread(target=self._watch)
    self._thread.start()

  def _watch(self):
    while not self._stop.wait(0.5):
      self._found.append(resident())

  def close(self) -> str:
    """End the thread; return a line about the memory that was measured."""
    self._stop.set()
    self._thread.join()
    first = self._found[int(len(self._found) * FIRST_SHARE)]
    last = self._found[-1]
    return (
      f'resident memory {first / 2**20:.1f} MiB after {FIRST_SHARE:.0%} of the time, '
      f'{last / 2**20:.1f} MiB at the end ({last / first:.3f} times)'
    )


def clients(url: str, case: str, count: int, amount: int) -> list[dict]:
  """Run load_clients, and return the JSON objects that it prints."""
  command = [sys.executable, '-m', 'benchmarks.load_clients', url, case, str(count), str(amount)]
  out = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
  return [json.loads(line) for line in out.splitlines()]


def different(engine: Engine, answers: list[dict]) -> int:
  """Return how many answers have other tokens than Engine.generate gives."""
  wrong, shortest = 0, 0
  for size in (LONGEST // 8, LONGEST):  # short prompts by themselves: less padding
    group = [each for each in answers if shortest < len(each['body']['prompt']) <= size]
    wrong += sum(
      _different_of_batch(engine, group[first : first + BATCH], size)
      for first in range(0, len(group), BATCH)
    )
    shortest = size
  return wrong


def _different_of_batch(engine: Engine, answers: list[dict], size: int) -> int:
  bodies = [each['body'] for each in answers]
  # Add rows, one of them with the largest limit, so that all batches have one shape.
  bodies += [{**bodies[0], 'max_tokens': MOST_NEW}] * (BATCH + 1 - len(bodies))
  found = engine.generate(
    [body['prompt'] for body in bodies],
    max_new_tokens=[body['max_tokens'] for body in bodies],
    sampling=[SamplingParams(body['temperature']) for body in bodies],
    seeds=[body['seed'] for body in bodies],
    prompt_size=size,
  )
  return sum(each['tokens'] != alone.tokens for each, alone in zip(answers, found))


def judge_mixed(engine: Engine, found: list[dict], args: argparse.Namespace) -> list[str]:
  """Print what clients got; return a sentence for each thing that is wrong."""
  kept = [each for each in found if not each['left']]
  sound = [each for each in kept if each['status'] == 200 and each['finish']]
  tokens, lost = sum(len(each['tokens']) for each in sound), len(kept) - len(sound)
  print(
    f'{args.clients} clients for {args.seconds} s: {len(found)} requests, {len(found) - len(kept)} '
    f'left, {lost} lost; {len(sound)} answers of {tokens} tokens',
    flush=True,
  )
  wrong = different(engine, sound)
  print(f'{wrong} answers are unlike those of Engine.generate')
  return [
    text for text in ('answers differ' * bool(wrong), 'answers are lost' * bool(lost)) if text
  ]


def judge_burst(engine: Engine, found: list[dict], args: argparse.Namespace) -> list[str]:
  """Print what clients got; return a sentence for each thing that is wrong."""
  del engine
  (told,) = found
  print(
    f'{args.clients} prompts of {args.tokens} tokens, {told["left"]} clients left after 0.5 s; a '
    f'fresh request was then answered within {told["seconds"]:.2f} s'
  )
  return [] if told['status'] == 200 else [f'the fresh request has the status {told["status"]}']


def left_over(service: Service) -> list[str]:
  """Return a sentence for each resource that stays taken after the last request."""
  scheduler, bounds, end = service.scheduler, service.bounds, time.monotonic() + 60
  while (service.answers or not scheduler.idle) and time.monotonic() < end:
    time.sleep(0.1)
  taken = {
    'slots': sum(row is not None for row in scheduler.rows),
    'prompts counted as waiting': bounds.waiting,
    'tokens counted as waiting': bounds.tokens,
    'requests that are answered': len(service.answers),
  }
  return scheduler.check_books() + [f'{n} {name} are left' for name, n in taken.items() if n]


def compiled() -> int:
  """Return how many programs of the engine have been compiled."""
  all_programs = (each for each in vars(programs).values() if isinstance(each, programs.Program))
  return sum(each.compiled for each in all_programs)


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--case', default='mixed', choices=('mixed', 'burst'))
  parser.add_argument('--checkpoint', default='examples/palm_tiny/checkpoint_1000')
  parser.add_argument('--clients', type=int, help='64, or 200 of a burst')
  parser.add_argument('--seconds', type=int, default=120)
  parser.add_argument('--tokens', type=int, default=10_000)
  parser.add_argument('--slots', type=int, default=32)
  parser.add_argument('--prefill_budget', type=int, default=2048)
  args = parser.parse_args()
  judge, count, amount, length = {
    'mixed': (judge_mixed, 64, args.seconds, LONGEST + MOST_NEW),
    'burst': (judge_burst, 200, args.tokens, args.tokens + 64),
  }[args.case]
  args.clients = args.clients or count
  engine = Engine.load(args.checkpoint, mesh='1x1x1', dtype='float32')
  options = ServerOptions(
    port=0, max_length=length, model_name='model', max_waiting_tokens=args.clients * length
  )
  model = InferOptions(
    checkpoint=args.checkpoint,
    batch_size=args.slots,
    dtype='float32',
    prefill_budget=args.prefill_budget,
  )
  settings = engine.checkpoint.text
  served = make_served(engine, settings, model, options)
  compile_programs(served)
  before = compiled()
  with open(os.devnull, 'w', encoding='utf-8') as nowhere:
    service = make_service(served, settings, options, RequestLog(nowhere))
    running, memory = ServedService(service), Memory()
    found = clients(running.url, args.case, args.clients, amount)
    print(memory.close(), flush=True)
    problems = left_over(service)
    running.close()
  if grown := compiled() - before:
    problems.append(f'{grown} programs were compiled for requests')
  problems += judge(engine, found, args)
  print('; '.join(problems) or 'nothing was compiled, all slots are free, the books are in order')
  print(f'on {jax.devices()[0].device_kind}')
  return int(bool(problems))


if __name__ == '__main__':
  sys.exit(main())
