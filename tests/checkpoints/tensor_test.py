"""Lazy tensors: any slice of a tensor is numpy's slice of the whole, and little more is read."""

from hypothesis import given, settings
from hypothesis import strategies as st
import ml_dtypes
import numpy as np
import pytest

from t5x_inference_ext.checkpoints.arrays import KernelLayout, KernelPart, SourceArray, whole_array
from t5x_inference_ext.checkpoints.tensor import Cast, InMemory, Stack, Tensor
from t5x_inference_ext.errors import CheckpointError


class Recording(InMemory):
  """Remembers how many values were asked of it."""

  asked = 0

  def _read(self, bounds):
    self.asked += int(np.prod([e - b for b, e in bounds]))
    return super()._read(bounds)


def numbers(*shape, dtype=np.float32):
  return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


def slices(shape):
  """Any slices of step 1, also empty, negative and open ones; possibly fewer than axes."""
  bound = lambda n: st.one_of(st.none(), st.integers(-n - 1, n + 1))
  each = [st.builds(slice, bound(n), bound(n)) for n in shape]
  return st.integers(0, len(shape)).flatmap(lambda k: st.tuples(*each[:k]))


def canonical(source: Tensor, inputs: int, axis: int, start: int, width: int, **part) -> Tensor:
  """Indices start to start + width of the part axis, from an array with layers on axis 1."""
  layers, *sizes = source.shape[1], source.shape[0], *source.shape[2:]
  parts = (KernelPart('name', start, width, **part),)
  layout = KernelLayout(layers, 1, tuple(sizes[:inputs]), tuple(sizes[inputs:]), parts, axis)
  return SourceArray(source, layout).tensors()['name']


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.data())
def test_any_slice_of_merged_heads(data):
  layers, heads, width, other, start, rest = (
    data.draw(st.integers(1, 4), label=n)
    for n in ('layers', 'heads', 'width', 'other', 'start', 'rest')
  )
  columns = start + width + rest
  if data.draw(st.booleans(), label='columns are outputs'):
    source = numbers(other, layers, heads, columns)
    view = canonical(InMemory(source, ''), 1, 2, start, width)
    whole = source.transpose(1, 0, 2, 3)[..., start : start + width].reshape(
      layers, other, heads * width
    )
  else:
    source = numbers(heads, layers, columns, other)
    view = canonical(InMemory(source, ''), 2, 1, start, width)
    whole = source.transpose(1, 0, 2, 3)[:, :, start : start + width].reshape(
      layers, heads * width, other
    )
  assert view.shape == whole.shape
  index = data.draw(slices(whole.shape), label='index')
  np.testing.assert_array_equal(view.read(index), whole[index], strict=True)
  np.testing.assert_array_equal(view.read(), whole, strict=True)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.data())
def test_any_slice_of_other_tensors(data):
  parts = [numbers(3, 4) + 100 * i for i in range(3)]
  axis = data.draw(st.integers(0, 2), label='axis')
  stacked = numbers(5, 3, 2, 2, 3)  # [E, L, parts, H, Q]
  scale = numbers(1, 3, 6) + 1
  tensors = [
    (Stack([InMemory(p, '') for p in parts], axis), np.stack(parts, axis)),
    (
      canonical(InMemory(stacked, ''), 1, 1, 1, 1),
      stacked[:, :, 1].swapaxes(0, 1).reshape(3, 5, 6),
    ),
    (
      canonical(InMemory(scale, ''), 1, 1, 2, 3, factor=3.0, reciprocal=True),
      1 / scale[0, :, 2:5] * np.float32(3),
    ),
    (whole_array(InMemory(numbers(3, 2, 4), ''), 'n', 0).tensors()['n'], numbers(3, 2, 4)),
    (whole_array(InMemory(numbers(3, 4), ''), 'n', 1).tensors()['n'], numbers(3, 4).T),
    (whole_array(InMemory(numbers(3, 4), ''), 'n', None).tensors()['n'], numbers(3, 4)),
    (whole_array(InMemory(numbers(4), ''), 'n', None).tensors()['n'], numbers(4)),
    (Cast(InMemory(parts[0], ''), np.int8, 'name'), parts[0].astype(np.int8)),
    (InMemory(parts[0], ''), parts[0]),
  ]
  tensor, whole = data.draw(st.sampled_from(tensors), label='tensor')
  index = data.draw(slices(whole.shape), label='index')
  np.testing.assert_array_equal(tensor.read(index), whole[index], strict=True)
  assert (tensor.shape, tensor.dtype) == (whole.shape, whole.dtype)


def test_reads_only_the_covering_heads_and_layers():
  source = Recording(numbers(5, 6, 8, 10), '')  # [E, L, H, C]
  view = canonical(source, 1, 2, 4, 3)
  view.read((slice(2, 3), slice(None), slice(7, 8)))  # one column of head 2
  assert source.asked == 5
  source.asked = 0
  view.read((slice(2, 3), slice(0, 2), slice(7, 11)))  # of heads 2 and 3
  assert source.asked == 2 * 2 * 3


def test_a_stack_reads_only_its_layers():
  parts = [Recording(numbers(4), '') for _ in range(3)]
  Stack(parts, 1).read((slice(None), slice(1, 2)))
  assert [p.asked for p in parts] == [0, 4, 0]


@pytest.mark.parametrize(
  'factor,dtype', [(0.5, ml_dtypes.bfloat16), (8.0, ml_dtypes.bfloat16), (3.0, np.float32)]
)
def test_scaling_bfloat16_rounds_nothing_away(factor, dtype):
  values = np.linspace(-1, 1, 50).astype(ml_dtypes.bfloat16)
  expected = (values.astype(np.float32) * np.float32(factor)).astype(dtype)
  part = KernelPart('name', 0, 50, factor)
  scaled = SourceArray(InMemory(values, ''), KernelLayout(None, 0, (), (50,), (part,), 0))
  np.testing.assert_array_equal(scaled.tensors()['name'].read(), expected, strict=True)


@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16])
def test_widened_int8_is_read_back_exactly(dtype):
  values = np.arange(-128, 128).astype(np.int8)
  cast = Cast(InMemory(values.astype(dtype), 'file'), np.int8, 'name')
  np.testing.assert_array_equal(cast.read(), values, strict=True)


@pytest.mark.parametrize('wrong', [0.5, 200.0, np.nan, np.inf])
def test_what_is_not_int8_is_an_error(wrong):
  with pytest.raises(CheckpointError, match='some/qkernel.*a/file.*int8'):
    Cast(InMemory(np.array([1.0, wrong], np.float32), 'a/file'), np.int8, 'some/qkernel').read()


@pytest.mark.parametrize('index', [(slice(0, 2, 2),), (slice(None),) * 3])
def test_wrong_indices(index):
  with pytest.raises(IndexError):
    InMemory(numbers(4, 4), '').read(index)
