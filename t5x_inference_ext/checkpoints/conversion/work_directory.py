"""The directory in which a conversion happens: what is finished, who works in it, how it ends.

OUTPUT.unfinished/
  UNFINISHED            marks the directory as a conversion's; holds the plan once all is laid out
  setup.lock            held while the directory is made or finished
  shard-I.lock          held by the process that is shard I
  read_back.lock        shared by the shards that read back together what was written
  claims                which of them reads which part: bytes of this file, locked
  journal-I.jsonl       the slices that shard I has finished, a line each
  checkpoint/           becomes OUTPUT by one rename
"""

from collections.abc import Callable, Iterator
import contextlib
import errno
import fcntl
import json
import os
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
    path: The output, absolute.
    root: The work directory.
    payload: The checkpoint that grows in it.
  """

  def __init__(self, path: str | os.PathLike[str]) -> None:
    path = os.fspath(path)
    if not path:
      raise CheckpointError('the output directory has an empty name')
    if storage.is_remote(path):
      raise CheckpointError(f"can't convert into {path}: it is no local directory")
    self.path = storage.normalize(path)
    self.root = self.path + '.unfinished'
    self.payload = os.path.join(self.root, 'checkpoint')
    self._marker = os.path.join(self.root, MARKER)
    self._shard, self._recording = 0, False

  def check_absent(self) -> None:
    """Raise CheckpointError if the output exists."""
    if os.path.lexists(self.path):
      raise CheckpointError(
        f'{self.path} exists already: remove it, or choose another output directory'
      )

  def finished_before(self, plan: dict[str, Any]) -> bool:
    """Return whether the output of this plan is there, and the work directory left over."""
    return (
      os.path.isdir(self.path)
      and os.path.isdir(self.root)
      and not os.path.lexists(self.payload)
      and self._stored_plan() == plan
    )

  @contextlib.contextmanager
  def lock(self, name: str, refusal: str | None = None, shared: bool = False) -> Iterator[bool]:
    """Hold a lock file of the directory: wait for it, or raise CheckpointError(refusal).

    Yields:
      Whether the file is still there: the process that held it may have removed the directory.
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
    """Make the directory if needed, and be the one process that starts or finishes work in it.

    Raises:
      CheckpointError: the output exists; the directory was not left by a conversion, or holds
        links.
    """
    with contextlib.ExitStack() as held:
      current = False
      while not current:  # the process that held the lock may have removed the directory
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
        f'{self.root} is in the way, and not left by an earlier conversion: move it'
      )
    files.check_no_links(self.root)

  @contextlib.contextmanager
  def working(self, shard: int) -> Iterator[None]:
    """Be the one process that is this shard.

    Enter it under setup(): a process that waits holds no shard's lock.

    Raises:
      CheckpointError: another process is this shard.
    """
    self._shard = shard
    with self.lock(
      f'shard-{shard}.lock', f'another conversion is writing {self.path}, as shard {shard}'
    ):
      yield

  @contextlib.contextmanager
  def reading_back(self) -> Iterator[Callable[[int], bool] | None]:
    """Wait for the shards at work, to read back what they wrote, together with others.

    Yields:
      A function that takes the number of a part and returns whether this process is to read it; the
      part is then its own until the end of the context. None where another process has finished
      already.
    """
    with contextlib.ExitStack() as held:
      current = False
      with contextlib.suppress(FileNotFoundError):  # another process has finished it
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
    """Wait for the shards at work. Yields whether this process is to finish the output."""
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
    """Make the directory this plan's. Call under setup().

    Args:
      plan: what is converted, and how.
      is_laid_out: whether the payload holds all files that were laid out for the plan.

    Returns:
      Whether work goes on where it was; if not, all that was there is removed, and the payload is
      empty.

    Raises:
      CheckpointError: another process is at work here on another plan.
    """
    if self._stored_plan() == plan and os.path.isdir(self.payload) and is_laid_out():
      return True
    for name in sorted(os.listdir(self.root)):
      path = os.path.join(self.root, name)
      if name == _READ_BACK or (name.startswith('shard-') and name != f'shard-{self._shard}.lock'):
        with self.lock(
          name,
          f'{path} is held by a conversion into {self.path} with other options or of another '
          'source: all shards need the same',
        ):
          os.remove(path)
    self._forget()
    os.mkdir(self.payload)
    return False

  def _forget(self) -> None:
    """Remove what is finished; the plan first: after a kill nothing is taken for laid out."""
    files.truncate(self._marker)
    for name in os.listdir(self.root):
      if name.startswith('journal-'):
        os.remove(os.path.join(self.root, name))
    files.remove(self.payload)

  def start(self, plan: dict[str, Any]) -> None:
    """Record that the payload is laid out for `plan`."""
    files.write_file(self._marker, json.dumps(plan).encode())

  def _stored_plan(self) -> dict[str, Any] | None:
    try:
      with open(self._marker, encoding='utf-8') as f:
        return json.load(f)
    except (OSError, ValueError):
      return None

  def record(self, entry: dict[str, Any]) -> None:
    """Add a line to this shard's journal."""
    path = os.path.join(self.root, f'journal-{self._shard}.jsonl')
    if not self._recording:
      files.append_line(path, {_BOOT: _boot_id()})
      self._recording = True
    files.append_line(path, entry)

  def entries(self) -> list[dict[str, Any]]:
    """Return what all shards have recorded and is there.

    A line that a kill tore is left out: its slice is done again. So is all that was written on a
      machine since
    restarted, or on another one, and not yet SYNCED: it may have been in that machine's page cache
      only. (To flush
    each slice would write most pages several times, for chunks are filled by many slices.) What was
    read back after all else was SYNCED has been on the disk.
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
    """Make the output appear, and remove the rest."""
    self.check_absent()
    files.publish(self.payload, self.path)
    self.clear()

  def discard(self) -> None:
    """Remove the work directory and what is finished in it."""
    self._forget()
    self.clear()

  def clear(self) -> None:
    """Remove the work directory without a payload; the marker, which says it is ours, last."""
    while os.path.isdir(self.root):
      with contextlib.suppress(FileNotFoundError):
        for name in sorted(os.listdir(self.root), key=lambda n: n == MARKER):
          os.remove(os.path.join(self.root, name))
        try:
          os.rmdir(self.root)
        except OSError as e:
          if (
            e.errno != errno.ENOTEMPTY
          ):  # another shard has made its lock file, to look whether it is the last
            raise


def _boot_id() -> str:
  """Return an identifier of this machine since its last start; empty where there is none."""
  try:
    with open('/proc/sys/kernel/random/boot_id', encoding='utf-8') as f:
      return f.read().strip()
  except OSError:
    return ''
