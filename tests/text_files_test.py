"""Files that a command writes: refused before the work, where they can't be written."""

import errno
import importlib.util
import io
import json
import os
import pathlib

import pytest

from t5x_inference_ext import text_files
from t5x_inference_ext.errors import RequestError, UserError


def test_what_can_be_written(tmp_path):
  (tmp_path / 'old').write_text('')
  text_files.check_writable(None, f'{tmp_path}/new', f'{tmp_path}/old')


@pytest.mark.parametrize(
  'name,words', [('none/new', 'there is no directory'), ('.', 'it is a directory')]
)
def test_what_can_not_is_refused(tmp_path, name, words):
  with pytest.raises(RequestError, match=f"can't write .*: {words}"):
    text_files.check_writable(f'{tmp_path}/{name}')


@pytest.mark.parametrize('exists', [False, True])
def test_permissions_are_asked_of_the_file_or_its_directory(tmp_path, monkeypatch, exists):
  path = tmp_path / 'file'
  if exists:
    path.write_text('')
  refused = str(path if exists else tmp_path)
  monkeypatch.setattr(os, 'access', lambda asked, mode: str(asked) != refused)
  with pytest.raises(RequestError, match='permission denied'):
    text_files.check_writable(str(path))


@pytest.mark.parametrize('text', ['{"a": [1, "x", null]}', '3', '[' * 200 + ']' * 200])
def test_json_that_can_be_used(text):
  assert json.dumps(text_files.parse_json(text)) == text


@pytest.mark.parametrize(
  'text, message',
  [
    ('{1: 2}', 'not JSON (Expecting property name enclosed in double quotes at column 2)'),
    ('[' * 100_000, 'not JSON that can be used (nested too deeply)'),
    ('[' * 300 + ']' * 300, 'not JSON that can be used (nested too deeply)'),
    ('9' * 5000, 'not JSON that can be used (a number has too many digits)'),
    ('[{"a": 1, "b": 2, "a": 1}]', "not JSON that can be used ('a' is given twice)"),
    ('{"a": [NaN]}', 'not JSON that can be used (it holds NaN)'),
  ],
)
def test_json_that_can_not_be_used(text, message):
  with pytest.raises(ValueError) as error:
    text_files.parse_json(text)
  assert str(error.value) == message


def test_what_is_written_is_json():
  """Also by the standard, which has no NaN and no infinities."""
  value = {'a': [float('nan'), 1.5], 'b': {'c': float('-inf'), 'd': None}}

  def refuse(text):
    raise AssertionError(text)

  written = json.loads(text_files.json_line(value), parse_constant=refuse)
  assert written == {'a': [None, 1.5], 'b': {'c': '-Infinity', 'd': None}}
  assert text_files.json_line({'a': 'ü'}) == json.dumps({'a': 'ü'})


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path, monkeypatch):
  path, link = tmp_path / 'a.json', tmp_path / 'link'
  link.symlink_to(path)
  text_files.write_text(str(path), 'one')
  text_files.write_text(str(link), 'two')
  assert path.read_text() == 'two' and link.is_symlink()

  class Full(io.StringIO):
    def close(self):
      raise OSError(errno.ENOSPC, 'No space left on device')

  def full(file, *arguments, **options):
    pathlib.Path(file).write_text('tw')
    return Full()

  monkeypatch.setattr('builtins.open', full)
  with pytest.raises(RequestError, match=f"can't write {path}: No space left on device"):
    text_files.write_text(str(path), 'three')
  monkeypatch.undo()
  assert path.read_text() == 'two' and sorted(tmp_path.iterdir()) == [path, link]
  text_files.write_text(os.devnull, 'four')
  assert not os.path.isfile(os.devnull)


def test_without_matplotlib_the_extra_is_named(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match="pip install 't5x_inference_ext.plots.'"):
    text_files.check_plots()
