"""What all commands share: flags, gin bindings, errors in one line."""

import errno
import importlib
import subprocess
import sys
import types

from absl import flags as absl_flags
import jax
import pytest

from t5x_inference_ext.commands import (
  cli,
  convert_checkpoint,
  infer,
  inspect_checkpoint,
  plan,
  precompile,
)
from t5x_inference_ext.errors import UserError


@pytest.fixture(scope='module')
def module():
  """Module that gin files can import; one for all tests, since gin remembers its functions."""
  module = types.ModuleType('command_test_module')
  module.__dict__['__name__'] = module.__name__
  exec(
    'def greet(name, greeting="hello", *, end="."):\n  return f"{greeting} {name}{end}"\n'
    'import dataclasses\nfrom t5x_inference_ext.options import check_options, option\n'
    '@dataclasses.dataclass(frozen=True)\n'
    'class Made:\n  times: int = option(1, help="How often.", least=0)\n'
    '  def __post_init__(self):\n    check_options(self)\n'
    'def typed(name: str | None = None, times: float = 1, loud: bool = False,\n'
    '          marks: tuple[str, ...] = (), made: Made | None = None):\n'
    '  return name, times, loud, marks, made.times',
    module.__dict__,
  )
  sys.modules[module.__name__] = module
  yield module
  del sys.modules[module.__name__]


@pytest.fixture
def gin_file(tmp_path):
  path = tmp_path / 'greet.gin'
  path.write_text(
    'from __gin__ import dynamic_registration\nimport command_test_module\n'
    'NAME = %gin.REQUIRED\nGREETING = "hi"\n'
    'command_test_module.greet:\n  name = %NAME\n  greeting = %GREETING\n'
  )
  return str(path)


def define_count(flags):
  absl_flags.DEFINE_integer('count', 1, 'How many.', flag_values=flags)


def run(main, *argv):
  """Run main(flags) as a command; return the exit code."""
  with cli.Session('What it does.', define_count, ['prog', *argv]) as session:
    main(session.parse())
  return session.code


def greet(module, *argv):
  """What the configured function says, or (exit code)."""
  said = []

  def main(flags):
    cli.parse_gin(flags)
    said.append(cli.configure(module.greet, end='!')())

  code = run(main, *argv)
  return said[0] if said else code


def test_plain_flags_and_success():
  seen = []
  assert (
    run(lambda flags: seen.append((flags.count, flags.gin_file, cli.uses_gin(flags))), '--count=3')
    == 0
  )
  assert seen == [(3, [], False)]


def test_absl_s_logging_flags_are_known():
  assert run(lambda flags: None, '--alsologtostderr') == 0


def test_user_errors_are_one_line(capsys):
  def main(flags):
    raise UserError('the path /x is wrong')

  assert run(main) == 2
  assert capsys.readouterr().err == 'error: the path /x is wrong\n'


def test_an_error_writes_no_control_characters(capsys):
  def main(flags):
    raise UserError('no file at a\x1b[31m:\n  one more')

  assert run(main) == 2
  assert capsys.readouterr().err == 'error: no file at a\\x1b[31m:\n  one more\n'


def test_other_errors_keep_their_traceback():
  with pytest.raises(ZeroDivisionError):
    run(lambda flags: 1 / 0)


@pytest.mark.parametrize(
  'error, message',
  [
    (OSError(errno.ENOSPC, 'No space left on device', '/x'), 'No space left on device: /x'),
    (OSError(errno.ENAMETOOLONG, 'File name too long'), 'File name too long'),
    (PermissionError(errno.EACCES, 'Permission denied', '/x'), 'Permission denied: /x'),
    (MemoryError(), 'too little memory (MemoryError): take fewer or shorter rows, or more devices'),
    (
      jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore'),
      'too little memory (Out of memory allocating 9 bytes.): take fewer or shorter rows',
    ),
  ],
)
def test_errors_of_the_machine_are_one_line(capsys, error, message):
  def main(flags):
    raise error

  assert run(main) == 2
  err = capsys.readouterr().err
  assert err.startswith(f'error: {message}') and err.count('\n') == 1


@pytest.mark.parametrize(
  'error', [FileNotFoundError(errno.ENOENT, 'No such file'), OSError('bare')]
)
def test_errors_that_may_be_this_packages_keep_their_traceback(error):
  def main(flags):
    raise error

  with pytest.raises(OSError):
    run(main)


def test_lines_appear_at_once_and_bytes_that_are_no_text_are_escaped(repository):
  """As in `command > file`, where Python would keep lines for itself until the end."""
  program = """
import os, signal, sys
from t5x_inference_ext.commands import cli
with cli.Session('', lambda flags: None) as session:
  print('wrote', sys.argv[1])
  os.kill(os.getpid(), signal.SIGKILL)
"""
  command = [sys.executable, '-c', program, b'/tmp/\xff']
  result = subprocess.run(command, cwd=repository, stdout=subprocess.PIPE, check=False)
  assert result.stdout == b'wrote /tmp/\\udcff\n'


def test_interrupted():
  def main(flags):
    raise KeyboardInterrupt

  assert run(main) == 130


@pytest.mark.parametrize(
  'argv,words',
  [
    (['--cuont=1'], 'cuont'),
    (['--count=x'], 'count'),
    (['stray'], 'stray'),
    (['--gin.NAME'], 'write --gin.NAME=VALUE'),
  ],
)
def test_wrong_flags(capsys, argv, words):
  assert run(lambda flags: pytest.fail('main was called'), *argv) == 2
  err = capsys.readouterr().err
  assert err.startswith('error: ') and words in err and err.count('\n') == 1


@pytest.mark.parametrize('flag', ['--help', '-h'])
def test_help(capsys, flag):
  assert run(lambda flags: pytest.fail('main was called'), flag) == 0
  out = capsys.readouterr().out
  for words in (
    'What it does.',
    '--count: How many. Default: 1.',
    '--gin_file',
    '--gin.NAME=VALUE',
  ):
    assert words in out


def test_bindings(module, gin_file):
  assert greet(module, f'--gin_file={gin_file}', '--gin.NAME="Ann"') == 'hi Ann!'
  assert (
    greet(module, f'--gin_file={gin_file}', '--gin.NAME="A = B"', '--gin.greet.greeting="yo"')
    == 'yo A = B!'
  )
  assert greet(module, f'--gin_file={gin_file}', '--gin_bindings=NAME = "Ann"') == 'hi Ann!'


def test_a_later_run_starts_afresh(module, gin_file):
  assert greet(module, f'--gin_file={gin_file}', '--gin.NAME="Ann"') == 'hi Ann!'
  assert greet(module, f'--gin_file={gin_file}') == 2


def test_search_paths(module, gin_file, tmp_path):
  paths = f'--gin_search_paths=nowhere,{tmp_path}'
  assert greet(module, paths, '--gin_file=greet.gin', '--gin.NAME="Ann"') == 'hi Ann!'


def test_files_of_the_package_are_found_from_anywhere(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  texts = []

  def main(flags):
    texts.append(cli.parse_gin(flags))

  assert (
    run(
      main,
      '--gin_file=t5x_inference_ext/configs/runs/convert.gin',
      '--gin.INPUT_CHECKPOINT="a"',
      '--gin.OUTPUT_CHECKPOINT="b"',
    )
    == 0
  )
  assert "INPUT_CHECKPOINT = 'a'" in texts[0]


@pytest.mark.parametrize(
  'argv,words',
  [
    ([], 'NAME has no value: set it with --gin.NAME='),
    (['--gin.NAMES="x"'], 'nothing uses NAMES; the gin files define GREETING, NAME'),
    (['--gin.NAM="x"'], 'nothing uses NAM;'),
    (['--gin.greet.nmae="x"'], "doesn't have a parameter named 'nmae'"),
    (['--gin.no_such.name="x"'], "No configurable matching 'no_such'"),
    (['--gin.NAME=text'], 'a string needs quotes'),
    (['--gin_file=no/such.gin'], 'no/such.gin'),
  ],
)
def test_gin_errors_are_one_line(module, gin_file, capsys, argv, words):
  assert greet(module, f'--gin_file={gin_file}', *argv) == 2
  err = capsys.readouterr().err
  assert err.startswith('error: gin: ') and words in err and err.count('\n') == 1


def test_what_no_gin_file_binds(module, tmp_path, capsys):
  (tmp_path / 'empty.gin').write_text('')
  assert greet(module, f'--gin_file={tmp_path}/empty.gin') == 2
  assert "missing a required argument: 'name'" in capsys.readouterr().err


LINES = """
import sys
from t5x_inference_ext.commands import cli
from t5x_inference_ext.progress_bar import print_line
with cli.Session('', lambda flags: None) as session:
  for _ in range(99999):
    print_line('a line')
sys.exit(session.code)
"""


def test_a_reader_that_goes(repository):
  """As `| head`: the command ends, and says nothing."""
  process = subprocess.Popen(
    [sys.executable, '-c', LINES],
    cwd=repository,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )
  assert process.stdout.readline() == 'a line\n'
  process.stdout.close()
  assert process.stderr.read() == '' and process.wait() == 141
  process.stderr.close()


def test_output_that_can_t_be_written(repository):
  with open('/dev/full', 'w', encoding='utf-8') as full:
    result = subprocess.run(
      [sys.executable, '-c', LINES],
      cwd=repository,
      text=True,
      stdout=full,
      stderr=subprocess.PIPE,
      check=False,
    )
  assert (result.returncode, result.stderr) == (
    2,
    "error: can't write to standard output: No space left on device\n",
  )


@pytest.fixture
def typed(module, tmp_path):
  """Runs the annotated function with a gin binding more; returns what it says, or the exit code."""
  path = tmp_path / 'typed.gin'
  path.write_text(
    'from __gin__ import dynamic_registration\nimport command_test_module\nTIMES = 1\n'
    'NAME = None\ncommand_test_module.typed.name = %NAME\n'
    'command_test_module.typed.made = @command_test_module.Made()\n'
    'command_test_module.Made.times = %TIMES\n'
  )

  def call(binding):
    said = []

    def main(flags):
      cli.parse_gin(flags)
      said.append(cli.configure(module.typed)())

    code = run(main, f'--gin_file={path}', f'--gin.{binding}')
    return said[0] if said else code

  return call


@pytest.mark.parametrize(
  'binding,message',
  [
    ('TIMES="x"', "times must be a whole number, 0 or more, got 'x'"),
    ('TIMES=True', 'times must be a whole number, 0 or more, got True'),
    (
      'TIMES=99999999999999999999',
      'times must be a whole number, 0 to 2147483647, got 99999999999999999999',
    ),
    ('NAME=3', 'NAME must be text or None, got 3'),
    ('command_test_module.typed.times="2"', "times must be a number, got '2'"),
    ('command_test_module.typed.loud="no"', "loud must be True or False, got 'no'"),
    ('command_test_module.typed.marks=3', 'marks must be a list, got 3'),
  ],
)
def test_a_value_of_another_type(typed, capsys, binding, message):
  assert typed(binding) == 2
  error = capsys.readouterr().err
  assert message in error and error.count('\n') == 1


@pytest.mark.parametrize(
  'binding,result',
  [
    ('TIMES=2', (None, 1, False, (), 2)),
    ('NAME=None', (None, 1, False, (), 1)),
    ('NAME="c"', ('c', 1, False, (), 1)),
    ('command_test_module.typed.times=2', (None, 2, False, (), 1)),
    ('command_test_module.typed.marks=["!"]', (None, 1, False, ['!'], 1)),
  ],
)
def test_values_of_the_type(typed, binding, result):
  assert typed(binding) == result


@pytest.mark.parametrize(
  'module', [convert_checkpoint, infer, inspect_checkpoint, plan, precompile]
)
def test_help_keeps_its_commands_lines(module):
  lines = module.__doc__.splitlines()
  assert len(lines) > 3
  # Two spaces within a line: a backslash has eaten the line's end.
  assert [line for line in lines if len(line) > 120 or '  ' in line.strip()] == []


@pytest.mark.parametrize(
  'command, words',
  [
    ('convert_checkpoint', ['--gin.INPUT_CHECKPOINT=', '--norm_scale', 'must not exist']),
    ('plan', ['--slice=v4:4x4x4', '--latency_target_ms', 'The cheapest', '--objective=']),
    ('precompile', ['exit code is 0 if the program fits, 1 if it does not', '--layout: ']),
  ],
)
def test_help_teaches(command, words, capsys):
  run = importlib.import_module(f't5x_inference_ext.commands.{command}').run
  assert run([command, '--help']) == 0
  out = capsys.readouterr().out
  assert [word for word in words if word not in out] == []
