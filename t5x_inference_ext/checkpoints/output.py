"""A directory that appears finished or not at all."""

import fcntl
import os
import shutil

from t5x_inference_ext.checkpoints import storage
from t5x_inference_ext.errors import CheckpointError

# Marks a directory as one of ours that is not finished, and is locked by the process that works in it.
MARKER = 'UNFINISHED'


class OutputDirectory:
  """Work goes into `directory`, a sibling of `path`, which finish() renames to `path`.

  Used as a context manager: what is not finished is removed at exit. A process that is killed leaves the sibling, which
  does not pass for a checkpoint, and which the next run for the same path replaces.

  Attributes:
    path: the finished directory, absolute.
    directory: where to write.
  """

  def __init__(self, path: str | os.PathLike):
    path = os.fspath(path)
    if storage.is_remote(path):
      raise CheckpointError(f'can\'t write to {path}: convert to a local directory, then copy it')
    if not path:
      raise CheckpointError('the output directory has an empty name')
    self.path = storage.normalize(path)
    self.directory = self.path + '.unfinished'
    self._marker = os.path.join(self.directory, MARKER)
    self._lock = None

  def __enter__(self) -> 'OutputDirectory':
    """Raises CheckpointError: `path` exists, or can't be written, or another process is working on it."""
    self.check_absent()
    try:
      os.makedirs(os.path.dirname(self.path), exist_ok=True)
      self._make()
    except OSError as e:
      raise CheckpointError(f'can\'t write to {self.directory}: {e.strerror}') from e
    return self

  def check_absent(self) -> None:
    """Raises CheckpointError if `path` exists."""
    if os.path.lexists(self.path):
      raise CheckpointError(f'{self.path} exists already: remove it, or choose another output directory')

  def _make(self):
    try:
      os.mkdir(self.directory)
    except FileExistsError:
      if os.listdir(self.directory) and not os.path.isfile(self._marker):
        raise CheckpointError(
            f'{self.directory} is in the way, and not left by an earlier conversion: move it') from None
    self._lock = open(self._marker, 'a', encoding='utf-8')
    try:
      fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      self._lock.close()
      raise CheckpointError(f'another conversion is writing {self.path}') from None
    for entry in os.scandir(self.directory):  # what a killed run left
      if entry.is_dir(follow_symlinks=False):
        shutil.rmtree(entry.path)
      elif entry.name != MARKER:
        os.remove(entry.path)

  def finish(self) -> None:
    """Renames. Raises CheckpointError if `path` has appeared meanwhile."""
    self.check_absent()
    os.rename(self.directory, self.path)
    os.remove(os.path.join(self.path, MARKER))

  def __exit__(self, *exc) -> None:
    shutil.rmtree(self.directory, ignore_errors=True)  # gone already if finished
    self._lock.close()
