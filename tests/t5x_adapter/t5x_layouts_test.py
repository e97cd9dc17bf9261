"""Layouts chosen per phase, under T5X's decoding functions, with several rows for each prompt."""

import functools
import re

from flax import traverse_util
import jax
import numpy as np
import pytest
from t5x import decoding

from t5x_inference_ext.checkpoints.load import load_tensor
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.t5x.models import InferenceModel
from t5x_inference_ext.t5x.module import declarations
from t5x_inference_ext.t5x.precompile import precompile_step
from tests import reference
from tests.t5x_adapter import running

# Two key heads over 4 shards are copied, and over 2 they are not: the heads of a cache depend on
# its rows.
GROUPED = ModelConfig(
  num_layers=2,
  d_model=32,
  d_ff=64,
  num_heads=8,
  num_kv_heads=2,
  d_head=8,
  vocab_size=384,
  block='serial',
  mlp='gelu',
  norm='layer',
)
LENGTH = 37  # of a sequence, and so of the cache; nothing else is as long
PAIRS = [
  ('wg_xyz/batch', 'ws_2d/batch'),
  ('ws_2d/heads', 'wg_x/batch'),
  ('ws_1d/heads', 'ws_1d/batch'),
]
SEARCH = {
  'samples': functools.partial(
    decoding.temperature_sample, temperature=0.7, topk=0, rescale_log_probs=False
  ),
  'beams': decoding.beam_search,
}


def _model(layouts, mesh='2x2x2', **kwargs):
  return InferenceModel(
    running.VOCABULARY,
    config=GROUPED,
    mesh=mesh,
    dtype='float32',
    prefill_layout=layouts[0],
    decode_layout=layouts[1],
    **kwargs,
  )


def _params(model):
  """T5X's tree of the same random weights, whatever the mesh."""
  checkpoint = reference.MemoryCheckpoint.of(GROUPED, reference.random_tensors(GROUPED))
  params = {
    path: load_tensor(checkpoint, model.model, d.tensor, d.layers)
    for path, d in declarations(model.model, 'float32', model.module.scan_layers).items()
  }
  return traverse_util.unflatten_dict(params)


def _batch(rows):
  tokens = np.zeros((rows, LENGTH), np.int32)
  tokens[:, 1:6] = np.random.default_rng(0).integers(3, 259, (rows, 5))
  causal = (np.arange(LENGTH) < 6).astype(np.int32)[None].repeat(rows, axis=0)
  return {'decoder_input_tokens': tokens, 'decoder_causal_attention': causal}


def _predict(model, rows, decodes):
  step = jax.jit(
    functools.partial(model.predict_batch_with_aux, num_decodes=decodes, return_all_decodes=True)
  )
  return jax.device_get(step(_params(model), _batch(rows), jax.random.PRNGKey(0)))


@functools.cache
def _on_one_device(search, rows, decodes):
  return _predict(
    _model(('ws_2d/batch', 'ws_2d/batch'), '1x1x1', decode_fn=SEARCH[search]), rows, decodes
  )


@pytest.mark.parametrize('layouts', PAIRS, ids=' then '.join)
@pytest.mark.parametrize(
  'search, rows, decodes, scan_layers', [('samples', 1, 4, False), ('beams', 2, 3, True)]
)
def test_several_decodes_of_each_prompt(search, rows, decodes, scan_layers, layouts):
  """The cache of a few rows, with heads split over devices, becomes that of more, split by rows."""
  model = _model(layouts, decode_fn=SEARCH[search], scan_layers=scan_layers)
  tokens, aux = _predict(model, rows, decodes)
  expected, expected_aux = _on_one_device(search, rows, decodes)
  np.testing.assert_array_equal(tokens, expected)
  assert len({tuple(row) for row in tokens[0].tolist()}) == decodes
  np.testing.assert_allclose(aux['scores'], expected_aux['scores'], rtol=1e-4)


def test_heads_of_the_cache_depend_on_its_rows():
  """What makes the test above one of more than shardings."""
  model = _model(PAIRS[-1]).model
  assert model.decode_sharding(1).heads.cached() != model.decode_sharding(4).heads.cached()


@pytest.mark.parametrize('layouts, decodes', [(PAIRS[0], 1), (PAIRS[0], 4), (PAIRS[-1], 4)])
def test_the_cache_moves_before_the_loop(layouts, decodes):
  """No collective of T5X's loop touches an array as long as the cache."""
  model = _model(layouts, scan_layers=False)
  model.predict_batch_with_aux = functools.partial(
    model.predict_batch_with_aux, num_decodes=decodes
  )
  compiled = precompile_step(
    model,
    running.InferencePartitioner(model),
    {'inputs': 8, 'targets': LENGTH - 8},
    4,
    'predict_with_aux',
  )
  _, *computations = re.split(r'\n(?=%|ENTRY )', compiled.as_text())
  looped = ''.join(c for c in computations if not c.startswith('ENTRY'))
  moved = re.findall(
    r'= (.*?) (?:all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)\(', looped
  )
  assert moved and not [shape for shape in moved if re.search(rf'\b{LENGTH}\b', shape)]
  assert re.search(rf'f32\[[0-9]+,[0-9]+,{LENGTH},8\]', looped)  # the cache is in there
