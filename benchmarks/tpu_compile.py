"""Estimated times of compiled programs, beside the targets and stock T5X: one table, no TPU.

  python -m benchmarks.tpu_compile [--case=SUBSTRING]

Each row is a phase of a PaLM model compiled at full size for a slice of TPU v4: embedding, all
layers, logits and greedy choice. The time is the serial estimate of
`python -m t5x_inference_ext.precompile`: everything in sequence, nothing overlapped. Needs libtpu.
Each row of PaLM 540B takes a minute or two to compile, or seconds with layers as a loop.

If T5X and flaxformer can be imported, their own model in bfloat16, split by T5X's standard rules
(see benchmarks/stock_t5x.py), is compiled for the same slice, phase and batch, and estimated in the
same way. That takes up to half a minute for each case.
"""

import argparse
import dataclasses
import functools
import os
import time

os.environ['JAX_PLATFORMS'] = 'cpu'  # before jax is imported: nothing is computed here

from t5x_inference_ext.config import preset  # noqa: E402
from t5x_inference_ext.errors import UserError  # noqa: E402
from t5x_inference_ext.precompile.analysis import analyze  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Row:
  """A case of the table.

  Attributes:
    model, weights, slice_name, phase, batch, layout, scan_layers: see precompile's flags.
    target: float. The target time, in ms.
  """

  model: str
  weights: str
  slice_name: str
  phase: str
  batch: int
  layout: str
  target: float
  scan_layers: bool | None = None

  def __str__(self) -> str:
    return (
      f'{self.model} {self.weights} {self.slice_name} {self.phase} batch {self.batch} '
      f'{self.layout}'
      f'{", layers as a loop" if self.scan_layers else ""}'
    )


CONTEXT = 2048
# MFU 80% of PaLM 540B's 512 x 2048 tokens on 64 chips of 275 TFLOP/s.
MFU_80 = 2 * 540.36e9 * 512 * 2048 / (0.8 * 64 * 275e12) * 1e3

ROWS = (
  Row('palm_540b', 'int8', 'v4:4x4x4', 'decode', 64, 'ws_2d/batch', 20),
  Row('palm_540b', 'int8', 'v4:4x4x4', 'decode', 64, 'ws_2d/batch', 20, scan_layers=True),
  Row('palm_540b', 'bfloat16', 'v4:4x4x4', 'decode', 512, 'ws_2d/batch', 65),
  Row('palm_540b', 'bfloat16', 'v4:4x4x4', 'decode', 512, 'ws_2d/batch', 65, scan_layers=True),
  Row('palm_540b', 'int8', 'v4:4x4x4', 'prefill', 1, 'ws_2d/batch', 220),
  Row('palm_540b', 'int8', 'v4:4x4x4', 'prefill', 1, 'ws_2d/batch', 220, scan_layers=True),
  Row(
    'palm_540b', 'bfloat16', 'v4:4x4x4', 'prefill', 512, 'wg_xyz/batch', MFU_80, scan_layers=True
  ),
  Row('palm_62b', 'int8', 'v4:2x2x4', 'decode', 32, 'ws_2d/batch', 8),
  Row('palm_62b', 'int8', 'v4:2x2x4', 'decode', 32, 'ws_2d/batch', 8, scan_layers=True),
  Row('palm_8b', 'int8', 'v4:2x2x1', 'decode', 32, 'ws_2d/batch', 5),
  Row('palm_8b', 'int8', 'v4:2x2x1', 'decode', 32, 'ws_2d/batch', 5, scan_layers=True),
)


def stock_side():
  """Return the module that compiles stock T5X, or None with a line about the reason."""
  try:
    from benchmarks import stock_t5x
  except ImportError as e:
    return None, (
      f'Stock T5X is left out: {e.name or e} is not importable. The extra `t5x` has T5X, '
      'docs/t5x.md the versions; flaxformer and aqt are used from their source (PYTHONPATH).'
    )
  return stock_t5x, ''


def stock_cells(stock, batch: int, seconds: float | None) -> str:
  """Return a row's columns for stock T5X: ' time | ratio |'.

  Args:
    stock: stock_t5x.Stock. The compiled model.
    batch: int. The row's batch.
    seconds: float or None. This package's serial estimate; None if the program does not fit.
  """
  if not stock.fits:
    needs = f': {stock.needed / 2**30:.1f} GiB' if stock.needed else ''
    return f' does not fit{needs} | |'
  time_ = stock.estimate.serial_seconds
  rows = '' if stock.batch == batch else f' (batch {stock.batch}, the least it takes)'
  return f' {time_ * 1e3:.1f}{rows} | {f"{time_ / seconds:.1f}x" if seconds else ""} |'


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--case', default='', help='only rows whose text holds this')
  arguments = parser.parse_args()
  stock, missing = stock_side()
  if missing:
    print(missing + '\n')
  titles = [
    'case',
    'serial estimate, ms',
    'with overlap',
    'target, ms',
    'of the target',
    'compiled in, s',
  ]
  titles += ['stock T5X bfloat16, ms', 'ratio'] if stock else []
  print(f'| {" | ".join(titles)} |\n|{"---|" * len(titles)}', flush=True)
  stock_best = functools.cache(lambda model, *case: stock.best(preset(model), *case)[0])
  splits = {}
  for row in (r for r in ROWS if arguments.case in str(r)):
    start = time.perf_counter()
    try:
      answer = analyze(
        preset(row.model),
        row.weights,
        row.slice_name,
        row.phase,
        row.batch,
        CONTEXT,
        layout=row.layout,
        scan_layers=row.scan_layers,
      )
      taken = time.perf_counter() - start
      beside = (
        stock_best(row.model, row.slice_name, row.phase, row.batch, CONTEXT) if stock else None
      )
    except UserError as error:
      raise SystemExit(f'{row}: {error}') from error
    serial = answer.estimate.serial_seconds if answer.fits else None
    if serial is None:
      line = f'| {row} | does not fit | | {row.target:.0f} | | {taken:.0f} |'
    else:
      line = (
        f'| {row} | {serial * 1e3:.2f} | {answer.estimate.overlapped_seconds * 1e3:.2f} '
        f'| {row.target:.0f} | {serial * 1e3 / row.target:.2f} | {taken:.0f} |'
      )
    if beside:
      line += stock_cells(beside, row.batch, serial)
      splits[f'{row.model} {row.slice_name} {row.phase} batch {row.batch}'] = beside.partitioning
    print(line, flush=True)
  if splits:
    print('\nStock T5X, the best of each:')
  for case, partitioning in splits.items():
    print(f'- {case}: {partitioning}')


if __name__ == '__main__':
  main()
