"""The conversion command, as a user runs it."""

import os
import re
import subprocess
import sys

import gin
import pytest

from t5x_inference_ext.checkpoints import open_checkpoint
from t5x_inference_ext.commands import convert_checkpoint
from t5x_inference_ext.config import ModelConfig
from tests.checkpoints import synthetic


@pytest.fixture(autouse=True)
def no_bindings():
  """A command with plain flags is a process of its own, to which no gin file has been given."""
  gin.clear_config()


def run(*argv):
  return convert_checkpoint.run(['convert_checkpoint', *map(str, argv)])


@pytest.mark.parametrize('weights,ratio', [('int8', 0.27), ('bfloat16', 0.5)])
def test_plain_flags(palm_tiny, tmp_path, capsys, weights, ratio):
  out = tmp_path / 'any.name'
  assert run(f'--input={palm_tiny}', f'--output={out}/', f'--weights={weights}') == 0
  checkpoint = open_checkpoint(out)
  assert (checkpoint.weights, checkpoint.config.norm_scale) == (weights, 'zero')
  captured = capsys.readouterr()
  for words in (
    'T5X checkpoint',
    'step 1000',
    '4 layers',
    "norm_scale: zero (assumed, PaLM's)",
    'worst tensor: ',
    '15.3 MB before (float32)',
    f'wrote and verified {out}',
  ):
    assert words in captured.out
  line = next(line for line in captured.out.splitlines() if line.startswith('layer weights'))
  assert float(line.split(' on disk, ')[1].split()[0]) <= ratio
  assert 'convert: 15.3 MB of 15.3 MB' in captured.err  # no terminal: lines, not a bar
  assert os.listdir(tmp_path) == ['any.name']


def test_gin_and_norm_scale(palm_tiny, tmp_path, capsys):
  out = tmp_path / 'out'
  assert (
    run(
      '--gin_file=t5x_inference_ext/configs/runs/convert.gin',
      f'--gin.INPUT_CHECKPOINT="{palm_tiny}"',
      f'--gin.OUTPUT_CHECKPOINT="{out}"',
      '--gin.WEIGHTS="bfloat16"',
      '--gin.NORM_SCALE="one"',
    )
    == 0
  )
  checkpoint = open_checkpoint(out)
  assert (checkpoint.weights, checkpoint.config.norm_scale) == ('bfloat16', 'one')
  assert 'norm_scale: one (given)' in capsys.readouterr().out


def test_formats_and_scale_search(palm_tiny, tmp_path, capsys):
  assert (
    run(
      f'--input={palm_tiny}', f'--output={tmp_path}/int8', '--format=t5x_int8', '--scale_search=mse'
    )
    == 0
  )
  assert 'slices of up to' in capsys.readouterr().out
  assert (
    run(
      '--gin_file=t5x_inference_ext/configs/runs/convert.gin',
      f'--gin.INPUT_CHECKPOINT="{tmp_path}/int8"',
      f'--gin.OUTPUT_CHECKPOINT="{tmp_path}/float"',
      '--gin.FORMAT="t5x_float"',
    )
    == 0
  )
  int8, floats = open_checkpoint(tmp_path / 'int8'), open_checkpoint(tmp_path / 'float')
  assert (int8.format, int8.weights, floats.format, floats.weights) == (
    't5x',
    'int8',
    't5x',
    'float32',
  )


def test_a_model_whose_tree_does_not_say_its_heads(tmp_path, capsys):
  config = ModelConfig(
    num_layers=2,
    d_model=16,
    d_ff=24,
    num_heads=4,
    d_head=6,
    vocab_size=12,
    num_kv_heads=4,
    block='serial',
    mlp='gelu',
    norm='layer',
    norm_scale='one',
  )
  leaves = synthetic.separate(synthetic.canonical(config), config)
  source = synthetic.write_legacy(tmp_path / 'source', leaves, inline=True)
  assert run(f'--input={source}', f'--output={tmp_path}/out', '--weights=int8') == 2
  assert 'num_heads of merged kernels (a whole number)' in capsys.readouterr().err
  model = tmp_path / 'model.gin'
  model.write_text(
    'from __gin__ import dynamic_registration\nfrom t5x_inference_ext import config\n'
    + ''.join(
      f'config.ModelConfig.{name} = {value!r}\n' for name, value in config.to_dict().items()
    )
    + 'MODEL_CONFIG = @config.ModelConfig()\n'
  )
  assert (
    run(
      '--gin_file=t5x_inference_ext/configs/runs/convert.gin',
      f'--gin_file={model}',
      f'--gin.INPUT_CHECKPOINT="{source}"',
      f'--gin.OUTPUT_CHECKPOINT="{tmp_path}/out"',
      '--gin.RESCALE_LOGITS=False',
    )
    == 0
  )
  assert open_checkpoint(tmp_path / 'out').config == config
  assert 'rescale_logits: False (given)' in capsys.readouterr().out


@pytest.mark.parametrize('gin', [False, True])
def test_sizes_of_slices_and_of_what_is_held(palm_tiny, tmp_path, capsys, gin):
  def planned(source, name, **sizes):
    flags = [
      f'--input={source}',
      f'--output={tmp_path}/{name}',
      '--weights=int8',
      '--workers=1',
      *(f'--{size}={value}' for size, value in sizes.items()),
    ]
    if gin:
      flags = [
        '--gin_file=t5x_inference_ext/configs/runs/convert.gin',
        f'--gin.INPUT_CHECKPOINT="{source}"',
        f'--gin.OUTPUT_CHECKPOINT="{tmp_path}/{name}"',
        '--workers=1',
        *(f'--gin.{size.upper()}="{value}"' for size, value in sizes.items()),
      ]
    assert run(*flags) == 0
    found = re.search(r'(\d+) slices of up to .* about (\d+) MB of memory', capsys.readouterr().out)
    return int(found[1]), int(found[2])

  assert planned(palm_tiny, 'a')[1] > planned(palm_tiny, 'b', hold_bytes='1MiB')[1]
  source = synthetic.write_legacy(
    tmp_path / 'source', synthetic.fused(synthetic.canonical()), chunks=4
  )
  assert planned(source, 'c')[0] < planned(source, 'd', slice_bytes='1kB')[0]
  for one, other in ('ab', 'cd'):
    assert (tmp_path / one / 'checksums.json').read_bytes() == (
      tmp_path / other / 'checksums.json'
    ).read_bytes()


@pytest.mark.parametrize(
  'argv,words',
  [
    ([], '--input, --output, --weights not given'),
    (['--input=a', '--output=b'], '--weights not given'),
    (['--input=a', '--output=b', '--weights=int2'], 'int2'),
    (
      ['--input=a', '--gin_file=t5x_inference_ext/configs/runs/convert.gin'],
      '--input and gin flags',
    ),
    (
      ['--gin_file=t5x_inference_ext/configs/runs/convert.gin', '--gin.INPUT_CHECKPOINT="a"'],
      'OUTPUT_CHECKPOINT has no value',
    ),
    (
      ['--gin_file=t5x_inference_ext/configs/runs/convert.gin', '--gin.WEIGHT="int8"'],
      'nothing uses WEIGHT;',
    ),
    (['--input=/no/such', '--output=b', '--weights=int8'], 'no checkpoint at /no/such'),
    (
      ['--input=a', '--output=b', '--weights=int8', '--hold_bytes=much'],
      'hold_bytes must be a number of bytes',
    ),
    (
      ['--input=a', '--output=b', '--weights=int8', '--slice_bytes=1 TB'],
      'slice_bytes must be a number of bytes',
    ),
    (['--input=a', '--output=gs://b/c', '--weights=int8'], 'give --staging=DIR, a local directory'),
    (['--input=a', '--output=b', '--weights=int8', '--staging=s'], 'is for outputs in a bucket'),
    (
      ['--input=a', '--output=b', '--weights=int8', '--num_shards=0'],
      'num_shards must be at least 1',
    ),
    (
      ['--input=a', '--output=b', '--weights=int8', '--report_tokens=t.npy'],
      'give its directory too, --report=DIR',
    ),
    (
      ['--input=a', '--output=b', '--weights=int8', '--report=r', '--report_tokens=t.npy'],
      'no file at --report_tokens=t.npy',
    ),
    (
      ['--verify', '--output=b', '--report=r'],
      '--verify can be combined only with --output, --input and --workers',
    ),
    (
      ['--verify', '--output=b', '--gin.INPUT_CHECKPOINT="a"'],
      'can be combined only with --output, --input and --workers',
    ),
  ],
)
def test_errors_are_one_line(tmp_path, monkeypatch, capsys, argv, words):
  monkeypatch.chdir(tmp_path)
  assert run(*argv) == 2
  err = capsys.readouterr().err
  assert err.startswith('error: ') and words in err and err.count('\n') == 1
  assert os.listdir(tmp_path) == []


def test_existing_output(palm_tiny, tmp_path, capsys):
  assert run(f'--input={palm_tiny}', f'--output={tmp_path}', '--weights=int8') == 2
  assert f'{tmp_path} exists already' in capsys.readouterr().err


def test_as_a_module_in_a_process_of_its_own(palm_tiny, tmp_path):
  """Without jax or TensorFlow: a conversion needs neither, and starts at once."""
  script = (
    'import runpy, sys; sys.argv[1:] = sys.argv[2:]\n'
    'try: runpy.run_module("t5x_inference_ext.convert_checkpoint", run_name="__main__")\n'
    'finally: print("imported", sorted({"jax", "tensorflow", "seqio"} & set(sys.modules)))'
  )
  environment = {**os.environ, 'PYTHONWARNINGS': 'error'}
  result = subprocess.run(
    [
      sys.executable,
      '-c',
      script,
      '-',
      f'--input={palm_tiny}',
      f'--output={tmp_path}/out',
      '--weights=int8',
    ],
    capture_output=True,
    text=True,
    env=environment,
    cwd=palm_tiny.parent.parent.parent,
    check=False,
  )
  assert result.returncode == 0, result.stderr
  assert 'imported []' in result.stdout
  assert open_checkpoint(tmp_path / 'out').weights == 'int8'


@pytest.mark.parametrize('stderr', ['2>&-', '2>/dev/full'])
def test_nowhere_to_tell_progress(palm_tiny, tmp_path, repository, stderr):
  """As after the terminal has gone: the conversion goes on."""
  command = (
    f'{sys.executable} -m t5x_inference_ext.convert_checkpoint --input={palm_tiny} '
    f'--output={tmp_path}/out --weights=int8 {stderr}'
  )
  result = subprocess.run(
    command, shell=True, stdout=subprocess.PIPE, text=True, cwd=repository, check=False
  )
  assert result.returncode == 0 and f'wrote and verified {tmp_path}/out' in result.stdout


def test_terminal_gets_a_bar(palm_tiny, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(sys.stderr, 'isatty', lambda: True)
  assert run(f'--input={palm_tiny}', f'--output={tmp_path}/out', '--weights=int8') == 0
  err = capsys.readouterr().err
  assert 'convert: 100%' in err and 'verify: 100%' in err
