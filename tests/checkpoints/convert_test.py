"""Conversion: contents against a numpy oracle, exact copies, errors, and never half a directory."""

import contextlib
import itertools
import multiprocessing
import os
import pathlib
import signal

import ml_dtypes
import numpy as np
import pytest

from t5x_inference_ext import params
from t5x_inference_ext.checkpoints import convert, open_checkpoint, serving
from t5x_inference_ext.checkpoints.conversion import files
from t5x_inference_ext.checkpoints.conversion.work_directory import WorkDirectory
from t5x_inference_ext.checkpoints.unfinished import MARKER
from t5x_inference_ext.errors import CheckpointError, UserError
from tests.checkpoints import synthetic

VALUES = synthetic.canonical()
VALUES['query'][1, :, 3] = 0  # a channel of zeros
MATRICES = [name for name, p in params.parameters(synthetic.CONFIG).items() if p.kind == 'matrix']


@pytest.fixture
def source(tmp_path) -> pathlib.Path:
  return synthetic.write_legacy(tmp_path / 'source', synthetic.fused(VALUES))


@pytest.fixture(params=['one chunk a layer', 'many chunks'])
def chunking(request, monkeypatch):
  if request.param == 'many chunks':
    monkeypatch.setattr(serving, 'MAX_CHUNK_ROWS', 5)
    monkeypatch.setattr(serving, 'MAX_CHUNK_COLUMNS', 5)
    monkeypatch.setattr(serving, 'MAX_CHUNK_BYTES', 12)


def read(path):
  return {name: tensor.read() for name, tensor in open_checkpoint(path).tensors.items()}


def oracle_scales(values):
  """[L, out] by name: max|w| / 127 of each output channel, over both output matrices for theirs."""
  largest = {name: np.abs(values[name]).max(1) for name in MATRICES}
  scales = {
    f'{n}_scale': largest[n] / np.float32(127) for n in ('query', 'key', 'value', 'gate', 'linear')
  }
  scales['output_scale'] = np.maximum(
    largest['attention_output'], largest['mlp_output']
  ) / np.float32(127)
  return {name: np.where(s > 0, s, np.float32(1)) for name, s in scales.items()}


def test_int8_contents(source, tmp_path, chunking):
  report = convert.convert(source, tmp_path / 'out')
  out, scales = read(tmp_path / 'out'), oracle_scales(VALUES)
  for name, scale in scales.items():
    np.testing.assert_array_equal(out[name], scale, strict=True, err_msg=name)
  for name in MATRICES:
    scale = scales[params.parameters(synthetic.CONFIG)[name].scale][:, None, :]
    expected = np.rint(VALUES[name] / scale)
    np.testing.assert_array_equal(out[name], expected.astype(np.int8), strict=True, err_msg=name)
    assert np.abs(out[name].astype(int)).max() <= 127
    error = np.abs(out[name] * scale - VALUES[name])
    assert (error <= scale * 0.5000001).all()
    measured = report.errors[name]
    np.testing.assert_allclose(measured.worst, error.max() / np.abs(VALUES[name]).max(), rtol=1e-5)
    np.testing.assert_allclose(
      measured.relative, np.linalg.norm(error) / np.linalg.norm(VALUES[name]), rtol=1e-5
    )
  assert not out['query'][1, :, 3].any()
  np.testing.assert_array_equal(
    out['embedding'], VALUES['embedding'].astype(ml_dtypes.bfloat16), strict=True
  )
  for name in ('final_norm', 'layer_norm'):
    np.testing.assert_array_equal(out[name], VALUES[name], strict=True)


def test_bfloat16_contents(source, tmp_path, chunking):
  convert.convert(source, tmp_path / 'out', 'bfloat16')
  out = read(tmp_path / 'out')
  assert set(out) == set(VALUES)
  for name, values in VALUES.items():
    dtype = np.float32 if name.endswith('norm') else ml_dtypes.bfloat16
    np.testing.assert_array_equal(out[name], values.astype(dtype), strict=True, err_msg=name)


def test_int8_source_is_copied_exactly(tmp_path, chunking):
  quantized = synthetic.quantized(synthetic.fused(synthetic.canonical()))
  source = synthetic.write_legacy(tmp_path / 'source', quantized)
  report = convert.convert(source, tmp_path / 'out')
  convert.convert(tmp_path / 'out', tmp_path / 'again')
  expected = read(source)
  for path in ('out', 'again'):
    found = read(tmp_path / path)
    assert set(found) == set(expected)
    for name, values in found.items():
      np.testing.assert_array_equal(values, expected[name].astype(values.dtype), err_msg=name)
  assert all(report.errors[name].largest == 0 for name in MATRICES)


def test_int8_source_to_bfloat16_is_its_value(tmp_path):
  source = synthetic.write_legacy(
    tmp_path / 'source', synthetic.quantized(synthetic.fused(synthetic.canonical()))
  )
  convert.convert(source, tmp_path / 'out', 'bfloat16')
  expected, out = read(source), read(tmp_path / 'out')
  for name in MATRICES:
    scale = expected[params.parameters(synthetic.CONFIG)[name].scale][:, None, :]
    np.testing.assert_array_equal(
      out[name], (expected[name] * scale).astype(ml_dtypes.bfloat16), strict=True
    )


def test_every_source_form_gives_the_same_bytes(tmp_path):
  leaves = synthetic.fused(VALUES)
  sources = [
    synthetic.write_legacy(tmp_path / 'a', leaves, state=True),
    synthetic.write_orbax(tmp_path / 'b', leaves),
    synthetic.write_legacy(tmp_path / 'c', synthetic.per_layer(leaves), chunks=3),
  ]
  checksums = set()
  for i, source in enumerate(sources):
    convert.convert(source, tmp_path / f'out{i}')
    checksums.add((tmp_path / f'out{i}' / 'checksums.json').read_text())
  assert len(checksums) == 1


def test_what_t5x_saved_through_orbax_gives_the_same_bytes(palm_tiny, testdata, tmp_path):
  convert.convert(palm_tiny, tmp_path / 'legacy')
  convert.convert(testdata / 'palm_tiny_orbax' / 'checkpoint_1000', tmp_path / 'orbax')
  legacy, orbax = ((tmp_path / name / 'checksums.json').read_text() for name in ('legacy', 'orbax'))
  assert legacy == orbax


def test_without_a_call_that_reserves_space(source, tmp_path, monkeypatch):
  convert.convert(source, tmp_path / 'out')
  monkeypatch.delattr(os, 'posix_fallocate')
  monkeypatch.delattr(os, 'posix_fadvise')
  monkeypatch.delattr(os, 'sched_getaffinity')
  convert.convert(source, tmp_path / 'other')
  assert (tmp_path / 'out' / 'checksums.json').read_text() == (
    tmp_path / 'other' / 'checksums.json'
  ).read_text()


def test_sizes_of_the_real_checkpoint(palm_tiny, tmp_path):
  report = convert.convert(palm_tiny, tmp_path / 'out')
  assert report.layer_float32_bytes == 4 * (
    report.source.config.num_params - 384 * 256 - 256 - 4 * 256
  )
  on_disk = sum(
    f.stat().st_size
    for name in (*MATRICES, *params.scales(report.source.config))
    for f in (tmp_path / 'out' / name).iterdir()
  )
  assert report.layer_bytes == on_disk <= 0.27 * report.layer_float32_bytes
  assert report.output_bytes == sum(
    f.stat().st_size for f in (tmp_path / 'out').rglob('*') if f.is_file()
  )
  assert report.source_bytes == 4 * report.source.config.num_params
  for name in MATRICES:
    assert 0 < report.errors[name].relative < 0.01


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
  'name,index,where',
  [
    ('gate', (1, 2, 20), ' in layer 1'),
    ('mlp_output', (0, 23, 7), ' in layer 0'),
    ('layer_norm', (1, 3), ' in layer 1'),
    ('embedding', (5, 5), ''),
    ('final_norm', (0,), ''),
  ],
)
def test_nan_and_infinite_weights(tmp_path, chunking, bad, name, index, where):
  values = {n: v.copy() for n, v in VALUES.items()}
  values[name][index] = bad
  values[name][(*index[:-1], 0)] = bad  # in another chunk, of the same layer
  source = synthetic.write_legacy(tmp_path / 'source', synthetic.fused(values))
  count = 1 if index[-1] == 0 else 2
  with pytest.raises(
    CheckpointError, match=f'^{name}: {count} NaN or infinite values{where}, .*{source}/target'
  ):
    convert.convert(source, tmp_path / 'out')
  assert sorted(p.name for p in tmp_path.iterdir()) == ['source']


def test_nan_in_the_scales_of_a_quantized_source(tmp_path):
  leaves = synthetic.quantized(synthetic.fused(synthetic.canonical()))
  leaves['decoder/decoder/kv_fused/qscale'][0, 1, 0, 2] = np.nan
  with pytest.raises(CheckpointError, match='^key_scale: 1 NaN or infinite values in layer 1'):
    convert.convert(synthetic.write_legacy(tmp_path / 'source', leaves), tmp_path / 'out')


def test_output_that_exists(source, tmp_path):
  for kind in ('directory', 'file', 'link to nowhere'):
    out = tmp_path / kind
    if kind == 'directory':
      out.mkdir()
    elif kind == 'file':
      out.write_text('mine')
    else:
      out.symlink_to(tmp_path / 'nowhere')
    with pytest.raises(CheckpointError, match=f'{out} exists already'):
      convert.convert(tmp_path / 'not even looked at', out)
    assert os.path.lexists(out) and not os.path.lexists(f'{out}.unfinished')


def test_output_that_cannot_be_written(source, tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(CheckpointError, match=f"can't write to {tmp_path}/file/out"):
    convert.convert(source, tmp_path / 'file' / 'out')


def test_unknown_weights(source, tmp_path):
  with pytest.raises(UserError, match='int8, int4, bfloat16'):
    convert.convert(source, tmp_path / 'out', 'int2')


def test_damaged_source_leaves_nothing_that_looks_finished(source, tmp_path):
  chunk = source / 'target.decoder.decoder.o_wo_fused.kernel' / '0.0.0.0'
  chunk.write_bytes(chunk.read_bytes()[:50])
  with pytest.raises(CheckpointError, match=str(chunk)):
    convert.convert(source, tmp_path / 'deep' / 'out')
  assert [p.name for p in (tmp_path / 'deep').iterdir()] == [
    'out.unfinished'
  ]  # other arrays were converted
  for path in ('out.unfinished', 'out.unfinished/checkpoint'):
    with pytest.raises(CheckpointError, match='an unfinished conversion'):
      open_checkpoint(tmp_path / 'deep' / path)


def test_a_user_s_directory_in_the_way_is_left_alone(source, tmp_path):
  mine = tmp_path / 'out.unfinished' / 'mine'
  mine.parent.mkdir()
  mine.write_text('mine')
  with pytest.raises(CheckpointError, match='was not left by an earlier conversion'):
    convert.convert(source, tmp_path / 'out')
  assert mine.read_text() == 'mine'


def test_two_conversions_into_one_directory(source, tmp_path):
  first = WorkDirectory(tmp_path / 'out')
  with contextlib.ExitStack() as shard:
    with first.setup():
      shard.enter_context(first.working(0))
    with pytest.raises(CheckpointError, match='another process is converting into'):
      convert.convert(source, tmp_path / 'out')
    assert (pathlib.Path(first.root) / MARKER).exists()


def test_output_that_appears_meanwhile(source, tmp_path):
  with pytest.raises(CheckpointError, match='exists already'):
    convert.convert(
      source, tmp_path / 'out', progress=lambda *_: (tmp_path / 'out').mkdir(exist_ok=True)
    )
  assert list((tmp_path / 'out').iterdir()) == []
  (tmp_path / 'out').rmdir()
  assert convert.convert(source, tmp_path / 'out').finished
  assert sorted(p.name for p in tmp_path.iterdir()) == ['out', 'source']


def test_what_was_written_wrongly_is_noticed(source, tmp_path, monkeypatch):
  """A disk that does not keep what it was given."""
  sync = files.sync

  def damaging(path):
    sync(path)
    if path.endswith('gate/0.0.0'):
      gate = pathlib.Path(path)
      gate.write_bytes((gate.parent.parent / 'linear' / '0.0.0').read_bytes())

  monkeypatch.setattr(files, 'sync', damaging)
  with pytest.raises(CheckpointError, match='gate: damaged data'):
    convert.convert(source, tmp_path / 'out', workers=1)
  assert not (tmp_path / 'out').exists()


def _convert_and_die(source, out, slices):
  left = iter(range(slices))
  convert.convert(
    source,
    out,
    progress=lambda *_: next(left, None) is None and os.kill(os.getpid(), signal.SIGKILL),
  )


@pytest.mark.parametrize('slices', [0, 3, 9, 14, 20])
def test_killed_in_the_middle(source, tmp_path, slices):
  """Nothing that looks finished is left; what is left is replaced by the next run."""
  spawn = multiprocessing.get_context('spawn')
  process = spawn.Process(target=_convert_and_die, args=(source, tmp_path / 'out', slices))
  process.start()
  process.join()
  assert process.exitcode == -signal.SIGKILL
  assert not (tmp_path / 'out').exists()
  assert (tmp_path / 'out.unfinished').exists()
  for path in ('out.unfinished', 'out.unfinished/checkpoint'):
    with pytest.raises(CheckpointError, match='not a checkpoint'):
      open_checkpoint(tmp_path / path)
  convert.convert(source, tmp_path / 'out')
  assert sorted(p.name for p in tmp_path.iterdir()) == ['out', 'source']
  assert not (tmp_path / 'out' / MARKER).exists()
  np.testing.assert_array_equal(read(tmp_path / 'out')['query'].shape, VALUES['query'].shape)


def test_progress_adds_up(source, tmp_path):
  done = {'convert': [], 'verify': []}
  convert.convert(
    source,
    tmp_path / 'out',
    progress=lambda what, n, total: done['verify' if 'verify' in what else 'convert'].append(
      (n, total)
    ),
  )
  for steps in done.values():
    assert sum(n for n, _ in steps) == steps[0][1]


@pytest.mark.parametrize('workers', [1, 4])
def test_int4_contents(source, tmp_path, chunking, workers):
  """Each channel's scale has the least squared error of all that are searched; two to a byte."""
  report = convert.convert(source, tmp_path / 'out', 'int4', workers=workers)
  opened = open_checkpoint(tmp_path / 'out')
  out, int4 = read(tmp_path / 'out'), np.dtype(ml_dtypes.int4)
  assert opened.weights == 'int4' and len(MATRICES) == 7
  together = {}  # scale -> its matrices
  for name in MATRICES:
    together.setdefault(params.parameters(synthetic.CONFIG)[name].scale, []).append(name)
  for scale, names in together.items():
    w = np.concatenate([VALUES[name] for name in names], axis=1).astype(np.float64)
    whole = np.maximum(np.abs(w).max(1), 1e-30) / 7  # [L, out]
    errors = []
    for sign, k in itertools.product((1, -1), range(24)):
      s = sign * (whole * (1 - k / 32))[:, None, :]
      errors.append(np.square(np.clip(np.rint(w / s), -8, 7) * s - w).sum(1))
    written = np.concatenate([out[name].astype(np.float64) for name in names], axis=1)
    found = np.square(written * out[scale][:, None, :] - w).sum(1)
    np.testing.assert_allclose(found, np.min(errors, axis=0), rtol=1e-4, atol=1e-12)
    assert (np.abs(out[scale]) < 0.99 * whole)[w.any(1)].any()  # some channels are clipped
    assert (out[scale] < 0).any() and (out[scale] > 0).any()  # either side has the eighth unit
  for name in MATRICES:
    assert out[name].dtype == int4
    scale = out[params.parameters(synthetic.CONFIG)[name].scale][:, None, :]
    error = np.abs(out[name].astype(np.float32) * scale - VALUES[name])
    np.testing.assert_allclose(
      report.errors[name].relative, np.linalg.norm(error) / np.linalg.norm(VALUES[name]), rtol=1e-5
    )
    rows = VALUES[name].shape[1]
    chunks = [p for p in (tmp_path / 'out' / name).iterdir() if p.name != '.zarray']
    values = out[name].size
    assert values // 2 <= sum(p.stat().st_size for p in chunks) <= values * (1 + 20 / rows)
    np.testing.assert_array_equal(  # any rows, across bytes and chunks
      opened.tensors[name].read((slice(1, 2), slice(1, rows - 2))), out[name][1:2, 1 : rows - 2]
    )


@pytest.mark.parametrize('output', ['int8', 'int4', 'bfloat16', 't5x_int8', 't5x_float'])
def test_int4_as_a_source(source, tmp_path, chunking, output):
  """Wider integers hold the same units, floats the same weights; nothing is rounded twice."""
  convert.convert(source, tmp_path / 'int4', 'int4', bits='gate:8')
  before = read(tmp_path / 'int4')
  if output == 'int4':
    with pytest.raises(UserError, match='holds gate in int8: rounding it again to int4'):
      convert.convert(tmp_path / 'int4', tmp_path / 'out', 'int4')
  options = {'format': output} if output.startswith('t5x') else {'weights': output}
  options |= {'bits': 'gate:8'} if output == 'int4' else {}
  convert.convert(tmp_path / 'int4', tmp_path / 'out', **options)
  config = synthetic.CONFIG if output.startswith('t5x') else None
  after = {n: t.read() for n, t in open_checkpoint(tmp_path / 'out', config=config).tensors.items()}
  for name in MATRICES:
    scale = params.parameters(synthetic.CONFIG)[name].scale
    if 'int' in output:
      np.testing.assert_array_equal(after[name].astype(int), before[name].astype(int))
      np.testing.assert_allclose(after[scale], before[scale], rtol=1e-6)
    else:
      weights = before[name].astype(np.float32) * before[scale][:, None, :]
      np.testing.assert_allclose(after[name].astype(np.float32), weights, rtol=2**-8)
