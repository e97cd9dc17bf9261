"""Slices, blocks and rectangles: every value once, whole chunks, bounded memory, equal scales."""

import threading

from hypothesis import given, settings
from hypothesis import strategies as st
import ml_dtypes
import numpy as np
import pytest

from t5x_inference_ext import params
from t5x_inference_ext.checkpoints import convert, open_checkpoint
from t5x_inference_ext.checkpoints.arrays import KernelLayout, KernelPart, Rectangle, SourceArray
from t5x_inference_ext.checkpoints.conversion.conversion import Conversion
from t5x_inference_ext.checkpoints.conversion.options import ConvertOptions
from t5x_inference_ext.checkpoints.conversion.pipeline import Pipeline
from t5x_inference_ext.checkpoints.conversion.rounding_error import RoundingError
from t5x_inference_ext.checkpoints.conversion.slices import ConversionPlan
from t5x_inference_ext.checkpoints.readers.zarr_arrays import ZarrTensor
from t5x_inference_ext.checkpoints.tensor import InMemory
from t5x_inference_ext.checkpoints.workers import run_jobs
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.errors import UserError
from t5x_inference_ext.quantization import rounding
from tests.checkpoints import synthetic

VALUES = synthetic.canonical()
LEAVES = synthetic.fused(VALUES)


@st.composite
def arrangements(draw):
  """An arrangement, and bounds in it."""
  layers = draw(st.sampled_from([None, 1, 3]))
  inputs = tuple(draw(st.lists(st.integers(1, 4), min_size=0, max_size=2)))
  outputs = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
  sizes = inputs + outputs
  axis = draw(st.integers(0, len(sizes) - 1))
  cut = draw(st.integers(0, sizes[axis]))
  parts = tuple(
    KernelPart(f'p{i}', start, width)
    for i, (start, width) in enumerate(((0, cut), (cut, sizes[axis] - cut)))
    if width
  )
  layer_axis = 0 if layers is None else draw(st.integers(0, len(sizes)))
  arrangement = KernelLayout(layers, layer_axis, inputs, outputs, parts, axis)
  bounds = []
  for n in arrangement.factored:
    begin = draw(st.integers(0, n - 1))
    bounds.append((begin, draw(st.integers(begin + 1, n))))
  return arrangement, tuple(bounds)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(arrangements())
def test_rectangles_and_pieces_are_inverse(drawn):
  """A block cut into canonical rectangles, and those put back as pieces, is the block."""
  arrangement, bounds = drawn
  shape = arrangement.to_stored(arrangement.factored)
  stored = np.arange(np.prod(shape, dtype=int)).reshape(shape)
  source = SourceArray(InMemory(stored, 'here'), arrangement)
  values = source.read(bounds)
  again = np.full(arrangement.factored, -1)
  for part, rectangle, block in source.rectangles(values, bounds):
    assert block.shape == tuple(e - b for b, e in rectangle)
    for where, index in arrangement.pieces(part, rectangle):
      target = again[tuple(slice(*b) for b in where)]
      assert (target == -1).all()
      target[...] = block[index]
  inside = tuple(slice(*b) for b in bounds)
  np.testing.assert_array_equal(again[inside], values)
  again[inside] = -1
  assert (again == -1).all()


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(1, 9), st.sampled_from([1, 300, 5000, 2**20]), st.booleans())
def test_a_plan_covers_everything_once(chunk, slice_bytes, finds_scales):
  arrays = []
  for shape, layers, inputs, outputs, axis, parts in (
    ((8, 2, 3, 20), 2, (8,), (3, 20), 2, ((('query', 0, 4), ('gate', 4, 8), ('linear', 12, 8)))),
    ((3, 2, 12, 8), 2, (3, 12), (8,), 1, (('attention_output', 0, 4), ('mlp_output', 4, 8))),
    ((12, 8), None, (12,), (8,), 0, (('embedding', 0, 12),)),
  ):
    tensor = InMemory(np.zeros(shape, np.float32), 'here')
    tensor.chunk = tuple(min(n, chunk) for n in shape)
    arrays.append(
      SourceArray(
        tensor, KernelLayout(layers, 1, inputs, outputs, tuple(KernelPart(*p) for p in parts), axis)
      )
    )
  finds = lambda name: finds_scales and name != 'embedding'  # noqa: E731
  plan = ConversionPlan(arrays, synthetic.CONFIG, finds, slice_bytes)
  seen = [np.zeros(a.arrangement.factored, int) for a in arrays]
  for number, piece in enumerate(plan.slices):
    assert piece.number == number and plan.nbytes(piece) <= plan.slice_bytes
    for box in piece.boxes:
      inputs = len(arrays[box.array].arrangement.inputs)
      if piece.scaled:  # whole columns
        assert all(
          b == (0, n)
          for b, n in zip(box.bounds[1 : 1 + inputs], arrays[box.array].arrangement.inputs)
        )
    for block in plan.blocks(piece):
      seen[block.array][tuple(slice(*b) for b in block.bounds)] += 1
      assert arrays[block.array].nbytes(block.bounds) <= plan.block_bytes
      for (begin, end), c, n in zip(
        block.bounds, arrays[block.array].chunk, arrays[block.array].arrangement.factored
      ):
        assert begin % c == 0 and (end % c == 0 or end == n)  # whole chunks
  assert all((count == 1).all() for count in seen)
  assert any(piece.scaled for piece in plan.slices) == finds_scales


def counted_reads(monkeypatch) -> list:
  reads, original = [], ZarrTensor._read

  def read(self, bounds):
    reads.append((self.name, bounds))
    return original(self, bounds)

  monkeypatch.setattr(ZarrTensor, '_read', read)
  return reads


@pytest.mark.parametrize(
  'search,hold,times', [('absmax', 10**6, 1), ('absmax', 0, 2), ('mse', 0, 3), ('mse', 10**6, 1)]
)
def test_what_is_held_is_read_once(tmp_path, monkeypatch, search, hold, times):
  source = synthetic.write_legacy(tmp_path / 'source', LEAVES, chunks=4)
  convert.convert(source, tmp_path / 'reference', scale_search=search)
  reads = counted_reads(monkeypatch)
  lines = []
  convert.convert(
    source,
    tmp_path / 'out',
    hold_bytes=hold,
    slice_bytes=1,
    workers=2,
    scale_search=search,
    planned=lines.append,
  )
  assert any('of memory' in line for line in lines)
  said = {1: '', 2: 'read twice', 3: 'read a third time'}[times]
  assert (said in lines[-1]) and (times == 1) == (len(lines) == 1)
  kernels = [read for read in reads if 'fused' in read[0]]
  assert kernels and all(kernels.count(read) == times for read in kernels)
  assert (tmp_path / 'out' / 'checksums.json').read_text() == (
    tmp_path / 'reference' / 'checksums.json'
  ).read_text()


def test_mse_scales_are_better_and_do_not_depend_on_chunks(tmp_path):
  reports = {}
  for search in ('absmax', 'mse'):
    for chunks in (None, 3):
      source = synthetic.write_legacy(tmp_path / f'{search}{chunks}', LEAVES, chunks=chunks)
      out = tmp_path / f'out{search}{chunks}'
      reports[search, chunks] = convert.convert(source, out, scale_search=search, slice_bytes=1)
    assert (tmp_path / f'out{search}None' / 'checksums.json').read_bytes() == (
      out / 'checksums.json'
    ).read_bytes()
  for name, p in params.parameters(synthetic.CONFIG).items():
    if p.kind == 'matrix' and p.scale != 'output_scale':
      assert (
        reports['mse', None].errors[name].squares <= reports['absmax', None].errors[name].squares
      )
  together = lambda report: (
    report.errors['attention_output'].squares + report.errors['mlp_output'].squares
  )
  assert together(reports['mse', None]) <= together(reports['absmax', None])


def to_int8(w, scale):
  return RoundingError().round(w, scale, np.dtype(np.int8), 0.0)


def test_squared_errors_are_what_they_say():
  w = np.random.default_rng(0).standard_normal((2, 3000, 3)).astype(np.float32)
  w[:, 0] *= 1.5  # outliers, that are worth clipping
  scale = rounding.scales_of(rounding.largest(w))
  errors = rounding.squared_errors(w, scale)
  for i, factor in enumerate(rounding.searched(np.dtype(np.int8))):
    s = (scale * np.float32(factor)).astype(np.float32)
    exact = np.square(rounding.dequantize(to_int8(w, s), s[:, None]).astype(np.float64) - w).sum(1)
    np.testing.assert_allclose(
      errors[i] * (s.astype(np.float64) ** 2) / rounding.SQUARE_UNITS, exact, rtol=1e-4
    )
  halves = rounding.squared_errors(w[:, :20], scale) + rounding.squared_errors(w[:, 20:], scale)
  np.testing.assert_array_equal(errors, halves)
  best = rounding.best_scales(scale, errors)
  assert (best <= scale).all() and (best < scale).any()
  written = [rounding.dequantize(to_int8(w, s), s[:, None]) for s in (scale, best)]
  assert np.square(written[1] - w).sum() < np.square(written[0] - w).sum()


@pytest.mark.parametrize('size', [1e-30, 1e-3, 1e25])
def test_errors_of_values_whose_squares_no_float32_holds(size):
  w = (np.random.default_rng(0).standard_normal((1, 50, 3)) * size).astype(np.float32)
  error = RoundingError()
  written = error.round(w, None, np.dtype(ml_dtypes.bfloat16), float(np.abs(w).max()))
  exact = w.astype(np.float64)
  expected = np.linalg.norm(written.astype(np.float64) - exact) / np.linalg.norm(exact)
  np.testing.assert_allclose(error.relative, expected, rtol=1e-4)


def test_memory_said_does_not_grow_with_the_model():
  """Of blocks and slices alone: the same chunks, four times the layers."""

  def peak(layers):
    config = ModelConfig(
      num_layers=layers, d_model=8, d_ff=24, num_heads=3, d_head=4, vocab_size=12
    )
    tensors = {name: np.zeros(p.shape, np.float32) for name, p in params.parameters(config).items()}
    tree = {}
    for name, values in synthetic.fused(tensors, config).items():
      tree[name] = values
    array = InMemory(tree['decoder/decoder/q_wi_fused/kernel'], 'here')
    array.chunk = (8, 1, 3, 20)
    parts = (KernelPart('query', 0, 4), KernelPart('gate', 4, 8), KernelPart('linear', 12, 8))
    plan = ConversionPlan(
      [SourceArray(array, KernelLayout(layers, 1, (8,), (3, 20), parts, 2))],
      config,
      lambda name: True,
      1,
    )
    return plan.slice_bytes, plan.block_bytes <= 8 * layers * 60 * 4

  assert peak(1)[0] == peak(4)[0]


@pytest.mark.parametrize(
  'options,words',
  [
    (dict(format='gguf'), 'serving, t5x_int8, t5x_float'),
    (dict(scale_search='best'), 'absmax, mse'),
    (dict(workers=0), 'at least 1'),
    (dict(workers=100_000), 'at most 1024'),
  ],
)
def test_options_that_are_not(tmp_path, options, words):
  source = synthetic.write_legacy(tmp_path / 'source', LEAVES)
  with pytest.raises(UserError, match=words):
    convert.convert(source, tmp_path / 'out', **options)
  assert [p.name for p in tmp_path.iterdir()] == ['source']


class _Work:
  """Steps of jobs that note what runs."""

  def __init__(self, name, steps, log, ahead=True):
    self._name, self._steps, self._log, self._ahead = name, iter(steps), log, ahead

  def may_start(self):
    return self._ahead

  def jobs(self):
    step = next(self._steps, None)
    self._log.append((self._name, 'end' if step is None else 'step'))
    return None if step is None else [lambda job=job: job() for job in step]


@pytest.mark.parametrize('workers', [1, 2, 5])
def test_a_pipeline_runs_steps_in_order(workers):
  log, done = [], []
  works = (
    _Work(n, [[lambda n=n, s=s: done.append((n, s))] * 3 for s in range(2)] + [[]], log)
    for n in range(4)
  )
  Pipeline(works, workers).run()
  assert len(done) == 24 and [name for name, what in log if what == 'end'] == [0, 1, 2, 3]
  for n in range(4):
    assert [s for name, s in done if name == n] == [0] * 3 + [1] * 3
  if workers == 1:  # nothing is begun ahead, so nothing more than one slice is lost
    assert [n for n, _ in done] == sorted(n for n, _ in done)


def test_a_pipeline_reads_ahead():
  """While the last job of a slice's step runs, the next slice begins."""
  ahead = threading.Event()
  works = [_Work(0, [[lambda: ahead.wait(30)]], []), _Work(1, [[ahead.set]], [])]
  Pipeline(iter(works), 2).run()
  assert ahead.is_set()


def test_a_pipeline_ends_with_the_first_error():
  def fail():
    raise KeyError('this')

  with pytest.raises(KeyError, match='this'):
    run_jobs([fail] + [lambda: None] * 5, 3)
  run_jobs([], 3)


def test_rectangles_name_layers_rows_and_columns():
  assert Rectangle((0, 1), (2, 3), (4, 5))._fields == ('layers', 'rows', 'columns')


def test_a_conversion_says_how_much_memory_it_takes(tmp_path):
  source = open_checkpoint(synthetic.write_legacy(tmp_path / 'source', LEAVES))
  small, large = (
    Conversion(source, ConvertOptions(workers=n), str(tmp_path), lambda *_: None).peak_bytes
    for n in (1, 64)
  )
  assert small < large < small + 64 * 4 * max(v.nbytes for v in LEAVES.values())
