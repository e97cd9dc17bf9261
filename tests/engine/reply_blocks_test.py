"""Blocks that are saved from slots equal those of a prompt with the same tokens."""

import jax
import numpy as np
import pytest

from t5x_inference_ext.engine.request import Request
from t5x_inference_ext.engine.scheduler import Scheduler
from t5x_inference_ext.engine.scheduler_config import SchedulerConfig
from tests import memory, reference
from tests.model import layouts_test

pytestmark = pytest.mark.usefixtures('quick_programs')

# (model, mesh, prefill, decode, stacked, cache, decode steps of a call): layouts that split rows
# and key heads differently, both forms of weights, both kinds of caches.
CASES = [
  ('multiquery-parallel', '1x1x1', 'ws_2d/batch', 'ws_2d/batch', False, None, 1),
  ('grouped-parallel', '2x2x2', 'ws_2d/heads', 'ws_2d/batch', True, None, 16),
  ('grouped-parallel', '2x2x2', 'wg_xyz/batch', 'ws_2d/heads', False, 'int8', 1),
  ('multihead-serial', '1x2x2', 'ws_1d/heads', 'ws_1d/batch', True, 'int8', 5),
]


def served(core, request):
  """Serve a request; return its tokens."""
  core.submit(request)
  return [t for _ in iter(lambda: core.idle, True) for event in core.step() for t in event.tokens]


def blocks_of(core, tokens):
  """Return the keys and values of the stored blocks of some tokens, in order."""
  nodes = core._prefixes.tree.find(tokens, None)
  store = core.executor._store
  blocks = [node.block for node in nodes]
  assert not np.asarray(store.broken)[blocks].any()
  return len(nodes), jax.tree.map(
    lambda x: np.asarray(x)[..., blocks, :, :, :], (store.keys, store.values)
  )


@pytest.mark.parametrize('model, mesh, prefill, decode, stacked, cache, steps', CASES)
def test_blocks_of_replies_are_those_of_prompts(
  model, mesh, prefill, decode, stacked, cache, steps
):
  config = layouts_test.MODELS[model]
  engine = memory.engine(
    config,
    reference.random_tensors(config),
    mesh,
    stacked=stacked,
    prefill=prefill,
    decode=decode,
    cache=cache,
  )
  sizes = SchedulerConfig(
    engine.model.padded_batch(4),
    160,
    page_size=64,
    prefix_bytes=2**20,
    prefill_chunk=160,
    prefill_rows=engine.model.prefilling.padded_batch(1),
    page_reads=1,
    decode_steps=steps,
    end_ids=(),
  )
  core = Scheduler(engine.model, engine.weights, sizes)
  prompt = tuple(memory.tokens(config, 1, 40)[0].tolist())
  reply = served(core, Request(prompt, limit=100, cache_reply=True))
  whole = (*prompt, *reply[:-1])
  served(core, Request((5, 6), limit=1))  # its start saves the blocks of the prompt before it
  count, found = blocks_of(core, whole)
  assert count == len(whole) // 32 == 4
  core._prefixes.tree.clear()
  served(core, Request(whole, limit=1))
  served(core, Request((5, 6), limit=1))
  _, wanted = blocks_of(core, whole)
  tolerance = 1e-4 if cache is None else 0.02
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    if a.dtype != np.int8:
      np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
    else:
      assert np.abs(np.int32(a) - b).max() <= 2
