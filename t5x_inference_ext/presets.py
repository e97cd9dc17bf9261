"""The published shapes of known models, by name; config.preset makes a ModelConfig of one."""

from typing import Any

# PaLM's published shapes (the paper's section 4 and PaLM's own Table 1), the Megatron-Turing model
# that the paper compares with (its section 5), and the small model of the test fixtures.
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
}
