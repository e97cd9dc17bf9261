"""Both sides of the comparison with transformers compute the same; needs torch too."""

import importlib.util

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import accelerator
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.model.weights import Weights, layer_weights
from t5x_inference_ext.sharding.mesh import make_mesh
from t5x_inference_ext.sharding.packing import packed_tensors

pytestmark = [
  pytest.mark.skipif(
    any(importlib.util.find_spec(m) is None for m in ('torch', 'transformers')),
    reason='needs torch and transformers',
  ),
  pytest.mark.filterwarnings('ignore'),
]  # PyTorch's own

TINY = accelerator.SHAPES['tiny'][0]


@pytest.fixture(scope='module')
def falcon():
  return accelerator.other_side(TINY, 64)[0]


def _canonical(state) -> dict[str, np.ndarray]:
  """Return transformers' arrays under this package's names: matrices [L, in, out]."""
  c, q = TINY, TINY.num_heads * TINY.d_head

  def layers(name):
    return np.stack([state[f'transformer.h.{n}.{name}'] for n in range(c.num_layers)])

  def matrix(name):
    return np.swapaxes(layers(f'{name}.weight'), 1, 2)

  fused = matrix('self_attention.query_key_value')
  return {
    'embedding': state['transformer.word_embeddings.weight'],
    'final_norm': state['transformer.ln_f.weight'],
    'final_norm_bias': state['transformer.ln_f.bias'],
    'layer_norm': layers('input_layernorm.weight'),
    'layer_norm_bias': layers('input_layernorm.bias'),
    'query': fused[..., :q],
    'key': fused[..., q : q + c.d_head],
    'value': fused[..., q + c.d_head :],
    'linear': matrix('mlp.dense_h_to_4h'),
    'mlp_output': matrix('mlp.dense_4h_to_h'),
    'attention_output': matrix('self_attention.dense'),
  }


def _weights(model: Model, canonical) -> Weights:
  tensors = packed_tensors(TINY, model.prefill_layout, dict(model.mesh.shape), ())

  def read(tensor, layer):
    return jnp.asarray(
      tensor.read(
        lambda name, index: canonical[name][index], layer, tuple(slice(0, n) for n in tensor.shape)
      )
    )

  layers = tuple(
    layer_weights({name: read(t, n) for name, t in tensors.items() if t.per_layer})
    for n in range(TINY.num_layers)
  )
  return Weights(
    layers=layers, **{name: read(t, None) for name, t in tensors.items() if not t.per_layer}
  )


def test_same_logits(falcon):
  import torch

  module = falcon.model.float().cpu()
  rng = np.random.default_rng(0)
  with torch.no_grad():
    for name, p in module.named_parameters():
      is_scale = name.endswith('weight') and p.ndim == 1
      p.copy_(torch.tensor((rng.normal(size=p.shape) * 0.1 + is_scale).astype(np.float32)))
  model = Model(TINY, make_mesh((1, 1, 1)), dtype='float32')
  weights = _weights(
    model, _canonical({name: x.numpy() for name, x in module.state_dict().items()})
  )
  tokens = rng.integers(2, TINY.vocab_size, (2, 20)).astype(np.int32)
  own = np.asarray(model.logits(weights, tokens)) * TINY.d_model**0.5  # which T5X divides by
  with torch.no_grad():
    other = module(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
  np.testing.assert_allclose(
    own, other, atol=5e-3 * other.std()
  )  # GELU here is the tanh approximation


def test_generates_as_many_tokens_as_asked(falcon):
  assert falcon.num_params == TINY.num_params
  falcon.model.bfloat16()
  assert falcon.generate(np.ones((2, 4), np.int64), 3)().shape == (2, 3)
