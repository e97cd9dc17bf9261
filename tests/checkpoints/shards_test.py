"""Several processes divide a conversion: together, one after the other, and in other numbers."""

import concurrent.futures
import multiprocessing
import pathlib
import sys
import threading

import pytest

from t5x_inference_ext.checkpoints import convert, open_checkpoint
from t5x_inference_ext.checkpoints.conversion import files, read_back
from t5x_inference_ext.checkpoints.conversion.work_directory import WorkDirectory
from t5x_inference_ext.errors import CheckpointError, UserError
from tests import processes
from tests.checkpoints import synthetic
from tests.checkpoints.synthetic import contents

LEAVES = synthetic.fused(synthetic.canonical())


@pytest.fixture
def source(tmp_path) -> pathlib.Path:
  return synthetic.write_legacy(tmp_path / 'source', LEAVES, chunks=4)


def run(source, out, **options):
  return convert.convert(source, out, slice_bytes=1, workers=2, **options)


def test_the_last_shard_finishes(source, tmp_path):
  assert run(source, tmp_path / 'whole').finished
  for shard in (2, 0):
    report = run(source, tmp_path / 'out', num_shards=3, shard_id=shard)
    assert not report.finished and not (tmp_path / 'out').exists()
    with pytest.raises(CheckpointError, match='an unfinished conversion'):
      open_checkpoint(tmp_path / 'out.unfinished' / 'checkpoint')
  assert not run(
    source, tmp_path / 'out', num_shards=3, shard_id=2
  ).finished  # once more: nothing left to do
  report = run(source, tmp_path / 'out', num_shards=3, shard_id=1)
  assert report.finished and not (tmp_path / 'out.unfinished').exists()
  assert contents(tmp_path / 'out') == contents(tmp_path / 'whole')
  assert all(error.magnitude > 0 for error in report.errors.values())  # of all shards


def test_another_number_of_shards_goes_on(source, tmp_path):
  run(source, tmp_path / 'whole')
  run(source, tmp_path / 'out', num_shards=2, shard_id=0)
  done = []
  report = run(
    source,
    tmp_path / 'out',
    progress=lambda what, n, total: done.append(n if 'verify' not in what else 0),
  )
  assert report.finished and contents(tmp_path / 'out') == contents(tmp_path / 'whole')
  assert 0 < sum(done) < report.source_bytes


def test_a_restarted_machine_s_page_cache_is_not_trusted(source, tmp_path, monkeypatch):
  """What was recorded but perhaps never reached the disk is done again; what was synced is not."""
  monkeypatch.setattr(files, 'write_file', fail_at('serving_config.json', files.write_file))
  for shards, all_again in ((1, True), (2, False)):
    out = tmp_path / f'out{shards}'
    for shard in range(shards):
      if shard + 1 < shards:
        run(source, out, num_shards=shards, shard_id=shard)
      else:
        with pytest.raises(CheckpointError, match='disk says no'):
          run(source, out, num_shards=shards, shard_id=shard)
    before = len([e for e in WorkDirectory(out).entries() if 'slice' in e])
    with monkeypatch.context() as patched:
      patched.setattr(
        't5x_inference_ext.checkpoints.conversion.work_directory._boot_id', lambda: 'another'
      )
      after = len([e for e in WorkDirectory(out).entries() if 'slice' in e])
    assert before > 1 and after == (0 if all_again else before)


def fail_at(name, original):
  def write_file(path, data):
    if path.endswith(name):
      raise OSError(5, 'disk says no', path)
    original(path, data)

  return write_file


@pytest.fixture
def written(source, tmp_path, monkeypatch):
  """An output of two shards that have written all, and read back nothing."""
  assert not run(source, tmp_path / 'out', num_shards=2, shard_id=0).finished
  with monkeypatch.context() as patched:
    patched.setattr(
      read_back.ReadBack, 'run', lambda *_: (_ for _ in ()).throw(CheckpointError('stopped'))
    )
    with pytest.raises(CheckpointError, match='stopped'):
      run(source, tmp_path / 'out', num_shards=2, shard_id=1)
  assert not any('read_back' in entry for entry in WorkDirectory(tmp_path / 'out').entries())
  return tmp_path / 'out'


def claim_and_wait(out, parts, connection):
  """A shard that reads back, and never ends."""
  with WorkDirectory(out).reading_back() as claim:
    connection.send([claim(part) for part in parts])
    connection.recv()


def test_shards_read_back_together(source, written, tmp_path):
  """And what one had taken when it was killed, another reads."""
  spawn = multiprocessing.get_context('spawn')
  ours, theirs = spawn.Pipe()
  other = spawn.Process(target=claim_and_wait, args=(written, [0, 2], theirs))
  other.start()
  theirs.close()  # so that a child that fails ends the wait
  assert ours.recv() == [True, True]
  read, most = [], threading.Event()

  def progress(what, *_):
    if what.startswith('verify'):
      read.append(what)
      if len(read) == groups - 2:
        most.set()

  manifest_arrays = [
    p for p in (written.parent / 'out.unfinished' / 'checkpoint').iterdir() if p.is_dir()
  ]
  groups = len(manifest_arrays)  # small arrays are one group each
  with concurrent.futures.ThreadPoolExecutor() as threads:
    shard = threads.submit(run, source, written, num_shards=2, shard_id=1, progress=progress)
    assert most.wait(60)
    assert not shard.done()  # waits for the other one
    other.kill()
    other.join()
    assert shard.result().finished
  ours.close()
  assert len(read) == len(set(read)) == groups
  run(source, tmp_path / 'whole')
  assert contents(written) == contents(tmp_path / 'whole')


def test_what_another_machine_read_back_is_not_read_again(source, written, tmp_path, monkeypatch):
  with monkeypatch.context() as patched:
    patched.setattr(
      't5x_inference_ext.checkpoints.conversion.work_directory._boot_id', lambda: 'another'
    )
    patched.setattr(files, 'write_file', fail_at('serving_config.json', files.write_file))
    with pytest.raises(CheckpointError, match='disk says no'):
      run(source, written, num_shards=2, shard_id=0)
  seen = []
  assert run(
    source, written, num_shards=2, shard_id=1, progress=lambda what, *_: seen.append(what)
  ).finished
  assert seen == []
  run(source, tmp_path / 'whole')
  assert contents(written) == contents(tmp_path / 'whole')


def test_a_shard_that_waits_for_another_to_lay_out_is_not_in_its_way(source, tmp_path):
  first = WorkDirectory(tmp_path / 'out')
  with concurrent.futures.ThreadPoolExecutor() as threads:
    with first.setup():
      second = threads.submit(run, source, tmp_path / 'out', num_shards=2, shard_id=1)
      with pytest.raises(concurrent.futures.TimeoutError):
        second.result(timeout=1)
      assert not first.adopt({'plan': 'of the first'})
    assert not second.result().finished
  assert run(source, tmp_path / 'out', num_shards=2, shard_id=0).finished


def test_a_working_directory_removed_while_waiting_for_it(source, tmp_path):
  first = WorkDirectory(tmp_path / 'out')
  with concurrent.futures.ThreadPoolExecutor() as threads:
    with first.setup():
      second = threads.submit(run, source, tmp_path / 'out')
      with pytest.raises(concurrent.futures.TimeoutError):
        second.result(timeout=1)
      first.discard()
    assert second.result().finished


def test_shards_of_different_conversions(source, tmp_path):
  other = WorkDirectory(tmp_path / 'out')
  run(source, tmp_path / 'out', num_shards=2, shard_id=0)
  with other.working(0), pytest.raises(CheckpointError, match='all shards need the same'):
    run(source, tmp_path / 'out', weights='bfloat16', num_shards=2, shard_id=1)
  # Nobody works on it any more: other options start over.
  assert not run(source, tmp_path / 'out', weights='bfloat16', num_shards=2, shard_id=1).finished
  assert run(source, tmp_path / 'out', weights='bfloat16', num_shards=2, shard_id=0).finished
  assert open_checkpoint(tmp_path / 'out').weights == 'bfloat16'


@pytest.mark.parametrize(
  'shards,words',
  [
    (dict(num_shards=2, shard_id=2), 'shard_id must be 0 to'),
    (dict(num_shards=0), 'num_shards must be at least 1'),
    (dict(shard_id=-1), 'shard_id must be 0 to'),
  ],
)
def test_shards_that_are_not(source, tmp_path, shards, words):
  with pytest.raises(UserError, match=words):
    run(source, tmp_path / 'out', **shards)


def test_the_processes_of_jax_distributed(source, tmp_path, repository):
  run(source, tmp_path / 'whole')
  results = processes.run(
    lambda port, process: [
      sys.executable,
      '-m',
      't5x_inference_ext.convert_checkpoint',
      f'--input={source}',
      f'--output={tmp_path}/out',
      '--weights=int8',
      f'--coordinator_address=localhost:{port}',
      f'--num_processes={processes.COUNT}',
      f'--process_id={process}',
    ],
    repository,
  )
  assert [r.returncode for r in results] == [0] * processes.COUNT, [r.stderr for r in results]
  said = [r.stdout for r in results]
  assert sum('wrote and verified' in text for text in said) == 1
  assert (tmp_path / 'out' / 'checksums.json').read_text() == (
    tmp_path / 'whole' / 'checksums.json'
  ).read_text()
