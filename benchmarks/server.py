"""The server's own work, and a model served over HTTP beside Engine.stream.

    python -m benchmarks.server                              # beside steps that compute nothing
    python -m benchmarks.server --checkpoint=DIR [--slots=32] [--new_tokens=64]

Run from the root of a checkout. Clients stream answers, in a process of their own.

Without a checkpoint, the result is the processor time of the server's process for each step, in
which each of `slots` rows gets a token: HTTP, JSON, metrics, threads, and the stub's own events. A
step sleeps for 10 ms, in place of a device's work.

With a checkpoint, the results are the tokens per second of all clients together, with and without
grammars, beside one caller of Engine.stream on the same engine; these cases run in turns.
"""

import argparse
import os
import statistics
import subprocess
import sys
import threading
import time

from benchmarks.server_clients import PROMPT
from benchmarks.stub_scheduler import stub_service
from t5x_inference_ext.server.http_server import HttpServer, address_of, bind
from t5x_inference_ext.server.options import ServerOptions
from t5x_inference_ext.server.request_log import RequestLog

STEP_SECONDS = 0.01
MAX_LENGTH = 224  # tokens of a prompt and its answer, with a model


class ServedService:
  """A server in a thread of this process, until `close`."""

  def __init__(self, service):
    self._ready = threading.Event()
    self._server = HttpServer(service, lambda line: self._ready.set())
    listener = bind(service.options)
    self.url = address_of(listener)
    self._service = service
    self._thread = threading.Thread(target=self._server.run, args=([listener],))
    self._thread.start()
    self._ready.wait()

  def close(self):
    """End the server."""
    self._server.stop()
    self._thread.join()
    self._service.driver.close()
    self._service.log.close()


def clients(url: str, count: int, new_tokens: int, constrained: int = 0) -> float:
  """Run server_clients in a process of its own, and return the seconds that it prints."""
  command = [sys.executable, '-m', 'benchmarks.server_clients', url]
  command += map(str, (count, new_tokens, constrained))
  return float(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)


def stub_case(args) -> None:
  """Print the server's processor time a step, beside steps that compute nothing."""
  with open(os.devnull, 'w', encoding='utf-8') as nowhere:
    service = stub_service(
      ServerOptions(port=0, max_length=10**6),
      RequestLog(nowhere),
      slots=args.slots,
      seconds=STEP_SECONDS,
    )
    running = ServedService(service)
    clients(running.url, args.slots, 100)  # warms up
    found = []
    for _ in range(args.repeats):
      steps, begin = service.driver.steps, time.process_time()
      clients(running.url, args.slots, args.new_tokens)
      found.append((time.process_time() - begin) / (service.driver.steps - steps) * 1e3)
    running.close()
  print(
    f'{args.slots} streams of {args.new_tokens} tokens, steps that compute nothing: '
    f'{statistics.median(found):.2f} ms of processor time a step '
    f'({", ".join(f"{each:.2f}" for each in found)})'
  )


def model_case(args) -> None:
  """Print tokens a second over HTTP, beside those of Engine.stream."""
  import jax

  from t5x_inference_ext.engine.engine import Engine
  from t5x_inference_ext.runs.infer_options import InferOptions
  from t5x_inference_ext.server.launch import compile_programs, make_served, make_service

  engine = Engine.load(args.checkpoint, mesh='1x1x1', dtype=args.dtype)
  options = ServerOptions(port=0, max_length=MAX_LENGTH, model_name='model')
  model = InferOptions(checkpoint=args.checkpoint, batch_size=args.slots, dtype=args.dtype)
  settings = engine.checkpoint.text
  served = make_served(engine, settings, model, options)
  compile_programs(served)
  prompts = [f'{i} {PROMPT}' for i in range(args.slots)]

  def stream() -> float:
    # The scheduler of the server and this one have equal sizes, and so the same programs.
    sizes = {'slots': args.slots, 'max_length': MAX_LENGTH, 'eos_id': -1, 'top_log_probs': 20}
    begin = time.perf_counter()
    with engine.stream(prompts, max_new_tokens=args.new_tokens, **sizes) as events:
      count = sum(len(event.tokens) for event in events)
    assert count == args.slots * args.new_tokens
    return count / (time.perf_counter() - begin)

  with open(os.devnull, 'w', encoding='utf-8') as nowhere:
    service = make_service(served, settings, options, RequestLog(nowhere))
    running = ServedService(service)

    def over_http(share: float) -> float:
      constrained = round(args.slots * share)
      seconds = clients(running.url, args.slots, args.new_tokens, constrained)
      return args.slots * args.new_tokens / seconds

    rates = {
      'Engine.stream': (stream, []),
      'over HTTP': (lambda: over_http(0), []),
      'over HTTP, half of the rows with a grammar': (lambda: over_http(0.5), []),
      'over HTTP, all rows with a grammar': (lambda: over_http(1), []),
    }
    for run, _ in rates.values():
      run()
    for _ in range(args.repeats):
      for run, found in rates.values():
        found.append(run())
    running.close()
  device = jax.devices()[0].device_kind
  print(f'{args.slots} streams of {args.new_tokens} tokens, {args.dtype}, {device}, tokens/s:')
  for name, (_, found) in rates.items():
    print(f'  {name}: {statistics.median(found):.1f} ({", ".join(f"{f:.1f}" for f in found)})')


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--checkpoint', help='a checkpoint; without one, steps compute nothing')
  parser.add_argument('--slots', type=int, default=32)
  parser.add_argument('--new_tokens', type=int, help='of each stream; 64, or 500 without a model')
  parser.add_argument('--dtype', default='float32')
  parser.add_argument('--repeats', type=int, default=3)
  args = parser.parse_args()
  args.new_tokens = args.new_tokens or (64 if args.checkpoint else 500)
  if args.checkpoint:
    model_case(args)
  else:
    stub_case(args)


if __name__ == '__main__':
  main()
