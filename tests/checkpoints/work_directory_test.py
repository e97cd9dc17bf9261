"""Damage to a work directory between two runs: links in it, files gone, bytes changed."""

import contextlib
import os
import pathlib

import numpy as np
import pytest

from t5x_inference_ext.checkpoints import convert
from t5x_inference_ext.checkpoints.conversion import files
from t5x_inference_ext.checkpoints.conversion.raw_array import FINGERPRINTS, RawArray
from t5x_inference_ext.checkpoints.conversion.read_back import ReadBack
from t5x_inference_ext.errors import CheckpointError
from tests.checkpoints import synthetic
from tests.checkpoints.synthetic import contents

PRECIOUS = b'precious'


class Killed(BaseException):
  """Nothing catches it, and so nothing is tidied up."""


@pytest.fixture(scope='module')
def source(tmp_path_factory) -> pathlib.Path:
  path = tmp_path_factory.mktemp('work_directory') / 'source'
  return synthetic.write_legacy(path, synthetic.fused(synthetic.canonical()), chunks=4)


@pytest.fixture
def precious(tmp_path) -> pathlib.Path:
  path = tmp_path / 'precious'
  path.write_bytes(PRECIOUS)
  return path


@pytest.fixture
def killed(source, tmp_path, monkeypatch) -> pathlib.Path:
  """The work directory of a conversion that was killed when it had finished all slices."""
  with monkeypatch.context() as patched:
    patched.setattr(ReadBack, 'ahead', lambda self: contextlib.nullcontext(lambda nbytes: None))
    patched.setattr(ReadBack, 'run', lambda *_: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
      convert.convert(source, tmp_path / 'out', workers=1, slice_bytes=1)
  return tmp_path / 'out.unfinished'


NAMES = (
  'UNFINISHED',
  'UNFINISHED.new',
  'setup.lock',
  'shard-0.lock',
  'read_back.lock',
  'claims',
  'journal-0.jsonl',
)


@pytest.mark.parametrize('link', [os.symlink, os.link], ids=['symbolic', 'hard'])
@pytest.mark.parametrize('name', NAMES)
def test_a_link_in_the_work_directory_is_not_written_through(
  source, tmp_path, precious, name, link
):
  root = tmp_path / 'out.unfinished'
  root.mkdir()
  (root / 'UNFINISHED').write_bytes(b'')
  (root / name).unlink(missing_ok=True)
  link(precious, root / name)
  with pytest.raises(CheckpointError, match=f'{root / name} is a link or not a regular file'):
    convert.convert(source, tmp_path / 'out')
  assert precious.read_bytes() == PRECIOUS and not (tmp_path / 'out').exists()


@pytest.mark.parametrize('place', ['checkpoint', 'checkpoint/gate', 'checkpoint/gate/0.0.0'])
def test_a_link_in_a_checkpoint_that_grows_is_not_written_through(source, tmp_path, killed, place):
  moved = tmp_path / 'moved'
  (killed / place).rename(moved)
  (killed / place).symlink_to(moved)
  before = contents(moved) if moved.is_dir() else moved.read_bytes()
  with pytest.raises(CheckpointError, match=f'{killed / place} is a link'):
    convert.convert(source, tmp_path / 'out', slice_bytes=1)
  assert (contents(moved) if moved.is_dir() else moved.read_bytes()) == before


def test_a_pipe_in_the_work_directory_is_refused(source, tmp_path):
  """To open it would wait for ever."""
  root = tmp_path / 'out.unfinished'
  root.mkdir()
  os.mkfifo(root / 'UNFINISHED')
  with pytest.raises(CheckpointError, match='not a regular file'):
    convert.convert(source, tmp_path / 'out')


@pytest.mark.parametrize(
  'write',
  [
    lambda path: files.allocate(path, 10),
    lambda path: files.write_blocks(path, (8,), [((slice(0, 8),), np.zeros(8, np.int8))]),
    lambda path: files.append_line(path, {}),
    lambda path: files.truncate(path),
    lambda path: files.write_file(path.removesuffix('.new'), b''),
  ],
  ids=['allocate', 'write_blocks', 'append_line', 'truncate', 'write_file'],
)
def test_a_link_that_appears_meanwhile_is_not_written_through(tmp_path, precious, write):
  path = tmp_path / 'file.new'
  path.symlink_to(precious)
  with pytest.raises(OSError, match='file.new'):
    write(str(path))
  assert precious.read_bytes() == PRECIOUS


def test_two_bytes_that_change_places_between_two_runs_are_noticed(source, tmp_path, killed):
  chunk = killed / 'checkpoint' / 'gate' / '0.0.0'
  data = bytearray(chunk.read_bytes())
  place = next(i for i in range(len(data) - 1) if data[i] != data[i + 1])
  data[place : place + 2] = data[place + 1], data[place]
  chunk.write_bytes(data)
  with pytest.raises(CheckpointError, match='gate: damaged data .* values read back from the disk'):
    convert.convert(source, tmp_path / 'out', slice_bytes=1)
  assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
  'damage',
  [
    lambda array: [p.unlink() for p in (*array.iterdir(), array) if p.is_file()] and array.rmdir(),
    lambda array: (array / '0.0.0').unlink(),
    lambda array: os.truncate(array / '0.0.0', 3),
    lambda array: (array / '.zarray').unlink(),
    lambda array: (array / '.zarray').write_text('{}'),
  ],
  ids=['array gone', 'chunk gone', 'chunk cut', 'metadata gone', 'other metadata'],
)
def test_files_lost_between_two_runs_are_made_again(source, tmp_path, killed, damage):
  convert.convert(source, tmp_path / 'expected', slice_bytes=1)
  damage(killed / 'checkpoint' / 'gate')
  told = []
  convert.convert(source, tmp_path / 'out', slice_bytes=1, planned=told.append)
  assert told[-1] == f'{killed}/checkpoint/gate is no longer complete: converting everything again'
  assert contents(tmp_path / 'out') == contents(tmp_path / 'expected')
  assert not killed.exists()


def test_a_damaged_line_of_the_journal_is_left_out(source, tmp_path, killed):
  journal = killed / 'journal-0.jsonl'
  lines = journal.read_bytes().split(b'\n')
  place = next(i for i, line in enumerate(lines) if b'"slice": 3' in line)
  lines[place] = lines[place].replace(b'"slice": 3', b'"slice": 2')
  journal.write_bytes(b'\n'.join(lines))
  read = []
  convert.convert(source, tmp_path / 'out', slice_bytes=1, progress=lambda *a: read.append(a))
  assert sum(not what.startswith('verify') for what, *_ in read) == 1
  convert.convert(source, tmp_path / 'expected', slice_bytes=1)
  assert contents(tmp_path / 'out') == contents(tmp_path / 'expected')


@pytest.mark.parametrize('dtype', ['int8', 'bfloat16', 'float32'])
@pytest.mark.parametrize('shape', [(7,), (5, 6), (3, 5, 6), (2, 3, 5, 6)])
def test_fingerprints_of_pieces_add_up(shape, dtype):
  rng = np.random.default_rng(0)
  values = rng.integers(-100, 100, shape).astype(dtype)
  array = RawArray('', 'a', shape, dtype, shape)
  whole = array.fingerprint(tuple((0, n) for n in shape), values)
  for axis, size in enumerate(shape):
    total = 0
    for span in ((0, 1), (1, size)):
      bounds = tuple((0, n) if a != axis else span for a, n in enumerate(shape))
      total += array.fingerprint(bounds, values[tuple(slice(*b) for b in bounds)])
    assert total % FINGERPRINTS == whole
    exchanged = np.flip(values, axis)
    assert array.fingerprint(tuple((0, n) for n in shape), exchanged) != whole
