"""Estimated times of compiled programs, beside their targets and stock T5X: one table, no TPU.

  python -m benchmarks.tpu_compile [--case=SUBSTRING] [--all_layers]

Each row is a phase of a model compiled for a TPU slice: embedding, layers, logits and greedy
choice. Times are the estimates of `python -m t5x_inference_ext.precompile`: serial (everything in
sequence), overlapped, and calibrated by what was measured on such chips. They are extrapolated from
programs of 2 and 4 unrolled layers, which compile in seconds; --all_layers compiles all, which
takes a minute or two for PaLM 540B. Rows with layers as a loop are always compiled whole. Needs
libtpu. A target is compared with the overlapped time: by XLA alone, and with attention by a kernel
(`--attention=kernel`).

If T5X and flaxformer can be imported, their own model in bfloat16, split by T5X's standard rules
(see benchmarks/stock_t5x.py), is compiled for the same slice of v4, phase and batch, and estimated
in the same way. That takes up to half a minute for each case.
"""

import argparse
import dataclasses
import functools
import time
from typing import Any

from benchmarks.few_layers import Times, extrapolated_times, times
from t5x_inference_ext.config import preset
from t5x_inference_ext.errors import UserError


@dataclasses.dataclass(frozen=True)
class Row:
  """A case of the table.

  Attributes:
    model, weights, slice_name, phase, batch, layout, context, cache, scan_layers: See precompile's
      flags.
    target: float. The target by XLA alone, in ms.
    kernel_target: float or None. The target with kernels, in ms.
  """

  model: str
  weights: str
  slice_name: str
  phase: str
  batch: int
  layout: str
  target: float
  kernel_target: float | None = None
  context: int = 2048
  cache: str | None = None
  scan_layers: bool = False

  def __str__(self) -> str:
    return (
      f'{self.model} {self.weights} {self.slice_name} {self.phase} batch {self.batch} '
      f'context {self.context} {self.layout}'
      f'{f", {self.cache} cache" if self.cache else ""}'
      f'{", layers as a loop" if self.scan_layers else ""}'
    )

  @property
  def has_stock(self) -> bool:
    """Whether stock T5X is compiled beside it: flaxformer's PaLM, on slices of v4."""
    return self.model.startswith('palm') and self.slice_name.startswith('v4')

  def times(self, all_layers: bool, attention: str) -> Times:
    """Return the estimated times.

    Args:
      all_layers: Compile all layers, in place of a few.
      attention: 'xla' or 'kernel'.

    Raises:
      UserError: The program can't be compiled, or does not fit.
    """
    case = (self.weights, self.slice_name, self.phase, self.batch, self.context, self.layout)
    fields: dict[str, Any] = {'attention': attention, 'cache': self.cache}
    if all_layers or self.scan_layers:
      return times(preset(self.model), *case, scan_layers=self.scan_layers, **fields)
    return extrapolated_times(self.model, *case, **fields)


def _row(case: str, target: float, kernel_target: float | None = None, **fields: Any) -> Row:
  """Return the row of a case written as 'model weights slice phase batch context layout'."""
  model, weights, slice_name, phase, batch, context, layout = case.split()
  return Row(
    model,
    weights,
    slice_name,
    phase,
    int(batch),
    layout,
    target,
    kernel_target,
    int(context),
    **fields,
  )


# MFU 80% of PaLM 540B's 512 x 2048 tokens on 64 chips of 275 TFLOP/s.
MFU_80 = 2 * 540.36e9 * 512 * 2048 / (0.8 * 64 * 275e12) * 1e3

ROWS = (
  _row('palm_540b int8 v4:4x4x4 decode 64 2048 ws_2d/batch', 16.4, 15.0),
  _row('palm_540b int8 v4:4x4x4 decode 128 2048 ws_2d/batch', 23.0, 20.0),
  # 2048 positions of 32768 filled are estimated as if all were, by XLA.
  _row('palm_540b int8 v4:4x4x4 decode 64 32768 ws_2d/batch', 22.4),
  # 10 and 25% less than 43.5 ms, 7 and 15% less than 76.0 ms: by XLA, before there was a kernel.
  _row('palm_540b int8 v4:4x4x4 decode 128 43008 ws_2d/batch', 39.2, 32.6),
  _row('palm_540b bfloat16 v4:4x4x4 decode 512 2048 ws_2d/batch', 63.0, 58.0),
  _row('palm_540b bfloat16 v4:4x4x4 decode 512 10704 ws_2d/batch', 70.7, 64.6),
  _row('palm_540b int8 v4:4x4x4 prefill 1 2048 ws_2d/batch', 220.0, 205.0),
  _row('palm_540b bfloat16 v4:4x4x4 prefill 512 2048 wg_xyz/batch', MFU_80, scan_layers=True),
  _row('palm_62b int8 v4:2x2x4 decode 32 2048 ws_2d/batch', 7.2, 6.8),
  _row('palm_62b int8 v4:2x2x4 decode 128 2048 ws_2d/batch', 14.2, 12.7),
  _row('palm_8b int8 v4:2x2x1 decode 32 2048 ws_2d/batch', 3.7, 3.4),
  _row('llama3_70b int8 v5e:4x4 decode 8 2048 ws_1d/batch', 8.2, 7.6),
  _row('llama3_70b int8 v5e:4x4 decode 8 2048 ws_1d/batch', 8.2, 7.6, cache='int8'),
  _row('llama3_70b int8 v5e:4x4 decode 128 2048 ws_1d/batch', 30.0, 27.0),
  _row('llama3_70b int8 v5e:4x4 decode 128 2048 ws_1d/batch', 30.0, 27.0, cache='int8'),
)
TITLES = ('case', 'serial, ms', 'overlapped', 'calibrated', 'target')
KERNEL_TITLES = ('kernel: serial', 'overlapped', 'calibrated', 'target')


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


def time_cells(found: Times | UserError, target: float | None) -> str:
  """Return a row's columns: ' serial | overlapped | calibrated | target |', in ms.

  Args:
    found: The times, or the reason why there are none.
    target: The target, in ms.
  """
  if isinstance(found, UserError):
    return f' {found} | | | |'
  milliseconds = (found.serial, found.overlapped, found.calibrated)
  cells = ['' if seconds is None else f'{seconds * 1e3:.2f}' for seconds in milliseconds]
  cells.append('' if target is None else f'{target:.1f}')
  return ''.join(f' {cell} |' for cell in cells)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--case', default='', help='Only rows whose text holds this.')
  parser.add_argument('--all_layers', action='store_true', help='Compile all layers.')
  arguments = parser.parse_args()
  stock, missing = stock_side()
  if missing:
    print(missing + '\n')
  titles = [*TITLES, *KERNEL_TITLES, 'compiled in, s']
  titles += ['stock T5X bfloat16, ms', 'ratio'] if stock else []
  print(f'| {" | ".join(titles)} |\n|{"---|" * len(titles)}', flush=True)
  stock_best = functools.cache(lambda model, *case: stock.best(preset(model), *case)[0])
  splits = {}
  for row in (r for r in ROWS if arguments.case in str(r)):
    start = time.perf_counter()
    line, serial = f'| {row} |', None
    for attention, target in (('xla', row.target), ('kernel', row.kernel_target)):
      found: Times | UserError
      try:
        found = row.times(arguments.all_layers, attention)
        serial = serial or found.serial
      except UserError as error:
        found = error
      line += time_cells(found, target)
    line += f' {time.perf_counter() - start:.0f} |'
    if stock and row.has_stock:
      beside = stock_best(row.model, row.slice_name, row.phase, row.batch, row.context)
      line += stock_cells(beside, row.batch, serial)
      splits[f'{row.model} {row.slice_name} {row.phase} batch {row.batch}'] = beside.partitioning
    print(line, flush=True)
  if splits:
    print('\nStock T5X, the best of each:')
  for case, partitioning in splits.items():
    print(f'- {case}: {partitioning}')


if __name__ == '__main__':
  main()
