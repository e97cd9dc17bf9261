"""Explained tensors against the arrays on eight simulated devices, and the text about them."""

import dataclasses

import jax
import numpy as np
import pytest

from t5x_inference_ext.config import ModelConfig, preset
from t5x_inference_ext.engine import programs
from t5x_inference_ext.errors import MeshError
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.sharding import explain_text
from t5x_inference_ext.sharding.explain import (
  ExplainedTensor,
  ExplainSetting,
  Explanation,
  explain_setting,
)
from t5x_inference_ext.sharding.layout import Layout
from t5x_inference_ext.sharding.mesh import AXES, make_mesh, parse_mesh
from tests import memory, reference

SIZES = dict(num_layers=2, d_model=16, d_ff=32, d_head=8, vocab_size=101)
MODELS = {
  'multiquery': ModelConfig(num_heads=3, **SIZES),
  'grouped': ModelConfig(num_heads=6, num_kv_heads=3, block='serial', norm='layer', **SIZES),
  'multihead': ModelConfig(num_heads=4, num_kv_heads=4, mlp='gelu', **SIZES),
}


def setting(
  config: ModelConfig,
  mesh: str,
  prefill_layout='ws_2d/batch',
  decode_layout='ws_2d/batch',
  **fields,
):
  return ExplainSetting(
    config,
    dict(zip(AXES, parse_mesh(mesh))),
    Layout.parse(prefill_layout),
    Layout.parse(decode_layout),
    **fields,
  )


def engine(s: ExplainSetting):
  tensors = reference.random_tensors(s.config)
  if s.scaled:
    tensors = reference.quantized(s.config, tensors, s.weights)
  return memory.engine(
    s.config,
    tensors,
    'x'.join(str(s.mesh[a]) for a in AXES),
    stacked=s.stacked,
    dtype=s.dtype,
    prefill=str(s.prefill),
    decode=str(s.decode),
    cache=s.cache,
  )


def check(explained: ExplainedTensor, arrays: list[jax.Array]) -> None:
  """An explained tensor is these arrays."""
  assert explained.arrays == len(arrays)
  for array in arrays:
    assert array.shape == explained.shape and str(array.dtype) == explained.dtype
    sharding = jax.sharding.NamedSharding(array.sharding.mesh, explained.spec)
    assert array.sharding.is_equivalent_to(sharding, array.ndim)
  for device in arrays[0].sharding.device_set:
    shards = [
      shard for array in arrays for shard in array.addressable_shards if shard.device == device
    ]
    assert sum(shard.data.nbytes for shard in shards) == explained.bytes
  assert len(explained.axes) == len(explained.shape)


def check_cache(e: Explanation, cache) -> None:
  """Keys and values are those explained; and their scales, where they have some."""
  leaves = jax.tree.leaves((cache.keys, cache.values))
  if e.setting.cache == 'int8':
    check(phase_tensor(e, 1, 'cache scales'), [x for x in leaves if x.dtype == np.float32])
    leaves = [x for x in leaves if x.dtype == np.int8]
  check(phase_tensor(e, 1, 'cache'), leaves)


def phase_tensor(e: Explanation, phase: int, name: str) -> ExplainedTensor:
  (found,) = [t for t in e.phases[phase].tensors if t.name == name]
  return found


CASES = [
  ('multiquery', '2x2x2', 'ws_2d/heads', 'ws_2d/batch', dict(batch=8)),
  (
    'multiquery',
    '2x2x2',
    'wg_xyz/batch',
    'ws_2d/batch',
    dict(batch=8, weights='int8,embedding:8', dtype='bfloat16'),
  ),
  ('multiquery', '1x2x4', 'ws_1d/batch', 'ws_1d/heads', dict(batch=3, stacked=False)),
  ('grouped', '2x2x2', 'wg_x/heads', 'ws_2d/batch', dict(batch=2, weights='int8')),
  ('grouped', '8x1x1', 'ws_2d/heads', 'ws_2d/heads', dict(batch=1, stacked=False, weights='int8')),
  ('multihead', '2x2x2', 'wg_xy/batch', 'wg_x/heads', dict(batch=4, dtype='bfloat16')),
  ('multihead', '1x1x1', 'ws_2d/batch', 'ws_2d/batch', dict(batch=2)),
  ('grouped', '2x2x2', 'wg_x/batch', 'ws_2d/heads', dict(batch=2, cache='int8', dtype='bfloat16')),
]


@pytest.mark.parametrize('model, mesh, first, second, fields', CASES)
def test_explained_tensors_are_those_on_the_devices(model, mesh, first, second, fields):
  s = setting(
    MODELS[model],
    mesh,
    first,
    second,
    **{'dtype': 'float32', 'prompt_length': 5, 'cache_length': 9, **fields},
  )
  e, run = explain_setting(s), engine(s)
  layers = [run.weights.layers] if s.stacked else run.weights.layers
  for t in e.weights:
    block_part, _, field = t.name.rpartition('/')
    check(
      t,
      [getattr(layer[block_part], field) for layer in layers]
      if block_part
      else [getattr(run.weights, field)],
    )
  assert e.weight_bytes == sum(  # no array is left out
    a.addressable_shards[0].data.nbytes for a in jax.tree.leaves(run.weights)
  )

  assert s.rows == run.model.padded_batch(s.batch)
  tokens = memory.tokens(s.config, s.rows, 5)
  logits, cache = memory.prefill(
    run.model, run.weights, *programs.put(run.model, tokens, np.full(s.rows, 5, np.int32)), size=9
  )
  check(phase_tensor(e, 0, 'logits'), [logits])
  check_cache(e, cache)
  assert e.cache_bytes == sum(a.addressable_shards[0].data.nbytes for a in jax.tree.leaves(cache))
  logits, cache = memory.decode_step(
    run.model, run.weights, cache, *programs.put(run.model, np.ones(s.rows, np.int32))
  )
  check(phase_tensor(e, 1, 'logits'), [logits])
  check_cache(e, cache)
  check(phase_tensor(e, 1, 'cache lengths'), [cache.lengths])


@pytest.mark.parametrize('model, mesh, first, second, fields', CASES)
def test_attention_of_each_phase(model, mesh, first, second, fields):
  """A device's queries are the rows, positions and heads of its activation sharding."""
  s = setting(
    MODELS[model],
    mesh,
    first,
    second,
    **{'dtype': 'float32', 'prompt_length': 5, 'cache_length': 9, **fields},
  )
  e = explain_setting(s)
  run = Model(s.config, make_mesh(parse_mesh(mesh)), s.prefill, s.decode, s.dtype)
  shardings = run.prefill_sharding(s.rows, 5), run.decode_sharding(s.rows)
  assert len(e.phases) == len(shardings)
  for phase, sharding in zip(e.phases, shardings):
    assert phase.sharding == sharding
    rows, positions, _ = (
      np.prod([s.mesh[a] for a in axes], dtype=int)
      for axes in (sharding.attention_rows, sharding.attention_positions, sharding.attention_heads)
    )
    queries = next(t for t in phase.tensors if t.name == 'queries')
    width = 4 if s.dtype == 'float32' else 2
    assert queries.bytes == (
      s.rows // rows * (phase.length // positions) * sharding.heads.heads * s.config.d_head * width
    )


def test_padding_and_copies_of_heads_are_told():
  # 3 groups of 2 heads of 8 columns: on 4 shards a group each, the last of zeros; on 8 shared by
  # two, a query head each.
  four = explain_setting(setting(MODELS['grouped'], '2x2x2', batch=8)).blocks['attention/w_in']
  assert [(b.names[0], b.width, b.total, b.padding, b.copies) for b in four] == [
    ('query', 2 * 8, 8 * 8, 2 * 8, 0),
    ('key', 8, 4 * 8, 8, 0),
    ('value', 8, 4 * 8, 8, 0),
  ]
  eight = explain_setting(
    setting(MODELS['grouped'], '2x2x2', 'ws_1d/batch', 'ws_1d/batch', batch=8)
  ).blocks['attention/w_in']
  assert [(b.names[0], b.width, b.total, b.padding, b.copies) for b in eight] == [
    ('query', 8, 8 * 8, 2 * 8, 0),
    ('key', 8, 8 * 8, 2 * 8, 3 * 8),
    ('value', 8, 8 * 8, 2 * 8, 3 * 8),
  ]
  text = explain_text.explain(
    setting(preset('palm_540b'), '4x4x4', 'ws_1d/batch', 'ws_1d/batch', batch=64)
  )
  assert 'query 256 of 16384, 4096 padding' in text


def test_the_paper_s_mesh_needs_no_devices():
  """PaLM 540B on 64 chips: a 64th of all weights, the cache of the paper's Table 1."""
  s = setting(
    preset('palm_540b'),
    '4x4x4',
    'wg_xyz/batch',
    'ws_2d/batch',
    batch=512,
    prompt_length=2048,
    cache_length=2048,
  )
  e = explain_setting(s)
  matrices = [t for t in e.weights if t.name in ('embedding', 'parallel/w_in', 'parallel/w_out')]
  norms = 119 * 18432
  padding = 16 * (128 - 32) * 118 * 18432  # each shard's columns of keys and values, to a tile
  vocabulary = (16 * 126 * 128 - 256128) * 18432  # each shard's rows of the embedding, to tiles
  assert 64 * sum(t.bytes for t in matrices) == 2 * (
    s.config.num_params - norms + padding + vocabulary
  )
  assert phase_tensor(e, 1, 'cache').bytes == 2 * 118 * 256 * 2 * 2048 * (512 // 64)
  assert e.phases[0].gathered == 18432 * 73728 * 2
  assert e.phases[1].gathered == 0


def test_text():
  text = explain_text.explain(
    setting(
      preset('palm_540b'),
      '4x4x4',
      'wg_xyz/batch',
      'ws_2d/batch',
      batch=512,
      prompt_length=2048,
      cache_length=2112,
    )
  )
  lines = text.splitlines()
  assert 'mesh:  4x4x4, 64 devices' in lines
  assert (
    'prefill: wg_xyz/batch (weights E_xF_zy gathered over xzy to EF, activations B_xzyTE)' in lines
  )
  assert 'decode: ws_2d/batch (weights E_xF_zy stay, activations B_zyTE_x)' in lines
  assert [
    'parallel/w_in',
    '118x18432x161792',
    'bfloat16',
    'L',
    'E_x',
    'hidden_zy',
    '10.24',
    'GiB',
    'layers,',
    'embed,',
    'hidden',
  ] in [line.split() for line in lines]
  assert '[gate 4608 | linear 4608 | query 768 | key, value 128 of 2048, 1536 padding]' in text
  assert 'the largest 2.53 GiB on each device' in text  # 18432 * 73728 * 2 bytes
  assert 'after prefill' not in text
  columns = [line.index('per device') for line in lines if 'per device' in line]
  assert len(columns) == 3 and text.endswith('\n')


def test_the_guide_shows_what_is_printed(repository):
  """The example of docs/layouts.md, whole."""
  text = explain_text.explain(
    setting(
      preset('palm_540b'),
      '4x4x4',
      'wg_xyz/batch',
      'ws_2d/batch',
      batch=512,
      prompt_length=2048,
      cache_length=2112,
    )
  )
  assert f'\n```\n{text}```\n' in (repository / 'docs' / 'layouts.md').read_text(encoding='utf-8')


def test_text_leaves_out_axes_of_one_device():
  s = setting(MODELS['multiquery'], '8x1x1', batch=8)
  w_in = next(t for t in explain_setting(s).weights if t.name == 'parallel/w_in')
  assert explain_text.sharding_text(w_in, s.mesh) == 'L E_x hidden'
  assert explain_text.weights_notation(s.prefill) == 'E_xF_zy'
  assert explain_text.weights_notation(Layout('ws_1d')) == 'EF_xzy'


def test_remarks():
  text = explain_text.explain(
    setting(
      MODELS['multiquery'],
      '2x2x2',
      'wg_xyz/batch',
      'ws_2d/heads',
      batch=1,
      prompt_length=5,
      cache_length=8,
    )
  )
  assert 'prefill: weights are gathered matrix by matrix' in text
  assert 'prefill: 5 positions are padded to 8' in text
  assert (
    '* decode: attention splits neither rows nor heads nor positions over x; '
    '2 devices along it do the same work' in text.splitlines()
  )
  assert 'B 3, T 1 ' in explain_text.explain(setting(MODELS['multiquery'], '1x1x1', batch=3))
  assert 'B 4 (3 rounded up for the mesh)' in explain_text.explain(
    setting(MODELS['multiquery'], '2x2x2', batch=3)
  )


@dataclasses.dataclass(frozen=True)
class FakeDevice:
  """As much of a TPU device as a mesh asks for."""

  id: int
  coords: tuple[int, int, int]
  device_kind: str = 'TPU v4'


def test_keys_and_values_of_prefill_are_told():
  by_heads = dict(batch=8, prompt_length=6, cache_length=8, dtype='float32')
  text = explain_text.explain(
    setting(MODELS['multiquery'], '2x2x2', 'ws_2d/heads', 'ws_2d/batch', **by_heads)
  )
  assert 'keys and values are resharded: B K S Q to B_xzy K S Q' in text
  e = explain_setting(
    setting(MODELS['multiquery'], '2x2x2', 'ws_2d/heads', 'ws_2d/batch', **by_heads)
  )
  made = 2 * 2 * 8 * 6 * 8 * 4  # layers, keys and values, rows, positions, Q, float32
  assert (
    f'in prefill {explain_text.binary_bytes(e.weight_bytes + made)} with the new keys and values'
    in text
  )
  text = explain_text.explain(
    setting(MODELS['multihead'], '2x2x2', 'ws_2d/heads', 'ws_2d/batch', **by_heads)
  )
  assert 'keys and values are resharded: B K_zy S Q to B_xzy K S Q' in text


def test_devices_and_links_are_told():
  s = setting(MODELS['multiquery'], '4x2x1', batch=8)
  chips = make_mesh(
    (4, 2, 1), [FakeDevice(4 * y + x, (x, y, 0)) for y in range(2) for x in range(4)]
  )
  text = explain_text.explain(s, chips)
  assert 'mesh:  4x2x1, 8 devices (TPU v4); links: x chain, y ring, z ring' in text
  assert '8 devices (cpu); links: no torus known' in explain_text.explain(s, make_mesh((4, 2, 1)))


def test_what_cannot_run_is_refused():
  with pytest.raises(MeshError, match='ws_1d'):
    explain_setting(setting(MODELS['multiquery'], '2x2x2', 'ws_1d/batch', 'ws_2d/batch'))
  with pytest.raises(MeshError, match='d_model=16'):
    explain_setting(setting(MODELS['multiquery'], '3x1x1'))
