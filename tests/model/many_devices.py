"""Generation on the simulated devices that XLA_FLAGS asks for; many_devices_test.py starts it.

Prints, for each case, the largest difference of a logit from the reference and whether the greedy
tokens are its tokens.
"""

import json

import jax
import numpy as np

from t5x_inference_ext.config import ModelConfig
from tests import memory, reference

STEPS = 3
# d_model and d_ff of 64: one column for each of 64 devices.
_SIZES = dict(num_layers=2, d_model=64, d_ff=64, d_head=2, vocab_size=101)
MODELS = {
  # PaLM 540B's 48 heads: padded to 64 over 64 shards (the paper's section 4).
  'palm': ModelConfig(num_heads=48, **_SIZES),
  'megatron': ModelConfig(
    num_heads=48,
    num_kv_heads=48,
    block='serial',
    mlp='gelu',
    norm='layer',
    norm_scale='one',
    **_SIZES,
  ),
  'grouped': ModelConfig(num_heads=48, num_kv_heads=8, **_SIZES),
}

# Devices -> (model, mesh, prefill, decode, rows, slots for heads of all shards together)
CASES = {
  16: [
    ('palm', '2x2x4', 'wg_xyz/batch', 'ws_2d/batch', 16, 48),
    ('megatron', '4x2x2', 'wg_xy/heads', 'ws_2d/heads', 3, 48),
    ('grouped', '4x4x1', 'ws_1d/batch', 'ws_1d/heads', 4, 48),
  ],
  64: [
    ('palm', '4x4x4', 'ws_1d/heads', 'ws_1d/batch', 2, 64),
    ('megatron', '1x8x8', 'ws_2d/heads', 'ws_2d/batch', 8, 64),
    ('grouped', '1x8x8', 'wg_xy/batch', 'ws_2d/heads', 2, 64),
    ('palm', '4x4x4', 'wg_xyz/batch', 'ws_2d/batch', 64, 48),
  ],
}


def run(model: str, mesh: str, prefill: str, decode: str, rows: int, heads: int) -> dict:
  config = MODELS[model]
  tensors = reference.random_tensors(config)
  engine = memory.engine(config, tensors, mesh, stacked=True, prefill=prefill, decode=decode)
  assert engine.model.mesh.size == jax.device_count()
  stored = engine.model.prefill_sharding(rows, 4).heads.stored
  assert stored.shards * stored.local_heads == heads, stored
  wanted = memory.greedy(config, tensors, rows, STEPS)
  found = memory.decode(engine, wanted, 4)
  return dict(
    error=float(np.abs(found.logits - wanted.logits).max()),
    same=bool(np.all(found.chosen == wanted.chosen)),
  )


def main():
  jax.config.update('jax_default_matmul_precision', 'highest')
  jax.config.update('jax_numpy_rank_promotion', 'raise')
  for case in CASES[jax.device_count()]:
    print(json.dumps([*case, run(*case)]), flush=True)


if __name__ == '__main__':
  main()
