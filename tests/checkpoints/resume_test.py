"""What a killed conversion left, met by another one, perhaps with other options."""

import os
import pathlib

import pytest

from t5x_inference_ext.checkpoints import convert
from t5x_inference_ext.checkpoints.conversion import files
from t5x_inference_ext.checkpoints.conversion.work_directory import WorkDirectory
from t5x_inference_ext.errors import CheckpointError
from tests.checkpoints import synthetic
from tests.checkpoints.synthetic import contents


class Killed(BaseException):
  """Nothing catches it, and so nothing is tidied up."""


@pytest.fixture(scope='module')
def source(tmp_path_factory) -> pathlib.Path:
  return synthetic.write_legacy(
    tmp_path_factory.mktemp('resume') / 'source', synthetic.fused(synthetic.canonical())
  )


def killed(monkeypatch, name: str, calls: int, *arguments, **options) -> bool:
  """Converts, and stops dead at a call of files.`name`. Returns whether it came to that."""
  left, real = iter(range(calls)), getattr(files, name)

  def dying(*args):
    if next(left, None) is None:
      raise Killed
    return real(*args)

  with monkeypatch.context() as patched:
    patched.setattr(files, name, dying)
    try:
      convert.convert(*arguments, workers=1, **options)
    except Killed:
      return True
  return False


@pytest.mark.parametrize(
  'other', [dict(scale_search='mse'), dict(weights='bfloat16')], ids=['mse', 'bfloat16']
)
@pytest.mark.parametrize(
  'name,calls', [('allocate', 0), ('allocate', 14), ('write_file', 7), ('remove', 0)]
)
def test_killed_while_laying_out_for_other_options(
  source, tmp_path, monkeypatch, other, name, calls
):
  """The first options again: what the second ones had laid out is not taken for theirs."""
  assert killed(monkeypatch, 'append_line', 4, source, tmp_path / 'out')  # some slices are finished
  assert killed(monkeypatch, name, calls, source, tmp_path / 'out', **other)
  convert.convert(source, tmp_path / 'out')
  convert.convert(source, tmp_path / 'expected')
  assert contents(tmp_path / 'out') == contents(tmp_path / 'expected')
  assert sorted(os.listdir(tmp_path)) == ['expected', 'out']


def test_output_removed_after_a_kill_behind_the_rename(source, tmp_path, monkeypatch):
  """The work directory says that all is done, but there is nothing any more: it is done again."""
  with monkeypatch.context() as patched:
    patched.setattr(WorkDirectory, 'clear', lambda self: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
      convert.convert(source, tmp_path / 'out')
  expected = contents(tmp_path / 'out')
  (tmp_path / 'out').rename(tmp_path / 'moved')
  report = convert.convert(source, tmp_path / 'out')
  assert report.finished and contents(tmp_path / 'out') == expected
  assert not (tmp_path / 'out.unfinished').exists()


def test_link_where_the_working_directory_should_be(source, tmp_path):
  """It could not be removed in the end: refused at the beginning."""
  (tmp_path / 'elsewhere').mkdir()
  (tmp_path / 'out.unfinished').symlink_to('elsewhere')
  with pytest.raises(CheckpointError, match='out.unfinished exists and was not left'):
    convert.convert(source, tmp_path / 'out')
  assert not (tmp_path / 'out').exists() and list((tmp_path / 'elsewhere').iterdir()) == []
