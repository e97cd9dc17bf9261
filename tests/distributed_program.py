"""Program of each process of distributed_test: several runs of the command, joined by jax once.

Its arguments are the coordinator's port, its process id and a directory. It prints a JSON object of
what it saw, last.
"""

import contextlib
import io
import json
import pathlib
import sys
from unittest import mock

import numpy as np

from t5x_inference_ext import distributed
from t5x_inference_ext.checkpoints.readers.zarr_arrays import ZarrTensor
from t5x_inference_ext.commands import infer
from t5x_inference_ext.engine.draft_width import verify_widths
from t5x_inference_ext.engine.engine import Engine
from t5x_inference_ext.engine.inbox import SharedInbox
from t5x_inference_ext.engine.request import Request
from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.engine.scheduler import Scheduler
from t5x_inference_ext.engine.scheduler_config import SchedulerConfig
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.rendezvous import ProcessOptions
from t5x_inference_ext.speculation import Speculation
from t5x_inference_ext.text.grammar import Grammar
from tests import processes

ROOT = pathlib.Path(__file__).resolve().parent.parent
CHECKPOINT = ROOT / 'examples' / 'palm_tiny' / 'checkpoint_1000'
TASK_FLAGS = (
  '--gin_file=t5x_inference_ext/configs/runs/infer.gin',
  f'--gin.CHECKPOINT_PATH="{CHECKPOINT}"',
  '--gin.DTYPE="float32"',
  '--gin.MESH="2x2x2"',
  '--gin.MIXTURE_OR_TASK_NAME="golden_prompts"',
  '--gin.MIXTURE_OR_TASK_MODULE="golden_tasks"',
  '--gin.TASK_FEATURE_LENGTHS={"inputs": 48, "targets": 16}',
  '--gin.MODE="predict_with_aux"',
  '--gin.MAX_NEW_TOKENS=8',
  '--gin.BATCH_SIZE=4',
)
PLAIN_FLAGS = (
  f'--checkpoint={CHECKPOINT}',
  '--dtype=float32',
  '--max_new_tokens=8',
  '--batch_size=4',
)


# They repeat themselves, so that rows have drafts.
CORE_PROMPTS = [[70 + i, 71, 70 + i, 71, 70 + i] for i in range(4)]
# Nothing is drafted beside the row with a grammar; the one before it goes on alone.
CORE_LIMITS = [12, 12, 40, 12]
GRAMMAR = Grammar('regex', '[0-9]{3}-[a-f]+')


def count_bytes() -> list[int]:
  """A list of one number: bytes read of the checkpoint's arrays from now on."""
  read, total = ZarrTensor._read, [0]

  def counted(self, bounds):
    values = read(self, bounds)
    total[0] += np.asarray(values).nbytes
    return values

  ZarrTensor._read = counted
  return total


def complaint(function) -> str:
  """What a function complains of, in this process."""
  try:
    function()
  except RequestError as error:
    return str(error)
  return ''


def core_rows(process: str) -> tuple[dict[str, list], int]:
  """Rows of one scheduler in all processes, and the number of draft tokens that it checked.

  Process 0 alone submits, late ones too, and cancels.
  """
  engine = Engine.load(CHECKPOINT, mesh='2x2x2', dtype='float32')
  drafts = Speculation('ngram', 3)
  config = SchedulerConfig(8, 64, page_size=32, end_ids=(), prefix_bytes=2**16, speculate=drafts)
  inbox = SharedInbox()
  core = Scheduler(
    engine.model, engine.weights, config, vocabulary=engine.checkpoint.vocabulary, inbox=inbox
  )
  # Prices at which drafts always pay, whatever this machine's are.
  free = np.ones(1 + len(verify_widths(drafts.most)), np.float32)
  core._decoder._prices = mock.Mock(tries_plain=False, next=lambda: free)
  late = [
    Request(
      (0, *prompt),
      (i,),
      limit,
      SamplingParams(0.7),
      grammar=GRAMMAR if i == 3 else None,
      cache_reply=True,
    )
    for i, (prompt, limit) in enumerate(zip(CORE_PROMPTS, CORE_LIMITS))
  ]
  rows: dict[str, list] = {}
  steps = 0
  if process == '0':
    handles = [core.submit(request) for request in late[:2]]
  while not inbox.closed:
    if process == '0':
      if steps == 3:
        handles += [core.submit(request) for request in late[2:]]
      if steps == 5:
        core.cancel(handles[0])
      if steps > 5 and all(handle.state.value == 'finished' for handle in handles):
        inbox.close()
    for event in core.step():
      rows.setdefault(str(event.request), []).extend([*event.tokens, event.finish])
    steps += 1
  found = {name: [x for x in row if x is not None] for name, row in rows.items()}
  assert core._prefixes is not None and core._prefixes.tree.used  # replies, too, are kept
  return found, core.stats.drafts.drafted


def main(port: str, process: str, directory: str) -> None:
  root = pathlib.Path(directory)
  mine = root / process  # of this process alone, as on hosts without a shared file system
  flags = (
    f'--coordinator_address=localhost:{port}',
    f'--num_processes={processes.COUNT}',
    f'--process_id={process}',
  )
  seen = {}

  def command(name, *arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
      code = infer.run(['infer', *flags, *arguments])
    seen[name] = [code, out.getvalue(), err.getvalue()]

  total = count_bytes()
  scores = [
    '--mode=score',
    f'--prompts={root / "scored.jsonl"}',
    f'--output={mine / "scores.jsonl"}',
  ]
  command('score', *PLAIN_FLAGS, *scores, '--mesh=2x2x2')
  seen['bytes'] = total[0]
  command(
    'taken', *PLAIN_FLAGS, *scores, '--mesh=2x2x2'
  )  # by process 0's output; process 1 has none
  command('small', *PLAIN_FLAGS, *scores, '--mesh=2x2x1', '--overwrite')
  command('differing', *PLAIN_FLAGS, *scores, f'--seed={process}', '--overwrite')
  command(
    'lacking',
    *PLAIN_FLAGS,
    '--mode=score',
    f'--prompts={mine / "only_0.jsonl"}',
    f'--output={mine / "other.jsonl"}',
  )
  task = (*TASK_FLAGS, f'--gin.INFER_OUTPUT_DIR="{mine / "task"}"')
  command('task', *task)
  command('completed', *task)
  seen['identity'] = [
    distributed.is_main(),
    distributed.exchange(lambda: int(process) + 1),
    distributed.from_main(lambda: f'of {process}'),
  ]
  seen['core'], seen['drafted'] = core_rows(process)
  seen['unequal'] = complaint(
    lambda: list(distributed.lockstep('ab' if process == '0' else 'a', key=str))
  )
  seen['joined_twice'] = complaint(
    lambda: distributed.initialize(ProcessOptions(f'localhost:{port}', 3, int(process)))
  )
  seen['written'] = sorted(
    str(path.relative_to(mine)) for path in mine.rglob('*') if path.is_file()
  )
  print(json.dumps(seen))


if __name__ == '__main__':
  main(*sys.argv[1:])
