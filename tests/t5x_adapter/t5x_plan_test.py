"""What the planner writes as gin, in T5X's own command."""

import json
import subprocess
import sys

from t5x_inference_ext import config
from t5x_inference_ext.planner.choose import choose
from t5x_inference_ext.planner.gin_text import gin_text
from t5x_inference_ext.planner.machine import Machine
from t5x_inference_ext.planner.request import PlanRequest
from tests.t5x_adapter import inference_tasks


def test_t5x_runs_a_plan_as_it_is(repository, palm_tiny, stock_rows, tmp_path):
  """The stock command, the adapter's gin file, and the plan behind it, in float32."""
  plan = choose(
    PlanRequest(config.preset('palm_tiny'), 3, 48, 16, weights='bfloat16'),
    [Machine.parse('v4:2x2x1')],
  ).plan
  path, output = tmp_path / 'plan.gin', tmp_path / 'output'
  path.write_text(gin_text(plan))
  process = subprocess.run(
    [
      sys.executable,
      '-m',
      't5x.infer',
      '--gin_file=tests/t5x_adapter/stock_infer.gin',
      '--gin_file=t5x_inference_ext/configs/t5x/infer.gin',
      f'--gin_file={path}',
      f'--gin.CHECKPOINT_PATH="{palm_tiny}"',
      f'--gin.INFER_OUTPUT_DIR="{output}"',
      '--gin.DTYPE="float32"',
    ],
    cwd=repository,
    capture_output=True,
    text=True,
    timeout=240,
    check=False,
  )
  assert process.returncode == 0, process.stderr[-4000:]
  written = output / f'{inference_tasks.TASK}-predict.jsonl-00000-of-00001'
  rows = [json.loads(line) for line in written.read_text(encoding='utf-8').splitlines()]
  assert rows == stock_rows('predict')
  said = (output / 'config.gin').read_text(encoding='utf-8')
  prefill, decode = plan.layouts
  for name, value in (
    ('MESH', plan.mesh_text),
    ('PREFILL_LAYOUT', prefill),
    ('DECODE_LAYOUT', decode),
  ):
    assert f"{name} = '{value}'" in said
