"""The published shapes of known models, by name; config.preset makes a ModelConfig of one."""

from typing import Any

# PaLM's published shapes (section 4 of Pope et al. and Table 1 of the PaLM paper), the
# Megatron-Turing model that Pope et al. compare with (section 5), the small bundled model, and
# public models (from their config.json).
PRESETS: dict[str, dict[str, Any]] = {
  'palm_tiny': dict(num_layers=4, d_model=256, d_ff=1024, num_heads=8, d_head=32, vocab_size=384),
  'palm_8b': dict(
    num_layers=32, d_model=4096, d_ff=16384, num_heads=16, d_head=256, vocab_size=256128
  ),
  'palm_62b': dict(
    num_layers=64, d_model=8192, d_ff=32768, num_heads=32, d_head=256, vocab_size=256128
  ),
  'palm_540b': dict(
    num_layers=118, d_model=18432, d_ff=73728, num_heads=48, d_head=256, vocab_size=256128
  ),
  'megatron_530b': dict(
    num_layers=105,
    d_model=20480,
    d_ff=81920,
    num_heads=128,
    d_head=160,
    vocab_size=51200,
    num_kv_heads=128,
    block='serial',
    mlp='gelu',
    norm='layer',
    norm_scale='one',
    norm_epsilon=1e-5,
  ),
  **{
    name: dict(
      num_layers=layers,
      d_model=d_model,
      d_ff=d_ff,
      num_heads=heads,
      d_head=128,
      vocab_size=128256,
      num_kv_heads=8,
      block='serial',
      norm_scale='one',
      norm_epsilon=1e-5,
      rope_max_timescale=5e5,
      tied_head=False,
    )
    for name, layers, d_model, d_ff, heads in (
      ('llama3_8b', 32, 4096, 14336, 32),
      ('llama3_70b', 80, 8192, 28672, 64),
    )
  },
  **{
    name: dict(
      num_layers=layers,
      d_model=d_model,
      d_ff=4 * d_model,
      num_heads=heads,
      d_head=64,
      vocab_size=65024,
      num_kv_heads=8,
      mlp='gelu_erf',
      norm='layer',
      norm_scale='one',
      norm_epsilon=1e-5,
      parallel_norms=2,
    )
    for name, layers, d_model, heads in (
      ('falcon_40b', 60, 8192, 128),
      ('falcon_180b', 80, 14848, 232),
    )
  },
  'command_r': dict(
    num_layers=40,
    d_model=8192,
    d_ff=22528,
    num_heads=64,
    d_head=128,
    vocab_size=256000,
    num_kv_heads=64,
    norm='layer',
    norm_scale='one',
    norm_epsilon=1e-5,
    rope_max_timescale=8e6,
  ),
  'bloom_176b': dict(
    num_layers=70,
    d_model=14336,
    d_ff=57344,
    num_heads=112,
    d_head=128,
    vocab_size=250880,
    num_kv_heads=112,
    block='serial',
    mlp='gelu',
    norm='layer',
    norm_scale='one',
    norm_epsilon=1e-5,
    qkv_bias=True,
    attention_output_bias=True,
    mlp_bias=True,
    positions='alibi',
    embedding_norm=True,
  ),
  # GPT-3's paper (arXiv 2005.14165), table 2.1; vocabulary and features as in GPT-2.
  'gpt3_175b': dict(
    num_layers=96,
    d_model=12288,
    d_ff=49152,
    num_heads=96,
    d_head=128,
    vocab_size=50257,
    num_kv_heads=96,
    block='serial',
    mlp='gelu',
    norm='layer',
    norm_scale='one',
    norm_epsilon=1e-5,
    qkv_bias=True,
    attention_output_bias=True,
    mlp_bias=True,
    positions='learned',
    num_positions=2048,
  ),
  'gemma_7b': dict(
    num_layers=28,
    d_model=3072,
    d_ff=24576,
    num_heads=16,
    d_head=256,
    vocab_size=256000,
    num_kv_heads=16,
    block='serial',
    mlp='geglu',
  ),
}
