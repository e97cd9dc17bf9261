"""Slopes and buckets against numbers written down by others."""

import numpy as np
import pytest

from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.model import attention_rules
from tests import reference

SIZES = dict(num_layers=1, d_model=8, d_ff=8, num_heads=2, d_head=4, vocab_size=11)


def slopes(heads, rule='bloom', **fields):
  config = ModelConfig(
    **{**SIZES, 'num_heads': heads}, positions='alibi', alibi_slopes=rule, **fields
  )
  return attention_rules.alibi_slopes(config)


def test_slopes_of_a_power_of_two_are_the_papers():
  """ALiBi's section 3: for 8 heads 1/2, 1/4, ... 1/256; for 16 the geometric means between."""
  np.testing.assert_allclose(slopes(8), 2.0 ** -np.arange(1, 9))
  np.testing.assert_allclose(slopes(16)[:3], 2.0 ** -np.asarray([0.5, 1, 1.5]))
  np.testing.assert_allclose(slopes(4, alibi_max=6.0), 2.0 ** -np.asarray([1.5, 3, 4.5, 6]))


@pytest.mark.parametrize('heads', [1, 2, 3, 5, 6, 12, 17, 112])
def test_slopes_of_other_numbers_of_heads_are_blooms(heads):
  """BLOOM says: those of the next smaller power of two, then every second one of twice as many."""
  wanted = [reference._alibi_slope(h, heads, 8) for h in range(heads)]
  np.testing.assert_allclose(slopes(heads), wanted, rtol=1e-6)


def test_falcons_slopes_are_rounded():
  np.testing.assert_allclose(slopes(12, 'falcon'), slopes(12), rtol=2**-8)
  assert (slopes(12, 'falcon') != slopes(12)).any()
  np.testing.assert_array_equal(slopes(12, 'falcon'), slopes(12, 'falcon_eager'))


def test_buckets_are_t5s():
  """From T5X's relative_position_bucket: 32 buckets, up to 128; half of them hold one distance."""
  buckets = attention_rules.relative_buckets(ModelConfig(**SIZES, positions='relative'))
  assert buckets[:17].tolist() == [*range(17)]
  assert [buckets[d] for d in (18, 19, 22, 23, 32, 64, 113, 128)] == [
    16,
    17,
    18,
    18,
    21,
    26,
    31,
    31,
  ]
