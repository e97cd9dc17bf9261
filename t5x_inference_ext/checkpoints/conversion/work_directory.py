"""The directory in which a conversion happens: what is finished in it, who works in it, and how it becomes the output.

OUTPUT.unfinished/
  UNFINISHED            marks it as ours; the plan (what is converted, and how) once all is laid out for it
  setup.lock            held while making or finishing it
  shard-I.lock          held by the process that is shard I
  seal.lock             shared by the shards that read back what was written, by several at a time
  claims                what each of them reads: bytes of this file that it has locked
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

_BOOT = 'boot'
SYNCED = 'synced'
_SEAL, _CLAIMS = 'seal.lock', 'claims'


class WorkDirectory:
  """The working directory of one output.

  Attributes:
    path: the output, absolute.
    root: the working directory.
    payload: the checkpoint growing in it.
  """

  def __init__(self, path: str | os.PathLike):
    path = os.fspath(path)
    if not path:
      raise CheckpointError('the output directory has an empty name')
    if storage.is_remote(path):
      raise CheckpointError(f"can't convert into {path}: it is no local directory")
    self.path = storage.normalize(path)
    self.root = self.path + '.unfinished'
    self.payload = os.path.join(self.root, 'checkpoint')
    self._shard, self._recording = 0, False

  def check_absent(self) -> None:
    """Raises CheckpointError if the output exists."""
    if os.path.lexists(self.path):
      raise CheckpointError(
        f'{self.path} exists already: remove it, or choose another output directory'
      )

  def finished_before(self, plan: dict[str, Any]) -> bool:
    """Whether the output is there, of this plan, and only the working directory has not been removed."""
    return (
      os.path.isdir(self.path)
      and os.path.isdir(self.root)
      and not os.path.lexists(self.payload)
      and self._stored_plan() == plan
    )

  @contextlib.contextmanager
  def lock(self, name: str, refusal: str | None = None, shared: bool = False) -> Iterator[bool]:
    """Holds a lock file of the directory; where it is held by another: waits, or raises CheckpointError(refusal).

    Yields:
      Whether the file is still there: whoever held it may have removed the directory.
    """
    with open(os.path.join(self.root, name), 'a', encoding='utf-8') as f:
      try:
        fcntl.flock(
          f, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (fcntl.LOCK_NB if refusal else 0)
        )
      except BlockingIOError:
        raise CheckpointError(refusal) from None
      try:
        current = os.path.samestat(os.fstat(f.fileno()), os.stat(f.name))
      except FileNotFoundError:
        current = False
      yield current

  @contextlib.contextmanager
  def setup(self) -> Iterator[None]:
    """Makes the directory where it is not there, and is the one process that starts, or finishes, work in it.

    Raises:
      CheckpointError: the output exists; the directory is not ours.
    """
    with contextlib.ExitStack() as held:
      current = False
      while not current:  # who held the lock may have removed the directory
        held.close()
        self.check_absent()
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        with contextlib.suppress(FileExistsError):
          os.mkdir(self.root)
        with contextlib.suppress(FileNotFoundError):
          strange = os.listdir(self.root) and not os.path.isfile(os.path.join(self.root, MARKER))
          if strange or os.path.islink(self.root):
            raise CheckpointError(
              f'{self.root} is in the way, and not left by an earlier conversion: move it'
            )
          with open(os.path.join(self.root, MARKER), 'a', encoding='utf-8'):
            pass
          current = held.enter_context(self.lock('setup.lock'))
      yield

  @contextlib.contextmanager
  def working(self, shard: int) -> Iterator[None]:
    """Is the one process that is this shard. Enter it under setup(): who waits to start holds no shard's lock.

    Raises:
      CheckpointError: the shard is being worked on.
    """
    self._shard = shard
    with self.lock(
      f'shard-{shard}.lock', f'another conversion is writing {self.path}, as shard {shard}'
    ):
      yield

  @contextlib.contextmanager
  def sealing(self) -> Iterator[Callable[[int], bool] | None]:
    """Waits for the shards that are at work, to read back what they wrote together with others that have waited.

    Yields:
      Takes the number of a part, and says whether it is now this process's, until the end of the context. None where
      another process has finished already.
    """
    with contextlib.ExitStack() as held:
      current = False
      with contextlib.suppress(FileNotFoundError):  # another has finished it
        for name in self._shard_locks():
          with self.lock(name, shared=True):
            pass
        current = held.enter_context(self.lock(_SEAL, shared=True)) and os.path.isdir(self.payload)
        claims = held.enter_context(open(os.path.join(self.root, _CLAIMS), 'a', encoding='utf-8'))

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
    """Waits for the shards that are at work. Yields whether there is something left: False when another has finished."""
    with contextlib.ExitStack() as locks:
      try:
        locks.enter_context(self.lock('setup.lock'))
        for name in (*self._shard_locks(), _SEAL):
          locks.enter_context(self.lock(name))
      except FileNotFoundError:
        yield False
        return
      yield os.path.isdir(self.payload)

  def adopt(self, plan: dict[str, Any]) -> bool:
    """Whether the directory is laid out for `plan`; if not, what is in it is removed. Call under setup().

    Raises:
      CheckpointError: another process is at work here on another plan.
    """
    if self._stored_plan() == plan and os.path.isdir(self.payload):
      return True
    for name in sorted(os.listdir(self.root)):
      path = os.path.join(self.root, name)
      if name == _SEAL or (name.startswith('shard-') and name != f'shard-{self._shard}.lock'):
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
    """Removes what is finished. The plan first: killed on the way, what is left is not taken for laid out for it."""
    files.truncate(os.path.join(self.root, MARKER))
    for name in os.listdir(self.root):
      if name.startswith('journal-'):
        os.remove(os.path.join(self.root, name))
    files.remove(self.payload)

  def start(self, plan: dict[str, Any]) -> None:
    """Records that the payload is laid out for `plan`."""
    files.write_file(os.path.join(self.root, MARKER), json.dumps(plan).encode())

  def _stored_plan(self) -> dict[str, Any] | None:
    try:
      with open(os.path.join(self.root, MARKER), encoding='utf-8') as f:
        return json.load(f)
    except (OSError, ValueError):
      return None

  def record(self, entry: dict[str, Any]) -> None:
    """Adds a line to this shard's journal."""
    path = os.path.join(self.root, f'journal-{self._shard}.jsonl')
    if not self._recording:
      files.append_line(path, {_BOOT: _boot_id()})
      self._recording = True
    files.append_line(path, entry)

  def entries(self) -> list[dict[str, Any]]:
    """What all shards have recorded and is there.

    A line that a kill tore is left out: its slice is done again. So is all that was written on a machine since
    restarted, or on another one, and not yet SYNCED: what is recorded may have been in its page cache only. What was
    sealed after all else was SYNCED has been on the disk.
    """
    found, here = [], _boot_id()
    for name in sorted(os.listdir(self.root)) if os.path.isdir(self.root) else ():
      if name.startswith('journal-'):
        boot, pending = None, []
        for entry in files.read_lines(os.path.join(self.root, name)):
          if _BOOT in entry:
            pending = pending if entry[_BOOT] == boot else []
            boot = entry[_BOOT]
          elif SYNCED in entry or ('sealed' in entry and not pending):
            found, pending = [*found, *pending, entry], []
          else:
            pending.append(entry)
        found += pending if boot == here else []
    return found

  def write_file(self, name: str, data: bytes) -> None:
    """One of the checkpoint's small files."""
    files.write_file(os.path.join(self.payload, name), data)

  def finish(self) -> None:
    """The output appears; the rest goes."""
    self.check_absent()
    files.publish(self.payload, self.path)
    self.clear()

  def discard(self) -> None:
    """Removes the working directory and what is finished in it."""
    self._forget()
    self.clear()

  def clear(self) -> None:
    """Removes the working directory without a payload; the marker last, so that until then it is known as ours."""
    while os.path.isdir(self.root):
      with contextlib.suppress(FileNotFoundError):
        for name in sorted(os.listdir(self.root), key=lambda n: n == MARKER):
          os.remove(os.path.join(self.root, name))
        try:
          os.rmdir(self.root)
        except OSError as e:
          if (
            e.errno != errno.ENOTEMPTY
          ):  # a shard that is just looking whether it is the last makes its lock file
            raise


def _boot_id() -> str:
  """Of this machine since its last start; empty where there is no saying."""
  try:
    with open('/proc/sys/kernel/random/boot_id', encoding='utf-8') as f:
      return f.read().strip()
  except OSError:
    return ''
