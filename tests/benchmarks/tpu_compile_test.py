"""The table of compiled programs: its cells for stock T5X, and the line where it is absent."""

import dataclasses
import sys
import types

import pytest

import benchmarks
from benchmarks import tpu_compile


@dataclasses.dataclass(frozen=True)
class FakeStock:
  """The fields of stock_t5x.Stock, which can't be imported without T5X."""

  batch: int
  fits: bool
  needed: int | None = None
  seconds: float = 0.0

  @property
  def estimate(self):
    return types.SimpleNamespace(serial_seconds=self.seconds)


@pytest.mark.parametrize(
  'stock, seconds, cells',
  [
    (FakeStock(8, True, seconds=0.050), 0.010, ' 50.0 | 5.0x |'),
    (FakeStock(8, True, seconds=0.050), None, ' 50.0 |  |'),
    (FakeStock(12, True, seconds=0.050), 0.010, ' 50.0 (batch 12, the least it takes) | 5.0x |'),
    (FakeStock(8, False, needed=45 * 2**30), 0.010, ' does not fit: 45.0 GiB | |'),
    (FakeStock(8, False), 0.010, ' does not fit | |'),
  ],
)
def test_stock_cells(stock, seconds, cells):
  assert tpu_compile.stock_cells(stock, 8, seconds) == cells


def test_absent_t5x_is_said(monkeypatch):
  monkeypatch.setitem(sys.modules, 't5x', None)
  monkeypatch.delitem(sys.modules, 'benchmarks.stock_t5x', raising=False)
  monkeypatch.delattr(benchmarks, 'stock_t5x', raising=False)
  stock, missing = tpu_compile.stock_side()
  assert stock is None and 't5x is not importable' in missing and 'PYTHONPATH' in missing
