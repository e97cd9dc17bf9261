"""t5x.infer over one seqio task: the adapter writes what the stock model writes."""

import json

import jax
import numpy as np
import pytest

from t5x_inference_ext.engine.engine import Engine
from t5x_inference_ext.runs import task_run
from tests.t5x_adapter import inference_tasks, running


def _predictions(rows):
  return [row['prediction'] for row in rows]


@pytest.mark.parametrize('mesh', ['1x1x1', '2x2x2'])
def test_predictions_equal_the_stock_models(mesh, palm_tiny, stock_rows, tmp_path):
  assert running.adapter_infer(palm_tiny, tmp_path, 'predict', mesh) == stock_rows('predict')


@pytest.mark.parametrize(
  'layouts',
  [
    ('ws_2d/heads', 'ws_2d/batch'),
    ('wg_xyz/batch', 'ws_2d/batch'),
    ('ws_1d/heads', 'ws_1d/batch'),
    ('ws_2d/batch', 'wg_x/heads'),
  ],
  ids=' then '.join,
)
def test_predictions_under_other_layouts(layouts, palm_tiny, stock_rows, tmp_path):
  assert running.adapter_infer(
    palm_tiny, tmp_path, 'predict', '2x2x2', layouts=layouts
  ) == stock_rows('predict')


def test_stock_predictions_are_the_golden_ones(stock_rows):
  """So that equal rows mean something: they are long, differ, and are what was recorded."""
  predictions = _predictions(stock_rows('predict'))
  assert [p[:48] for p in predictions] == [row['greedy_text'] for row in inference_tasks.rows()]


def test_predict_with_aux(palm_tiny, stock_rows, tmp_path):
  rows = running.adapter_infer(palm_tiny, tmp_path, 'predict_with_aux', '1x2x2')
  assert rows == stock_rows('predict_with_aux')
  assert rows[0]['aux'] == {
    'scores': 0.0
  }  # T5X's score of a greedy completion, with rescale_log_probs


@pytest.mark.parametrize(
  'mesh, layouts',
  [
    ('1x1x1', ('ws_2d/batch', 'ws_2d/batch')),
    ('2x2x2', ('ws_2d/batch', 'ws_2d/batch')),
    ('2x2x2', ('wg_xyz/batch', 'ws_2d/heads')),
  ],
)
def test_scores_equal_the_stock_models(mesh, layouts, palm_tiny, stock_rows, tmp_path):
  rows = running.adapter_infer(palm_tiny, tmp_path, 'score', mesh, layouts=layouts)
  stock = stock_rows('score')
  assert [row['inputs'] for row in rows] == [row['inputs'] for row in stock]
  np.testing.assert_allclose(
    [row['score'] for row in rows], [row['score'] for row in stock], rtol=1e-3
  )


@pytest.mark.parametrize('mode', ['predict', 'score'])
def test_the_standalone_command_writes_the_same(mode, palm_tiny, stock_rows, tmp_path):
  jobs = task_run.infer(
    mixture_or_task_name=inference_tasks.TASK,
    task_feature_lengths=inference_tasks.LENGTHS,
    checkpoint_path=str(palm_tiny),
    output_dir=str(tmp_path),
    mode=mode,
    mesh='2x2x2',
    dtype='float32',
    batch_size=3,
  )
  for job in jobs:
    with job.running():
      while not job.work.finished:
        job.keep(job.work.step())
      job.write()
  written = tmp_path / f'{inference_tasks.TASK}-{mode}.jsonl-00000-of-00001'
  rows, stock = (
    [json.loads(line) for line in written.read_text(encoding='utf-8').splitlines()],
    stock_rows(mode),
  )
  if mode == 'score':
    np.testing.assert_allclose(
      [row.pop('score') for row in rows], [row['score'] for row in stock], rtol=1e-3
    )
    stock = [{'inputs': row['inputs']} for row in stock]
  assert rows == stock


def test_orbax_checkpoint(testdata, stock_rows, tmp_path):
  rows = running.adapter_infer(
    testdata / 'palm_tiny_orbax' / 'checkpoint_1000', tmp_path, 'predict', '2x2x2'
  )
  assert rows == stock_rows('predict')


def test_without_orbax(testdata, stock_rows, tmp_path):
  """T5X's older path, which with T5X's own classes reads no Orbax checkpoint."""
  rows = running.adapter_infer(
    testdata / 'palm_tiny_orbax' / 'checkpoint_1000', tmp_path, 'predict', '2x2x2', use_orbax=False
  )
  assert rows == stock_rows('predict')


@pytest.mark.parametrize('mesh', ['1x1x1', '2x2x2'])
def test_int8_is_the_standalone_engines(mesh, int8_checkpoint, tmp_path):
  """T5X's default restore dtype would cast the int8 weights: the adapter keeps them."""
  rows = running.adapter_infer(int8_checkpoint, tmp_path, 'predict', mesh, restore_dtype='bfloat16')
  engine = Engine.load(str(int8_checkpoint), mesh='1x1x1', dtype='float32')
  prompts = [row['prompt_tokens'] for row in inference_tasks.rows()]
  for row, prompt, completion in zip(
    rows, prompts, engine.generate(prompts, max_new_tokens=85), strict=True
  ):
    room = sum(inference_tasks.LENGTHS.values()) - len(
      prompt
    )  # T5X fills a sequence of inputs and targets
    assert row['prediction'] == running.VOCABULARY.decode(completion.tokens[:room])


def test_restore_dtype_leaves_int8_alone(int8_checkpoint):
  model = running.adapter_model(int8_checkpoint, '2x2x2')
  state, _, _ = running.restored(model, int8_checkpoint, restore_dtype='bfloat16')
  dtypes = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
    dtypes.setdefault(path[-1].key, set()).add(leaf.dtype.name)
  assert dtypes == {
    'embedding': {'float32'},
    'final_norm': {'float32'},
    'norm': {'float32'},
    'w_in': {'int8'},
    'w_out': {'int8'},
    'in_scale': {'float32'},
    'out_scale': {'float32'},
  }
  assert int(state.step) == 1000
