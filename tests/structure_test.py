"""What keeps the package's rooms apart: who may import what, and how long a module may be. Reads
source, runs none.
"""

import ast
import collections
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / 't5x_inference_ext'
MODULES = sorted(
  path.relative_to(PACKAGE).as_posix()
  for path in PACKAGE.rglob('*.py')
  if 'configs' not in path.relative_to(PACKAGE).parts
)
# `python -m t5x_inference_ext.NAME`: each only calls its command.
SHIMS = {
  'convert_checkpoint.py',
  'infer.py',
  'inspect_checkpoint.py',
  'plan.py',
  'selfcheck.py',
  'precompile/__main__.py',
  'serve.py',
}

# Slow or global things, and the only modules that may import them: the commands, the runs over a
# seqio task that one of them imports when asked for a task, and the adapter, whose host brings
# them.
FRAMEWORKS = {
  'absl': ('commands/', 't5x/'),
  'gin': ('checkpoints/readers/training_gin.py', 'commands/cli.py', 't5x/'),
  'seqio': ('runs/task_', 'runs/tasks.py', 't5x/'),
  'tensorflow': ('runs/task_', 'runs/tasks.py', 't5x/'),
}
# The adapter alone knows T5X and flax.
HOST = {'t5x', 'flax', 'flaxformer'}
ADAPTER = ('t5x/',)
MAX_LINES = 300

# Rooms from the top floor down: a room imports rooms of lower floors alone. Single modules at the
# package's root are the ground floor; everyone may import them.
FLOORS = (
  {'commands'},
  {'server'},
  {'planner', 'runs', 't5x'},
  {'precompile', 'simulator'},
  {'engine'},
  {'checkpoints'},
  {'model'},
  {'sharding', 'kernels'},
  {'quantization', 'text'},
)
# planner may import precompile for `--check` alone; tests/planner holds it to doing so lazily.

# Modules whose functions are compiled; nothing else calls jax.jit.
JITTED = ('checkpoints/calibration/', 'engine/programs.py', 'precompile/', 't5x/')

# Public names that several modules define on purpose, and why.
SHARED_NAMES = {
  'run': 'the entry point of each command',
  'define_flags': 'the flags of each command',
}
COMPILED = 'engine/programs.py'  # defines the compiled form of a function under the function's name


def _tree(module: str) -> ast.Module:
  return ast.parse((PACKAGE / module).read_text(encoding='utf-8'))


def _imported(module: str) -> set[str]:
  """Dotted names of everything a module imports, inside functions too."""
  names = set()
  for node in ast.walk(_tree(module)):
    if isinstance(node, ast.Import):
      names.update(alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{module}: imports are absolute'
      names.update(f'{node.module}.{alias.name}' for alias in node.names)
  return names


def _frameworks(module: str) -> set[str]:
  return {name.partition('.')[0] for name in _imported(module)}


def _dotted(module: str) -> str:
  return 't5x_inference_ext.' + module.removesuffix('.py').removesuffix('/__init__').replace(
    '/', '.'
  )


def _room(path: str) -> str | None:
  """The room of a module's path, None on the ground floor."""
  return path.partition('/')[0] if '/' in path and path not in SHIMS else None


def _rooms_imported(module: str) -> set[str]:
  rooms = set().union(*FLOORS)
  parts = (name.split('.') for name in _imported(module) if name.startswith('t5x_inference_ext.'))
  return {part[1] for part in parts if part[1] in rooms}


def test_there_are_modules():
  assert {'config.py', 'engine/engine.py', 'commands/infer.py'} | SHIMS <= set(MODULES)


@pytest.mark.parametrize('module', MODULES)
def test_imports_only_what_its_room_may(module):
  imports = _frameworks(module)
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
    assert modules and (allowed in ADAPTER or framework in set().union(*map(_frameworks, modules)))


def test_every_room_has_a_floor():
  rooms = {_room(module) for module in MODULES} - {None}
  assert rooms == set().union(*FLOORS)


@pytest.mark.parametrize('module', MODULES)
def test_imports_point_down(module):
  """So that no two rooms import each other, directly or through others."""
  room = _room(module)
  floor = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}
  for other in _rooms_imported(module) - {room}:
    if room is None:
      assert module in SHIMS or module == '__init__.py', f'{module} may not import {other}'
    else:
      assert floor[room] < floor[other], f'{module}: {room} may not import {other}'


def test_modules_do_not_import_each_other_in_a_circle():
  """Imports at the top of modules; what functions import when they run may close a circle."""
  names = {module: _dotted(module) for module in MODULES}
  graph = {}
  for module, name in names.items():
    tops = set()
    for node in _tree(module).body:
      if isinstance(node, ast.ImportFrom):
        for alias in node.names:
          inner = f'{node.module}.{alias.name}'
          tops.add(inner if inner in names.values() else node.module)
    graph[name] = tops & set(names.values()) - {name}
  while leaves := {name for name, tops in graph.items() if not tops}:
    graph = {name: tops - leaves for name, tops in graph.items() if name not in leaves}
  assert not graph, f'these import each other: {sorted(graph)}'


@pytest.mark.parametrize('module', [m for m in MODULES if not m.startswith(JITTED)])
def test_compiled_programs_have_one_home(module):
  found = [
    node.lineno
    for node in ast.walk(_tree(module))
    if isinstance(node, ast.Attribute)
    and node.attr in ('jit', 'pmap')
    and isinstance(node.value, ast.Name)
    and node.value.id == 'jax'
  ]
  assert not found, f'{module}:{found}: compile it in engine/programs.py'


def _public_names(module: str) -> set[str]:
  names = set()
  for node in _tree(module).body:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
      names.add(node.name)
    elif isinstance(node, ast.Assign):
      names.update(target.id for target in node.targets if isinstance(target, ast.Name))
    elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
      names.add(node.target.id)
  return {name for name in names if not name.startswith('_')}


def test_one_name_one_thing():
  """A public name is defined in one module, or excused in SHARED_NAMES."""
  homes = collections.defaultdict(list)
  for module in MODULES:
    for name in _public_names(module):
      homes[name].append(module)
  shared = {name: modules for name, modules in homes.items() if len(modules) > 1}
  for name in SHARED_NAMES:
    assert name in shared, f'{name} is excused, and has one home'
  unexcused = {
    name: modules
    for name, modules in shared.items()
    if name not in SHARED_NAMES and not (len(modules) == 2 and COMPILED in modules)
  }
  assert not unexcused, unexcused


@pytest.mark.parametrize('module', MODULES)
def test_is_short_enough_to_hold_one_concept(module):
  lines = (PACKAGE / module).read_text(encoding='utf-8').count('\n')
  assert lines <= MAX_LINES, f'{module} has {lines} lines: split it'


def test_every_directory_is_a_package():
  """Gin looks files up by package, and setuptools ships packages: a directory without __init__.py
  would be lost.
  """
  directories = {path.parent for path in PACKAGE.rglob('*') if path.suffix in ('.py', '.gin')}
  directories |= {path.parent for path in (PACKAGE / 'configs').rglob('*.gin')}
  assert [d for d in directories if not (d / '__init__.py').is_file()] == []
