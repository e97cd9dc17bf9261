"""Compiled programs that commands keep: found again, never wrong, and never the end of a run."""

import json
import os
import subprocess
import sys
import threading

import pytest

from t5x_inference_ext import compilation_cache
from t5x_inference_ext.compilation_cache import CacheOptions, ProgramFiles


@pytest.fixture
def files(tmp_path):
  warnings = []
  found = ProgramFiles(str(tmp_path / 'programs'), warnings.append)
  yield found
  assert warnings == []


def test_programs_are_found_again(files, tmp_path):
  assert files.get('a') is None
  files.put('a', b'program')
  files.put('b', b'')
  files.put('a', b'a newer one')
  assert (files.get('a'), files.get('b'), files.get('c')) == (b'a newer one', b'', None)
  again = ProgramFiles(str(tmp_path / 'programs'), print)
  assert (again.count, again.size) == (2, 2 * 32 + len(b'a newer one'))
  assert (tmp_path / 'programs').stat().st_mode & 0o077 == 0


def test_no_damaged_program_is_used(files, tmp_path):
  """Every bit counts, and so does every byte at the end. A damaged file is removed."""
  files.put('a', b'program')
  path = tmp_path / 'programs' / 'a.program'
  whole = path.read_bytes()
  damaged = [whole[:length] for length in range(len(whole))]
  damaged += [
    bytes(byte ^ (1 << bit % 8) * (i == bit // 8) for i, byte in enumerate(whole))
    for bit in range(8 * len(whole))
  ]
  assert len(damaged) == 9 * 39
  for data in damaged:
    path.write_bytes(data)
    assert files.get('a') is None and not path.exists()
  files.put('a', b'program')
  assert files.get('a') == b'program'


def test_processes_share_a_directory(files, tmp_path):
  """A reader finds no program, or a whole one, whatever others write."""
  other = ProgramFiles(str(tmp_path / 'programs'), print)
  programs = {bytes([i]) * 10**5 for i in range(40)}
  writers = [
    threading.Thread(target=lambda each=each: [each.put('a', p) for p in programs])
    for each in (files, other)
  ]
  for writer in writers:
    writer.start()
  found = [files.get('a') for _ in range(200)]
  for writer in writers:
    writer.join()
  assert set(found) <= {None, *programs} and files.get('a') in programs
  assert [p.name for p in (tmp_path / 'programs').iterdir()] == ['a.program']


def test_programs_that_were_not_used_for_long_make_room(files, tmp_path, monkeypatch):
  for i, key in enumerate('abc'):
    files.put(key, bytes(68))
    os.utime(tmp_path / 'programs' / f'{key}.program', (i, i))
  assert files.get('a') == bytes(68)  # now the last one used
  monkeypatch.setattr(compilation_cache, 'MOST_BYTES', 250)
  again = ProgramFiles(str(tmp_path / 'programs'), print)
  assert (again.count, again.size) == (2, 200)
  assert again.get('b') is None and again.get('a') == again.get('c') == bytes(68)


def _a_file(path):
  path.write_text('')


def _below_a_file(path):
  path.parent.joinpath('file').write_text('')
  path.symlink_to('file/programs')


def _dangling(path):
  path.symlink_to('nothing')


@pytest.mark.parametrize('make', [_a_file, _below_a_file, _dangling])
def test_a_directory_that_can_t_be_used_is_one_warning(tmp_path, make):
  path, warnings = tmp_path / 'programs', []
  make(path)
  files = ProgramFiles(str(path), warnings.append)
  for _ in range(2):
    files.put('a', b'program')
    assert files.get('a') is None
  assert len(warnings) == 1 and warnings[0].startswith(
    f"warning: the compilation cache {path} can't be used ("
  )


SCRIPT = """
import glob, json, os, resource, signal, sys
import jax
from t5x_inference_ext.compilation_cache import CacheOptions, use_compilation_cache
import t5x_inference_ext.compilation_cache as module
module.LEAST_SECONDS = 0.0
said, hits = [], []
use_compilation_cache(CacheOptions(sys.argv[1]), said.append)
jax.monitoring.register_event_listener(
  lambda event, **_: hits.append(event) if event.endswith('cache_hits') else None)

def run(number):
  jax.clear_caches()
  hits.clear()
  result = float(jax.jit(lambda x: x * 2 + number)(3.0))
  return [result, len(hits) > 0]

told = [run(1), run(1), run(2)]
programs = glob.glob(sys.argv[1] + '/*/*.program')
for path in programs:
  data = open(path, 'rb').read()
  open(path, 'wb').write(data[:-1])
told += [run(1), run(1)]
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))  # as on a full disk
told += [run(3), run(3)]
print(json.dumps([told, said, len(programs), jax.config.jax_compilation_cache_dir]))
"""


def test_jax_uses_the_directory(tmp_path):
  """A process of its own: jax's configuration is global. No result is another program's."""
  result = subprocess.run(
    [sys.executable, '-c', SCRIPT, tmp_path],
    env={**os.environ, 'JAX_ENABLE_COMPILATION_CACHE': '1'},
    capture_output=True,
    text=True,
    check=True,
  )
  assert 'Traceback' not in result.stderr and 'persistent' not in result.stderr
  told, said, programs, directory = json.loads(result.stdout)
  compiled, found = False, True
  assert told == [
    [7.0, compiled],
    [7.0, found],
    [8.0, compiled],
    [7.0, compiled],  # the damaged file is written anew
    [7.0, found],
    [9.0, compiled],
    [9.0, compiled],
  ]
  assert programs >= 2 and directory.startswith(f'{tmp_path}/jax-')
  assert said == [
    f'compilation cache: {directory}, 0 programs, 0 B (--compilation_cache= turns it off)',
    f"warning: the compilation cache {directory} can't be written (File too large): programs are "
    'compiled anew',
  ]


def test_the_directory_of_a_user(monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', '/somewhere')
  assert compilation_cache.default_directory() == '/somewhere/t5x_inference_ext/programs'
  monkeypatch.setenv('XDG_CACHE_HOME', 'relative')
  monkeypatch.setenv('HOME', '/home/me')
  assert compilation_cache.default_directory() == '/home/me/.cache/t5x_inference_ext/programs'


def test_tests_leave_the_users_directory_alone(tmp_path, monkeypatch):
  """The cache is disabled in tests (conftest.py): then no directory is made."""
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  said = []
  compilation_cache.use_compilation_cache(CacheOptions(), said.append)
  assert said == ['compilation cache: none'] and not list(tmp_path.iterdir())
