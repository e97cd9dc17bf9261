"""What compiles for a TPU needs libtpu here too; rules of tests/precompile."""

from tests.precompile.conftest import pytest_collection_modifyitems, pytest_configure

__all__ = ('pytest_collection_modifyitems', 'pytest_configure')
