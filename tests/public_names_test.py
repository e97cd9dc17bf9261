"""The public names, what importing them costs, and what the names of earlier versions say."""

import ast
import importlib
import pathlib
import re
import subprocess
import sys

import gin
import pytest

import t5x_inference_ext
from t5x_inference_ext import _moved
from t5x_inference_ext.commands import infer

HEAVY = ('jax', 'numpy', 'tensorstore', 'absl', 'gin')


def _python(program):
  return subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, check=True)


def test_importing_the_package_imports_nothing_heavy():
  program = (
    f'import sys, t5x_inference_ext; print(*(name for name in {HEAVY!r} if name in sys.modules))'
  )
  assert _python(program).stdout.split() == []


def test_every_public_name_is_there():
  assert sorted(t5x_inference_ext.__all__) == sorted([*t5x_inference_ext._MODULES, '__version__'])
  for name, module in t5x_inference_ext._MODULES.items():
    home = importlib.import_module(f't5x_inference_ext.{module}')
    assert getattr(t5x_inference_ext, name) is getattr(home, name)
  assert re.fullmatch(r'\d+\.\d+\.\d+', t5x_inference_ext.__version__)
  assert set(t5x_inference_ext.__all__) <= set(dir(t5x_inference_ext))


def test_type_checkers_see_the_same_names():
  """The imports under TYPE_CHECKING are those that __getattr__ makes."""
  tree = ast.parse(pathlib.Path(t5x_inference_ext.__file__).read_text(encoding='utf-8'))
  (checked,) = [node for node in tree.body if isinstance(node, ast.If)]
  seen = {
    alias.name: node.module.removeprefix('t5x_inference_ext.')
    for node in checked.body
    for alias in node.names
  }
  assert seen == t5x_inference_ext._MODULES


def test_a_name_that_never_was_is_an_attribute_error():
  with pytest.raises(AttributeError, match="has no attribute 'Enigne'"):
    t5x_inference_ext.Enigne  # noqa: B018
  with pytest.raises(ModuleNotFoundError, match="No module named 't5x_inference_ext.enigne'"):
    importlib.import_module('t5x_inference_ext.enigne')


@pytest.mark.parametrize(('old', 'new'), _moved._MODULES.items())
def test_an_old_module_says_its_new_name(old, new):
  with pytest.raises(
    ModuleNotFoundError, match=rf'{re.escape(old)} is now t5x_inference_ext\.{re.escape(new)} \('
  ):
    importlib.import_module(f't5x_inference_ext.{old}')
  importlib.import_module(f't5x_inference_ext.{new}')


@pytest.mark.parametrize(('old', 'new'), _moved._PACKAGES.items())
def test_other_modules_of_an_old_package_say_where_it_went(old, new):
  with pytest.raises(ModuleNotFoundError, match=f'{old}.rest is gone: .* is now .*{new} '):
    importlib.import_module(f't5x_inference_ext.{old}.rest')
  importlib.import_module(f't5x_inference_ext.{new}')


OLD = [
  ('from t5x_inference_ext.decoding import sampling', 't5x_inference_ext.engine.sampling'),
  ('import t5x_inference_ext.serving.task_run', 't5x_inference_ext.runs.task_run'),
  (
    'from t5x_inference_ext.engine import sampling\nsampling.Sampler.temperature = 1',
    't5x_inference_ext.engine.sampling.SamplingParams',
  ),
]


@pytest.fixture(params=OLD, ids=['from', 'import', 'selector'])
def old_gin(request, tmp_path):
  """A gin file of an earlier version, and the name that an error must tell."""
  text, new = request.param
  path = tmp_path / 'old.gin'
  path.write_text(f'from __gin__ import dynamic_registration\n{text}\n', encoding='utf-8')
  return path, new


def test_an_old_gin_file_ends_the_command_with_the_new_name(old_gin, capsys):
  path, new = old_gin
  assert infer.run(['infer', f'--gin_file={path}']) == 2
  error = capsys.readouterr().err
  assert error.startswith('error: gin: ') and error.count('\n') == 1
  assert f'is now {new} (CHANGELOG.md' in error


def test_gin_itself_says_the_new_name(old_gin):
  path, new = old_gin
  with pytest.raises(ImportError, match=rf'is now {re.escape(new)} \(CHANGELOG\.md'):
    gin.parse_config_file(str(path))


@pytest.mark.parametrize('name', ['Engine', 'Completion'])
def test_names_of_the_old_engine_module(name):
  with pytest.raises(ImportError, match=rf'engine\.{name} is now t5x_inference_ext\..*{name} '):
    exec(f'from t5x_inference_ext.engine import {name}')
