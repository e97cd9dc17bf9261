"""Fits the planner's efficiencies to the paper's Table 2.

  python -m benchmarks.planner_fit

Prints the efficiencies of both bandwidth conventions (planner.efficiency.FITTED has a copy), and
the error of each column, with efficiencies fitted to all columns and to the other three. On the
torus two efficiencies are fitted: links reach their full rate, as in measured programs
(precompile/calibration.py). Then prints the time per layer that GPUs take to launch kernels
(hardware.GPU_LAYER_LATENCY), fitted to FasterTransformer's times with tensor parallelism of 16;
those of 32 are predictions.
"""

from collections.abc import Callable, Sequence
import dataclasses
import itertools
import math

import numpy as np

from benchmarks.planner_predictions import FASTER_TRANSFORMER, megatron_plan
from benchmarks.planner_table_2 import TABLE_2, Column
from t5x_inference_ext.hardware import GPU_LAYER_LATENCY
from t5x_inference_ext.planner.costs import PassCost, cost
from t5x_inference_ext.planner.efficiency import IDEAL, Efficiency

# Convention -> the efficiencies that are fitted; others are 1.
FREE = {'torus': ('matmul', 'memory'), 'paper': ('matmul', 'memory', 'network')}
_GRID = 7  # points along each parameter, in every round
_ROUNDS = 12  # each searches half the range of the round before


@dataclasses.dataclass(frozen=True)
class Fit:
  """The fit of one convention.

  Attributes:
    convention: Convention of the network.
    efficiency: Efficiencies fitted to all columns.
    errors: For each column, predicted time / measured time - 1.
    left_out: For each column, the error with efficiencies fitted to the other columns only.
  """

  convention: str
  efficiency: Efficiency
  errors: tuple[float, ...]
  left_out: tuple[float, ...]


def fit(convention: str) -> Fit:
  """Fit efficiencies by the least sum of squared log ratios of predicted to measured times."""
  ideal = [cost(c.case, convention, IDEAL) for c in TABLE_2]
  free = FREE[convention]
  found = _least(ideal, TABLE_2, free)
  left_out = []
  for i, column in enumerate(TABLE_2):
    others = _least(ideal[:i] + ideal[i + 1 :], TABLE_2[:i] + TABLE_2[i + 1 :], free)
    left_out.append(_error(ideal[i], column, others))
  return Fit(
    convention,
    found,
    tuple(_error(c, column, found) for c, column in zip(ideal, TABLE_2)),
    tuple(left_out),
  )


def _error(ideal: PassCost, column: Column, efficiency: Efficiency) -> float:
  return ideal.at(efficiency).seconds / column.seconds - 1


def _least(ideal: Sequence[PassCost], columns: Sequence[Column], free: Sequence[str]) -> Efficiency:

  def loss(efficiency: Efficiency) -> float:
    return sum(math.log1p(_error(c, column, efficiency)) ** 2 for c, column in zip(ideal, columns))

  return search(loss, free)


def search(loss: Callable[[Efficiency], float], free: Sequence[str]) -> Efficiency:
  """Return the efficiencies, from 0.05 to 1 with three digits, that have the least loss.

  Searches a series of grids, each one finer and around the best point so far.

  Args:
    loss: The function to minimize.
    free: Names of the efficiencies to search; others are 1.
  """
  centre, reach = np.full(len(free), 0.525), 0.475
  least, best = math.inf, IDEAL
  for _ in range(_ROUNDS):
    axes = [
      np.unique(np.clip(np.linspace(c - reach, c + reach, _GRID), 0.05, 1).round(3)) for c in centre
    ]
    for values in itertools.product(*axes):
      efficiency = Efficiency(**dict(zip(free, map(float, values))))
      found = loss(efficiency)
      if found < least:
        least, best = found, efficiency
    centre, reach = np.asarray([getattr(best, name) for name in free]), reach / 2
  return best


def fit_text(found: Fit) -> str:
  """Return a table of measured and predicted times."""
  e = found.efficiency
  lines = [
    f'{found.convention} convention: '
    + ', '.join(f'{name} {value:.3f}' for name, value in dataclasses.asdict(e).items()),
    f'  {"column of Table 2":24} {"measured":>10} {"predicted":>10} {"error":>7} {"left out":>9}',
  ]
  for column, error, left_out in zip(TABLE_2, found.errors, found.left_out):
    lines.append(
      f'  {column.name:24} {column.seconds:8.4f} s {column.seconds * (1 + error):8.4f} s '
      f'{error:+7.1%} {left_out:+9.1%}'
    )
  return '\n'.join(lines)


@dataclasses.dataclass(frozen=True)
class LayerFit:
  """The fit of GPU_LAYER_LATENCY.

  Attributes:
    seconds: Seconds per layer fitted to all rows, to a microsecond.
    errors: For each row, predicted time / measured time - 1.
    left_out: For each row, the error with the seconds fitted to the other rows only.
  """

  seconds: float
  errors: tuple[float, ...]
  left_out: tuple[float, ...]


def fit_layer_latency() -> LayerFit:
  """Fit the launch time of a layer to FasterTransformer's rows with tensor parallelism of 16."""
  rows = []  # (measured seconds, predicted ones without launches, layers that the row runs)
  for (tokens, output), batches in FASTER_TRANSFORMER.items():
    for batch, (measured, _) in batches.items():
      plan = megatron_plan(batch, tokens, output, 16)
      layers = plan.request.config.num_layers * (1 + output)
      rows.append((measured / 1e3, plan.seconds - layers * GPU_LAYER_LATENCY, layers))

  def error(row: tuple[float, float, int], seconds: float) -> float:
    return (row[1] + row[2] * seconds) / row[0] - 1

  def least(some: Sequence[tuple[float, float, int]]) -> float:
    choices = [n * 1e-6 for n in range(1000)]
    return min(choices, key=lambda s: sum(math.log1p(error(row, s)) ** 2 for row in some))

  found = least(rows)
  left_out = [error(row, least(rows[:i] + rows[i + 1 :])) for i, row in enumerate(rows)]
  return LayerFit(found, tuple(error(row, found) for row in rows), tuple(left_out))


if __name__ == '__main__':
  for _convention in FREE:
    print(fit_text(fit(_convention)), end='\n\n')
  _layers = fit_layer_latency()
  _largest = max(map(abs, _layers.errors)), max(map(abs, _layers.left_out))
  print(
    f'A100, launches of a layer: {_layers.seconds * 1e6:.0f} us; largest error of '
    f'{len(_layers.errors)} rows with TP-16 {_largest[0]:.1%}, left out {_largest[1]:.1%}'
  )
