"""Two processes of four devices: the rows of one process of eight; each reads half, one writes."""

import json
import os
import sys
import threading
import time

import jax
import pytest

from t5x_inference_ext import distributed, rendezvous
from t5x_inference_ext.commands import infer
from t5x_inference_ext.engine.engine import Engine
from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.errors import RequestError
from tests import distributed_program, processes
from tests.commands import infer_task_test

pytestmark = pytest.mark.usefixtures('quick_programs')


def _rows(path):
  return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]


def _without_scores(rows):
  return [{k: v for k, v in row.items() if k not in ('score', 'aux')} for row in rows]


@pytest.fixture(scope='module')
def greedy(golden):
  return json.loads((golden / 'greedy.json').read_text(encoding='utf-8'))


@pytest.fixture(scope='module')
def root(golden, greedy, tmp_path_factory):
  """Directory for distributed_program: rows to score, a task's module, one for each process."""
  root = tmp_path_factory.mktemp('distributed')
  (root / 'scored.jsonl').write_text(
    ''.join(
      json.dumps({'prompt': g['prompt'], 'tokens': g['greedy_tokens'][:8]}) + '\n'
      for g in greedy[:6]
    )
  )
  (root / 'golden_tasks.py').write_text(
    infer_task_test.MODULE.format(golden=str(golden / 'greedy.json'))
  )
  for process in range(processes.COUNT):
    (root / str(process)).mkdir()
  (root / '0' / 'only_0.jsonl').write_text('{"prompt": "a", "completion": "b"}\n')
  return root


@pytest.fixture(scope='module')
def seen(root, repository):
  """What the two processes of distributed_program saw."""
  path = os.pathsep.join([str(root), str(repository), os.environ.get('PYTHONPATH', '')])
  results = processes.run(
    lambda port, process: [
      sys.executable,
      '-m',
      'tests.distributed_program',
      str(port),
      str(process),
      str(root),
    ],
    repository,
    PYTHONPATH=path,
  )
  assert [r.returncode for r in results] == [0, 0], '\n'.join(r.stderr for r in results)
  return [json.loads(r.stdout.splitlines()[-1]) for r in results]


def test_the_command_generates_what_one_process_does(palm_tiny, greedy, repository, tmp_path):
  """As a user starts it, on the default mesh: all devices of all processes."""
  output, prompts = tmp_path / 'completions.jsonl', tmp_path / 'prompts.jsonl'
  prompts.write_text(''.join(json.dumps({'prompt': g['prompt']}) + '\n' for g in greedy))
  results = processes.run(
    lambda port, process: [
      sys.executable,
      '-m',
      't5x_inference_ext.infer',
      f'--checkpoint={palm_tiny}',
      f'--prompts={prompts}',
      f'--output={output}',
      '--dtype=float32',
      '--max_new_tokens=16',
      f'--coordinator_address=localhost:{port}',
      '--num_processes=2',
      f'--process_id={process}',
    ],
    repository,
  )
  assert [r.returncode for r in results] == [0, 0], '\n'.join(r.stderr for r in results)
  rows = _rows(output)
  assert [row['prompt'] for row in rows] == [g['prompt'] for g in greedy]
  assert [row['tokens'] for row in rows] == [g['greedy_tokens'][:16] for g in greedy]
  assert (
    'mesh: 2x2x2 (all that divide the model), 8 of 8 cpu devices in 2 processes'
    in results[0].stdout
  )
  assert processes.own(results[1].stdout) == ''
  assert sorted(os.listdir(tmp_path)) == [
    'completions.jsonl',
    'completions.jsonl.config.json',
    'prompts.jsonl',
  ]
  assert json.loads((tmp_path / 'completions.jsonl.config.json').read_text())['processes'] == 2


def test_scores_are_those_of_one_process(seen, root, tmp_path):
  assert [s['score'][0] for s in seen] == [0, 0], seen[0]['score'][2] + seen[1]['score'][2]
  one = tmp_path / 'scores.jsonl'
  assert (
    infer.run(
      [
        'infer',
        *distributed_program.PLAIN_FLAGS,
        '--mesh=2x2x2',
        '--mode=score',
        f'--prompts={root / "scored.jsonl"}',
        f'--output={one}',
      ]
    )
    == 0
  )
  rows, expected = _rows(root / '0' / 'scores.jsonl'), _rows(one)
  assert len(rows) == 6 and _without_scores(rows) == _without_scores(expected)
  assert [row['score'] for row in rows] == pytest.approx(
    [row['score'] for row in expected], rel=1e-5
  )


def test_a_tasks_rows_are_those_of_one_process(seen, root, greedy, tmp_path, monkeypatch):
  assert [s['task'][0] for s in seen] == [0, 0], seen[0]['task'][2] + seen[1]['task'][2]
  monkeypatch.syspath_prepend(root)
  assert (
    infer.run(['infer', *distributed_program.TASK_FLAGS, f'--gin.INFER_OUTPUT_DIR="{tmp_path}"'])
    == 0
  )
  name = 'golden_prompts-predict_with_aux.jsonl-00000-of-00001'
  rows, expected = _rows(root / '0' / 'task' / name), _rows(tmp_path / name)
  assert [row['prediction'] for row in rows] == [g['greedy_text'][:8] for g in greedy]
  assert _without_scores(rows) == _without_scores(expected)
  assert [row['aux']['scores'] for row in rows] == pytest.approx(
    [row['aux']['scores'] for row in expected], rel=1e-5
  )


def test_each_process_reads_its_half(seen, palm_tiny, root, tmp_path, monkeypatch):
  """Of what one process of eight devices reads: 15 MB of float32, each shard once."""
  monkeypatch.setattr(distributed_program.ZarrTensor, '_read', distributed_program.ZarrTensor._read)
  total = distributed_program.count_bytes()
  assert (
    infer.run(
      [
        'infer',
        *distributed_program.PLAIN_FLAGS,
        '--mesh=2x2x2',
        '--mode=score',
        f'--prompts={root / "scored.jsonl"}',
        f'--output={tmp_path / "scores.jsonl"}',
      ]
    )
    == 0
  )
  weights = 3_835_136 * 4
  assert weights <= total[0] < 1.01 * weights
  for s in seen:
    assert s['bytes'] == pytest.approx(weights / 2, rel=0.01)


def test_one_core_in_all_processes(seen, palm_tiny):
  """Late requests, one of which has a grammar, and one that is cancelled, with drafts: both
  processes see the rows of one process without drafts.
  """
  rows = seen[0]['core']
  assert rows == seen[1]['core'] and sorted(rows) == ['0', '1', '2', '3']
  assert seen[0]['drafted'] == seen[1]['drafted'] > 0
  engine = Engine.load(palm_tiny, mesh='1x1x1', dtype='float32')
  found = engine.generate(
    distributed_program.CORE_PROMPTS,
    max_new_tokens=distributed_program.CORE_LIMITS,
    sampling=SamplingParams(0.7),
    seeds=range(4),
    eos_id=-1,
  )
  *tokens, finish = rows['0']
  assert finish == 'cancelled' and 0 < len(tokens) < 12 and tokens == found[0].tokens[: len(tokens)]
  for i in (1, 2):
    assert rows[str(i)] == [*found[i].tokens, 'length']
  ((sample,),) = engine.complete(
    distributed_program.CORE_PROMPTS[3:],
    max_new_tokens=12,
    sampling=SamplingParams(0.7),
    seeds=[3],
    eos_id=-1,
    grammar=distributed_program.GRAMMAR,
  )
  assert rows['3'] == [*sample.tokens, 'length'] and sample.tokens != found[3].tokens


def test_process_0_alone_writes_and_prints(seen):
  assert seen[0]['written'] == [
    'only_0.jsonl',
    'scores.jsonl',
    'scores.jsonl.config.json',
    'task/config.gin',
    'task/golden_prompts-predict_with_aux.jsonl-00000-of-00001',
    'task/golden_prompts-predict_with_aux.jsonl-00000-of-00001.COMPLETED',
    'task/infer.config.json',
  ]
  assert seen[1]['written'] == []
  for name in ('score', 'task', 'completed'):
    assert seen[0][name][1] and seen[1][name][1] == ''
    assert seen[1][name][2] == ''


def test_what_process_0_completed_is_skipped_by_all(seen):
  assert [s['completed'][0] for s in seen] == [0, 0]
  assert 'COMPLETED exists, skipped' in seen[0]['completed'][1]


@pytest.mark.parametrize(
  'name, says, says_other',
  [
    ('taken', 'scores.jsonl exists: remove it', 'process 0: the output'),
    (
      'small',
      'the mesh has 4 of 8 devices, but none of process 1',
      'but none of process 1: with 2 processes',
    ),
    (
      'differing',
      'options of process 1 and of process 0 differ',
      'options of process 1 and of process 0 differ',
    ),
    ('lacking', 'process 1: no prompts file at', 'error: no prompts file at'),
  ],
)
def test_an_error_of_one_process_ends_all(seen, name, says, says_other):
  assert [s[name][0] for s in seen] == [2, 2]
  assert says in seen[0][name][2] and says_other in seen[1][name][2]


def test_agreement(seen):
  assert [s['identity'] for s in seen] == [[True, [1, 2], 'of 0'], [False, [1, 2], 'of 0']]
  for process, s in enumerate(seen):
    assert (
      s['unequal']
      == 'batch 1 of process 1 differs from that of process 0: the processes must read the same '
      'examples '
      'in the same order'
    )
    assert (
      s['joined_twice']
      == f"this process is already process {process} of 2, and can't become process "
      f'{process} of 3'
    )


class TestOneProcess:
  def test_agrees_with_itself(self):
    assert distributed.is_main()
    assert distributed.exchange(lambda: 3) == [3] and distributed.from_main(lambda: 'a') == 'a'
    assert list(distributed.lockstep(iter('abc'))) == ['a', 'b', 'c']
    with pytest.raises(KeyError), distributed.together():
      raise KeyError('x')
    distributed.check_same(a=1)
    distributed.initialize(rendezvous.ProcessOptions())
    assert not jax.distributed.is_initialized()

  @pytest.mark.parametrize(
    'flags, says',
    [
      (['--coordinator_address=localhost:1234'], 'num_processes and process_id not given'),
      (['--num_processes=2', '--process_id=0'], 'go together: coordinator_address not given'),
      (['--process_id=0'], 'go together: coordinator_address and num_processes not given'),
      (
        ['--coordinator_address=localhost', '--num_processes=2', '--process_id=0'],
        'is HOST:PORT of process 0',
      ),
      (
        ['--coordinator_address=localhost:x', '--num_processes=2', '--process_id=0'],
        "got 'localhost:x'",
      ),
      (
        ['--coordinator_address=h:1', '--num_processes=2', '--process_id=2'],
        'process_id must be 0 to num_processes -',
      ),
      (
        ['--coordinator_address=h:1', '--num_processes=2', '--process_id=-1'],
        'process_id must be a whole number, 0',
      ),
      (
        ['--coordinator_address=h:1', '--num_processes=0', '--process_id=0'],
        'num_processes must be a whole number, 1',
      ),
      (
        ['--coordinator_address=auto', '--num_processes=2'],
        'coordinator_address=auto finds num_processes and',
      ),
    ],
  )
  @pytest.mark.parametrize(
    'others', [['--checkpoint=a', '--prompts=b', '--output=c'], ['--gin_file=none.gin']]
  )
  def test_bad_flags(self, flags, says, others, capsys):
    assert infer.run(['infer', *flags, *others]) == 2
    assert says in capsys.readouterr().err


class TestRendezvous:
  """In threads, as each side only has its sockets."""

  def _meet(self, *arguments, timeout=20):
    """Runs meet(address, *arguments) at once for each of `arguments`: what each complains of."""
    address, complaints = f'localhost:{processes.free_port()}', [None] * len(arguments)

    def meet(i, count, process):
      try:
        rendezvous.meet(address, count, process, timeout)
        complaints[i] = ''
      except RequestError as error:
        complaints[i] = str(error)

    threads = [threading.Thread(target=meet, args=(i, *a)) for i, a in enumerate(arguments)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join(60)
    return complaints

  def test_all_come(self):
    assert self._meet((3, 2), (3, 0), (3, 1)) == ['', '', '']
    assert self._meet((1, 0)) == ['']

  def test_one_is_missing(self):
    start = time.monotonic()
    told = (
      'process 2 of 3 did not arrive within 1 s: are they started with the same '
      'coordinator_address?'
    )
    assert self._meet((3, 0), (3, 1), timeout=1)[0] == told
    assert time.monotonic() - start < 10

  def test_process_0_is_missing(self):
    (complaint,) = self._meet((2, 1), timeout=0.5)
    assert 'process 0 was not reached at coordinator_address=localhost:' in complaint
    assert 'within 0.5 s (Connection refused)' in complaint

  def test_twice_the_same(self):
    assert self._meet((3, 0), (3, 1), (3, 1))[0] == 'two processes were started with process_id=1'

  def test_other_numbers(self):
    assert (
      self._meet((2, 0), (3, 1))
      == ['process 1 was started with num_processes=3 and process 0 with 2'] * 2
    )

  def test_a_port_in_use(self):
    with rendezvous.socket.create_server(('', 0)) as server:
      port = server.getsockname()[1]
      with pytest.raises(RequestError, match=f"can't listen at port {port} .*choose another"):
        rendezvous.meet(f'localhost:{port}', 2, 0, 1)

  def test_strangers(self):
    """What else speaks at the port is passed over, and what else listens there is not process 0."""
    port = processes.free_port()
    thread = threading.Thread(target=rendezvous.meet, args=(f'localhost:{port}', 2, 0, 20))
    thread.start()
    deadline = time.monotonic() + 10
    while True:
      try:
        with rendezvous.socket.create_connection(('localhost', port)) as stranger:
          stranger.sendall(b'GET / HTTP/1.1\r\n')
        break
      except ConnectionRefusedError:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    rendezvous.meet(f'localhost:{port}', 2, 1, 20)
    thread.join(20)
    assert not thread.is_alive()
    with rendezvous.socket.create_server(('', 0)) as server:
      address = f'localhost:{server.getsockname()[1]}'
      with pytest.raises(RequestError, match='process 0 was not reached'):
        rendezvous.meet(address, 2, 1, 0.5)
