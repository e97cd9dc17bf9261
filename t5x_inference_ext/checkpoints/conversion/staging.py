"""Staging of an output in a bucket: it is made in a local directory, then uploaded.

In a bucket, objects can't be written in pieces, and directories can't be renamed. A checkpoint
still appears in one step: its header is uploaded last, and without a header a directory is not a
checkpoint.

STAGING/NAME-CHECKSUM/    CHECKSUM: of the output's address
  plan.json               the source and the options
  checkpoint/             the finished output
  checkpoint.unfinished/  the unfinished output (work_directory.py)
  journal.jsonl           uploaded objects with their generations, one per line, and an end mark
  setup.lock              held while a run compares its plan with plan.json
  upload.lock             held while uploading
OUTPUT/UNFINISHED         an object that exists while OUTPUT is incomplete
"""

from collections.abc import Callable, Iterator
import contextlib
import fcntl
import functools
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
from t5x_inference_ext.text_format import megabytes

# Copies of a file in memory during its upload: the file, the library's copy, and two of the object
# read back.
_COPIES = 4
_COMPLETE = 'complete'


class Staging:
  """The staging directory of one output.

  Attributes:
    path: The output, gs://BUCKET/...
    root: The staging directory on the local disk.
    local: Path of the finished checkpoint in the staging directory.
  """

  def __init__(self, path: str, staging: str | os.PathLike[str]) -> None:
    self.path = storage.normalize(path)
    bucket, _, key = self.path.removeprefix('gs://').partition('/')
    if not bucket or not key:
      raise CheckpointError(f'{self.path} is no directory in a bucket: use gs://BUCKET/DIRECTORY')
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
    """Raise CheckpointError if the bucket already has other objects there, or can't be read."""
    names = storage.list_objects(self.path)
    if names and MARKER not in names and _COMPLETE not in self._entries():
      raise CheckpointError(
        f'{self.path} exists already, with {names[0]} in it: remove it, or choose another output'
      )

  def description(self, largest_file: int, workers: int) -> str:
    """Return a line with the disk space and memory that the upload takes."""
    return (
      f'made in {self.root}, taking disk space until all is uploaded to {self.path}; uploading '
      f'takes up to {megabytes(_COPIES * largest_file * workers)} of memory'
    )

  def adopt(self, plan: dict[str, Any]) -> bool:
    """Prepare the directory for `plan`. Remove leftovers of other plans, here and in the bucket.

    Returns:
      Whether everything is already in the bucket.

    Raises:
      CheckpointError: The bucket can't be written, another plan's checkpoint is being uploaded, or
        the directory holds links.
    """
    os.makedirs(self.root, exist_ok=True)
    files.check_no_links(self.root)
    with self._lock('setup.lock', fcntl.LOCK_EX):
      entries, stored = self._entries(), files.read_plan(self._plan)
      complete = _COMPLETE in entries
      if complete and stored not in (None, plan):
        raise CheckpointError(
          f'{self.path} exists already, made from another source or other options: remove it, or '
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
    # Write the marker first: it fails if the bucket is not writable.
    generation = storage.write_object(
      self.path, MARKER, b'Unfinished: run the same convert_checkpoint again.\n'
    )
    # Remove headers first, before the arrays that they describe.
    for name in sorted(storage.list_objects(self.path), key=lambda n: ('/' in n, n)):
      if name != MARKER:
        storage.remove_object(self.path, name)
    files.write_file(self._plan, json.dumps(plan).encode())
    files.append_line(self._journal, {MARKER: generation.hex()})

  def upload(self, header: str, workers: int, progress: Callable[[str, int, int], None]) -> None:
    """Copy the finished checkpoint to the bucket, read each file back, and remove the directory.

    Args:
      header: Name of the file without which a directory is not a checkpoint.
      workers: Number of threads.
      progress: Called after every file.

    Raises:
      CheckpointError: An object read back differs from the one written, or the bucket can't be
        accessed.
    """
    with self._uploading():
      if not os.path.isdir(self.local):
        return  # another shard has uploaded everything
      entries = self._entries()
      sizes = {
        name: os.path.getsize(os.path.join(self.local, name))
        for name in storage.list_files(self.local)
      }
      lock, total = threading.Lock(), sum(sizes.values())

      def upload_file(name: str) -> None:
        if not self._is_there(name, entries.get(name)):
          generation = self._copy(name)
          with lock:
            files.append_line(self._journal, {name: generation.hex()})
        with lock:
          progress(f'upload {name}', sizes[name], total)

      run_jobs([functools.partial(upload_file, name) for name in sizes if name != header], workers)
      if not self._is_there(MARKER, entries[MARKER]):
        raise CheckpointError(
          f'{self.path}/{MARKER} was not written by this conversion: another one is writing to '
          f'{self.path}; stop it, and run the same command again'
        )
      upload_file(header)
      files.append_line(self._journal, {_COMPLETE: ''})
      self.remove()

  def _is_there(self, name: str, generation: str | None) -> bool:
    """Return whether an object still has the generation that was written."""
    if generation is None:
      return False
    found = storage.read_object(self.path, name, unless=bytes.fromhex(generation))
    return found.state == 'unspecified'

  def _copy(self, name: str) -> bytes:
    """Upload a file, read it back, and return the object's generation."""
    with open(os.path.join(self.local, name), 'rb') as f:
      data = f.read()
    generation = storage.write_object(self.path, name, data)
    found = storage.read_object(self.path, name)
    if found.state != 'value' or found.stamp.generation != generation or found.value != data:
      raise CheckpointError(
        f'{self.path}/{name} changed right after it was written: if nothing else writes '
        'there, run the same command again'
      )
    return generation

  def remove(self) -> None:
    """Remove the directory, and the bucket's object that marks the upload as unfinished."""
    storage.remove_object(self.path, MARKER)
    files.remove(self.local)
    # Errors are ignored, because another shard may be looking into the directory.
    shutil.rmtree(self.root, ignore_errors=True)

  def _entries(self) -> dict[str, str]:
    """Return the objects that the journal lists as uploaded: name -> generation."""
    if not os.path.exists(self._journal):
      return {}
    return {
      name: generation
      for entry in files.read_lines(self._journal)
      for name, generation in entry.items()
    }

  def _uploading(self) -> contextlib.AbstractContextManager[None]:
    return self._lock('upload.lock', fcntl.LOCK_EX | fcntl.LOCK_NB)

  @contextlib.contextmanager
  def _lock(self, name: str, how: int) -> Iterator[None]:
    with open(os.path.join(self.root, name), 'ab', opener=files.open_no_link) as f:
      try:
        fcntl.flock(f, how)
      except BlockingIOError:
        raise CheckpointError(
          f'another conversion is uploading {self.path} from {self.root}'
        ) from None
      yield
