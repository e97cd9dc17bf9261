"""Log-probabilities of ragged examples, packed by length."""

import math

import jax
import numpy as np
import pytest

from t5x_inference_ext.engine import length_buckets
from tests import memory, reference

pytestmark = pytest.mark.usefixtures('quick_programs')

CONFIG = memory.ODD
TENSORS = reference.random_tensors(CONFIG)
LENGTH = 13

FOURS = lambda rows: -(-rows // 4) * 4


def _lengths(rng, count):
  return np.exp(rng.uniform(np.log(5), np.log(900), count)).astype(int).tolist()


def test_packs_hold_every_example_once_and_little_padding():
  lengths = _lengths(np.random.default_rng(0), 400)
  packs = length_buckets.Packer(4096, FOURS).pack(lengths)
  assert sorted(i for p in packs for i in p.items) == list(range(400))
  for p in packs:
    assert p.rows % 4 == 0 and p.rows >= len(p.items) and p.rows <= max(4, 4096 // p.length + 3)
    assert all(lengths[i] <= p.length for i in p.items)
  taken = sum(p.rows * p.length for p in packs)
  assert taken < 1.15 * sum(lengths)  # in order, 32 a batch, padded to the longest: 4 times
  assert len({(p.rows, p.length) for p in packs}) < 30


def test_later_examples_use_the_shapes_of_earlier_ones():
  rng = np.random.default_rng(0)
  packer = length_buckets.Packer(4096, FOURS)
  first = {(p.rows, p.length) for p in packer.pack(_lengths(rng, 400))}
  lengths = _lengths(rng, 400)
  packs = packer.pack(lengths)
  assert len({(p.rows, p.length) for p in packs} - first) <= 3
  assert sum(p.rows * p.length for p in packs) < 1.5 * sum(lengths)
  # One more example is not worth a shape; one that is longer than any has no choice.
  assert {(p.rows, p.length) for p in packer.pack([37])} <= first
  assert packer.pack([2000]) == [length_buckets.Pack([0], 4, 2048)]
  assert not packer.pack([])


@pytest.mark.parametrize(
  'length, size',
  [
    (0, 16),
    (1, 16),
    (16, 16),
    (17, 24),
    (25, 32),
    (33, 40),
    (128, 128),
    (129, 136),
    (257, 272),
    (512, 512),
    (513, 544),
  ],
)
def test_padded_lengths(length, size):
  assert length_buckets.padded(length) == size


def test_completions_of_any_length_in_any_order():
  engine = memory.engine(CONFIG, TENSORS, '2x1x1')
  rng = np.random.default_rng(1)
  ids = lambda n: rng.integers(1, 101, n).tolist()
  pairs = [(ids(n), ids(m)) for n, m in ((3, 5), (0, 1), (20, 2), (1, 30), (2, 2), (40, 9))]
  found = engine.score_completions(pairs, tokens=64)
  for (prompt, completion), scores in zip(pairs, found, strict=True):
    logits = reference.logits(CONFIG, TENSORS, np.asarray([[0, *prompt, *completion]]))[0]
    wanted = np.asarray(jax.nn.log_softmax(logits))[
      len(prompt) + np.arange(len(completion)), completion
    ]
    np.testing.assert_allclose(scores, wanted, atol=1e-4)
  assert math.isclose(
    sum(found[0]),
    engine.score(
      np.asarray([[0, *pairs[0][0], *pairs[0][1]]])[:, :-1],
      np.asarray([[*pairs[0][0], *pairs[0][1]]]),
      np.asarray([[0.0] * 3 + [1.0] * 5]),
    )[0],
    abs_tol=1e-4,
  )
