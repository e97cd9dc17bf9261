"""JAX inference of large decoder-only language models.

    from t5x_inference_ext import Engine, SamplingParams

The names in `__all__` are the public API. All other modules and names may change from one version
to the next; CHANGELOG.md lists the changes. Importing this package imports neither JAX nor NumPy:
the first use of a public name imports its module.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from t5x_inference_ext._moved import MovedModuleFinder

if TYPE_CHECKING:
  from t5x_inference_ext.config import ModelConfig
  from t5x_inference_ext.engine.engine import Engine
  from t5x_inference_ext.engine.request import Request
  from t5x_inference_ext.engine.sampling import SamplingParams
  from t5x_inference_ext.sharding.layout import Layout
  from t5x_inference_ext.text.grammar import Grammar

__version__ = '0.1.0'  # setup.py reads this line

__all__ = ['Engine', 'Grammar', 'Layout', 'ModelConfig', 'Request', 'SamplingParams', '__version__']

_MODULES = {
  'Engine': 'engine.engine',
  'Grammar': 'text.grammar',
  'Layout': 'sharding.layout',
  'ModelConfig': 'config',
  'Request': 'engine.request',
  'SamplingParams': 'engine.sampling',
}

sys.meta_path.append(MovedModuleFinder())


def __getattr__(name: str) -> Any:
  """Import a public name from its module, and return it."""
  if name not in _MODULES:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  value = getattr(importlib.import_module(f'{__name__}.{_MODULES[name]}'), name)
  globals()[name] = value  # later uses do not call this function
  return value


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
