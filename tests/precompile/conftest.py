"""The TPU compiler is in the extra `test`; where it is not installed, what needs it is skipped and says so."""

import importlib.util

import pytest


def pytest_configure(config):
  config.addinivalue_line('markers', 'libtpu: compiles for a TPU slice; needs libtpu, the TPU compiler, and no TPU.')


def pytest_collection_modifyitems(items):
  if importlib.util.find_spec('libtpu') is None:
    for item in items:
      if item.get_closest_marker('libtpu'):
        item.add_marker(pytest.mark.skip(reason='libtpu, the TPU compiler, is not installed (extra `test`)'))
