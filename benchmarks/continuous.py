"""Slot refill beside a static batch (useful tokens/s), and first tokens with a shared prefix.

    python -m benchmarks.continuous                 # 256 requests of ragged lengths, 32 slots
    python -m benchmarks.continuous --case=prefix   # two families of prompts that share 500 tokens
    python -m benchmarks.continuous --case=chat     # 32 chats of four turns, of 256 tokens each

Run from the root of a checkout, on one device. Prompts of 16 to 512 tokens and outputs of 8 to 256
are drawn log-uniformly with seed 0. A useful token is one that a request asked for. The static
batch takes requests in order, 32 at a time. Each batch is padded to its longest prompt and stops
when all of its rows have ended. Both sides give the same tokens. With --stock, the same batches
also go through the step that stock `t5x.infer` makes of T5X's DecoderOnlyModel (needs T5X and
flaxformer). Its sequences are as long as the longest prompt and output, and it decodes as many
steps as the batch's longest output has tokens, since T5X has no limits per row.
"""

import argparse
from collections.abc import Callable, Generator
import contextlib
import statistics
import time

import jax
import numpy as np

from t5x_inference_ext.checkpoints.load import load_weights
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.engine import scheduler_config
from t5x_inference_ext.engine.engine import Engine
from t5x_inference_ext.engine.request import Request
from t5x_inference_ext.engine.scheduler import Scheduler
from t5x_inference_ext.engine.serve import serve
from t5x_inference_ext.model.shardings import COMPUTE_DTYPES
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.sharding.mesh import make_mesh
from tests import reference


def make_engine(
  layers: int,
  d_model: int,
  vocabulary: int,
  dtype: str,
  mesh: tuple[int, int, int] = (1, 1, 1),
  stacked: bool = True,
  weights: str = 'float',
) -> Engine:
  """Return an engine with a random model of PaLM's form, on one device by default."""
  config = ModelConfig(layers, d_model, 4 * d_model, d_model // 64, 64, vocabulary)
  tensors = reference.random_tensors(config)
  if weights == 'int8':
    tensors = reference.quantized(config, tensors)
  checkpoint = reference.MemoryCheckpoint.of(config, tensors)
  model = Model(config, make_mesh(mesh), dtype=dtype)
  return Engine(checkpoint, model, load_weights(checkpoint, model, stacked=stacked))


def ragged(vocabulary: int, count: int, longest: int, most: int) -> list[Request]:
  rng = np.random.default_rng(0)
  draw = lambda low, high: int(np.exp(rng.uniform(np.log(low), np.log(high + 1))))
  return [
    Request((0, *rng.integers(3, vocabulary, draw(16, longest)).tolist()), limit=draw(8, most))
    for _ in range(count)
  ]


def refilled(engine: Engine, requests: list[Request], slots: int, **options):
  options = {'decode_steps': 16, 'end_ids': (), **options}
  config = scheduler_config.config_for(engine.model, requests, slots=slots, **options)

  def run():
    scheduler = Scheduler(engine.model, engine.weights, config)
    tokens = [[] for _ in requests]
    for event in serve(scheduler, requests):
      tokens[event.request] += event.tokens
    return tokens, scheduler.stats

  return run


def static(engine: Engine, requests: list[Request], slots: int):
  def run():
    tokens, positions, steps = [], 0, 0
    for i in range(0, len(requests), slots):
      some = requests[i : i + slots]
      longest = -(-max(len(r.tokens) - 1 for r in some) // 32) * 32
      found = engine.generate(
        [r.tokens[1:] for r in some],
        max_new_tokens=[r.limit for r in some],
        eos_id=-1,
        prompt_size=longest,
        cache_size=-(-(longest + max(r.limit for r in some)) // 32) * 32,
      )
      tokens += [c.tokens for c in found]
      positions += len(some) * (longest + 1)
      steps += len(some) * (max(r.limit for r in some) - 1)
    return tokens, (positions, steps)

  return run


def stock(engine: Engine, tensors, requests: list[Request], slots: int):
  """Run the same batches through stock T5X."""
  import functools

  import jax.numpy as jnp
  from t5x import decoding

  from tests.checkpoints import synthetic
  from tests.t5x_adapter import palm_flaxformer

  c = engine.model.config
  params = jax.tree.map(jnp.asarray, synthetic.nest(synthetic.fused(tensors, c)))
  length = max(len(r.tokens) for r in requests) + max(r.limit for r in requests)

  @functools.partial(jax.jit, static_argnames='steps')
  def step(params, batch, steps):
    decode = functools.partial(decoding.temperature_sample, temperature=0.0, max_decode_steps=steps)
    model = palm_flaxformer.stock_model(c, decode_fn=decode)
    options = {'eos_id': -1, 'decode_rng': jax.random.PRNGKey(0)}
    return model.predict_batch_with_aux(params, batch, decoder_params=options)[0]

  def run():
    tokens = []
    for i in range(0, len(requests), slots):
      some = requests[i : i + slots]
      inputs, causal = np.zeros((2, len(some), length), np.int32)
      for row, request in enumerate(some):
        inputs[row, : len(request.tokens)], causal[row, : len(request.tokens)] = request.tokens, 1
      batch = {'decoder_input_tokens': inputs, 'decoder_causal_attention': causal}
      found = np.asarray(step(params, batch, max(r.limit for r in some)))
      tokens += [row[: r.limit].tolist() for row, r in zip(found, some)]
    return tokens

  return run


def timed(run, repeats: int):
  result, times = run(), []  # the first run compiles
  for _ in range(repeats):
    start = time.perf_counter()
    result = run()
    times.append(time.perf_counter() - start)
  return result, statistics.median(times)


def refill_case(args) -> None:
  engine = make_engine(args.layers, args.d_model, args.vocabulary, args.dtype)
  requests = ragged(args.vocabulary, args.requests, args.prompt, args.generate)
  useful = sum(r.limit for r in requests)
  print(
    f'{engine.model.config}\n{jax.devices()[0].device_kind}, {args.dtype}; {len(requests)} '
    'requests, '
    f'{sum(len(r.tokens) for r in requests)} prompt tokens, {useful} asked for; {args.slots} '
    'slots; median of '
    f'{args.repeats}'
  )
  (old, (positions, steps)), slow = timed(static(engine, requests, args.slots), args.repeats)
  print(
    f'static batch: {useful / slow:8.0f} useful tokens/s ({slow:.2f} s: {positions} prompt '
    f'positions, {steps} '
    'slot-steps)',
    flush=True,
  )
  (new, tally), fast = timed(
    refilled(engine, requests, args.slots, prefill_chunk=args.chunk, prefill_budget=args.budget),
    args.repeats,
  )
  print(
    f'slot refill:  {useful / fast:8.0f} useful tokens/s ({fast:.2f} s: {tally.prefilled} prompt '
    'positions, '
    f'{tally.decoded} slot-steps), {slow / fast:.2f}x'
  )
  print(
    f'positions {positions / tally.prefilled:.2f}x fewer, slot-steps {steps / tally.decoded:.2f}x '
    'fewer; without any '
    f'waste {positions / sum(len(r.tokens) for r in requests):.2f}x and '
    f'{steps / (useful - len(requests)):.2f}x; '
    f'{sum(a == b for a, b in zip(old, new))} of {len(requests)} rows equal',
    flush=True,
  )
  if args.stock:
    stock_case(args, engine, requests, new, fast)


# Yields the prompts of each turn, and gets the replies to them.
Turns = Generator[list[list[int]], list[list[int]], None]


def replies_to(
  scheduler: Scheduler, prompts: list[list[int]], new: int
) -> tuple[list[list[int]], float]:
  """Return `new` tokens after each prompt, and the seconds until the last prompt's first token."""
  start = time.perf_counter()
  replies: list[list[int]] = [[] for _ in prompts]
  last = 0.0
  for event in serve(scheduler, [Request((0, *p), limit=new, cache_reply=True) for p in prompts]):
    if not replies[event.request]:
      last = time.perf_counter() - start
    replies[event.request] += event.tokens
  return replies, last


def beginnings_case(args, turns: Callable[[], Turns], new: int, longest: int, what: str) -> None:
  """Time all first tokens of each turn's prompts, with a prefix cache and without.

  Args:
    args: Arguments of the command.
    turns: Begins the turns anew.
    new: Number of new tokens after each prompt.
    longest: Maximum number of tokens of a prompt and what follows it.
    what: What the turns are.
  """
  engine = make_engine(args.layers, args.d_model, args.vocabulary, args.dtype)
  print(f'{engine.model.config}\n{jax.devices()[0].device_kind}, {args.dtype}; {what}')
  times: dict[bool, list[list[float]]] = {False: [], True: []}
  tokens: dict[bool, list[list[list[int]]]] = {}
  for repeat in range(args.repeats + 1):  # the first run compiles
    for share in (False, True):
      config = scheduler_config.config_for(
        engine.model,
        [],
        slots=args.slots,
        max_length=longest + 1,
        share=share,
        end_ids=(),
        prefill_chunk=args.chunk,
        prefill_budget=10**6,
      )
      scheduler = Scheduler(engine.model, engine.weights, config)
      tokens[share], seconds = [], []
      conversation = turns()
      prompts = next(conversation)
      with contextlib.suppress(StopIteration):  # after the last turn
        while True:
          replies, last = replies_to(scheduler, prompts, new)
          tokens[share].append(replies)
          seconds.append(last)
          prompts = conversation.send(replies)
      if repeat:
        times[share].append(seconds)
  for turn, (before, after) in enumerate(zip(tokens[False], tokens[True])):
    alone, shared = (statistics.median(t[turn] for t in times[share]) for share in (False, True))
    equal = sum(a == b for a, b in zip(before, after))
    print(
      f'turn {turn + 1}: first tokens after {alone:.3f} s, with the tree {shared:.3f} s: '
      f'{alone / shared:.2f}x sooner; {equal} of {len(before)} equal',
      flush=True,
    )
  if len(tokens[True]) > 1:
    alone, shared = (
      statistics.median(sum(found[1:]) for found in times[share]) for share in (False, True)
    )
    print(f'turns 2 to {len(tokens[True])} together: {alone / shared:.2f}x sooner')


def prefix_case(args) -> None:
  """Time two families of prompts in turn, each with a common prefix of its own."""
  rng = np.random.default_rng(0)
  ids = lambda n: rng.integers(3, args.vocabulary, n).tolist()
  begins = [ids(500), ids(500)]
  count = args.requests
  prompts = [[*begins[i % 2], *ids(int(rng.integers(4, 64)))] for i in range(count)]

  def turns() -> Turns:
    yield prompts

  what = f'{count} prompts of two families that share 500 tokens; median of {args.repeats}'
  beginnings_case(args, turns, 1, max(map(len, prompts)), what)


def chat_case(args) -> None:
  """Time chats of four turns; each turn continues the reply before it."""
  turn, new = args.turn, args.reply

  def turns() -> Turns:
    rng = np.random.default_rng(0)
    chats: list[list[int]] = [[] for _ in range(32)]
    for _ in range(4):
      chats = [[*chat, *rng.integers(3, args.vocabulary, turn).tolist()] for chat in chats]
      replies = yield chats
      chats = [[*chat, *reply] for chat, reply in zip(chats, replies)]

  what = f'32 chats, 4 turns of {turn} tokens, replies of {new}; median of {args.repeats}'
  beginnings_case(args, turns, new, 4 * (turn + new), what)


def stock_case(args, engine, requests, new, fast) -> None:
  run = stock(engine, reference.random_tensors(engine.model.config), requests, args.slots)
  found, slow = timed(run, args.repeats)
  useful = sum(r.limit for r in requests)
  print(
    f'stock T5X:    {useful / slow:8.0f} useful tokens/s ({slow:.2f} s); slot refill is '
    f'{slow / fast:.2f}x; '
    f'{sum(a == b for a, b in zip(found, new))} of {len(requests)} rows equal'
  )


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--case', default='refill', choices=('refill', 'prefix', 'chat'))
  parser.add_argument('--requests', type=int, default=256)
  parser.add_argument('--slots', type=int, default=32)
  parser.add_argument('--prompt', type=int, default=512, help='the longest prompt')
  parser.add_argument('--generate', type=int, default=256, help='the longest output')
  parser.add_argument('--turn', type=int, default=256, help='tokens of a turn of a chat')
  parser.add_argument('--reply', type=int, default=16, help='tokens of a reply in a chat')
  parser.add_argument('--chunk', type=int, default=256)
  parser.add_argument('--budget', type=int, default=2048)
  parser.add_argument('--layers', type=int, default=6)
  parser.add_argument('--d_model', type=int, default=384, help='a multiple of 64')
  parser.add_argument('--vocabulary', type=int, default=8192)
  parser.add_argument('--dtype', default='float32', choices=COMPUTE_DTYPES)
  parser.add_argument('--stock', action='store_true', help='also stock T5X')
  parser.add_argument('--repeats', type=int, default=3)
  args = parser.parse_args()
  dict(refill=refill_case, prefix=prefix_case, chat=chat_case)[args.case](args)


if __name__ == '__main__':
  main()
