"""Runs of infer that are killed at random moments: no finished row is lost or doubled.

    python -m benchmarks.kills --kills=100

Run from the root of a checkout. The command runs over the same prompts again and again, each time
until it is killed, and goes on from its journal the next time. One run in five has a second one of
the same output beside it; one in five may write only some bytes into each file, as on a full disk.
After each run, the rows that were kept before must still be kept, a run that was not killed must
end well or with one line `error: ...`, and a finished output must have every row once, with the
tokens of a run that nothing disturbed. Processes are forked from one that has imported the
command, so that most kills come while rows are generated, not while Python imports modules.
"""

import argparse
import collections
import json
import multiprocessing
import os
import pathlib
import re
import resource
import signal
import sys
import tempfile
import time

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
CHECKPOINT = ROOT / 'examples' / 'palm_tiny' / 'checkpoint_1000'
ROWS, NEW_TOKENS = 32, 32
PRINTED_BYTES, ROW_BYTES = 3000, 300
PLAIN, TWO, FULL_DISK = 'one run', 'two runs of one output', 'a full disk'
ERRORS = 'another run is writing this output', "finished rows can't be kept", "can't write"


def infer(flags: list[str], said: str, most_bytes: int | None) -> None:
  """Run the command in this process. The file `said` gets all that it prints.

  Args:
    flags: The command's flags.
    said: File for stdout and stderr.
    most_bytes: Most bytes that a file may have; None: any number.
  """
  handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
  os.dup2(handle, 1)
  os.dup2(handle, 2)
  if most_bytes is not None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing then fails with an OSError
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
  from t5x_inference_ext.commands.infer import run

  sys.exit(run(['infer', *flags]))


class Runs:
  """Runs of the command over one file of prompts, and what is left of them in a directory.

  Args:
    directory: Where prompts, output and journal are.
    seed: Chooses the moments of the kills.

  Attributes:
    counts: How often each thing happened.
    expected: The output's rows of a run that nothing disturbs.
    seconds: Time of such a run.
  """

  def __init__(self, directory: pathlib.Path, seed: int) -> None:
    self._output, self._said = directory / 'out.jsonl', directory / 'said'
    self._journal = directory / '.out.jsonl.unfinished'
    self._rng = np.random.default_rng(seed)
    self._context = multiprocessing.get_context('forkserver')
    self._context.set_forkserver_preload(['t5x_inference_ext.commands.infer'])
    self.counts: collections.Counter[str] = collections.Counter()
    prompts = directory / 'prompts.jsonl'
    starts = [json.loads(s) for s in (ROOT / 'examples' / 'prompts.jsonl').read_text().splitlines()]
    rows = [{**starts[i % len(starts)], 'number': i} for i in range(ROWS)]
    prompts.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    self._flags = [
      f'--checkpoint={CHECKPOINT}',
      f'--prompts={prompts}',
      f'--output={self._output}',
      f'--compilation_cache={directory / "programs"}',
      f'--max_new_tokens={NEW_TOKENS}',
      '--temperature=1',
      '--dtype=float32',
      '--mesh=1x1x1',
      '--batch_size=4',
      '--cache_length=128',
    ]
    for _ in range(2):  # the first run compiles
      start = time.perf_counter()
      process = self._start(None)
      process.join()
      self.seconds = time.perf_counter() - start
      assert process.exitcode == 0, self._said.read_text()
      self.expected = self._finished_rows()
      self._output.unlink()

  def _start(self, most_bytes: int | None) -> multiprocessing.process.BaseProcess:
    arguments = self._flags, str(self._said), most_bytes
    process = self._context.Process(target=infer, args=arguments)
    process.start()
    return process

  def _finished_rows(self) -> list[dict]:
    return [json.loads(line) for line in self._output.read_text().splitlines()]

  def _kept(self) -> dict[int, str]:
    """Return the journal's whole lines, by their row."""
    if not self._journal.exists():
      return {}
    lines = self._journal.read_text().split('\n')[1:-1]
    kept: dict[int, str] = {}
    for line in lines:
      try:
        row = json.loads(line)['row']
      except ValueError:
        continue  # cut by a kill or a full disk; a later run has ended the line
      assert row not in kept, f'row {row} is kept twice'
      kept[row] = line
    return kept

  def life(self) -> int:
    """Run the command once, or twice at a time, until a random moment; return how many were killed.

    Raises:
      AssertionError: A row is lost, doubled or wrong, or a message is not one sentence.
    """
    kind = str(self._rng.choice([PLAIN, TWO, FULL_DISK], p=[0.6, 0.2, 0.2]))
    self.counts[kind] += 1
    before = self._kept()
    self._said.unlink(missing_ok=True)
    most = None
    if kind == FULL_DISK:  # there is room for what the command prints, and for a few rows
      size = self._journal.stat().st_size if self._journal.exists() else 0
      most = max(size, PRINTED_BYTES) + int(self._rng.integers(ROWS * ROW_BYTES // 4))
    processes = []
    for _ in range(2 if kind == TWO else 1):
      processes.append(self._start(most))
      time.sleep(self._rng.uniform(0, 0.2) if kind == TWO else 0)
    for process in processes:
      process.join(self._rng.uniform(0, 1.5 * self.seconds))  # a few runs end
      process.kill()  # nothing, if it has ended
      process.join()
    killed = sum(process.exitcode == -signal.SIGKILL for process in processes)
    self.counts['killed'] += killed
    self.counts['killed after going on from kept rows'] += killed * bool(before)
    self._check(before, [process.exitcode for process in processes])
    return killed

  def _check(self, before: dict[int, str], codes: list[int | None]) -> None:
    said = self._said.read_text() if self._said.exists() else ''
    assert 'Traceback' not in said, said
    errors = re.findall('^error: (.*)', said, re.MULTILINE)
    refused = codes.count(2)
    assert set(codes) <= {0, 2, -signal.SIGKILL} and len(errors) == refused, (codes, said)
    for error in errors:
      kind = next((each for each in ERRORS if each in error), None)
      assert kind or 'out.jsonl exists: remove it' in error, error
      self.counts[f'ended with "{kind or "the output exists"}"'] += 1
    for count in re.findall(r'^resumed: (\d+) of', said, re.MULTILINE):
      assert int(count) >= len(before), f'{count} of {len(before)} kept rows were found'
    if self._output.exists():
      rows = self._finished_rows()
      assert [row['number'] for row in rows] == list(range(ROWS)), 'rows are lost or doubled'
      for row, expected in zip(rows, self.expected):
        assert row['tokens'] == expected['tokens'], f'row {row["number"]} is another'
      self.counts['outputs finished'] += 1
      self._output.unlink()
      self._journal.unlink(missing_ok=True)  # killed between the output and the journal's end
      return
    kept = self._kept()
    lost = [row for row in before if kept.get(row) != before[row]]
    assert not lost, f'rows {lost} are lost'
    self.counts['most rows kept by one journal'] = max(
      len(kept), self.counts['most rows kept by one journal']
    )


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--kills', type=int, default=100)
  parser.add_argument('--seed', type=int, default=0)
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as directory:
    runs = Runs(pathlib.Path(directory), args.seed)
    print(f'{ROWS} rows take {runs.seconds:.1f} s; seed {args.seed}', flush=True)
    killed = 0
    while killed < args.kills:
      killed += runs.life()
  for what, count in sorted(runs.counts.items()):
    print(f'{count:5d}  {what}')
  print('no finished row was lost, none doubled, and no run ended with a traceback')


if __name__ == '__main__':
  main()
