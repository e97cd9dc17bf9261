"""What keeps the package's rooms apart: who may import what, and how long a module may be. Reads source, runs none."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / 't5x_inference_ext'
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob('*.py'))

# Slow or global things, and the only modules that may reach for them: the entry points, the runs over a seqio task that
# one of them imports when asked for a task, and the adapter, whose host brings them all.
FRAMEWORKS = {
  'absl': (
    'commands/cli.py',
    'commands/convert_checkpoint.py',
    'commands/infer.py',
    'commands/inspect_checkpoint.py',
    'commands/option_flags.py',
    'commands/plan.py',
    'commands/precompile.py',
    'commands/sampling_flags.py',
    't5x/',
  ),
  'gin': ('commands/cli.py', 't5x/'),
  'seqio': ('runs/task_rows.py', 'runs/task_run.py', 'runs/tasks.py', 't5x/'),
  'tensorflow': ('runs/task_rows.py', 'runs/task_run.py', 'runs/tasks.py', 't5x/'),
}
# The adapter alone knows T5X and flax.
HOST = {'t5x', 'flax', 'flaxformer'}
ADAPTER = ('t5x/',)
MAX_LINES = 300


def _imports(module: str) -> set[str]:
  """Top-level names of everything a module imports, inside functions too."""
  names = set()
  for node in ast.walk(ast.parse((PACKAGE / module).read_text(encoding='utf-8'))):
    if isinstance(node, ast.Import):
      names.update(alias.name.split('.')[0] for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      names.add('t5x_inference_ext' if node.level else node.module.split('.')[0])
  return names


def test_there_are_modules():
  assert {
    'config.py',
    'engine/engine.py',
    'commands/infer.py',
    'commands/convert_checkpoint.py',
  } <= set(MODULES)


@pytest.mark.parametrize('module', MODULES)
def test_imports_only_what_its_room_may(module):
  imports = _imports(module)
  if not module.startswith(ADAPTER):
    assert not imports & HOST, f'only t5x_inference_ext/t5x may import {sorted(imports & HOST)}'
  for framework, allowed in FRAMEWORKS.items():
    assert framework not in imports or module.startswith(allowed), (
      f'only {", ".join(allowed)} may import {framework}'
    )


@pytest.mark.parametrize('framework', FRAMEWORKS)
def test_no_room_is_allowed_what_it_does_not_use(framework):
  for allowed in FRAMEWORKS[framework]:
    modules = [module for module in MODULES if module.startswith(allowed)]
    assert modules and (allowed in ADAPTER or framework in set().union(*map(_imports, modules)))


@pytest.mark.parametrize('module', MODULES)
def test_is_short_enough_to_hold_one_concept(module):
  lines = (PACKAGE / module).read_text(encoding='utf-8').count('\n')
  assert lines <= MAX_LINES, f'{module} has {lines} lines: split it'


def test_every_directory_is_a_package():
  """Gin looks files up by package, and setuptools ships packages: a directory without __init__.py would be lost."""
  directories = {path.parent for path in PACKAGE.rglob('*') if path.suffix in ('.py', '.gin')}
  directories |= {path.parent for path in (PACKAGE / 'configs').rglob('*.gin')}
  assert [d for d in directories if not (d / '__init__.py').is_file()] == []
