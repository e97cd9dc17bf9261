"""Attention by the kernel, in JAX's interpreter, beside plain JAX: layers, passes and tokens."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from t5x_inference_ext.config import preset
from t5x_inference_ext.engine import programs
from t5x_inference_ext.engine.request import Request
from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.engine.scheduler import Scheduler
from t5x_inference_ext.engine.scheduler_config import SchedulerConfig
from t5x_inference_ext.engine.serve import serve
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.model import kernel_attention
from t5x_inference_ext.model.attention import Context, attend
from t5x_inference_ext.model.kernel_attention import AttentionKernel, check_attention
from t5x_inference_ext.model.paged_attention import PagedContext, attend_pages
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.quantization.kv import to_cache
from t5x_inference_ext.sharding.mesh import make_mesh
from tests import memory, reference
from tests.model import pages_test

pytestmark = pytest.mark.usefixtures('quick_programs')
KERNEL = AttentionKernel(interpret=True)
verify = memory.quick_jit(Model.verify, static_argnames='self')
# Cases of pages_test: rows split over all shards or some, whole or by heads; one key head or more.
CASES = [0, 2, 3, 7, 9]


def _random(rng, *shape, dtype='float32'):
  return to_cache(jnp.asarray(rng.normal(size=shape), jnp.float32), dtype)


@pytest.mark.parametrize('dtype', ['float32', 'int8'])
@pytest.mark.parametrize('new, heads', [(1, 1), (3, 1), (3, 2)])
def test_a_layer_over_each_rows_positions(new, heads, dtype):
  rng = np.random.default_rng(new)
  q = _random(rng, 3, new, 4, 8)
  k, v = (_random(rng, 3, heads, new, 8, dtype=dtype) for _ in range(2))
  cached = (_random(rng, 3, heads, 40, 8, dtype=dtype) for _ in range(2))
  context = Context(*cached, jnp.array([0, 40, 17], jnp.int32))
  wanted = attend(q, k, v, context)
  np.testing.assert_allclose(KERNEL.attend(q, k, v, context), wanted, atol=2e-5)


@pytest.mark.parametrize('rows, heads', [(1, 1), (4, 2)])
def test_a_layer_over_pages_and_shared_pages(rows, heads):
  """A row sees the first shared pages. The last two pages have no owner, and are not read."""
  rng, size, pages, shared = np.random.default_rng(rows), 8, 3 * rows + 2, 3
  q = _random(rng, rows, 2, 4, 8)
  k, v = (_random(rng, rows, heads, 2, 8) for _ in range(2))
  keys, values = (_random(rng, pages, heads, size, 8) for _ in range(2))
  keys = keys.at[-2:].set(jnp.nan)
  sees = rng.integers(0, shared + 1, rows)
  owners = np.repeat(np.arange(rows), 3)
  starts = np.tile(np.arange(3), rows) * size + sees[owners] * size
  lengths = sees * size + rng.integers(0, 3 * size + 1, rows)
  context = PagedContext(
    keys,
    values,
    *(jnp.asarray(x, jnp.int32) for x in (lengths, owners, starts)),
    *(_random(rng, heads, shared * size, 8) for _ in range(2)),
    jnp.asarray(np.arange(shared)[None, :] < sees[:, None]),
    jnp.arange(shared, dtype=jnp.int32) * size,
  )
  wanted = attend_pages(q, k, v, context)
  np.testing.assert_allclose(KERNEL.attend(q, k, v, context), wanted, atol=2e-5)


@pytest.mark.parametrize(
  'case', CASES, ids=lambda i: ':'.join(map(str, pages_test.CASES[i])).replace('/', '_')
)
def test_passes_in_every_layout(case):
  """A decode step over pages and over a dense cache, and a check of drafts."""
  name, layout, rows, mesh, stacked, holds = pages_test.CASES[case]
  engine = pages_test.load(name, layout, mesh, stacked, holds)
  pool = pages_test.Pool(engine, rows, seed=case, shared_pages=case % 3)
  kernel = dataclasses.replace(engine.model, attention='kernel')
  tolerance = 2e-5 if holds is None else 2e-3
  tokens = memory.tokens(engine.model.config, rows, 2)
  counts = np.full(rows, 2, np.int32)
  for cache in (pool.dense, pool.paged):
    step = programs.put(engine.model, tokens[:, 0])
    wanted, found = (
      memory.decode_step(model, engine.weights, cache, *step)[0] for model in (engine.model, kernel)
    )
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance)
  draft = programs.put(engine.model, tokens, counts)
  wanted, found = (
    verify(model, engine.weights, pool.paged, *draft)[0] for model in (engine.model, kernel)
  )
  np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance)


def test_rows_of_the_scheduler_have_the_tokens_of_plain_jax():
  """More requests than slots, chunks of prompts, shared beginnings, and samples."""
  tensors = reference.random_tensors(memory.ODD, seed=1)
  engine = memory.engine(memory.ODD, tensors, '1x1x1', stacked=True)
  rng = np.random.default_rng(0)
  common = rng.integers(3, 90, 40).tolist()
  requests = [
    Request(
      (0, *common[: 40 * (i % 2)], *rng.integers(3, 90, 1 + 7 * i).tolist()),
      (i,),
      5 + i,
      SamplingParams(temperature=0.7 * (i % 3 > 0)),
    )
    for i in range(7)
  ]
  config = SchedulerConfig(
    slots=4, max_length=128, page_size=32, page_reads=1, prefill_chunk=16, end_ids=()
  )

  def rows(attention):
    model = dataclasses.replace(engine.model, attention=attention)
    found = {i: [] for i in range(len(requests))}
    for event in serve(Scheduler(model, engine.weights, config), requests):
      found[event.request] += event.tokens
    return found

  assert rows('kernel') == rows('xla')


@pytest.mark.parametrize(
  'kind,name,platform,message',
  [
    ('flash', 'palm_8b', 'tpu', "must be one of xla, kernel, got 'flash'"),
    ('kernel', 'palm_8b', 'gpu', 'is for TPUs, and these devices are gpus'),
    ('kernel', 'palm_tiny', 'tpu', 'heads of a multiple of 128 dimensions, and these have 32'),
  ],
)
def test_models_and_devices_that_the_kernel_does_not_run_on(
  monkeypatch, kind, name, platform, message
):
  mesh = make_mesh((1, 1, 1))
  check_attention('kernel', preset('palm_tiny'), mesh)
  monkeypatch.setattr(kernel_attention, '_platform', lambda _: platform)
  with pytest.raises(RequestError, match=message):
    check_attention(kind, preset(name), mesh)
