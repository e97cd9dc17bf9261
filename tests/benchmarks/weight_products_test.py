"""int4 and int8 weights stay as they are in memory: products convert them inside."""

import dataclasses
import math

import pytest

from benchmarks import weight_products
from t5x_inference_ext.config import preset
from t5x_inference_ext.precompile.analysis import analyze
from t5x_inference_ext.precompile.hlo_parser import parse_hlo
from t5x_inference_ext.precompile.loops import executed
from t5x_inference_ext.sharding.torus import parse_slice


@pytest.mark.libtpu
@pytest.mark.parametrize('dtype, element', [('bfloat16', 'bf16'), ('int8', 's8'), ('int4', 's4')])
def test_a_product_reads_the_matrix_as_it_is(dtype, element):
  slice_, shape = parse_slice('v4:2x2x1'), (2048, 1024)
  text = weight_products.compiled_text(slice_, 16, shape, dtype)
  runs, _ = executed(parse_hlo(text))
  read = [s for run in runs for s in run.instruction.shapes if s.elements == math.prod(shape)]
  assert read and {s.dtype for s in read} == {element}
  assert not weight_products.float_copies(text, math.prod(shape)) or dtype == 'bfloat16'


@pytest.mark.libtpu
@pytest.mark.parametrize(
  'model, slice_name, batch', [('palm_540b', 'v4:2x2x4', 16), ('palm_62b', 'v5e:2x2', 8)]
)
def test_a_decode_step_in_int4(model, slice_name, batch):
  """Two layers: half of int8's bytes, and no float copy of a matrix in HBM."""
  config = dataclasses.replace(preset(model), num_layers=2)
  held = {}
  for weights in ('int8', 'int4'):
    found = analyze(
      config, weights, slice_name, 'decode', batch, 2048, layout='ws_2d/batch', scan_layers=False
    )
    program, estimate = found.compiled
    assert estimate.offending_relayouts == ()
    held[weights] = program.memory.weights + program.memory.other
    smallest = min(
      math.prod(getattr(part, field).sharding.shard_shape(getattr(part, field).shape))
      for layer in program.arguments[0].layers
      for part in layer.values()
      for field in ('w_in', 'w_out')
    )
    table = program.arguments[0].embedding
    rows = math.prod(table.sharding.shard_shape(table.shape))
    copies = weight_products.float_copies(program.text, smallest)
    assert all(f'[{rows // config.d_model}' in made for made in copies), copies
  matrices = sum(
    math.prod(getattr(part, field).sharding.shard_shape(getattr(part, field).shape))
    for layer in program.arguments[0].layers
    for part in layer.values()
    for field in ('w_in', 'w_out')
  )
  assert held['int8'] - held['int4'] == pytest.approx(matrices / 2, rel=0.02)
