"""Checker of annotations in tests: conftest.py installs it for the package's array functions."""

from collections.abc import Callable

import beartype


def typecheck(function: Callable) -> Callable:
  """Check a function's arguments and result with beartype, but not a dataclass's fields.

  Fields of pytrees are annotated as arrays. In their place a pytree may hold shapes, PartitionSpecs
  or tracers' leaves.
  """
  return function if function.__name__ == '__init__' else beartype.beartype(function)
