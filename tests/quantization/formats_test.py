"""Formats of weights: their texts, dtypes and sizes, and int4 values as bytes."""

import ml_dtypes
import numpy as np
import pytest

from t5x_inference_ext import params
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.errors import UserError
from t5x_inference_ext.quantization import formats, nibbles

PARALLEL = ModelConfig(num_layers=1, d_model=8, d_ff=16, num_heads=2, d_head=4, vocab_size=8)
SERIAL = ModelConfig(**{**PARALLEL.to_dict(), 'block': 'serial'})


@pytest.mark.parametrize(
  'text',
  [
    *('float32', 'bfloat16', 'int8', 'int4', 'int4,gate:8,query:8'),
    *('int8,embedding:8', 'bfloat16,embedding:8,head:8'),
  ],
)
def test_a_format_is_its_text(text):
  assert str(formats.weight_format(text)) == text


@pytest.mark.parametrize(
  'text',
  [
    *('', 'float8', 'int4,', 'int4,gate:3', 'int4,query:8,gate:8', 'bfloat16,gate:8', 'int4 '),
    *('int4,embedding:4', 'bfloat16,embedding:8,gate:8', 'embedding:8'),
  ],
)
def test_no_format(text):
  with pytest.raises(ValueError, match='is no format of weights'):
    formats.weight_format(text)


def test_the_widest_matrix_decides():
  found = formats.weight_format('int4,gate:8')
  assert found.dtype('query').name == 'int4' and found.dtype('query', 'gate').name == 'int8'
  assert formats.stored_size(7, 'int4') == 4 and formats.stored_size(7, np.float32) == 28


@pytest.mark.parametrize(
  'text, scaled, embedding',
  [
    ('float32', (), 'float32'),
    ('int8', (params.MATRICES,), 'bfloat16'),
    ('int4,embedding:8,gate:8', (params.MATRICES, 'embedding'), 'int8'),
    ('bfloat16,embedding:8,head:8', ('embedding', 'head'), 'int8'),
  ],
)
def test_tables_are_float_unless_they_are_named(text, scaled, embedding):
  found = formats.weight_format(text)
  assert found.scaled == set(scaled) and found.dtype('embedding').name == embedding
  assert found.dtype('position_embedding') == formats.weight_format(
    str(found.with_float_tables())
  ).dtype('head')
  on_devices = found.on_devices('float32')
  assert formats.weight_format(on_devices).scaled == set(scaled)
  assert ('bfloat16' in on_devices, 'int' in on_devices.partition(',')[0]) == (
    False,
    params.MATRICES in scaled,
  )


def test_bits_of_tables():
  untied = ModelConfig(**{**SERIAL.to_dict(), 'tied_head': False})
  with_bits = formats.with_bits
  assert with_bits('int8', 'embedding:8', PARALLEL) == 'int8,embedding:8'
  assert with_bits('bfloat16', 'head:8,embedding:8', untied) == 'bfloat16,embedding:8,head:8'
  assert formats.served_format('int4,head:8,gate:8', untied) == 'int4,gate:8,head:8'


def test_matrices_that_share_a_scale_have_equal_bits():
  both = 'int4,attention_output:8,mlp_output:8'
  assert formats.with_bits('int4', 'mlp_output:8', PARALLEL) == both
  assert formats.with_bits('int4', 'mlp_output:8', SERIAL) == 'int4,mlp_output:8'
  assert formats.with_bits('int8', 'query:4,gate:8', PARALLEL) == 'int8,query:4'
  with pytest.raises(UserError, match='attention_output and mlp_output share one scale'):
    formats.with_bits('int4', 'attention_output:4,mlp_output:8', PARALLEL)


@pytest.mark.parametrize(
  'weights, bits, message',
  [
    ('int4', 'gate', 'bits must be TENSOR:8 or TENSOR:4, separated by commas, got gate'),
    ('int4', 'gate:3', 'bits must be TENSOR:8 or TENSOR:4, separated by commas, got gate:3'),
    ('int4', 'wi:8', 'wi is no matrix of this model, and no table .*: it has embedding, query'),
    ('int8', 'head:8', 'head is no matrix of this model, and no table'),
    ('int8', 'position_embedding:8', 'position_embedding is no matrix'),
    ('int4', 'embedding:4', 'bits=embedding:4: a table is int8 or float, so give embedding:8'),
    ('bfloat16', 'gate:8', 'bits=gate:8 is for int8 and int4 weights, not for bfloat16'),
  ],
)
def test_wrong_bits(weights, bits, message):
  with pytest.raises(UserError, match=message):
    formats.with_bits(weights, bits, PARALLEL)


@pytest.mark.parametrize('rows', [1, 2, 5, 8])
def test_bytes_of_int4(rows):
  values = np.random.default_rng(rows).integers(-7, 8, (3, rows, 5)).astype(ml_dtypes.int4)
  packed = nibbles.pack(values)
  assert packed.shape == nibbles.packed_shape(values.shape) and packed.dtype == np.uint8
  assert packed[0, 0, 0] & 15 == int(values[0, 0, 0]) % 16  # the even row, as two's complement
  for first in range(min(2, rows)):
    found = nibbles.unpack(packed, first, rows - first)
    np.testing.assert_array_equal(found, values[:, first:], strict=True)
