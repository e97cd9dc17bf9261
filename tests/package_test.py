"""The distribution as a user gets it: built, installed, and used outside the checkout."""

import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

PIP = [sys.executable, '-m', 'pip', '--quiet', '--disable-pip-version-check']
ROOT = pathlib.Path(__file__).resolve().parent.parent
GIN_FILES = sorted(
  path.relative_to(ROOT).as_posix()
  for path in (ROOT / 't5x_inference_ext' / 'configs').rglob('*.gin')
)
NEEDS_T5X = re.compile(
  r"^(from|import) (t5x|t5x_inference_ext\.t5x)\b|^include 't5x/", re.MULTILINE
)
COMMANDS = tuple(
  f't5x_inference_ext-{name}' for name in ('convert', 'infer', 'serve', 'precompile', 'selfcheck')
)
# Frameworks with import costs or global state, which a user of the Python API has not asked for.
FRAMEWORKS = ('absl.flags', 'gin', 'seqio', 'tensorflow', 't5x', 'flax')


def _run(command, cwd, **environment) -> str:
  result = subprocess.run(
    command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
  )
  assert result.returncode == 0, (
    f'{command} exited {result.returncode}\n{result.stdout}\n{result.stderr}'
  )
  return result.stdout


def _wheel(source: pathlib.Path, destination: pathlib.Path) -> pathlib.Path:
  """Builds with what is installed: no network, no isolated environment."""
  _run(
    [
      *PIP,
      'wheel',
      '--no-deps',
      '--no-build-isolation',
      '--wheel-dir',
      str(destination),
      str(source),
    ],
    destination,
  )
  (wheel,) = destination.glob('*.whl')
  return wheel


def _names(wheel: pathlib.Path) -> set[str]:
  with zipfile.ZipFile(wheel) as archive:
    return {name for name in archive.namelist() if '.dist-info/' not in name}


@pytest.fixture(scope='module')
def checkout(repository, tmp_path_factory) -> pathlib.Path:
  """A copy of the sources: a build writes beside them, and finds an earlier build's files."""
  copy = tmp_path_factory.mktemp('checkout') / 'sources'
  unwanted = shutil.ignore_patterns(
    '.*', 'build', 'dist', '*.egg-info', '__pycache__', 'testdata', 'palm_tiny'
  )
  return shutil.copytree(repository, copy, symlinks=True, ignore=unwanted)


@pytest.fixture(scope='module')
def wheel(checkout, tmp_path_factory) -> pathlib.Path:
  return _wheel(checkout, tmp_path_factory.mktemp('wheel'))


@pytest.fixture(scope='module')
def installed(wheel, tmp_path_factory) -> pathlib.Path:
  """A directory with the wheel's contents, for PYTHONPATH; dependencies are this environment's."""
  target = tmp_path_factory.mktemp('installed')
  _run([*PIP, 'install', '--no-deps', '--target', str(target), str(wheel)], target)
  return target


@pytest.fixture
def outside(installed, tmp_path):
  """Runs Python in an empty directory, with the installed wheel before anything editable."""
  path = os.pathsep.join(filter(None, [str(installed), os.environ.get('PYTHONPATH')]))
  return lambda *arguments: _run([sys.executable, *arguments], tmp_path, PYTHONPATH=path)


def test_wheel_holds_the_package_and_nothing_else(wheel, repository):
  package = repository / 't5x_inference_ext'
  sources = [*package.rglob('*.py'), *(package / 'configs').rglob('*')]
  wanted = {
    path.relative_to(repository).as_posix() for path in sources if path.suffix in ('.py', '.gin')
  }
  data = [package / 'runs' / 'selfcheck' / 'golden.json', *(package / 'server' / 'page').iterdir()]
  wanted |= {path.relative_to(repository).as_posix() for path in data}
  assert any(name.endswith('.gin') for name in wanted) and len(data) > 5
  assert _names(wheel) == wanted


def test_wheel_from_an_sdist_is_the_same(wheel, checkout, tmp_path):
  """The checkout's link to configs/ does not survive an sdist: the files behind it must."""
  build = f'from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})'
  _run([sys.executable, '-c', build], checkout)
  (sdist,) = tmp_path.glob('*.tar.gz')
  assert _names(_wheel(sdist, tmp_path)) == _names(wheel)


def test_is_imported_from_the_wheel(outside, installed):
  where = outside('-c', 'import t5x_inference_ext; print(t5x_inference_ext.__file__)').strip()
  assert where == str(installed / 't5x_inference_ext' / '__init__.py')


def test_core_needs_nothing_from_outside_pypi(outside):
  requirements = outside(
    '-c', 'import importlib.metadata as m; print(*m.requires("t5x_inference_ext"), sep="\\n")'
  )
  direct = [line for line in requirements.splitlines() if '@' in line]
  assert direct and all('extra == "t5x"' in line for line in direct)


def test_core_does_without_tensorflow(outside):
  """Two thirds of a full environment, which only a seqio task needs."""
  requirements = outside(
    '-c', 'import importlib.metadata as m; print(*m.requires("t5x_inference_ext"), sep="\\n")'
  ).splitlines()
  core = {re.match(r'[\w.-]+', line)[0] for line in requirements if 'extra ==' not in line}
  assert 'jax' in core and not core & {'tensorflow', 'seqio'}
  extra = {re.match(r'[\w.-]+', line)[0] for line in requirements if 'extra == "seqio"' in line}
  assert extra == {'tensorflow', 'seqio'}


def test_a_task_without_seqio_is_one_sentence(outside):
  program = (
    'import contextlib, io, sys\n'
    'sys.modules.update(seqio=None, tensorflow=None)\n'  # as if not installed
    'from t5x_inference_ext.commands import infer\n'
    'with contextlib.redirect_stderr(io.StringIO()) as said:\n'
    '  code = infer.run(["infer", "--gin_file=t5x_inference_ext/configs/runs/infer.gin"])\n'
    'print(code, said.getvalue())'
  )
  code, _, error = outside('-c', program).strip().partition(' ')
  assert code == '2' and error.startswith('error: ') and error.count('\n') == 0
  assert "pip install 't5x_inference_ext[seqio]'" in error


@pytest.mark.parametrize('module', ['t5x_inference_ext', 't5x_inference_ext.engine.engine'])
def test_python_api_imports_no_framework(outside, module):
  program = (
    f'import sys, {module}; print(*(name for name in {FRAMEWORKS!r} if name in sys.modules))'
  )
  assert outside('-c', program).split() == []


@pytest.mark.parametrize('command', COMMANDS)
def test_command_resolves_and_shows_help(outside, command):
  program = (
    'import importlib.metadata as m, sys; '
    f'entry, = m.distribution("t5x_inference_ext").entry_points.select(name={command!r}); '
    f'run = entry.load(); sys.argv = [{command!r}, "--help"]; sys.exit(run())'
  )
  text = outside('-c', program)
  assert 'python -m t5x_inference_ext.' in text and '--gin_file' in text


@pytest.mark.parametrize('name', GIN_FILES)
def test_gin_file_parses_outside_the_checkout(outside, name):
  """By the name that a user gives to --gin_file or writes in an include."""
  needs_t5x = NEEDS_T5X.search((ROOT / name).read_text(encoding='utf-8'))
  # export.gin imports what only exporting needs; others bind functions of the script that runs.
  missing = [
    module for module in ('t5x', 'tensorflow_serving') if importlib.util.find_spec(module) is None
  ]
  if needs_t5x and missing and (missing[0] == 't5x' or 'export' in name):
    pytest.skip(f'needs {missing[0]}, which is not installed')
  host = 'from t5x.export_lib import save' if 'export' in name else 'from t5x.infer import infer'
  program = (
    f'{host if needs_t5x else ""}\nimport gin, importlib.util\ngin.parse_config_file({name!r})\n'
  )
  assert ' = ' in outside('-c', f'{program}print(gin.config_str())')  # some bind macros alone
