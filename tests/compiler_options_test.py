"""The options of the compiler reach every program of the package."""

import types

import jax
import jax.numpy as jnp
import pytest

from t5x_inference_ext import compiler_options as module
from t5x_inference_ext.config import preset
from t5x_inference_ext.engine import programs
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.precompile import program as precompiled
from t5x_inference_ext.precompile import slices
from t5x_inference_ext.precompile.case import CompileCase
from t5x_inference_ext.precompile.program import abstract_weights, compile_case
from t5x_inference_ext.quantization.formats import weight_format
from t5x_inference_ext.sharding.layout import Layout
from t5x_inference_ext.sharding.mesh import make_mesh
from t5x_inference_ext.sharding.torus import parse_slice

SMALL = preset('palm_tiny', num_layers=2)
# No compiler has it, so that it is refused by the first program that it reaches.
UNKNOWN = 'xla_no_compiler_has_this_option'


@pytest.fixture
def unknown_option(monkeypatch):
  monkeypatch.setitem(module._OF_KIND, jax.devices()[0].device_kind, {UNKNOWN: True})


def test_cpus_keep_the_compiler_s_defaults():
  assert module.compiler_options(jax.devices()[0]) is None


def test_options_are_of_the_kind_of_device():
  options = {
    kind: bool(module.compiler_options(types.SimpleNamespace(device_kind=kind)))
    for kind in ('TPU v4', 'TPU v5 lite', 'TPU v5', 'TPU v6 lite', 'NVIDIA H200')
  }
  assert [kind for kind, given in options.items() if given] == ['TPU v4', 'TPU v5']


def test_no_weight_stays_on_the_chip_beside_a_quantized_table():
  options = {}
  for kind in ('TPU v4', 'TPU v6 lite', 'NVIDIA H200'):
    device = types.SimpleNamespace(device_kind=kind)
    plain = module.compiler_options(device, weight_format('int8').scaled)
    assert plain == module.compiler_options(device)
    table = module.compiler_options(device, weight_format('int8,embedding:8').scaled)
    options[kind] = {
      name: value for name, value in (table or {}).items() if not plain or name not in plain
    }
  added = {'xla_max_cross_program_prefetches': '0'}
  assert options == {'TPU v4': added, 'TPU v6 lite': added, 'NVIDIA H200': {}}


def test_programs_of_the_engine_take_the_options(unknown_option):
  model = Model(SMALL, make_mesh((1, 1, 1)))
  weights = abstract_weights(model, 'int8')
  tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
  lowered = programs._replicated(Model.logits).lower(model, weights, tokens)
  with pytest.raises(jax.errors.JaxRuntimeError, match=UNKNOWN):
    lowered.compile()


def test_programs_of_precompile_take_the_options(unknown_option):
  case = CompileCase(SMALL, 'int8', 'decode', 2, 16)
  with pytest.raises(jax.errors.JaxRuntimeError, match=UNKNOWN):
    compile_case(case, make_mesh((1, 1, 1)))


@pytest.mark.libtpu
@pytest.mark.parametrize(
  'name,starts',
  [('v4:2x2x1', ('all-gather-start', 'all-to-all-start')), ('v5p:2x2x1', ('all-to-all-start',))],
)
def test_the_options_make_collectives_asynchronous(monkeypatch, name, starts):
  slice_ = parse_slice(name)
  case = CompileCase(SMALL, 'int8', 'decode', 8, 128, Layout.parse('ws_2d/batch'))
  mesh = slices.slice_mesh(slice_, SMALL, (2, 2, 1))
  with_options = compile_case(case, mesh).text
  monkeypatch.setattr(precompiled, 'compiler_options', lambda device, scaled: None)
  without = compile_case(case, mesh).text
  for start in starts:
    assert start in with_options and start not in without
