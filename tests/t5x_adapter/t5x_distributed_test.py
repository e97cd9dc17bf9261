"""T5X's own command as two processes that share a mesh."""

import json
import os
import sys

import pytest

from tests import processes
from tests.t5x_adapter import inference_tasks

STEPS = 8


LOOP = [
  f'--gin.decoding.temperature_sample.max_decode_steps={STEPS}',
  '--gin.decoding.temperature_sample.temperature=0.0',
]
# Batches of 5 through 2 slots, the last one padded; each process drives its own host loop, alike.
REFILL = [
  '--gin_file=t5x_inference_ext/configs/t5x/continuous.gin',
  '--gin.SLOTS=2',
  f'--gin.MAX_NEW_TOKENS={STEPS}',
]


@pytest.mark.parametrize('flags, batch', [(LOOP, 8), (REFILL, 5)])
def test_infer(flags, batch, repository, palm_tiny, tmp_path):
  """The rows that one process writes: T5X's golden ones."""
  output = tmp_path / 'output'
  command = [
    sys.executable,
    '-m',
    't5x.infer',
    '--gin_file=t5x_inference_ext/configs/runs/t5x_infer.gin',
    '--gin_file=t5x_inference_ext/configs/t5x/distributed.gin',
    '--gin_bindings=from tests.t5x_adapter import inference_tasks',
    f'--gin.MIXTURE_OR_TASK_NAME="{inference_tasks.TASK}"',
    f'--gin.TASK_FEATURE_LENGTHS={inference_tasks.LENGTHS}',
    f'--gin.CHECKPOINT_PATH="{palm_tiny}"',
    f'--gin.INFER_OUTPUT_DIR="{output}"',
    '--gin.MESH="2x2x2"',
    '--gin.DTYPE="float32"',
    f'--gin.utils.DatasetConfig.batch_size={batch}',
    *flags,
  ]
  results = processes.run(
    lambda port, process: [
      *command,
      f'--gin.COORDINATOR_ADDRESS="localhost:{port}"',
      f'--gin.NUM_PROCESSES={processes.COUNT}',
      f'--gin.PROCESS_ID={process}',
    ],
    repository,
  )
  assert [r.returncode for r in results] == [0] * processes.COUNT, (
    results[0].stderr[-3000:] + results[1].stderr[-3000:]
  )
  written = output / f'{inference_tasks.TASK}-predict.jsonl-00000-of-00001'
  rows = [json.loads(line) for line in written.read_text(encoding='utf-8').splitlines()]
  golden = inference_tasks.rows()
  assert [row['inputs']['inputs_pretokenized'] for row in rows] == [row['prompt'] for row in golden]
  assert [row['prediction'] for row in rows] == [row['greedy_text'][:STEPS] for row in golden]
  assert sorted(os.listdir(output)) == [
    'config.gin',
    written.name,
    f'{written.name}.COMPLETED',
    'model-info.txt',
  ]
