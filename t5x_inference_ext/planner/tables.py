"""The paper's Figure 3 and Table 1 for any model and slice: bytes of a feedforward layer, and the longest context."""

from collections.abc import Sequence
import dataclasses
import math

from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.planner.case import PassCase
from t5x_inference_ext.planner.machine import Machine, Mesh
from t5x_inference_ext.planner.network import sizes
from t5x_inference_ext.planner.work import cache_bytes
from t5x_inference_ext.sharding.layout import Layout
from t5x_inference_ext.sharding.traffic import feedforward_moves

# Those that the paper draws.
FIGURE_3_LAYOUTS = ('ws_2d', 'wg_x', 'wg_xy', 'wg_xyz')
FIGURE_3_MESH = (4, 4, 4)
# One feedforward layer of these sizes, of two matrices; what else a model has does not matter there.
FIGURE_3_MODEL = ModelConfig(
  num_layers=1,
  d_model=16384,
  d_ff=65536,
  num_heads=64,
  d_head=256,
  vocab_size=256,
  block='serial',
  mlp='gelu',
)


def feedforward_bytes(config: ModelConfig, mesh: Mesh, feedforward: str, tokens: int) -> int:
  """What a chip sends for the MLP of one layer, in bfloat16, (K-1)/K taken as 1: the paper's Figure 3.

  Raises:
    ValueError: tokens that do not divide over the chips that split them.
  """
  moves = feedforward_moves(config, Layout(feedforward), sizes(mesh), tokens)
  return sum(move.bytes * (2 if move.kind == 'all_reduce' else 1) for move in moves)


def switch_points(
  config: ModelConfig, mesh: Mesh, feedforward: Sequence[str] = FIGURE_3_LAYOUTS
) -> list[tuple[float, str, str]]:
  """[(tokens, layout below, layout above)]: where the layout that sends least changes, from one token on.

  What a layout sends grows in proportion to the tokens, over what it sends of weights.
  """
  step = math.prod(mesh)
  lines = {}
  for name in feedforward:
    low, high = (feedforward_bytes(config, mesh, name, n) for n in (step, 2 * step))
    lines[name] = 2 * low - high, (high - low) / step  # bytes of weights, bytes a token
  at, points = 0.0, []
  current = min(lines, key=lambda name: (lines[name][0], lines[name][1]))
  while True:
    fixed, slope = lines[current]
    crossings = [
      ((other[0] - fixed) / (slope - other[1]), other[1], name)
      for name, other in lines.items()
      if other[1] < slope
    ]
    if not crossings:
      return points
    at, _, after = min(c for c in crossings if c[0] >= at)
    points.append((at, current, after))
    current = after


def longest_context(
  config: ModelConfig,
  machine: Machine,
  mesh: Mesh,
  layout: str,
  batch: int,
  share: float = 0.3,
  cache: str = 'bfloat16',
) -> int:
  """The positions of each row for which a share of a chip's memory has room: the paper's Table 1.

  Args:
    config, machine, mesh: the model, and where it runs.
    layout: of decode, 'ws_2d/batch'.
    batch: rows.
    share: of all memory of a chip.
    cache: 'bfloat16' or 'int8'.

  Raises:
    MeshError: rows that the layout can't split, or a mesh that does not divide the model.
  """
  case = PassCase(config, machine, mesh, Layout.parse(layout), 'decode', batch, 1, 1, cache=cache)
  return int(share * machine.chip.hbm_bytes / cache_bytes(case, 1))


@dataclasses.dataclass(frozen=True)
class ContextRow:
  """A row of Table 1.

  Attributes:
    name: of the attention.
    config, layout: what it is.
  """

  name: str
  config: ModelConfig
  layout: str


def table_1(config: ModelConfig) -> tuple[ContextRow, ...]:
  """Its rows, for a multiquery model: multihead with heads of half the size, as in the paper; by heads; by batch."""
  multihead = dataclasses.replace(config, num_kv_heads=config.num_heads, d_head=config.d_head // 2)
  return (
    ContextRow('multihead', multihead, 'ws_2d/heads'),
    ContextRow('multiquery by heads', config, 'ws_2d/heads'),
    ContextRow('multiquery by batch', config, 'ws_2d/batch'),
  )
