"""An output in a bucket: made in a directory on a local disk, then uploaded.

A bucket's objects can't be written in pieces, nor a directory of them be renamed. What makes a checkpoint appear whole
is its header, without which it is none: it is uploaded last.

STAGING/NAME-CHECKSUM/    of the output's address
  plan.json               what is converted, and how
  checkpoint/             the output, once it is finished here
  checkpoint.unfinished/  before that (work_directory.py)
  journal.jsonl           the objects that are in the bucket, with their generations, a line each; that all are there
  setup.lock              held while the plan is compared
  upload.lock             held while uploading
OUTPUT/UNFINISHED         an object that is there while OUTPUT is not complete
"""

from collections.abc import Callable, Iterator
import contextlib
import fcntl
import json
import os
import re
import shutil
import threading
from typing import Any
import zlib

from t5x_inference_ext.checkpoints import storage
from t5x_inference_ext.checkpoints.conversion import files
from t5x_inference_ext.checkpoints.unfinished import MARKER
from t5x_inference_ext.checkpoints.workers import run_jobs
from t5x_inference_ext.errors import CheckpointError

# What is held of a file on its way: as read from the disk, as handed over, as it came back, twice.
_COPIES = 4
_COMPLETE = 'complete'


class Staging:
  """The staging directory of one output.

  Attributes:
    path: the output, gs://BUCKET/...
    root: the directory on the local disk.
    local: the checkpoint in it, when it is finished.
  """

  def __init__(self, path: str, staging: str | os.PathLike):
    self.path = storage.normalize(path)
    bucket, _, key = self.path.removeprefix('gs://').partition('/')
    if not bucket or not key:
      raise CheckpointError(f'{self.path} names no directory in a bucket: gs://BUCKET/DIRECTORY')
    staging = os.fspath(staging)
    if storage.is_remote(staging):
      raise CheckpointError(f'the staging directory must be on a local disk, not {staging}')
    name = re.sub(r'[^\w.-]', '_', os.path.basename(key))
    self.root = os.path.join(
      storage.normalize(staging), f'{name}-{zlib.crc32(self.path.encode()):08x}'
    )
    self.local, self._plan, self._journal = (
      os.path.join(self.root, n) for n in ('checkpoint', 'plan.json', 'journal.jsonl')
    )

  def check_target(self) -> None:
    """Raises CheckpointError where there is something that is not an upload of ours, or cannot be looked at."""
    names = storage.list_objects(self.path)
    if names and MARKER not in names and _COMPLETE not in self._entries():
      raise CheckpointError(
        f'{self.path} exists already, with {names[0]} in it: remove it, or choose another output'
      )

  def description(self, largest_file: int, workers: int) -> str:
    """What it takes, for people."""
    return (
      f'made in {self.root}, whose disk it takes until all is uploaded to {self.path}; uploading takes up to '
      f'{_COPIES * largest_file * workers / 1e6:.0f} MB of memory'
    )

  def adopt(self, plan: dict[str, Any]) -> bool:
    """Makes the directory that of this plan: what is left of another, here and in the bucket, is removed.

    Returns:
      Whether all is in the bucket already, and nothing is left to do.

    Raises:
      CheckpointError: the bucket can't be written; another plan's checkpoint is being uploaded.
    """
    os.makedirs(self.root, exist_ok=True)
    with self._lock('setup.lock', fcntl.LOCK_EX):
      entries, stored = self._entries(), self._stored_plan()
      complete = _COMPLETE in entries
      if complete and stored not in (None, plan):
        raise CheckpointError(
          f'{self.path} exists already, from another source or with other options: remove it, or '
          'choose another output'
        )
      if not complete and (stored != plan or MARKER not in entries):
        with self._uploading():
          self._start(plan)
    if complete:
      self.remove()
    return complete

  def _start(self, plan: dict[str, Any]) -> None:
    files.remove(self.local)
    for path in (self._journal, self._plan):
      with contextlib.suppress(FileNotFoundError):
        os.remove(path)
    # Written before all else: it says whether the bucket takes anything. And headers go before what they describe.
    generation = storage.write_object(
      self.path, MARKER, b'Unfinished: run the same convert_checkpoint again.\n'
    )
    for name in sorted(storage.list_objects(self.path), key=lambda n: ('/' in n, n)):
      if name != MARKER:
        storage.remove_object(self.path, name)
    files.write_file(self._plan, json.dumps(plan).encode())
    files.append_line(self._journal, {MARKER: generation.hex()})

  def upload(self, header: str, workers: int, progress: Callable[[str, int, int], None]) -> None:
    """Copies the finished checkpoint to the bucket, each file read back, and removes the directory.

    Args:
      header: the name of the file without which it is no checkpoint.
      workers: threads.
      progress: told after every file.

    Raises:
      CheckpointError: what is in the bucket is not what was written; the bucket can't be written or read.
    """
    with self._uploading():
      if not os.path.isdir(self.local):
        return  # another shard was quicker
      entries, sizes = self._entries(), dict(_files(self.local))
      lock, total = threading.Lock(), sum(sizes.values())

      def one(name: str) -> None:
        if not self._is_there(name, entries.get(name)):
          generation = self._copy(name)
          with lock:
            files.append_line(self._journal, {name: generation.hex()})
        with lock:
          progress(f'upload {name}', sizes[name], total)

      run_jobs([lambda n=name: one(n) for name in sizes if name != header], workers)
      if not self._is_there(MARKER, entries[MARKER]):
        raise CheckpointError(
          f'{self.path}/{MARKER} is not the one written by this conversion: another one writes to '
          f'{self.path}; end it, and run the same command again'
        )
      one(header)
      files.append_line(self._journal, {_COMPLETE: ''})
      self.remove()

  def _is_there(self, name: str, generation: str | None) -> bool:
    """Whether an object still is what was written, by its generation."""
    return (
      generation is not None
      and storage.read_object(self.path, name, unless=bytes.fromhex(generation)).state
      == 'unspecified'
    )

  def _copy(self, name: str) -> bytes:
    """Uploads a file and reads it back. Returns the object's generation."""
    with open(os.path.join(self.local, name), 'rb') as f:
      data = f.read()
    generation = storage.write_object(self.path, name, data)
    found = storage.read_object(self.path, name)
    if found.state != 'value' or found.stamp.generation != generation or found.value != data:
      raise CheckpointError(
        f'{self.path}/{name} is not what was written there a moment ago: if nothing else writes '
        'there, run the same command again'
      )
    return generation

  def remove(self) -> None:
    """The directory, and the object that says that there is one."""
    storage.remove_object(self.path, MARKER)
    files.remove(self.local)
    shutil.rmtree(
      self.root, ignore_errors=True
    )  # another shard may be looking whether there is something to do

  def _entries(self) -> dict[str, str]:
    """What the journal says is in the bucket: generations by name."""
    if not os.path.exists(self._journal):
      return {}
    return {
      name: generation
      for entry in files.read_lines(self._journal)
      for name, generation in entry.items()
    }

  def _stored_plan(self) -> dict[str, Any] | None:
    try:
      with open(self._plan, encoding='utf-8') as f:
        return json.load(f)
    except (OSError, ValueError):
      return None

  def _uploading(self) -> contextlib.AbstractContextManager:
    return self._lock('upload.lock', fcntl.LOCK_EX | fcntl.LOCK_NB)

  @contextlib.contextmanager
  def _lock(self, name: str, how: int) -> Iterator[None]:
    with open(os.path.join(self.root, name), 'a', encoding='utf-8') as f:
      try:
        fcntl.flock(f, how)
      except BlockingIOError:
        raise CheckpointError(
          f'another conversion is uploading {self.path} from {self.root}'
        ) from None
      yield


def _files(directory: str) -> Iterator[tuple[str, int]]:
  """Names below a directory, and sizes."""
  for root, _, names in os.walk(directory):
    for name in sorted(names):
      path = os.path.join(root, name)
      yield os.path.relpath(path, directory), os.path.getsize(path)
