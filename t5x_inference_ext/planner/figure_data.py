"""The data of two figures: bytes that a feedforward layer sends, and the longest context.

They reproduce the paper's Figure 3 and Table 1 for any model and slice.
"""

import dataclasses
import math

from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.planner.case import PassCase
from t5x_inference_ext.planner.machine import Machine, Mesh
from t5x_inference_ext.planner.network import axis_sizes
from t5x_inference_ext.planner.work import cache_bytes
from t5x_inference_ext.sharding.layout import Layout
from t5x_inference_ext.sharding.traffic import feedforward_collectives

# The layouts that the paper draws.
FEEDFORWARD_LAYOUTS = ('ws_2d', 'wg_x', 'wg_xy', 'wg_xyz')
CACHE_SHARE = 0.3  # share of a chip's memory for the cache, in the paper's Table 1


def feedforward_bytes(config: ModelConfig, mesh: Mesh, feedforward: str, tokens: int) -> int:
  """Return the bytes that a chip sends for the MLP of one layer.

  Elements are bfloat16, and the factor (K-1)/K of each collective is taken as 1.

  Raises:
    ValueError: The tokens do not divide over the chips that split them.
  """
  collectives = feedforward_collectives(config, Layout(feedforward), axis_sizes(mesh), tokens)
  return sum(
    collective.bytes * (2 if collective.kind == 'all_reduce' else 1) for collective in collectives
  )


def switch_points(config: ModelConfig, mesh: Mesh) -> list[tuple[float, str, str]]:
  """Return (tokens, layout below, layout above) for each number of tokens where the best changes.

  The best layout sends the fewest bytes. A layout's bytes are a line in the number of tokens:
  constant for weights, proportional to the tokens for activations.
  """
  step = math.prod(mesh)
  lines = {}
  for name in FEEDFORWARD_LAYOUTS:
    low, high = (feedforward_bytes(config, mesh, name, n) for n in (step, 2 * step))
    lines[name] = 2 * low - high, (high - low) / step  # (bytes of weights, bytes per token)
  points: list[tuple[float, str, str]] = []
  at, current = 0.0, min(lines, key=lambda name: lines[name])
  while True:
    fixed, slope = lines[current]
    crossings = [
      ((other_fixed - fixed) / (slope - other_slope), other_slope, name)
      for name, (other_fixed, other_slope) in lines.items()
      if other_slope < slope
    ]
    if not crossings:
      return points
    at, _, after = min(c for c in crossings if c[0] >= at)
    points.append((at, current, after))
    current = after


def longest_context(
  config: ModelConfig, machine: Machine, mesh: Mesh, layout: str, batch: int
) -> int:
  """Return the longest context, in positions per row, whose bfloat16 cache fits CACHE_SHARE.

  Args:
    config: The model.
    machine: The chips.
    mesh: (X, Y, Z) over all chips.
    layout: The decode layout, such as 'ws_2d/batch'.
    batch: Number of rows.

  Raises:
    MeshError: The layout can't split the rows, or the mesh does not divide the model.
  """
  case = PassCase(config, machine, mesh, Layout.parse(layout), 'decode', batch, 1, 1)
  return int(CACHE_SHARE * machine.chip.hbm_bytes / cache_bytes(case, 1))


@dataclasses.dataclass(frozen=True)
class ContextRow:
  """One row of the paper's Table 1.

  Attributes:
    name: Kind of attention and its split.
    config: The model with that kind of attention.
    layout: Decode layout of the row.
  """

  name: str
  config: ModelConfig
  layout: str


def context_rows(config: ModelConfig) -> tuple[ContextRow, ...]:
  """Return Table 1's rows: one for each split of attention, by heads and by batch.

  A multiquery model is also compared with multihead attention with heads of half the size, as in
  the paper.
  """
  multiquery = config.num_kv_heads == 1
  name = 'multiquery' if multiquery else f'{config.num_kv_heads} key heads'
  rows = tuple(
    ContextRow(f'{name} by {split}', config, f'ws_2d/{split}') for split in ('heads', 'batch')
  )
  if not multiquery:
    return rows
  multihead = dataclasses.replace(config, num_kv_heads=config.num_heads, d_head=config.d_head // 2)
  return (ContextRow('multihead', multihead, 'ws_2d/heads'), *rows)
