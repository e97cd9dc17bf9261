"""Draws the figures of docs/planner.md: PaLM 540B on TPU v4, 1920 tokens in and 64 out.

  python -m benchmarks.planner_figures [--output_dir=docs/figures]

Takes about two minutes; the same versions draw the same bytes.
"""

import argparse
import os

os.environ['JAX_PLATFORMS'] = 'cpu'  # before jax is imported: nothing is computed here

from t5x_inference_ext.config import preset  # noqa: E402
from t5x_inference_ext.planner import figures  # noqa: E402
from t5x_inference_ext.planner.choose import BATCHES, choose  # noqa: E402
from t5x_inference_ext.planner.machine import Machine, known_machines  # noqa: E402
from t5x_inference_ext.planner.request import PlanRequest  # noqa: E402
from t5x_inference_ext.planner.sweep import sweep  # noqa: E402

MODEL = preset('palm_540b')
SLICE = Machine.parse('v4:4x4x4')


def draw(output_dir: str) -> list[str]:
  """Writes all; returns the files."""
  os.makedirs(output_dir, exist_ok=True)
  names = 'communication', 'context', 'parts', 'pareto'
  files = {name: os.path.join(output_dir, f'planner_{name}.svg') for name in names}
  figures.communication(files['communication'])
  figures.contexts(files['context'], MODEL, SLICE, (4, 4, 4))
  figures.time_parts(files['parts'], choose(PlanRequest(MODEL, 64), [SLICE]).ranked[:8])
  machines = [Machine.parse(name) for name in known_machines('v4')]
  points = sweep(PlanRequest(MODEL, 1), machines, BATCHES, ('int8', 'bfloat16'))
  figures.pareto(files['pareto'], points)
  return list(files.values())


if __name__ == '__main__':
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--output_dir', default='docs/figures')
  print('\n'.join(draw(parser.parse_args().output_dir)))
