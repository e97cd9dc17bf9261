"""Convert again and again in children that are killed, or whose disk fails; print what came of it.

  python fault_program.py SOURCE SCRATCH kills SEED COUNT [WEIGHTS]
  python fault_program.py SOURCE SCRATCH shard_kills SEED COUNT
  python fault_program.py SOURCE SCRATCH errors

A process of its own, without jax: it forks, and a fork starts at once.
"""

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import sys
import time

from t5x_inference_ext.checkpoints import convert, open_checkpoint
from t5x_inference_ext.checkpoints.conversion import conversion, files
from t5x_inference_ext.checkpoints.conversion.work_directory import WorkDirectory
from t5x_inference_ext.checkpoints.readers.zarr_arrays import ZarrTensor
from t5x_inference_ext.errors import CheckpointError

# Many slices; some blocks are held, some read again; and most of the time is spent on them.
OPTIONS = dict(slice_bytes=1, hold_bytes=2000, progress=lambda *_: time.sleep(0.002))
# Public formats have no chunks: without a larger slice, each column would be one.
SLICE_BYTES = 4000
FUNCTIONS = ('allocate', 'write_blocks', 'sync', 'append_line', 'write_file', 'publish')


def digest(path: pathlib.Path) -> str:
  """Of all names and contents below a directory."""
  total = hashlib.sha256()
  for file in sorted(p for p in path.rglob('*') if p.is_file()):
    total.update(str(file.relative_to(path)).encode() + b'\0' + file.read_bytes())
  return total.hexdigest()


def fork(function, *arguments, **options) -> int:
  """Call a function in a child, which ends with 0, or 2 and the message in the file `error`."""
  pid = os.fork()
  if pid:
    return pid
  code = 1
  try:
    function(*arguments, **options)
    code = 0
  except CheckpointError as e:
    code = 2
    with contextlib.suppress(OSError):
      pathlib.Path('error').write_text(str(e), encoding='utf-8')
  finally:
    os._exit(code)


def exit_code(pid: int) -> int:
  return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def loads(out: pathlib.Path) -> bool:
  """Whether anything of an unfinished conversion passes for a checkpoint."""
  for path in (f'{out}.unfinished', f'{out}.unfinished/checkpoint'):
    try:
      open_checkpoint(path)
      return True
    except CheckpointError:
      pass
  return False


def check_parts(out: pathlib.Path) -> bool:
  """In a child: opening a checkpoint starts tensorstore's threads, which a fork would lose."""

  def check():
    if loads(out):
      raise CheckpointError('loads')

  return exit_code(fork(check)) == 0


def recorded(out: pathlib.Path) -> list[int]:
  """The slices that are finished, by the journal."""
  if not os.path.isdir(f'{out}.unfinished'):
    return []
  return sorted(e['slice'] for e in WorkDirectory(out).entries() if 'slice' in e)


def convert_noting(source: str, out: pathlib.Path, workers: int) -> None:
  """A conversion that writes the numbers of the slices it begins to the file `begun`."""
  original = conversion.SliceWork

  def begin(job, piece):
    with open('begun', 'a', encoding='utf-8') as f:
      f.write(f'{piece.number}\n')
    return original(job, piece)

  conversion.SliceWork = begin
  convert.convert(source, out, workers=workers, **OPTIONS)


def begun() -> list[int]:
  return list(map(int, pathlib.Path('begun').read_text(encoding='utf-8').split()))


def kill(pid: int, rng: random.Random, seconds: float) -> None:
  """Kill a process at some time, or after some slices, however busy the machine is."""
  if rng.random() < 0.3:
    time.sleep(rng.uniform(0.05, 1.0) * seconds)
  else:
    slices = rng.randrange(1, 7)
    while (
      len(begun()) < slices
      and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    ):
      time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.01))
  os.kill(pid, signal.SIGKILL)


def kills(source: str, scratch: pathlib.Path, seed: int, count: int) -> dict:
  """Kill a conversion at random moments until it finishes; then another one, until `count` kills.

  Of every two, one has a single worker. `redone` is how many slices a kill made to be done again,
  at most, by workers.
  """
  rng = random.Random(seed)
  whole = scratch / 'whole'
  begin = time.monotonic()
  assert exit_code(fork(convert.convert, source, whole, workers=2, **OPTIONS)) == 0
  seconds = time.monotonic() - begin
  expected = digest(whole)
  result = dict(
    kills=0,
    finished=0,
    different=0,
    partial_loads=0,
    lost=0,
    resumed=0,
    seconds=seconds,
    redone={1: 0, 2: 0},
  )
  while result['kills'] < count or result['finished'] < 2:
    out = scratch / f'out{result["finished"]}'
    done, killed, workers = [], 0, 2 - result['finished'] % 2
    while not out.exists():
      pathlib.Path('begun').write_text('', encoding='utf-8')
      pid = fork(convert_noting, source, out, workers)
      if killed < 12:  # then it may finish
        kill(pid, rng, seconds)
      code = exit_code(pid)
      if code == -signal.SIGKILL:
        killed += 1
        if not out.exists():
          result['partial_loads'] += not check_parts(out)
          now = recorded(out)
          result['lost'] += len(set(done) - set(now))
          result['redone'][workers] = max(result['redone'][workers], len(set(begun()) - set(now)))
          result['resumed'] += bool(done)
          done = now
      elif code:
        raise SystemExit(f'ended with {code}: {pathlib.Path("error").read_text(encoding="utf-8")}')
    result['kills'] += killed
    if os.path.lexists(f'{out}.unfinished'):  # killed between its last two steps
      assert exit_code(fork(convert.convert, source, out, workers=workers, **OPTIONS)) == 0
    result['finished'] += 1
    result['different'] += digest(out) != expected or os.path.lexists(f'{out}.unfinished')
    shutil.rmtree(out)
  return result


def shard_kills(source: str, scratch: pathlib.Path, seed: int, count: int) -> dict:
  """Two shards at once, of which one or both are killed, over and over."""
  rng = random.Random(seed)
  whole = scratch / 'whole'
  begin = time.monotonic()
  assert exit_code(fork(convert.convert, source, whole, workers=2, **OPTIONS)) == 0
  seconds = time.monotonic() - begin
  expected = digest(whole)
  result = dict(kills=0, finished=0, different=0, partial_loads=0, wrong=[])
  while result['kills'] < count or not result['finished']:
    out = scratch / f'out{result["finished"]}'
    rounds = 0
    while not out.exists():
      pids = [
        fork(convert.convert, source, out, workers=1, num_shards=2, shard_id=i, **OPTIONS)
        for i in range(2)
      ]
      if rounds < 6:  # then they may finish
        time.sleep(rng.uniform(0.05, 1.2) * seconds)
        for pid in rng.choice([pids, pids[:1], pids[1:]]):
          os.kill(pid, signal.SIGKILL)
      rounds += 1
      for code in map(exit_code, pids):
        result['kills'] += code == -signal.SIGKILL
        # One that comes when the other has finished finds the output there.
        if code not in (0, -signal.SIGKILL) and not out.exists():
          result['wrong'].append(f'{code}: {pathlib.Path("error").read_text(encoding="utf-8")}')
      if not out.exists():
        result['partial_loads'] += not check_parts(out)
    if os.path.lexists(f'{out}.unfinished'):  # killed between the last two steps
      assert exit_code(fork(convert.convert, source, out, workers=2, num_shards=2, **OPTIONS)) == 0
    result['finished'] += 1
    result['different'] += digest(out) != expected or os.path.lexists(f'{out}.unfinished')
    shutil.rmtree(out)
  return result


def failing(function: str, number: int, code: int):
  """Makes the number-th call of one of files' functions fail."""
  original, calls = getattr(files, function), [0]

  def replaced(*arguments):
    calls[0] += 1
    if calls[0] == number:
      raise OSError(code, os.strerror(code), str(arguments[0]))
    return original(*arguments)

  setattr(files, function, replaced)


def failing_read(number: int):
  original, calls = ZarrTensor._read, [0]

  def replaced(self, bounds):
    calls[0] += 1
    if calls[0] == number:
      raise CheckpointError(f'{self.name}: damaged data in {self.path}: Input/output error')
    return original(self, bounds)

  ZarrTensor._read = replaced


def faulty(source: str, out: pathlib.Path, name: str, number: int, code: int) -> None:
  """Convert with a fault."""
  if name == 'read':
    failing_read(number)
  elif name == 'limit':  # a real one, of the system: no file may be so long
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  else:
    failing(name, number, code)
  convert.convert(source, out, workers=2, **OPTIONS)


def errors(source: str, scratch: pathlib.Path) -> dict:
  """Let disks fill up and reads fail, each followed by the same command without the fault."""
  whole = scratch / 'whole'
  assert exit_code(fork(convert.convert, source, whole, workers=2, **OPTIONS)) == 0
  expected = digest(whole)
  faults = [
    (name, number, code)
    for name in FUNCTIONS
    for number in (1, 4, 30)
    for code in (errno.ENOSPC, errno.EIO)
    if name != 'publish' or number == 1
  ]
  faults += [('read', number, 0) for number in (1, 5, 12)] + [('limit', 0, 0)]
  result = dict(faults=0, hit=0, wrong=[], messages=[])
  for name, number, code in faults:
    out = scratch / f'out{result["faults"]}'

    ended = exit_code(fork(faulty, source, out, name, number, code))
    result['faults'] += 1
    result['hit'] += ended == 2
    if ended == 2:
      message = pathlib.Path('error').read_text(encoding='utf-8') if name != 'limit' else ''
      result['messages'].append(message)
      if out.exists() or not check_parts(out):
        result['wrong'].append(f'{name} {number} {code}: looks finished')
    elif ended:
      result['wrong'].append(f'{name} {number} {code}: ended with {ended}')
    if (
      not out.exists() and exit_code(fork(convert.convert, source, out, workers=2, **OPTIONS)) != 0
    ):
      result['wrong'].append(
        f'{name} {number} {code}: {pathlib.Path("error").read_text(encoding="utf-8")}'
      )
    elif digest(out) != expected or os.path.lexists(f'{out}.unfinished'):
      result['wrong'].append(f'{name} {number} {code}: another checkpoint')
    shutil.rmtree(out, ignore_errors=True)
  return result


if __name__ == '__main__':
  scratch_directory = pathlib.Path(sys.argv[2])
  os.chdir(scratch_directory)
  if not os.path.exists(os.path.join(sys.argv[1], 'checkpoint')):
    OPTIONS['slice_bytes'] = SLICE_BYTES
  if sys.argv[6:]:
    OPTIONS['weights'], _, bits = sys.argv[6].partition(',')
    OPTIONS['bits'] = bits or None
  if sys.argv[3] in ('kills', 'shard_kills'):
    print(
      json.dumps(globals()[sys.argv[3]](sys.argv[1], scratch_directory, *map(int, sys.argv[4:6])))
    )
  else:
    print(json.dumps(errors(sys.argv[1], scratch_directory)))
