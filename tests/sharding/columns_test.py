"""One account of a shard's columns: weights, products and traffic have the same."""

import itertools

import pytest

from t5x_inference_ext import params
from t5x_inference_ext.config import ModelConfig, preset
from t5x_inference_ext.sharding.columns import column_widths, input_parts, row_widths
from t5x_inference_ext.sharding.heads import kv_columns, query_columns, stored_heads
from t5x_inference_ext.sharding.layout import Layout
from t5x_inference_ext.sharding.packing import packed_tensors

MODELS = {
  'palm_540b': preset('palm_540b'),
  'megatron_530b': preset('megatron_530b'),
  'grouped': ModelConfig(2, 128, 256, 12, 8, 101, num_kv_heads=3),
}


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('layout', ['ws_1d', 'ws_2d'])
def test_widths_are_those_of_the_arrays(name, layout):
  config, mesh = MODELS[name], dict(x=2, y=8, z=4)
  shards = 64 if layout == 'ws_1d' else 32
  tensors = packed_tensors(config, Layout(layout), mesh, (params.MATRICES,))
  stored = stored_heads(config, shards)
  for part in config.block_parts:
    columns, rows = column_widths(config, part, shards), row_widths(config, part, shards)
    assert tensors[f'{part.name}/w_in'].shape[1] == shards * sum(columns.values())
    assert tensors[f'{part.name}/in_scale'].shape == (shards * sum(columns.values()),)
    assert tensors[f'{part.name}/w_out'].shape[0] == shards * sum(rows.values())
    if part.attention:
      assert columns['attention'] == query_columns(config, stored) + kv_columns(config, stored)[1]
      assert rows['attention_output'] == query_columns(config, stored)
    if part.mlp:
      assert {columns[n] for n in config.mlp_inputs} == {rows['mlp_output']}
      assert rows['mlp_output'] == config.d_ff // shards


def test_parts_in_order():
  (part,) = MODELS['palm_540b'].block_parts
  assert list(column_widths(MODELS['palm_540b'], part, 16)) == ['gate', 'linear', 'attention']
  assert list(row_widths(MODELS['palm_540b'], part, 16)) == ['mlp_output', 'attention_output']
  names = [p.names for p in input_parts(MODELS['palm_540b'], part, 16)]
  assert list(itertools.chain(*names)) == ['gate', 'linear', 'query', 'key', 'value']
