"""Requests of a log, and requests at random."""

import json
import statistics

import pytest

from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.simulator.trace import HASH_BLOCK, RandomTrace, at_rate, rate_of, read_trace


def log(tmp_path, *rows) -> str:
  path = tmp_path / 'trace.jsonl'
  path.write_text(
    ''.join((row if isinstance(row, str) else json.dumps(row)) + '\n' for row in rows)
  )
  return str(path)


def test_a_log_is_read_by_arrival(tmp_path):
  path = log(
    tmp_path,
    {'arrival': 12.5, 'input_length': 7, 'output_length': 3},
    '',
    {'arrival': 10, 'tokens': [4, 5], 'output_length': 1},
  )
  first, second = read_trace(path, 101)
  assert first == (0.0, (4, 5), 1)
  assert (second.seconds, len(second.tokens), second.limit) == (2.5, 7, 3)
  assert rate_of([first, second]) == pytest.approx(0.4)
  assert [a.seconds for a in at_rate([first, second], 4)] == pytest.approx([0, 0.25])


def test_equal_hashes_are_equal_beginnings(tmp_path):
  rows = [
    {'timestamp': at, 'input_length': 3 * HASH_BLOCK - 5, 'output_length': 1, 'hash_ids': ids}
    for at, ids in ((0, [1, 2, 3]), (500, [1, 2, 4]), (1500, [9, 2, 3]))
  ]
  a, b, c = read_trace(log(tmp_path, *rows), 32000)
  assert (a.seconds, b.seconds, c.seconds) == (0, 0.5, 1.5)
  assert {len(x.tokens) for x in (a, b, c)} == {3 * HASH_BLOCK - 5}
  assert a.tokens[: 2 * HASH_BLOCK] == b.tokens[: 2 * HASH_BLOCK]
  assert a.tokens[2 * HASH_BLOCK :] != b.tokens[2 * HASH_BLOCK :]
  assert a.tokens[:HASH_BLOCK] != c.tokens[:HASH_BLOCK]
  assert a.tokens[HASH_BLOCK:] == c.tokens[HASH_BLOCK:]


@pytest.mark.parametrize(
  'row, words',
  [
    ('nonsense', 'line 1 is not JSON'),
    ('[1]', 'line 1 is not a JSON object'),
    ({'input_length': 1, 'output_length': 1}, "line 1 has no 'arrival'"),
    (
      {'arrival': -1, 'input_length': 1, 'output_length': 1},
      'arrival must be 0 or a positive number, got -1',
    ),
    ({'arrival': True, 'input_length': 1, 'output_length': 1}, 'got True'),
    ({'arrival': 0, 'input_length': 0, 'output_length': 1}, 'input_length must be a whole number'),
    ({'arrival': 0, 'input_length': 1, 'output_length': 2.5}, 'output_length must be a whole'),
    ({'arrival': 0, 'tokens': [], 'output_length': 1}, 'its list of tokens is empty'),
    ({'arrival': 0, 'tokens': [101], 'output_length': 1}, 'whole numbers from 0 to 100'),
    ('', 'has no requests'),
  ],
)
def test_a_line_that_is_no_request_is_named(tmp_path, row, words):
  with pytest.raises(RequestError) as refused:
    read_trace(log(tmp_path, row), 101)
  assert words in str(refused.value)


def test_a_log_that_is_not_there_is_named(tmp_path):
  with pytest.raises(RequestError, match="can't read .*nowhere.jsonl: No such file"):
    read_trace(str(tmp_path / 'nowhere.jsonl'), 101)


def test_requests_at_one_moment_have_no_rate_to_change(tmp_path):
  rows = [{'arrival': 3, 'input_length': 1, 'output_length': 1}] * 2
  with pytest.raises(RequestError, match='all requests of the trace arrive at once'):
    at_rate(read_trace(log(tmp_path, *rows), 101), 2)


def test_random_requests_have_the_lengths_and_the_rate_that_were_asked_for():
  trace = RandomTrace(4000, 200, 50, 0.5, shared_length=64)
  found = trace.arrivals(8, 32000)
  assert rate_of(found) == pytest.approx(8, rel=0.05)
  for lengths, mean in (([len(a.tokens) for a in found], 200), ([a.limit for a in found], 50)):
    assert statistics.mean(lengths) == pytest.approx(mean, rel=0.05)
    assert statistics.stdev(lengths) == pytest.approx(0.5 * mean, rel=0.1)
  beginnings = {a.tokens[:64] for a in found if len(a.tokens) > 64}
  assert len(beginnings) == 1
  rest = [a.tokens[64:70] for a in found if len(a.tokens) >= 70]
  assert len(set(rest)) == len(rest) > 3900


def test_another_rate_changes_the_times_alone():
  trace = RandomTrace(50, 20, 5, 0.5)
  slow, fast = trace.arrivals(1, 101), trace.arrivals(4, 101)
  assert [a[1:] for a in slow] == [a[1:] for a in fast]
  assert [a.seconds / 4 for a in slow] == pytest.approx([a.seconds for a in fast])


def test_without_a_spread_all_are_equal():
  assert {(len(a.tokens), a.limit) for a in RandomTrace(9, 20, 5).arrivals(1, 101)} == {(20, 5)}
