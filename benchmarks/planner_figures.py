"""Draws the figures of docs/planner.md: PaLM 8B, 62B and 540B on TPU v4.

  python -m benchmarks.planner_figures [--output_dir=docs/figures]

Takes two minutes of processor time; the same versions draw the same bytes.
"""

import argparse
import os

os.environ['JAX_PLATFORMS'] = 'cpu'  # before jax is imported: nothing is computed here

from benchmarks.planner_predictions import PAPER  # noqa: E402
from benchmarks.planner_table_2 import TABLE_2  # noqa: E402
from t5x_inference_ext.config import ModelConfig, preset  # noqa: E402
from t5x_inference_ext.planner import figures  # noqa: E402
from t5x_inference_ext.planner.choose import BATCHES, choose  # noqa: E402
from t5x_inference_ext.planner.drawing import PublishedPoint  # noqa: E402
from t5x_inference_ext.planner.machine import Machine, known_machines  # noqa: E402
from t5x_inference_ext.planner.request import PlanRequest  # noqa: E402
from t5x_inference_ext.planner.sweep import sweep  # noqa: E402

MODEL = preset('palm_540b')
# Model -> fewest and most chips of a slice in the figure of latency against cost.
MODELS = {'palm_8b': (1, 64), 'palm_62b': (1, 256), 'palm_540b': (32, 64)}
# The paper's Figure 3 shows one feedforward layer of two matrices of these sizes. The other sizes
# do not matter there.
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
SLICE = Machine.parse('v4:4x4x4')
# The paper's Table 1: the longest context of 128 and of 512 rows.
TABLE_1 = {'multihead': (1320, 330), 'by heads': (660, 165), 'by batch': (43_000, 10_700)}


def table_1_points() -> list[PublishedPoint]:
  """Return Table 1's cells, by batch and positions."""
  return [
    PublishedPoint('', f'{length:,}', batch, length)
    for lengths in TABLE_1.values()
    for batch, length in zip((128, 512), lengths)
  ]


def measured_points() -> list[PublishedPoint]:
  """Return the paper's Tables 2 and 3 and its text, in ms and chip-ms a token.

  Of two measurements of one case, the table's is left out.
  """
  seconds = {column.case: column.seconds for column in TABLE_2}
  seconds |= {point.case: point.latency for point in PAPER}
  return [
    PublishedPoint(
      case.phase,
      f'{case.weights}, {case.machine.chips} chips, {case.batch}',
      measured * 1e3,
      case.machine.chips * measured * 1e3 / (case.batch * case.length),
    )
    for case, measured in seconds.items()
  ]


def draw(output_dir: str) -> list[str]:
  """Draw all figures, and return their files."""
  os.makedirs(output_dir, exist_ok=True)
  names = 'communication', 'context', 'parts', 'pareto'
  files = {name: os.path.join(output_dir, f'planner_{name}.svg') for name in names}
  figures.communication(files['communication'], FIGURE_3_MODEL, (4, 4, 4))
  figures.contexts(
    files['context'], MODEL, SLICE, (4, 4, 4), table_1_points(), "the paper's table 1"
  )
  figures.time_parts(files['parts'], choose(PlanRequest(MODEL, 64), [SLICE]).ranked[:8])
  machines = [Machine.parse(name) for name in known_machines('v4')]
  points = [
    point
    for model, (fewest, most) in MODELS.items()
    for point in sweep(
      PlanRequest(preset(model), 1, input_length=2048, output_length=64),
      [machine for machine in machines if fewest <= machine.chips <= most],
      BATCHES[::2],
      ('int8', 'bfloat16'),
    )
  ]
  label = 'measured by the paper, 2048 tokens in'
  figures.pareto(files['pareto'], points, measured_points(), label)
  return list(files.values())


if __name__ == '__main__':
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--output_dir', default='docs/figures')
  print('\n'.join(draw(parser.parse_args().output_dir)))
