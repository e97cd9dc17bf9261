"""The work directory of a conversion: finished slices, locks, and the unfinished output.

OUTPUT.unfinished/
  UNFINISHED            marks a work directory; holds the plan once all files are allocated
  setup.lock            held while the directory is made or finished
  shard-I.lock          held by the process that is shard I
  read_back.lock        held (shared) by all shards that read the output back
  claims                byte i is locked by the shard that reads part i back
  journal-I.jsonl       the slices that shard I has finished, one per line
  checkpoint/           becomes OUTPUT by one rename
  calibration/          layers that a calibration has rounded (calibration/results.py)
"""

from collections.abc import Callable, Iterator
import contextlib
import errno
import fcntl
import json
import os
import threading
from typing import Any

from t5x_inference_ext.checkpoints import storage
from t5x_inference_ext.checkpoints.conversion import files
from t5x_inference_ext.checkpoints.unfinished import MARKER
from t5x_inference_ext.errors import CheckpointError

SYNCED = 'synced'
_BOOT = 'boot'
_READ_BACK, _CLAIMS = 'read_back.lock', 'claims'


class WorkDirectory:
  """The work directory of one output.

  Attributes:
    path: Absolute path of the output.
    root: Path of the work directory.
    payload: The unfinished checkpoint in the work directory.
    calibration: The results of a calibration in the work directory.
  """

  def __init__(self, path: str | os.PathLike[str]) -> None:
    path = os.fspath(path)
    if not path:
      raise CheckpointError('the output directory has an empty name')
    if storage.is_remote(path):
      raise CheckpointError(f"can't convert into {path}: it is not a local directory")
    self.path = storage.normalize(path)
    self.root = self.path + '.unfinished'
    self.payload = os.path.join(self.root, 'checkpoint')
    self.calibration = os.path.join(self.root, 'calibration')
    self._marker = os.path.join(self.root, MARKER)
    self._shard, self._recording, self._record_lock = 0, False, threading.Lock()

  def check_absent(self) -> None:
    """Raise CheckpointError if the output exists."""
    if os.path.lexists(self.path):
      raise CheckpointError(
        f'{self.path} exists already: remove it, or choose another output directory'
      )

  def finished_before(self, plan: dict[str, Any]) -> bool:
    """Return whether the output of `plan` is complete, and only the work directory is left over."""
    return (
      os.path.isdir(self.path)
      and os.path.isdir(self.root)
      and not os.path.lexists(self.payload)
      and files.read_plan(self._marker) == plan
    )

  @contextlib.contextmanager
  def lock(self, name: str, refusal: str | None = None, shared: bool = False) -> Iterator[bool]:
    """Context manager: lock a file of the directory. If it is locked, wait or raise `refusal`.

    Yields:
      Whether the lock file still exists. The previous holder may have removed the directory.
    """
    how = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (fcntl.LOCK_NB if refusal else 0)
    path = os.path.join(self.root, name)
    with open(path, 'ab', opener=files.open_no_link) as f:
      try:
        fcntl.flock(f, how)
      except BlockingIOError:
        assert refusal is not None
        raise CheckpointError(refusal) from None
      try:
        current = os.path.samestat(os.fstat(f.fileno()), os.lstat(path))
      except FileNotFoundError:
        current = False
      yield current

  @contextlib.contextmanager
  def setup(self) -> Iterator[None]:
    """Context manager: make the directory if needed; hold the lock for starting and finishing work.

    Raises:
      CheckpointError: The output exists, or the directory was not left by a conversion or holds
        links.
    """
    with contextlib.ExitStack() as held:
      current = False
      while not current:  # the previous holder may have removed the directory
        held.close()
        self.check_absent()
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        with contextlib.suppress(FileExistsError):
          os.mkdir(self.root)
        with contextlib.suppress(FileNotFoundError):
          self._check_ours()
          with open(self._marker, 'ab', opener=files.open_no_link):
            pass
          current = held.enter_context(self.lock('setup.lock'))
      yield

  def _check_ours(self) -> None:
    strange = os.listdir(self.root) and not os.path.lexists(self._marker)
    if strange or os.path.islink(self.root):
      raise CheckpointError(
        f'{self.root} exists and was not left by an earlier conversion: move it away'
      )
    files.check_no_links(self.root)

  @contextlib.contextmanager
  def working(self, shard: int) -> Iterator[None]:
    """Context manager: hold the lock of the process that works as shard `shard`.

    Enter it inside setup(), so that a process that waits in setup() holds no shard's lock.

    Raises:
      CheckpointError: Another process works as this shard.
    """
    self._shard = shard
    with self.lock(
      f'shard-{shard}.lock', f'another process is converting into {self.path} as shard {shard}'
    ):
      yield

  @contextlib.contextmanager
  def reading_back(self) -> Iterator[Callable[[int], bool] | None]:
    """Context manager: wait for working shards, then share the reading back with other processes.

    Yields:
      A function from a part's index to whether this process is to read the part. If it returns
      True, no other process reads that part until the context ends. None if another process has
      already finished the output.
    """
    with contextlib.ExitStack() as held:
      current = False
      with contextlib.suppress(FileNotFoundError):  # another process has finished
        for name in self._shard_locks():
          with self.lock(name, shared=True):
            pass
        current = held.enter_context(self.lock(_READ_BACK, shared=True))
        current = current and os.path.isdir(self.payload)
        path = os.path.join(self.root, _CLAIMS)
        claims = held.enter_context(open(path, 'ab', opener=files.open_no_link))

      def claim(number: int) -> bool:
        try:
          fcntl.lockf(claims, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
          return True
        except OSError as e:
          if e.errno in (errno.EACCES, errno.EAGAIN):
            return False
          raise

      yield claim if current else None

  def _shard_locks(self) -> list[str]:
    return sorted(name for name in os.listdir(self.root) if name.startswith('shard-'))

  @contextlib.contextmanager
  def finishing(self) -> Iterator[bool]:
    """Context manager: wait for working shards. Yields whether this process finishes the output."""
    with contextlib.ExitStack() as locks:
      try:
        locks.enter_context(self.lock('setup.lock'))
        for name in (*self._shard_locks(), _READ_BACK):
          locks.enter_context(self.lock(name))
      except FileNotFoundError:
        yield False
        return
      yield os.path.isdir(self.payload)

  def adopt(self, plan: dict[str, Any], is_laid_out: Callable[[], bool] = lambda: True) -> bool:
    """Prepare the directory for `plan`; to be called inside setup().

    Args:
      plan: The source and the options.
      is_laid_out: Function that returns whether the payload has all files allocated for the plan.

    Returns:
      Whether work can continue from an earlier run. If not, the directory was cleared, and the
      payload is empty.

    Raises:
      CheckpointError: Another process is working here on another plan.
    """
    if files.read_plan(self._marker) == plan and os.path.isdir(self.payload) and is_laid_out():
      return True
    for name in sorted(os.listdir(self.root)):
      path = os.path.join(self.root, name)
      if name == _READ_BACK or (name.startswith('shard-') and name != f'shard-{self._shard}.lock'):
        with self.lock(
          name,
          f'{path} is held by a conversion into {self.path} with other options or from another '
          'source: all shards need the same options and source',
        ):
          os.remove(path)
    self._forget()
    os.mkdir(self.payload)
    return False

  def _forget(self) -> None:
    """Remove all results: the plan first, so that it never exists without its files."""
    files.truncate(self._marker)
    for name in os.listdir(self.root):
      if name.startswith('journal-'):
        os.remove(os.path.join(self.root, name))
    files.remove(self.payload)
    files.remove(self.calibration)

  def start(self, plan: dict[str, Any]) -> None:
    """Record that the payload's files are allocated for `plan`."""
    files.write_file(self._marker, json.dumps(plan).encode())

  def record(self, entry: dict[str, Any]) -> None:
    """Add a line to this shard's journal. Threads may share it."""
    path = os.path.join(self.root, f'journal-{self._shard}.jsonl')
    with self._record_lock:
      if not self._recording:
        files.append_line(path, {_BOOT: _boot_id()})
        self._recording = True
      files.append_line(path, entry)

  def entries(self) -> list[dict[str, Any]]:
    """Return all shards' journal entries whose data is certainly on the disk.

    Incomplete lines, which a killed process leaves, are dropped: their slices are converted again.
    Entries that were not yet SYNCED are dropped if they were written on another machine or before
    this machine restarted: their data may have been only in a page cache. (Slices are not flushed
    one by one, since many slices fill one chunk, whose pages would be written several times.)
    Entries that were read back after SYNCED are on the disk.
    """
    found: list[dict[str, Any]] = []
    here = _boot_id()
    for name in sorted(os.listdir(self.root)) if os.path.isdir(self.root) else ():
      if not name.startswith('journal-'):
        continue
      boot = None
      pending: list[dict[str, Any]] = []
      for entry in files.read_lines(os.path.join(self.root, name)):
        if _BOOT in entry:
          pending = pending if entry[_BOOT] == boot else []
          boot = entry[_BOOT]
        elif SYNCED in entry or ('read_back' in entry and not pending):
          found, pending = [*found, *pending, entry], []
        else:
          pending.append(entry)
      found += pending if boot == here else []
    return found

  def finish(self) -> None:
    """Move the output to its final path, and remove the work directory."""
    self.check_absent()
    files.publish(self.payload, self.path)
    self.clear()

  def discard(self) -> None:
    """Remove the work directory with everything in it."""
    self._forget()
    self.clear()

  def clear(self) -> None:
    """Remove a work directory that has no payload. The marker file goes last."""
    files.remove(self.calibration)
    while os.path.isdir(self.root):
      with contextlib.suppress(FileNotFoundError):
        for name in sorted(os.listdir(self.root), key=lambda n: n == MARKER):
          os.remove(os.path.join(self.root, name))
        try:
          os.rmdir(self.root)
        except OSError as e:
          # ENOTEMPTY: another shard has just made its lock file here; try again.
          if e.errno != errno.ENOTEMPTY:
            raise


def _boot_id() -> str:
  """Return an identifier of this start of this machine (Linux's boot id); '' if there is none."""
  try:
    with open('/proc/sys/kernel/random/boot_id', encoding='utf-8') as f:
      return f.read().strip()
  except OSError:
    return ''
