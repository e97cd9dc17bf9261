"""Decoding rows with LoRA adapters beside decoding the model alone, in alternating rounds.

    JAX_PLATFORMS=cpu python -m benchmarks.adapters --model=SmolLM2-135M-Instruct.Q4_1.gguf

Run from the root of a checkout, on one device, with a public model of Llama's module names. Random
adapters of one rank on query and value are written in PEFT's format and loaded beside the model.
One side has them loaded, and its rows take turns among them; the other side is an engine without
adapters. Both serve the same prompts, never ending early, after a round that is not measured.
Tokens and seconds are those of steps that prefill nothing. The bound is 0.8.
"""

import argparse
import json
import pathlib
import statistics
import tempfile
import time

import numpy as np
import safetensors.numpy

from t5x_inference_ext import params
from t5x_inference_ext.checkpoints import Checkpoint, open_checkpoint
from t5x_inference_ext.engine import scheduler_config
from t5x_inference_ext.engine.engine import Engine
from t5x_inference_ext.engine.request import Request
from t5x_inference_ext.engine.scheduler import Scheduler

LEAST = 0.8
MATRICES = ('query', 'value')


def write_adapter(directory: pathlib.Path, base: Checkpoint, rank: int, seed: int) -> None:
  """Write a random LoRA on queries and values."""
  rng, tensors = np.random.default_rng(seed), {}
  for name in MATRICES:
    layers, inputs, outputs = params.parameters(base.config)[name].shape
    for layer in range(layers):
      module = 'base_model.model.' + base.module_map.modules[name].replace('{}', str(layer))
      a, b = rng.normal(size=(rank, inputs)), rng.normal(size=(outputs, rank)) * 0.01
      tensors[f'{module}.lora_A.weight'] = a.astype(np.float32)
      tensors[f'{module}.lora_B.weight'] = b.astype(np.float32)
  directory.mkdir()
  safetensors.numpy.save_file(tensors, directory / 'adapter_model.safetensors')
  settings = {'peft_type': 'LORA', 'r': rank, 'lora_alpha': rank}
  (directory / 'adapter_config.json').write_text(json.dumps(settings))


class Side:
  """One scheduler that serves the requests again and again."""

  def __init__(self, engine: Engine, requests: list[Request], steps: int):
    config = scheduler_config.config_for(
      engine.model, requests, slots=len(requests), decode_steps=steps
    )
    self._scheduler = Scheduler(engine.model, engine.weights, config, adapters=engine.adapters)
    self._requests = requests

  def run(self) -> float:
    """Serve the requests; return the tokens/s of the steps that prefilled nothing."""
    for request in self._requests:
      self._scheduler.submit(request)
    tokens, seconds = 0, 0.0
    while not self._scheduler.idle:
      before = self._scheduler.stats.prefilled
      begin = time.perf_counter()
      events = self._scheduler.step()
      if self._scheduler.stats.prefilled == before:
        seconds += time.perf_counter() - begin
        tokens += sum(len(event.tokens) for event in events)
    return tokens / seconds


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n', maxsplit=1)[0])
  parser.add_argument('--model', required=True)
  parser.add_argument('--adapters', type=int, default=8)
  parser.add_argument('--rank', type=int, default=8)
  parser.add_argument('--rows', type=int, default=32)
  parser.add_argument('--max_new_tokens', type=int, default=32)
  parser.add_argument('--decode_steps', type=int, default=8)
  parser.add_argument('--rounds', type=int, default=5)
  options = parser.parse_args()
  base = open_checkpoint(options.model)
  with tempfile.TemporaryDirectory() as directory:
    paths = {f'adapter_{i}': pathlib.Path(directory, str(i)) for i in range(options.adapters)}
    for seed, path in enumerate(paths.values()):
      write_adapter(path, base, options.rank, seed)
    sides = [
      Engine.load(base, mesh='1x1x1', dtype='float32', adapters=each) for each in ({}, paths)
    ]
  rng, names = np.random.default_rng(0), [*paths]
  prompts = rng.integers(0, base.config.vocab_size, (options.rows, 16)).tolist()
  both = []
  for engine, chosen in zip(sides, ([None], names)):
    requests = [
      Request(
        tuple(prompt), (i,), options.max_new_tokens, end_ids=(), adapter=chosen[i % len(chosen)]
      )
      for i, prompt in enumerate(prompts)
    ]
    both.append(Side(engine, requests, options.decode_steps))
  for side in both:
    side.run()  # compiles
  ratios = []
  for number in range(options.rounds):
    order = both if number % 2 else both[::-1]
    found = {id(side): side.run() for side in order}
    alone, adapted = (found[id(side)] for side in both)
    ratios.append(adapted / alone)
    print(f'{alone:8.1f} tokens/s alone, {adapted:8.1f} with: {ratios[-1]:.3f}', flush=True)
  ratio = statistics.median(ratios)
  print(
    f'{options.rows} rows, {options.adapters} LoRA of rank {options.rank} on '
    f'{" and ".join(MATRICES)}: {ratio:.3f} of the tokens/s without, median of {len(ratios)} '
    f'({"at least" if ratio >= LEAST else "LESS THAN"} {LEAST})'
  )


if __name__ == '__main__':
  main()
