"""Fits the planner's three efficiencies to the paper's Table 2.

  python -m benchmarks.planner_fit

Prints the efficiencies of both bandwidth conventions (planner.efficiency.FITTED has a copy), and
the error of each column, with efficiencies fitted to all columns and to the other three.
"""

from collections.abc import Callable, Sequence
import dataclasses
import itertools
import math

import numpy as np

from benchmarks.planner_table_2 import TABLE_2, Column
from t5x_inference_ext.planner.costs import PassCost, cost
from t5x_inference_ext.planner.efficiency import IDEAL, Efficiency
from t5x_inference_ext.planner.network import CONVENTIONS

_NAMES = tuple(f.name for f in dataclasses.fields(Efficiency))
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
  found = _least(ideal, TABLE_2)
  left_out = []
  for i, column in enumerate(TABLE_2):
    others = _least(ideal[:i] + ideal[i + 1 :], TABLE_2[:i] + TABLE_2[i + 1 :])
    left_out.append(_error(ideal[i], column, others))
  return Fit(
    convention,
    found,
    tuple(_error(c, column, found) for c, column in zip(ideal, TABLE_2)),
    tuple(left_out),
  )


def _error(ideal: PassCost, column: Column, efficiency: Efficiency) -> float:
  return ideal.at(efficiency).seconds / column.seconds - 1


def _least(ideal: Sequence[PassCost], columns: Sequence[Column]) -> Efficiency:

  def loss(efficiency: Efficiency) -> float:
    return sum(math.log1p(_error(c, column, efficiency)) ** 2 for c, column in zip(ideal, columns))

  return search(loss)


def search(loss: Callable[[Efficiency], float]) -> Efficiency:
  """Return the efficiencies, from 0.05 to 1 with three digits, that have the least loss.

  Searches a series of grids, each one finer and around the best point so far.
  """
  centre, reach = np.full(len(_NAMES), 0.525), 0.475
  least, best = math.inf, IDEAL
  for _ in range(_ROUNDS):
    axes = [
      np.unique(np.clip(np.linspace(c - reach, c + reach, _GRID), 0.05, 1).round(3)) for c in centre
    ]
    for values in itertools.product(*axes):
      efficiency = Efficiency(*map(float, values))
      found = loss(efficiency)
      if found < least:
        least, best = found, efficiency
    centre, reach = np.asarray(dataclasses.astuple(best)), reach / 2
  return best


def fit_text(found: Fit) -> str:
  """Return a table of measured and predicted times."""
  e = found.efficiency
  lines = [
    f'{found.convention} convention: '
    + ', '.join(f'{name} {getattr(e, name):.3f}' for name in _NAMES),
    f'  {"column of Table 2":24} {"measured":>10} {"predicted":>10} {"error":>7} {"left out":>9}',
  ]
  for column, error, left_out in zip(TABLE_2, found.errors, found.left_out):
    lines.append(
      f'  {column.name:24} {column.seconds:8.4f} s {column.seconds * (1 + error):8.4f} s '
      f'{error:+7.1%} {left_out:+9.1%}'
    )
  return '\n'.join(lines)


if __name__ == '__main__':
  for _convention in CONVENTIONS:
    print(fit_text(fit(_convention)), end='\n\n')
