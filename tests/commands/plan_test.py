"""The command: flags and gin, report, files, and errors in one line."""

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
from unittest import mock

import pytest

from t5x_inference_ext import config
from t5x_inference_ext.commands import infer, precompile
from t5x_inference_ext.commands import plan as command
from t5x_inference_ext.planner import choose, drafts, search
from t5x_inference_ext.planner.advice import NothingFits
from t5x_inference_ext.planner.gin_text import gin_text
from t5x_inference_ext.planner.machine import Machine
from t5x_inference_ext.planner.request import PlanRequest

TINY = [
  '--model=palm_tiny',
  '--slice=v4:2x2x1',
  '--batch=8',
  '--input_length=48',
  '--output_length=16',
]
PALM = [
  '--model=palm_540b',
  '--slice=v4:4x4x4',
  '--batch=64',
  '--input_length=1920',
  '--output_length=64',
]
GIN = [
  '--gin_file=t5x_inference_ext/configs/runs/plan.gin',
  '--gin_file=t5x_inference_ext/configs/models/palm_540b.gin',
]


@pytest.fixture(autouse=True)
def platforms(monkeypatch):
  """The command sets it."""
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')


@pytest.fixture(autouse=True, scope='module')
def plans_are_searched_once():
  """Many tests ask for the same plans, and a search over all slices takes seconds."""
  with mock.patch.object(search, 'plans', functools.cache(search.plans)):
    yield


def run(*argv: str) -> int:
  return command.run(['plan', *argv])


def test_it_says_where_drafts_pay(capsys, tmp_path, monkeypatch):
  priced = mock.Mock(side_effect=drafts.checking_steps)  # once for the text and the file
  monkeypatch.setattr(drafts, 'checking_steps', priced)
  path = tmp_path / 'plan.json'
  assert run(*TINY, '--speculate=4', f'--json={path}') == 0
  assert 'draft  ' in capsys.readouterr().out
  assert [step['draft'] for step in json.loads(path.read_text())['drafts']] == [1, 2, 4]
  assert priced.call_count == 1
  assert run(*TINY, '--speculate=4', '--phase=prefill') == 2
  assert 'speculate is for decode steps' in capsys.readouterr().err
  assert run(*TINY, '--speculate=ngram:2', f'--json={path}') == 0
  assert [step['draft'] for step in json.loads(path.read_text())['drafts']] == [1, 2]
  assert run(*TINY, '--speculate=4', '--sweep') == 2
  assert 'speculate applies to a single plan' in capsys.readouterr().err


def test_a_simulated_service_checks_drafts(capsys, tmp_path):
  path = tmp_path / 'service.json'
  service = *TINY, '--batch=8', '--rate=5', '--requests=10', f'--json={path}'
  assert run(*service, '--speculate=ngram:8', '--acceptance=0.8') == 0
  out = ' '.join(capsys.readouterr().out.split())
  assert 'drafts ngram:8 right with probability 0.8' in out and 'tokens a step of a row' in out
  (found,) = json.loads(path.read_text())['runs']
  assert 0 < found['drafts']['accepted'] < found['drafts']['drafted']
  for flags, words in (
    (['--speculate=ngram:8'], 'how often drafts (ngram:8) are right: give --acceptance'),
    (['--acceptance=0.8'], 'acceptance is for drafts: give --speculate'),
    (['--speculate=8', '--acceptance=0.8'], 'speculate must be ngram:N or draft:DIR:N'),
    (['--speculate=draft:no:2', '--acceptance=1'], 'draft models by the names of presets'),
  ):
    assert run(*service, *flags) == 2
    assert words in ' '.join(capsys.readouterr().err.split())


def test_the_report_ranks_breaks_down_and_says_why(capsys, repository):
  assert run(*PALM) == 0
  out = capsys.readouterr().out
  tutorial = (repository / 'docs' / 'tutorial.md').read_text(encoding='utf-8')
  shown = re.search(r'^prefill +decode.*\n(?:.+/.+\n)+', tutorial, re.MULTILINE)[0]
  assert shown.count('\n') == 3 and shown in out
  row = r'^(\w+/\w+) +(\w+/\w+)(?: \(1D\))? +(\S+) +64 +([\d.]+) s '
  rows = re.findall(row, out, re.MULTILINE)
  assert rows[0][:3] == ('wg_xyz/batch', 'ws_2d/batch', '4x4x4')
  totals = [float(row[3]) for row in rows]
  assert len(totals) == 12 and totals == sorted(totals)
  assert re.search(r'pairs fit into 30\.75 GiB a chip', out)
  for words in (
    'weight load',
    'chip-ms a token',
    'memory a chip: weights 8.00 GiB + cache 228.',
    'efficiency: matmul 0.796',
  ):
    assert words in out.replace('\n         ', ' ')
  sentence = ' '.join(out.split())
  assert re.search(
    r'wg_xyz/batch for prefill and ws_2d/batch for decode on 4x4x4 take 14\.\d+ s in all, '
    r'[\d.]+ ms less than the next pair of layouts, wg_x/heads and ws_2d/batch on 8x4x2: prefill '
    r'moves fewer activations \(-[\d.]+ s\), other parts cost more \(\+[\d.]+ s\)\.',
    sentence,
  )
  assert "The paper's convention, 270 GB/s for every collective" in sentence


def test_json_has_every_number(tmp_path, capsys):
  path = tmp_path / 'plan.json'
  assert run(*PALM, f'--json={path}') == 0
  data = json.loads(path.read_text())
  assert (data['chips'], data['batch'], data['weights'], data['convention']) == (
    64,
    64,
    'int8',
    'torus',
  )
  assert data['efficiency'] == {'matmul': 0.796, 'memory': 0.903, 'network': 1}
  best = data['plan']
  assert best == data['ranked'][0] and best['decode_layout'] == 'ws_2d/batch' and best['fits']
  assert best['seconds'] == pytest.approx(
    best['prefill']['seconds'] + 64 * best['decode']['seconds']
  )
  for each in data['ranked']:
    for phase in (each['prefill'], each['decode']):
      assert phase['seconds'] == pytest.approx(sum(phase['parts'].values()))
      moved = sum(c['seconds'] for c in phase['collectives'])
      parts = phase['parts']
      assert moved == pytest.approx(
        parts['activations moved'] + parts['weights moved'] + phase['hidden_seconds']
      )
  head, _, difference = data['why'].partition(', mostly as ')
  printed = ' '.join(capsys.readouterr().out.split())
  assert head in printed and data['paper_convention'] in printed
  assert re.fullmatch(
    r'[\d.]+ s less go into activations moved in prefill against [\d.]+ s more elsewhere\.',
    difference,
  )


def test_gin_says_the_same(tmp_path, capsys):
  by_flags, by_gin = tmp_path / 'flags', tmp_path / 'gin'
  assert run(*PALM, f'--json={by_flags}', '--convention=paper') == 0
  assert (
    run(
      *GIN,
      '--gin.SLICE="v4:4x4x4"',
      '--gin.BATCH=64',
      '--gin.CONVENTION="paper"',
      f'--gin.JSON_FILE="{by_gin}"',
    )
    == 0
  )
  assert json.loads(by_flags.read_text()) == json.loads(by_gin.read_text())


def test_without_a_slice_the_cheapest_that_meets_the_target(capsys):
  asked = ['--model=palm_62b', '--batch=8', '--input_length=256', '--output_length=16']
  assert run(*asked, '--latency_target_ms=400') == 0
  out, err = capsys.readouterr()
  slice_ = re.search(r'machine: (v4:\S+), ', out)[1]
  assert f'{slice_} with a batch of 8 is the cheapest, ' in out
  assert 'that take at most 400 ms. The next:' in ' '.join(out.split())
  cost = float(re.search(r'the cheapest, ([\d.]+) chip-ms a token', out)[1])
  others = re.findall(r'^  v4:\S+ +8  .* ([\d.]+) ms +[\d.]+ ms +[\d.]+ +([\d.]+)$', out, re.M)
  costs = [float(c) for _, c in others]
  assert len(costs) > 1 and [cost, *costs] == sorted([cost, *costs])
  assert max(float(total) for total, _ in others) <= 400
  assert 'v4:1x1x1, batch 8: does not fit' in err
  assert run(*asked, '--latency_target_ms=1') == 2
  assert 'error: nothing meets 1 ms: the fastest is v4:' in capsys.readouterr().err


def test_gpus_are_planned_for_too(capsys):
  assert run('--model=palm_62b', '--slice=A100:8', '--batch=8') == 0
  assert 'machine: A100:8, 8 chips' in capsys.readouterr().out


@pytest.mark.skipif(
  importlib.util.find_spec('matplotlib') is None,
  reason='matplotlib is not installed (extra `plots`)',
)
def test_a_sweep_and_figures_write_their_files(tmp_path, capsys):
  assert run(*TINY, '--sweep', f'--output_dir={tmp_path}') == 0
  out = capsys.readouterr().out
  assert 'are on the front' in out and (tmp_path / 'pareto.csv').read_text().startswith(
    'phase,weights,machine'
  )
  assert run(*TINY, '--figures', f'--output_dir={tmp_path}') == 0
  assert {p.name for p in tmp_path.iterdir()} == {
    'pareto.csv',
    'pareto.svg',
    'communication.svg',
    'context.svg',
    'parts.svg',
  }
  # Nothing fits: that is said, with what would.
  assert (
    run('--model=palm_540b', '--slice=v5e:2x2', '--batch=1', '--sweep', f'--output_dir={tmp_path}')
    == 2
  )
  assert 'nothing fits' in capsys.readouterr().err


@pytest.mark.parametrize(
  'argv,words',
  [
    ([], '--model not given; --help shows examples'),
    (['--model=palm_9b'], 'palm_540b'),
    ([*TINY, '--slice=v4:3x3x3'], 'there is no v4 slice v4:3x3x3; known: v4:1x1x1'),
    ([*TINY, '--slice=v9:2x2'], "no chip is called 'v9'"),
    (['--model=palm_tiny', '--chip=v4,v9'], "no chip is called 'v9': there are v4"),
    ([*TINY, '--weights=int9'], 'weights must be one of int8, int4, bfloat16, got int9'),
    ([*TINY, '--weights=int8,head:8'], 'bits: head is no matrix of this model, and no table'),
    ([*TINY, '--batch=0'], 'batch must be a whole number above 0'),
    ([*TINY, '--output_length=0'], 'output_length must be a whole number above 0'),
    ([*TINY, '--mesh=2x2'], 'a mesh is written XxYxZ'),
    ([*TINY, '--mesh=2x2x2'], 'the mesh 2x2x2 has 8 positions and v4:2x2x1 has 4 chips'),
    (
      ['--model=palm_tiny', '--batch=1', '--mesh=2x2x2'],
      'mesh=2x2x2 needs one slice: give its name',
    ),
    ([*TINY, '--slice=v4:8x8x8'], 'd_model=256 does not divide over the 512 devices'),
    ([*TINY, '--latency_target_ms=-1'], 'latency_target_ms must be above 0'),
    ([*TINY, '--latency_target_ms=nan'], 'latency_target_ms must be above 0 and finite, got nan'),
    ([*TINY, '--latency_target_ms=inf'], 'latency_target_ms must be above 0 and finite, got inf'),
    ([*TINY, '--slice=v5e'], 'v5e is a chip, not a slice; known slices: v5e:1x1'),
    ([*TINY, '--slice=h100'], 'h100 is a chip, not a slice; known slices: H100:1'),
    ([*TINY, '--slice=v9'], "no chip is called 'v9': a slice is written chip:shape"),
    ([*TINY, '--json=tests'], "can't write tests: it is a directory"),
    ([*TINY, '--sweep', '--figures'], 'figures applies to a single plan, and sweep makes many'),
    ([*GIN, '--gin.SLICE=4'], 'SLICE must be text or None, got 4'),
    (
      [*GIN, '--gin.SLICE="v4:4x4x4"', '--gin.MESH=(4, 4, 4)'],
      'MESH must be text or None, got (4, 4, 4)',
    ),
    ([*GIN, '--gin.CHIP=["v4"]'], "CHIP must be text, got ['v4']"),
    (
      [*GIN, '--gin.LATENCY_TARGET_MS="fast"'],
      "LATENCY_TARGET_MS must be a number or None, got 'fast'",
    ),
    ([*GIN, '--gin.WEIGHTS=["int8"]'], "WEIGHTS must be text, got ['int8']"),
    (
      [*GIN, '--gin.config.preset.num_layers=0'],
      'ModelConfig.num_layers must be a whole number above 0 and below 2**31, got 0',
    ),
    ([*TINY, '--json=/nowhere/plan'], "can't write /nowhere/plan: there is no directory"),
    ([*TINY, '--sweep', '--output_dir=/nowhere'], 'there is no directory /nowhere'),
    (
      [*TINY, '--sweep', '--gin_output=plan.gin'],
      'gin_output applies to a single plan, and sweep makes many',
    ),
    ([*TINY, '--sweep', '--phase=decode'], 'phase applies to a single plan, and sweep makes many'),
    ([*TINY, '--slice=H100:4', '--check'], 'H100:4 is not a TPU slice'),
    ([*TINY, *GIN], "--model and gin flags can't be mixed"),
    (GIN[:1], 'MODEL_CONFIG has no value'),
    (['--model=palm_540b', '--slice=v5e:4x4', '--batch=1'], 'what would fit: v5e:8x8'),
  ],
)
def test_two_is_for_errors_in_one_line(capsys, argv, words):
  if importlib.util.find_spec('matplotlib') is None and '--sweep' in argv:
    words = 'plots'
  assert run(*argv) == 2
  err = capsys.readouterr().err
  assert err.startswith('error: ') and words in err and err.count('\n') == 1


def test_small_numbers_are_shown(capsys):
  assert run(*TINY) == 0
  out = capsys.readouterr().out
  assert re.search(r'memory a chip: weights [\d.]+ [KM]iB \+ cache [\d.]+ [KM]iB', out)
  costs = re.search(r'chip-ms a token +(\S+) +(\S+) .*prefill: (\S+)\)', out).groups()
  assert all(float(cost) > 0 for cost in costs)


def test_a_chip_that_is_named_twice_counts_once(capsys):
  assert run('--model=palm_tiny', '--batch=8', '--chip=A100,A100', '--input_length=48') == 0
  assert 'of 8 slices' in ' '.join(capsys.readouterr().out.split())


def test_a_file_without_permission_is_refused_first(capsys, monkeypatch, tmp_path):
  monkeypatch.setattr(os, 'access', lambda *unused: False)  # root may write everywhere
  assert run(*TINY, f'--json={tmp_path / "plan"}') == 2
  out, err = capsys.readouterr()
  assert out == '' and err.endswith('plan: permission denied\n')


def test_it_runs_as_a_module(repository, tmp_path):
  result = subprocess.run(
    [sys.executable, '-m', 't5x_inference_ext.plan', *TINY],
    cwd=repository,
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert result.returncode == 0 and 'machine: v4:2x2x1' in result.stdout and result.stderr == ''


@pytest.mark.parametrize(
  'argv',
  [TINY, ['--model=palm_8b', '--slice=v4:2x2x1', '--batch=100000'], [*GIN, '--gin.BATCH=8']],
  ids=['flags', 'nothing fits', 'gin'],
)
def test_a_plan_imports_nothing_that_runs_a_model(repository, argv):
  """Neither the engine nor a checkpoint reader: of the rooms above, only what describes slices."""
  code = (
    'import sys\n'
    'from t5x_inference_ext.commands import plan\n'
    'plan.run(["plan", *sys.argv[1:]])\n'
    'print("imported:", *sys.modules)'
  )
  result = subprocess.run(
    [sys.executable, '-c', code, *argv], cwd=repository, capture_output=True, text=True, timeout=120
  )
  assert result.returncode == 0, result.stderr
  assert ('machine: ' in result.stdout) != ('nothing fits' in result.stderr)
  imported = result.stdout.rpartition('imported: ')[2].split()
  own = {name for name in imported if name.startswith('t5x_inference_ext.')}
  rooms = {name.split('.')[1] for name in own}
  assert {'planner', 'sharding'} < rooms
  assert not rooms & {'engine', 'checkpoints', 'runs', 'model', 't5x', 'distributed'}
  assert {name for name in own if '.precompile.' in name} == {'t5x_inference_ext.precompile.slices'}
  assert not {'tensorstore', 'tensorflow', 'seqio', 'flax', 'tqdm'} & set(imported)


# The plan as gin.

INFER = ['--gin_file=t5x_inference_ext/configs/runs/infer.gin']
TASK = [
  '--gin.MIXTURE_OR_TASK_NAME="planned"',
  '--gin.TASK_FEATURE_LENGTHS={"inputs": 48, "targets": 16}',
]


@pytest.fixture
def planned(tmp_path, capsys):
  path = tmp_path / 'plan.gin'
  assert run(*TINY, '--weights=bfloat16', f'--gin_output={path}') == 0
  assert f'gin: {path}' in capsys.readouterr().out
  return path


def test_infer_runs_the_file_as_it_is(planned, palm_tiny, golden, tmp_path, capsys, monkeypatch):
  (tmp_path / 'planned_task.py').write_text(f"""
import json
import seqio
import tensorflow as tf

def rows(split, shuffle_files, seed=None):
  with open({str(golden / 'greedy.json')!r}) as file:
    prompts = [row['prompt'] for row in json.load(file)]
  return tf.data.Dataset.from_tensor_slices({{'inputs': prompts, 'targets': [''] * len(prompts)}})

feature = seqio.Feature(seqio.ByteVocabulary(), add_eos=False)
seqio.TaskRegistry.add('planned', source=seqio.FunctionDataSource(rows, splits=['test']),
                       preprocessors=[seqio.preprocessors.tokenize],
                       output_features={{'inputs': feature, 'targets': feature}})
""")
  monkeypatch.syspath_prepend(tmp_path)
  assert (
    infer.run(
      [
        'infer',
        *INFER,
        f'--gin_file={planned}',
        *TASK,
        '--gin.MIXTURE_OR_TASK_MODULE="planned_task"',
        f'--gin.CHECKPOINT_PATH="{palm_tiny}"',
        f'--gin.INFER_OUTPUT_DIR="{tmp_path}"',
        '--gin.DTYPE="float32"',
      ]
    )
    == 0
  )  # so that tokens are those of float32
  request = PlanRequest(config.preset('palm_tiny'), 8, 48, 16, weights='bfloat16')
  plan = choose.choose(request, [Machine.parse('v4:2x2x1')]).plan
  out = capsys.readouterr().out
  assert f'mesh: {plan.mesh_text} (given)' in out
  record = json.loads((tmp_path / 'infer.config.json').read_text())
  assert record['mesh'] == plan.mesh_text and plan.layouts == (
    record['prefill_layout'],
    record['decode_layout'],
  )
  rows = [
    json.loads(line)
    for line in (tmp_path / 'planned-predict.jsonl-00000-of-00001').read_text().splitlines()
  ]
  greedy = json.loads((golden / 'greedy.json').read_text())
  assert [row['prediction'] for row in rows] == [row['greedy_text'][:16] for row in greedy]


@pytest.mark.libtpu
def test_precompile_runs_the_file_as_it_is(planned, tmp_path, capsys):
  report = tmp_path / 'report'
  assert (
    precompile.run(
      [
        'precompile',
        '--gin_file=t5x_inference_ext/configs/runs/precompile.gin',
        f'--gin_file={planned}',
        f'--gin.JSON_FILE="{report}"',
      ]
    )
    == 0
  )
  case, text = json.loads(report.read_text())['case'], planned.read_text()
  assert (
    case['phase'] == 'decode'
    and case['batch'] == 8
    and case['context'] == 64
    and case['weights'] == 'bfloat16'
  )
  assert (
    f"PREFILL_LAYOUT = '{case['prefill_layout']}'" in text
    and f"DECODE_LAYOUT = '{case['decode_layout']}'" in text
  )


@pytest.mark.libtpu
def test_a_plan_with_an_int8_cache(tmp_path):
  path, report = tmp_path / 'plan.gin', tmp_path / 'report'
  assert run(*TINY, '--cache=int8', f'--gin_output={path}') == 0
  assert (
    precompile.run(
      [
        'precompile',
        '--gin_file=t5x_inference_ext/configs/runs/precompile.gin',
        f'--gin_file={path}',
        f'--gin.JSON_FILE="{report}"',
      ]
    )
    == 0
  )
  assert json.loads(report.read_text())['case']['cache'] == 'int8'


def test_a_model_of_another_shape_is_written_out():
  model = config.preset('palm_tiny', num_layers=3)
  text = gin_text(choose.choose(PlanRequest(model, 1, 8, 8), [Machine.parse('v4:1x1x1')]).plan)
  assert (
    'config.ModelConfig:\n  num_layers = 3\n' in text
    and 'MODEL_CONFIG = @config.ModelConfig()' in text
  )


def test_nothing_fits_is_an_error_of_the_user():
  assert issubclass(NothingFits, ValueError)


def test_a_pair_of_layouts_can_be_pinned(capsys):
  assert run(*PALM, '--layout=ws_2d/batch') == 0
  out = capsys.readouterr().out
  rows = re.findall(r'^(\w+/\w+) +(\w+/\w+) +(\S+) +64 +([\d.]+) s ', out, re.MULTILINE)
  assert rows == [('ws_2d/batch', 'ws_2d/batch', '4x4x4', rows[0][3])]
  assert 'no other pair of layouts fits' in ' '.join(out.split())
  assert run(*PALM, '--layout=ws_2d/batch,ws_2d/batch,ws_2d/batch') == 2
  assert 'layout must be PREFILL,DECODE or one layout for both' in capsys.readouterr().err
