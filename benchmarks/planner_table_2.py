"""The paper's Table 2: PaLM 540B on 64 TPU v4, context 2048. The fit uses it, and nothing else."""

import dataclasses

from t5x_inference_ext.config import preset
from t5x_inference_ext.planner.case import PassCase
from t5x_inference_ext.planner.machine import Machine
from t5x_inference_ext.sharding.layout import Layout

SLICE = 'v4:4x4x4'
MESH = (4, 4, 4)
CONTEXT = 2048
DECODED = 64  # the table's decode latencies are the time of this many steps


@dataclasses.dataclass(frozen=True)
class Column:
  """A column of Table 2.

  Attributes:
    name: Heading of the column.
    phase: 'prefill' or 'decode'.
    batch: Rows.
    layout: Layout of the phase.
    weights: 'int8' or 'bfloat16'.
    latency: Seconds of a prefill of 2048 tokens, or of 64 decode steps.
    mfu: MFU as the paper prints it.
  """

  name: str
  phase: str
  batch: int
  layout: str
  weights: str
  latency: float
  mfu: float

  @property
  def seconds(self) -> float:
    """Seconds of one pass: the prefill, or a decode step."""
    return self.latency / (DECODED if self.phase == 'decode' else 1)

  @property
  def length(self) -> int:
    """T, the positions of each row that the pass takes."""
    return 1 if self.phase == 'decode' else CONTEXT

  @property
  def case(self) -> PassCase:
    """The pass of the column."""
    return PassCase(
      preset('palm_540b'),
      Machine.parse(SLICE),
      MESH,
      Layout.parse(self.layout),
      self.phase,
      self.batch,
      self.length,
      CONTEXT,
      self.weights,
    )


TABLE_2 = (
  Column('low-latency prefill', 'prefill', 1, 'ws_2d/heads', 'int8', 0.29, 0.43),
  Column('low-latency decode', 'decode', 64, 'ws_2d/batch', 'int8', 1.82, 0.14),
  Column('high-throughput prefill', 'prefill', 512, 'wg_xyz/batch', 'bfloat16', 85.2, 0.76),
  Column('high-throughput decode', 'decode', 512, 'ws_2d/batch', 'bfloat16', 6.0, 0.33),
)
