"""Sizes of chunks, and the chunks of prompts of all lengths."""

import pytest

from t5x_inference_ext.engine.chunk_sizes import first_chunks, later_chunks, next_chunk

FIRST, LATER = first_chunks(256), later_chunks(256, 2048)


def chunks(left, sizes):
  found = []
  while left > 0:
    found.append(next_chunk(sizes, LATER, left))
    left, sizes = left - found[-1], LATER
  return found


@pytest.mark.parametrize(
  'largest, most, first, later',
  [
    (256, 2048, [16, 64, 144, 256], [16, 64, 288]),
    (256, 256, [16, 64, 144, 256], [16, 64, 256]),
    (512, 2048, [16, 64, 272, 512], [32, 128, 576]),
    (2000, 2048, [64, 256, 1024, 2000], [128, 464, 2048]),
    (100, 2048, [16, 80, 100], [16, 32, 100]),
    (64, 2048, [16, 48, 64], [16, 64]),
    (16, 2048, [16], [16]),
    (1, 2048, [1], [1]),
  ],
)
def test_sizes(largest, most, first, later):
  assert first_chunks(largest) == first
  assert later_chunks(largest, most) == later


@pytest.mark.parametrize(
  'left, first, later',
  [
    (1, [16], [16]),
    (16, [16], [16]),
    (17, [64], [64]),
    (64, [64], [64]),
    (65, [144], [64, 16]),
    (81, [144], [64, 64]),
    (144, [144], [64, 64, 16]),
    (145, [144, 16], [288]),
    (192, [256], [288]),
    (256, [256], [288]),
    (257, [256, 16], [288]),
    (288, [256, 64], [288]),
    (289, [256, 64], [288, 16]),
    (544, [256, 288], [288, 288]),
    (545, [256, 288, 16], [288, 288]),
    (999, [256, 288, 288, 288], [288, 288, 288, 64, 64, 16]),
  ],
)
def test_chunks_cost_least(left, first, later):
  assert chunks(left, FIRST) == first
  assert chunks(left, LATER) == later


def test_no_prompt_takes_many_chunks_or_much_padding():
  for left in range(1, 2000):
    for sizes in (FIRST, LATER):
      found = chunks(left, sizes)
      assert len(found) <= 3 + left // 256
      assert sum(found) - left < 144 and sum(found[:-1]) < left


def test_a_long_prompt_is_cut_without_recursion_over_its_length():
  assert next_chunk(FIRST, LATER, 10**6) == 256 and next_chunk(LATER, LATER, 10**6) == 288
