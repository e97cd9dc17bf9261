"""The infer command with adapters: rows choose them by name, whatever the batching."""

import json

import numpy as np
import pytest

from t5x_inference_ext.engine.engine import Engine
from tests.commands.infer_public_test import command, smollm2

pytestmark = pytest.mark.usefixtures('quick_programs')

__all__ = ['command', 'smollm2']
IDS = [17, 90, 4, 61, 33]


@pytest.fixture(scope='module')
def paths(testdata):
  names = {'lora': 'lora-0', 'ranks': 'lora-1', 'factors': 'ia3-0', 'soft': 'prompt-1'}
  return {name: testdata / 'adapters' / f'smollm2-{each}' for name, each in names.items()}


@pytest.fixture(scope='module')
def engine(smollm2, paths):
  return Engine.load(smollm2, mesh='1x1x1', dtype='float32', adapters=paths)


def flags_of(paths):
  first, *others = (f'{name}={path}' for name, path in paths.items())
  return [f'--adapters={first}', f'--adapters={",".join(others)}', '--max_new_tokens=8']


def test_rows_choose_adapters(command, smollm2, engine, paths):
  names = [None, *paths]
  rows = [{'prompt': IDS, 'adapter': name} for name in names] + [{'prompt': IDS}]
  found, out = command(smollm2, rows, *flags_of(paths), '--adapter=ranks')
  assert 'adapters: lora, ranks, factors, soft' in out
  wanted = engine.generate([IDS] * 6, max_new_tokens=8, adapter=[*names, 'ranks'])
  assert [row['tokens'] for row in found] == [each.tokens for each in wanted]
  assert len({tuple(each.tokens) for each in wanted}) > 3
  assert [row.get('adapter', 'none') for row in found] == [*names, 'none']


def test_adapters_in_static_batches_and_scores(command, smollm2, engine, paths):
  (wanted,) = engine.generate([IDS], max_new_tokens=8, adapter='soft')
  names = ['lora', None, 'soft', 'factors', 'lora']
  rows = [{'prompt': IDS}, *({'prompt': IDS, 'adapter': name} for name in names)]
  static = ('--adapter=soft', '--batching=static', '--batch_size=4')
  found, _ = command(smollm2, rows, *flags_of(paths), *static)
  alone = engine.generate([IDS] * 6, max_new_tokens=8, adapter=['soft', *names])
  assert [row['tokens'] for row in found] == [each.tokens for each in alone]
  assert found[0]['tokens'] == wanted.tokens
  rows = [{'prompt': IDS, 'tokens': wanted.tokens, 'adapter': name} for name in (None, *paths)]
  scored, _ = command(smollm2, rows, *flags_of(paths)[:2], '--mode=score')
  for name, each in zip((None, *paths), scored):
    ((*scores,),) = engine.score_completions([(IDS, wanted.tokens)], adapter=name)
    np.testing.assert_allclose(each['score'], sum(scores), rtol=1e-4)
  np.testing.assert_allclose(scored[-1]['score'], wanted.score, rtol=1e-4)
  assert len({round(each['score'], 3) for each in scored}) == 5


@pytest.mark.parametrize(
  'row, flags, message',
  [
    ({'adapter': 'other'}, (), ':1: no adapter other is loaded; loaded are lora, ranks'),
    ({'adapter': 3}, (), ':1: "adapter" must be the name of an adapter or null, not the number 3'),
    ({}, ('--adapter=other',), 'adapter=other is not among adapters, which has lora, ranks'),
    ({}, ('--adapters=lora',), 'adapters must be NAME=PATH, got lora'),
    ({}, ('--adapters=lora=x',), 'adapters name lora twice'),
    ({}, ('--adapters=a b=x',), "an adapter can't be named a b"),
    ({}, ('--adapters=more=/nothing',), '/nothing is not an adapter'),
    ({'sampling': {'temperature': 0.5}}, ('--batching=static',), 'need batching=continuous'),
    ({}, ('--cache_length=14', '--adapter=soft'), 'longer than the cache: 16 tokens'),
  ],
)
def test_what_is_refused_before_weights_are_loaded(command, smollm2, paths, row, flags, message):
  error = command(smollm2, [{'prompt': IDS, **row}], *flags_of(paths), *flags)
  assert isinstance(error, str) and message in error
  assert error.count('\n') == 1, json.dumps(error)
