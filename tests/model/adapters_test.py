"""Adapters in every layout: golden logits of PEFT; mixed rows against folded weights."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from t5x_inference_ext import params
from t5x_inference_ext.checkpoints.adapters.adapter import Adapter, LowRank
from t5x_inference_ext.checkpoints.adapters.load import load_adapters
from t5x_inference_ext.checkpoints.adapters.read import read_adapter
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.engine import programs
from t5x_inference_ext.engine.engine import Engine
from t5x_inference_ext.model import chunks
from t5x_inference_ext.model.transformer import Model
from tests import memory, reference
from tests.model import layouts_test
from tests.model.layouts_test import LAYOUTS, Case
from tests.model.token_parts_test import halves_on_cpu

__all__ = ['halves_on_cpu']

logits_of = memory.quick_jit(Model.logits, static_argnames='self')
verify = memory.quick_jit(Model.verify, static_argnames='self')
extend = memory.quick_jit(Model.prefill_chunk, static_argnames=('self', 'read'))
empty_cache = memory.quick_jit(chunks.empty_cache, static_argnames=('model', 'rows', 'size'))

GOLDEN = (
  *(('1x1x1', 'ws_2d/batch'), ('2x2x2', 'ws_2d/heads'), ('2x2x2', 'wg_xy/batch')),
  ('2x2x2', 'ws_1d/batch'),
)


@pytest.mark.parametrize('mesh, layout', GOLDEN)
@pytest.mark.parametrize('family', ['smollm2', 'falcon_7b'])
def test_golden_logits(testdata, family, mesh, layout):
  """All adapters of a family in one batch. The largest error measured is 8e-6 of the largest."""
  engine = Engine.load(
    testdata / 'families' / family,
    mesh=mesh,
    dtype='float32',
    prefill_layout=layout,
    decode_layout=layout,
    scan_layers=True,
  )
  paths = sorted((testdata / 'adapters').glob(f'{family}-*'))
  adapters = [read_adapter(path, engine.checkpoint) for path in paths]
  assert len(adapters) == 5
  weights = load_adapters(adapters, engine.checkpoint, engine.model, engine.weights)
  tokens, rows, wanted, first = np.zeros((16, 48), np.int32), [], [], []
  soft = engine.model.config.vocab_size
  for number, (path, adapter) in enumerate(zip(paths, adapters), 1):
    golden, width = np.load(path / 'golden.npz'), 0
    if adapter.prompt is not None:
      width = len(adapter.prompt)
    for ids, logits in zip(golden['input_ids'], golden['logits']):
      tokens[len(rows), : width + len(ids)] = [*range(soft, soft + width), *ids]
      rows.append(number)
      wanted.append(logits)
      first.append(width)
    soft += width
  rows = np.asarray([*rows, *[0] * (16 - len(rows))], np.int32)
  tokens, rows = programs.put(engine.model, tokens, rows)
  found = np.asarray(logits_of(engine.model, weights.for_rows(rows), tokens))
  assert len(wanted) == 10
  for row, (logits, width) in enumerate(zip(wanted, first)):
    mine = found[row, width : width + len(logits)]
    assert np.abs(mine - logits).max() < 1e-4 * np.abs(logits).max()
  base = np.asarray(logits_of(engine.model, engine.weights, tokens))
  np.testing.assert_allclose(found[10:], base[10:], rtol=0, atol=1e-4)
  assert np.abs(found[:6] - base[:6]).max() > 0.01


# Two norms in a parallel block, and biases, which (IA)^3 multiplies too.
MODELS = {
  **layouts_test.MODELS,
  'two-norms': ModelConfig(
    **{**layouts_test._SIZES, 'num_heads': 6, 'num_kv_heads': 3, 'parallel_norms': 2},
    norm='layer',
    qkv_bias=True,
    mlp_bias=True,
    qkv_clip=1.5,
  ),
}
NUMBER = 3  # adapters; row i has adapter i % 4, 0 is none


@functools.cache
def adapters_of(model: str) -> tuple[Adapter, ...]:
  """Return a LoRA of all matrices, one of two, and (IA)^3 with a LoRA of the values beside it."""
  config, rng = MODELS[model], np.random.default_rng(7)

  def random(*shape: int) -> np.ndarray:
    return (rng.normal(size=shape) * 0.3).astype(np.float32)

  def lora(name: str, rank: int) -> LowRank:
    layers, inputs, outputs = params.parameters(config)[name].shape
    return LowRank(random(layers, inputs, rank), random(layers, rank, outputs))

  matrices = {n: p.shape for n, p in params.parameters(config).items() if p.kind == 'matrix'}
  scaling = {name: 1 + random(2, matrices[name][2]) for name in ('query', 'key', 'value')}
  scaling['mlp_output'] = 1 + random(2, config.d_ff)
  return (
    Adapter('all', {name: lora(name, 3) for name in matrices}),
    Adapter('two', {name: lora(name, 1) for name in ('key', 'mlp_output')}),
    Adapter('factors', {'value': lora('value', 2)}, scaling),
  )


def folded(config: ModelConfig, tensors: dict[str, np.ndarray], adapter: Adapter | None):
  """Return the float tensors of the model that a row with the adapter computes."""
  out = dict(tensors)
  if adapter is None:
    return out
  for name, low_rank in adapter.low_rank.items():
    out[name] = out[name] + low_rank.a @ low_rank.b
  for name, factors in adapter.scaling.items():
    if name == 'mlp_output':
      out[name] = factors[:, :, None] * out[name]
    else:
      out[name] = out[name] * factors[:, None]
      if config.qkv_bias:
        out[f'{name}_bias'] = out[f'{name}_bias'] * factors
  return out


@functools.cache
def float_tensors(model: str, weights: str) -> dict[str, np.ndarray]:
  config, made = MODELS[model], tensors_of(model, weights)
  return reference.dequantized(config, made) if weights == 'int8' else made


@functools.cache
def tensors_of(model: str, weights: str) -> dict[str, np.ndarray]:
  made = reference.random_tensors(MODELS[model])
  return reference.quantized(MODELS[model], made) if weights == 'int8' else made


@functools.cache
def expected(model: str, weights: str, rows: int) -> memory.Greedy:
  """Return what each row's own model computes; row i has adapter i % 4."""
  config, tensors = MODELS[model], float_tensors(model, weights)
  each = [
    memory.greedy(config, folded(config, tensors, adapter), rows, layouts_test.STEPS)
    for adapter in (None, *adapters_of(model))
  ]
  own = np.arange(rows) % (NUMBER + 1)
  return memory.Greedy(
    np.stack([each[own[i]].tokens[i] for i in range(rows)]),
    each[0].lengths,
    np.stack([each[own[i]].logits[:, i] for i in range(rows)], axis=1),
  )


def load(case: Case) -> Engine:
  engine = memory.engine(
    MODELS[case.model],
    tensors_of(case.model, case.weights),
    case.mesh,
    stacked=case.stacked,
    prefill=case.prefill,
    decode=case.decode,
  )
  weights = load_adapters(adapters_of(case.model), engine.checkpoint, engine.model, engine.weights)
  rows = np.arange(case.rows, dtype=np.int32) % (NUMBER + 1)
  (rows,) = programs.put(engine.model, rows)
  return dataclasses.replace(engine, weights=weights.for_rows(rows))


def cases() -> list[Case]:
  """Every layout in both phases; models, meshes, int8 and forms take turns."""
  out, models = [], list(MODELS)
  for i, layout in enumerate(LAYOUTS):
    rows = 8 if layout.startswith('wg') else (8, 4, 5, 16)[i % 4]
    model = models[i % len(models)]
    out.append(Case(model, layout, layout, rows, prompt_size=4 + i % 3, stacked=i % 2 == 0))
    weights = ('int8', 'float32')[i % 2]
    model = models[(i + 3) % len(models)]
    out.append(Case(model, layout, layout, 8, weights=weights))
    model = models[(i + 5) % len(models)]
    out.append(Case(model, layout, layout, 8, ('8x1x1', '1x2x4')[i % 2], 5, weights='int8'))
  for i, (prefill, decode) in enumerate(
    (
      ('wg_xyz/batch', 'ws_2d/batch'),
      ('ws_2d/heads', 'wg_x/batch'),
      ('wg_xy/heads', 'wg_xyz/batch'),
    )
  ):
    out.append(Case('two-norms', prefill, decode, 8, stacked=i % 2 == 0))
  out.append(Case('two-norms', 'ws_2d/batch', 'ws_2d/heads', 8, weights='int8'))
  out.append(Case('multiquery-parallel', 'ws_2d/batch', 'ws_2d/batch', 1))
  out.append(Case('multiquery-parallel', 'ws_2d/batch', 'ws_2d/batch', 4, '1x1x1', stacked=False))
  return out


def assert_rows_are_their_models(case: Case) -> None:
  wanted = expected(case.model, case.weights, 24).first(case.rows)
  found = memory.decode(load(case), wanted, case.prompt_size)
  np.testing.assert_array_equal(found.chosen, wanted.chosen)
  np.testing.assert_allclose(found.logits, wanted.logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize('case', cases(), ids=str)
def test_prefill_and_decode_steps_of_mixed_rows(case):
  assert_rows_are_their_models(case)


@pytest.mark.parametrize(
  'case',
  [
    Case('multiquery-parallel', 'ws_2d/batch', 'ws_2d/batch', 8),
    Case('grouped-serial', 'ws_2d/batch', 'ws_2d/batch', 16, weights='int8'),
    Case('multiquery-parallel', 'ws_2d/batch', 'ws_2d/batch', 1, prompt_size=8),
  ],
  ids=str,
)
def test_passes_in_two_halves(halves_on_cpu, case):
  assert_rows_are_their_models(case)


@pytest.mark.parametrize('i', range(len(LAYOUTS)))
def test_chunks_and_drafts_of_mixed_rows(i):
  """Chunks of 3 and 4 positions, then 3 tokens to verify, in the decode layout."""
  model, layout, rows = list(MODELS)[i % len(MODELS)], LAYOUTS[i], 8
  engine = load(Case(model, layout, layout, rows, stacked=i % 2 == 0))
  tokens = memory.tokens(engine.model.config, rows, 10)
  wanted = np.stack(
    [
      reference.logits(
        engine.model.config,
        folded(engine.model.config, float_tensors(model, 'float32'), adapter),
        tokens[row : row + 1],
      )[0]
      for row in range(rows)
      for adapter in [(None, *adapters_of(model))[row % (NUMBER + 1)]]
    ]
  )
  run = engine.model, engine.weights
  cache = empty_cache(*run, rows=rows, size=16)
  for begin, end in (0, 3), (3, 7):
    counts = np.full(rows, end - begin, np.int32)
    logits, cache = extend(*run, cache, *programs.put(run[0], tokens[:, begin:end], counts))
    np.testing.assert_allclose(logits, wanted[:, end - 1], rtol=0, atol=1e-4)
  counts = np.full(rows, 3, np.int32)
  logits, _ = verify(*run, cache, *programs.put(run[0], tokens[:, 7:], counts))
  np.testing.assert_allclose(logits, wanted[:, 7:], rtol=0, atol=1e-4)


def test_an_adapter_with_large_values_does_not_reach_other_rows():
  """Infinite inner products of one row's adapter are not those of others, times zero."""
  case = Case('multiquery-parallel', 'ws_2d/batch', 'ws_2d/batch', 8, '1x1x1')
  engine = load(case)
  plain = dataclasses.replace(engine, weights=engine.weights.for_rows(None))
  huge = jax.tree.map(lambda x: x, engine.weights)
  layers = {
    name: dataclasses.replace(w, adapters={**w.adapters, 'in_a': w.adapters['in_a'] * 1e38})
    for name, w in huge.layers.items()
  }
  huge = dataclasses.replace(huge, layers=layers)
  (tokens,) = programs.put(engine.model, memory.tokens(engine.model.config, 8, 5))
  found = np.asarray(logits_of(engine.model, huge, tokens))
  base = np.asarray(logits_of(engine.model, plain.weights, tokens))
  assert np.isnan(found[1]).any() and np.isnan(found[5]).any()
  np.testing.assert_allclose(found[::4], base[::4], rtol=0, atol=1e-5)
