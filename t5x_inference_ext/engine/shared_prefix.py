"""Beginnings that many prompts have in common: found, prefilled and stored once."""

from collections.abc import Callable, Sequence
import functools

import numpy as np

from t5x_inference_ext.engine import programs
from t5x_inference_ext.engine import slots as device
from t5x_inference_ext.model.cache import Shared
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.model.weights import Weights

# A beginning is not worth its own product in every step's attention below so many positions that it spares.
LEAST_SPARED = 64


def find_shared_prefix(
  prompts: Sequence[Sequence[int]], least: int = LEAST_SPARED
) -> tuple[int, ...]:
  """The beginning to store: followed from the first token, always with most of the prompts, while two or more go on.

  Args:
    prompts: model inputs, BOS first. A prompt's last token is never shared: its logits are needed.
    least: positions that prefill must be spared in all, or nothing is shared.

  Returns:
    Tokens, () where there is too little to share. Prompts that leave it early share what they have of it.
  """
  rows = sorted(tuple(p[:-1]) for p in prompts)
  low, high, depth, spared, found = 0, len(rows), 0, 0, 0
  while high - low > 1:
    # The largest run of rows that go on with one token; rows are sorted, those that end here come first.
    runs, start = [], low
    while start < high:
      stop = _run_end(rows, start, high, depth)
      if len(rows[start]) > depth:
        runs.append((stop - start, -start, stop))
      start = stop
    if not runs or max(runs)[0] < 2:
      break
    count, first, high = max(runs)
    low = -first
    depth += 1
    spared += count - 1
    found = low
  return rows[found][:depth] if spared >= least else ()


def common_length(shared: Sequence[int], tokens: Sequence[int]) -> int:
  """How many of the first positions of a prompt are shared; all but its last can be."""
  most = min(len(shared), len(tokens) - 1)
  return next((i for i in range(most) if shared[i] != tokens[i]), most)


def store_prefix(
  model: Model,
  weights: Weights,
  tokens: Sequence[int],
  rows: tuple[int, int],
  chunk: int,
  put: Callable,
) -> tuple[Shared, Shared]:
  """Prefills a beginning.

  Args:
    model: decides layouts.
    weights: on its mesh.
    tokens: BOS and the rest of it.
    rows: of the slots, and of the prompts that are prefilled together.
    chunk: positions that one pass takes.
    put: arrays onto the mesh.

  Returns:
    What the slots share, in the decode layout, and what prompts do, in the prefill layout.
  """
  steps = -(-len(tokens) // chunk)
  prompts = programs.empty_prefill(
    model, weights, rows[1], device.prompt_room(model, rows[1], steps * chunk), None
  )
  for i in range(0, len(tokens), chunk):
    some, counts = np.zeros((rows[1], chunk), np.int32), np.zeros(rows[1], np.int32)
    counts[0] = len(tokens[i : i + chunk])
    some[0, : counts[0]] = tokens[i : i + chunk]
    prompts = programs.prefill_chunk(model, prompts, weights, *put(some, counts))
  share = functools.partial(
    programs.share_row, model.prefilling, prompts.cache, weights, row=0, length=len(tokens)
  )
  return share(to=model, rows=rows[0]), share(to=model.prefilling, rows=rows[1])


def _run_end(rows, start, stop, depth):
  """The end of the run of rows [start, stop) whose token at `depth` (or that they have none) is that of the first."""
  token = rows[start][depth : depth + 1]
  while start < stop and rows[start][depth : depth + 1] == token:
    start += 1
  return start
