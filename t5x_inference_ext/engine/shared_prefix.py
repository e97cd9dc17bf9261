"""The prefix that many prompts share: found on the host, then prefilled and stored once."""

from collections.abc import Sequence
import functools

import numpy as np

from t5x_inference_ext.engine import programs
from t5x_inference_ext.engine import slots as device
from t5x_inference_ext.model.cache import Shared
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.model.weights import Weights

# Least positions of prefill that a shared prefix must save. With less, it does not pay for the
# extra product in every decode step's attention.
LEAST_SPARED = 64


def find_shared_prefix(
  prompts: Sequence[Sequence[int]], least: int = LEAST_SPARED
) -> tuple[int, ...]:
  """Return the prefix to store for prompts.

  The prefix is extended token by token, each time with the token that most of the prompts have, as
  long as two or more prompts agree. A prompt that leaves the prefix early still shares the part
  before.

  Args:
    prompts: Model inputs, BOS first. A prompt's last token is never shared: its logits are needed.
    least: Least number of positions that sharing must save prefill, over all prompts.

  Returns:
    The prefix, or () if it would save too little.
  """
  rows = sorted(tuple(p[:-1]) for p in prompts)
  low, high, depth, spared, found = 0, len(rows), 0, 0, 0
  while high - low > 1:
    # The largest run of rows with one next token. Rows are sorted; those that end at this depth
    # come first.
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


def common_length(prefix: Sequence[int], tokens: Sequence[int]) -> int:
  """Return how many tokens of a prompt are in the prefix. The last token is never counted."""
  most = min(len(prefix), len(tokens) - 1)
  return next((i for i in range(most) if prefix[i] != tokens[i]), most)


def store_prefix(
  model: Model, weights: Weights, tokens: Sequence[int], rows: tuple[int, int], chunk: int
) -> tuple[Shared, Shared]:
  """Prefill a prefix.

  Args:
    model: Decides mesh and layouts.
    weights: Weights on that mesh.
    tokens: The prefix, BOS first.
    rows: (slots, prompts prefilled together).
    chunk: Positions of one prefill pass.

  Returns:
    The stored prefix twice: for slots, in the decode layout, and for prompts, in the prefill
    layout.
  """
  slots, prompts = rows
  steps = -(-len(tokens) // chunk)
  room = device.prompt_room(model, prompts, steps * chunk)
  state = programs.empty_prefill(model, weights, prompts, room, None)
  for i in range(0, len(tokens), chunk):
    part = tokens[i : i + chunk]
    inputs, counts = np.zeros((prompts, chunk), np.int32), np.zeros(prompts, np.int32)
    inputs[0, : len(part)], counts[0] = part, len(part)
    state = programs.prefill_chunk(model, state, weights, *programs.put(model, inputs, counts))
  share = functools.partial(
    programs.share_row, model.prefilling, state.cache, weights, row=0, length=len(tokens)
  )
  return share(to=model, rows=slots), share(to=model.prefilling, rows=prompts)


def _run_end(rows: Sequence[tuple[int, ...]], start: int, stop: int, depth: int) -> int:
  """Return the end of the run of rows in rows[start:stop] that all have one token at `depth`.

  Rows that end before `depth` form a run too.
  """
  token = rows[start][depth : depth + 1]
  while start < stop and rows[start][depth : depth + 1] == token:
    start += 1
  return start
