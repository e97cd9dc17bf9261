"""Errors for old names of modules and classes: using one raises an error with the new name.

Users' gin files name modules and classes, so a rename breaks files that no tool here can check.
"""

from collections.abc import Callable, Mapping, Sequence
import importlib.machinery
import types
from typing import Any

_PACKAGE = 't5x_inference_ext'
_WHERE = '(CHANGELOG.md lists all new names)'

# Removed package -> package that most of its modules moved to.
_PACKAGES = {
  'collectives': 'model.collectives',
  'decoding': 'engine',
  'layers': 'model',
  'layouts': 'sharding',
  'serving': 'runs',
}
# Old name of a module, which gin files, documentation and scripts may use -> its new name.
_MODULES = {
  'command': 'commands.cli',
  'decoding.cache': 'model.cache',
  'decoding.conversation': 'engine.conversation',
  'decoding.generate': 'engine.static_batch',
  'decoding.model': 'model.transformer',
  'decoding.sampling': 'engine.sampling',
  'decoding.scheduler': 'engine.scheduler',
  'decoding.scoring': 'engine.scoring',
  'engine.vocabularies': 'text.vocabulary',
  'layouts.arrangement': 'sharding.packing',
  'layouts.explain': 'sharding.explain',
  'layouts.explain_text': 'sharding.explain_text',
  'layouts.layout': 'sharding.layout',
  'layouts.mesh': 'sharding.mesh',
  'layouts.mesh_choice': 'sharding.mesh_choice',
  'layouts.placement': 'sharding.activations',
  'layouts.rules': 'sharding.axis_rules',
  'layouts.torus': 'sharding.torus',
  'layouts.traffic': 'sharding.traffic',
  'parameters': 'params',
  'precompile.generation': 'engine.saved_generation',
  'precompile.saved': 'engine.saved_program',
  'quality': 'runs.quality',
  'serving.loading': 'runs.loading',
  'serving.prompts_file': 'runs.prompts_file',
  'serving.task_run': 'runs.task_run',
  'serving.tasks': 'runs.tasks',
  'serving.vocabularies': 'text.vocabulary',
  'weights': 'model.weights',
}


class MovedModuleFinder:
  """The last finder in `sys.meta_path`. It raises an error for old module names of this package.

  For a removed package it returns an empty package. Python then asks for each module in it, which
  has its own new name.
  """

  def find_spec(
    self, fullname: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
  ) -> importlib.machinery.ModuleSpec | None:
    """Return an empty package, or None for a name that this package never had.

    Raises:
      ModuleNotFoundError: The module has a new name.
    """
    package, _, name = fullname.partition('.')
    if package != _PACKAGE:
      return None
    if name in _PACKAGES:
      return importlib.machinery.ModuleSpec(fullname, None, is_package=True)
    parent = name.partition('.')[0]
    if name in _MODULES:
      message = f'{fullname} is now {_PACKAGE}.{_MODULES[name]}'
    elif parent in _PACKAGES:
      message = f'{fullname} is gone: {_PACKAGE}.{parent} is now {_PACKAGE}.{_PACKAGES[parent]}'
    else:
      return None
    # The error has no `name`: with one, `from package import name` would hide the message.
    raise ModuleNotFoundError(f'{message} {_WHERE}')


def renamed(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
  """Return a module's `__getattr__` that raises ImportError, with the new name, for old names.

  The error is not an AttributeError, because gin and `from module import name` replace the message
  of such an error by their own.

  Args:
    module: The module's `__name__`.
    names: Old names -> new names. A new name with a dot is in another module.
  """

  def get(name: str) -> Any:
    if name in names:
      new = names[name] if '.' in names[name] else f'{module}.{names[name]}'
      raise ImportError(f'{module}.{name} is now {new} {_WHERE}')
    raise AttributeError(f'module {module!r} has no attribute {name!r}')

  return get
