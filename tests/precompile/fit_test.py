"""A lack of memory is an answer: what is missing, and which layout, batch or slice would fit."""

import dataclasses

import jax
import pytest

from t5x_inference_ext.config import preset
from t5x_inference_ext.errors import MeshError, UserError
from t5x_inference_ext.precompile import fit, slices
from t5x_inference_ext.precompile.case import CompileCase
from t5x_inference_ext.precompile.fit import Shortage
from t5x_inference_ext.precompile.memory import CompiledMemory
from t5x_inference_ext.precompile.program import Program
from t5x_inference_ext.sharding.layout import Layout
from t5x_inference_ext.sharding.torus import parse_slice

GIB = 2**30
SMALL = preset('palm_tiny', num_layers=2)
SLICE = parse_slice('v4:2x2x1')
# palm_62b on 16 chips, with a cache that is too large.
LARGE = CompileCase(preset('palm_62b'), 'bfloat16', 'decode', batch=512, context=8192)


def _shortage(case, slice_, needed):
  weights, cache = fit.held_bytes(case, dict(zip('xyz', (4, 2, 2))))
  return Shortage(case, slice_, needed, 30 * GIB, weights, cache, 'the compiler said no')


class Compiler:
  """A compiler that takes what `fits` accepts, and remembers what it was asked."""

  def __init__(self, fits):
    self.fits, self.asked = fits, []

  def __call__(self, case, slice_):
    self.asked.append((str(case.layout), case.batch, str(slice_)))
    if self.fits(case, slice_):
      return Program(case, None, None, (), CompiledMemory(1, 1, 1, 1, 30 * GIB), 0.0)
    return _shortage(case, slice_, 40 * GIB)


def test_arithmetic_counts_weights_and_cache():
  weights, cache = fit.held_bytes(LARGE, dict(x=4, y=2, z=2))
  assert weights == pytest.approx(2 * LARGE.config.num_params / 16, rel=0.01)
  # [L, B, K, S, Q] of keys and of values, in 2 bytes, rows over all 16 chips.
  assert cache == pytest.approx(2 * 2 * 64 * 512 * 8192 * 256 / 16, rel=1e-6)


def test_one_alternative_of_each_kind_confirmed_by_the_compiler():
  compiler = Compiler(lambda case, slice_: True)
  found = fit.alternatives(_shortage(LARGE, parse_slice('v4:2x2x4'), 45 * GIB), compiler)
  by_change = {a.change: a for a in found}
  assert set(by_change) == {
    'batch',
    'slice',
  }  # in decode no layout holds less than rows over all chips
  assert 0 < by_change['batch'].program.case.batch < LARGE.batch
  assert by_change['slice'].slice.chips > 16 and by_change['slice'].program.case == LARGE
  assert len(compiler.asked) == 2


def test_a_layout_that_holds_less_is_found():
  case = dataclasses.replace(LARGE, layout=Layout.parse('ws_2d/heads'), batch=16)
  mesh = dict(x=4, y=2, z=2)
  assert sum(fit.held_bytes(case, mesh)) > sum(
    fit.held_bytes(dataclasses.replace(case, layout=Layout()), mesh)
  )
  found = fit.alternatives(
    _shortage(case, parse_slice('v4:2x2x4'), 45 * GIB), Compiler(lambda *_: True)
  )
  assert [str(a.program.case.layout) for a in found if a.change == 'layout'] == ['ws_2d/batch']


def test_a_prefill_tries_the_layouts_that_the_phase_has():
  case = dataclasses.replace(LARGE, phase='prefill', batch=64, context=2048)
  compiler = Compiler(lambda case, slice_: case.layout.feedforward == 'wg_xy')
  found = fit.alternatives(_shortage(case, parse_slice('v4:2x2x4'), 45 * GIB), compiler)
  # Tries are bounded: ws_2d/heads, wg_x/batch, wg_xy/batch.
  assert [(a.change, str(a.program.case.layout)) for a in found] == [('layout', 'wg_xy/batch')]
  assert [layout for layout, *_ in compiler.asked][:3] == [
    'ws_2d/heads',
    'wg_x/batch',
    'wg_xy/batch',
  ]
  assert len(compiler.asked) <= 3 * fit.TRIES


def test_batches_get_smaller_until_the_compiler_agrees():
  compiler = Compiler(lambda case, slice_: case.batch <= 64)
  found = fit.alternatives(_shortage(LARGE, parse_slice('v4:2x2x4'), 45 * GIB), compiler)
  assert [a.program.case.batch for a in found if a.change == 'batch'] == [64]
  batches = [batch for _, batch, slice_ in compiler.asked if slice_ == 'v4:2x2x4']
  assert batches == sorted(batches, reverse=True)


def test_weights_that_do_not_fit_leave_only_larger_slices():
  case = CompileCase(preset('palm_540b'), 'bfloat16', 'decode', 1, 128)
  shortage = Shortage(case, parse_slice('v4:2x2x1'), 300 * GIB, 30 * GIB, 270 * GIB, 0, '')
  found = fit.alternatives(shortage, Compiler(lambda *_: True))
  assert [(a.change, str(a.slice)) for a in found] == [('slice', 'v4:4x4x4')]


def test_one_row_has_no_smaller_batch():
  compiler = Compiler(lambda case, slice_: slice_.chips > 16)
  one_row = dataclasses.replace(LARGE, batch=1)
  found = fit.alternatives(_shortage(one_row, parse_slice('v4:2x2x4'), 45 * GIB), compiler)
  assert [a.change for a in found] == ['slice']
  assert {batch for _, batch, _ in compiler.asked} == {1}


def test_nothing_may_fit():
  found = fit.alternatives(
    _shortage(LARGE, parse_slice('v4:2x2x4'), 45 * GIB), Compiler(lambda *_: False)
  )
  assert found == []


@pytest.mark.libtpu
def test_what_arithmetic_rules_out_is_not_compiled():
  case = CompileCase(SMALL, 'int8', 'decode', batch=4096, context=2**19)
  found = fit.try_compile(case, SLICE)
  assert (
    isinstance(found, Shortage)
    and found.cache > 100 * GIB
    and found.available == slices.available_bytes('v4')
  )
  assert found.needed == found.weights + found.cache and 'nothing was compiled' in found.message


@pytest.mark.libtpu
def test_the_compiler_s_word_becomes_an_answer():
  """The cache alone would fit; what the program needs besides does not."""
  case = CompileCase(SMALL, 'int8', 'prefill', batch=1024, context=2**15)
  found = fit.try_compile(case, SLICE)
  assert isinstance(found, Shortage) and 'RESOURCE_EXHAUSTED' in found.message
  assert found.weights + found.cache < found.available < found.needed


@pytest.mark.libtpu
def test_what_fits_is_a_program():
  found = fit.try_compile(CompileCase(SMALL, 'int8', 'decode', batch=8, context=128), SLICE)
  assert isinstance(found, Program) and found.memory.needed < found.memory.available


@pytest.mark.libtpu
def test_rows_that_a_layout_cannot_split_are_an_error():
  with pytest.raises(MeshError, match='use a batch that is a multiple of 4'):
    fit.try_compile(
      CompileCase(SMALL, 'int8', 'decode', 3, 128, Layout.parse('wg_xyz/batch')), SLICE
    )


@pytest.mark.libtpu
def test_another_refusal_of_the_compiler_is_an_error(monkeypatch):
  def refuse(*_):
    raise jax.errors.JaxRuntimeError('UNIMPLEMENTED: no such thing\nmore')

  monkeypatch.setattr(fit, 'compile_case', refuse)
  with pytest.raises(
    UserError,
    match='the TPU compiler refused decode in ws_2d/batch for v4:2x2x1: UNIMPLEMENTED: no',
  ):
    fit.try_compile(CompileCase(SMALL, 'int8', 'decode', 8, 128), SLICE)
