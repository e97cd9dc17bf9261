"""Summaries for reports: lower bounds on the time; collectives and operations in groups."""

import collections
from collections.abc import Iterable
import dataclasses
from typing import Any

from t5x_inference_ext import hardware
from t5x_inference_ext.precompile.analysis import Answer
from t5x_inference_ext.precompile.estimate import Estimate
from t5x_inference_ext.precompile.operations import MATMUL, OperationCost


@dataclasses.dataclass(frozen=True)
class TimeBounds:
  """Lower bounds, in seconds, on the time of any program on a slice.

  Attributes:
    flops: float. Time of 2 N FLOPs for each token (N parameters), at the chips' bf16 peak.
    weights: float. Time in which each chip reads its weights once, at full memory bandwidth.
    memory: float. Time in which each chip reads its weights and its cache once.
  """

  flops: float
  weights: float
  memory: float


def time_bounds(answer: Answer) -> TimeBounds:
  """Return the lower bounds for a program that fits."""
  chip, case, memory = hardware.chip(answer.slice.kind), answer.case, answer.compiled[0].memory
  work = 2 * case.config.num_params * case.tokens / answer.slice.chips
  weights = memory.weights / chip.hbm_bandwidth
  return TimeBounds(work / chip.bf16_flops, weights, weights + memory.cache / chip.hbm_bandwidth)


def collective_rows(found: Estimate) -> list[dict[str, Any]]:
  """Return the collectives, JSON-ready: one row per (kind, axes, size), longest time first."""
  rows: dict[tuple[Any, ...], dict[str, Any]] = {}
  for cost in found.costs:
    if c := cost.collective:
      key = c.kind, c.axes, c.bytes, c.size
      start = {'kind': c.kind, 'axes': list(c.axes), 'bytes': c.bytes, 'devices': c.size}
      row = rows.setdefault(key, {**start, 'count': 0, 'seconds': 0.0, 'hidden_seconds': 0.0})
      row['count'] += cost.count
      row['seconds'] += cost.seconds
      row['hidden_seconds'] += cost.hidden_seconds
  return sorted(rows.values(), key=lambda row: -row['seconds'])


def grouped_operations(costs: Iterable[OperationCost]) -> list[list[OperationCost]]:
  """Group operations by kind and origin in the program; return the groups, longest time first.

  Matrix products are not grouped.
  """
  groups: dict[tuple[Any, ...], list[OperationCost]] = collections.defaultdict(list)
  for c in costs:
    if c.seconds:
      origin = c.name if c.kind == MATMUL else c.op_name or c.name
      groups[c.kind, origin, c.count, c.estimated].append(c)
  return sorted(groups.values(), key=lambda group: -sum(c.seconds for c in group))
