"""t5x.infer with slot refill: T5X's rows, in T5X's order."""

import functools
import glob
import time

import jax
import numpy as np
import pytest

from t5x_inference_ext.engine.engine import Engine
from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.t5x.partitioning import InferencePartitioner
from t5x_inference_ext.t5x.refill import HostStep, Predictor, Refill
from tests.t5x_adapter import inference_tasks, running


def refilled(
  checkpoint,
  output_dir,
  mode,
  refill,
  mesh='1x1x1',
  layouts=('ws_2d/batch', 'ws_2d/batch'),
  **kwargs,
):
  model = running.adapter_model(
    checkpoint,
    mesh,
    prefill_layout=layouts[0],
    decode_layout=layouts[1],
    refill=refill,
    task_feature_lengths=inference_tasks.LENGTHS,
  )
  return running.infer_with(
    model, InferencePartitioner(model), checkpoint, output_dir, mode, **kwargs
  )


@pytest.mark.parametrize(
  'mesh, layouts',
  [('1x1x1', ('ws_2d/batch', 'ws_2d/batch')), ('2x2x2', ('wg_xyz/batch', 'ws_2d/heads'))],
)
def test_predictions_equal_the_stock_models(mesh, layouts, palm_tiny, stock_rows, tmp_path):
  """Batches of 3 through 2 slots. T5X pads the last batch, of 2; padding is not decoded."""
  rows = refilled(palm_tiny, tmp_path, 'predict', Refill(slots=2, chunk=16), mesh, layouts)
  assert rows == stock_rows('predict')


def test_scores_equal_the_stock_models(palm_tiny, stock_rows, tmp_path):
  rows = refilled(palm_tiny, tmp_path, 'score', Refill(slots=2))
  np.testing.assert_allclose(
    [r['score'] for r in rows], [r['score'] for r in stock_rows('score')], rtol=1e-3
  )


def test_aux_has_the_model_s_own_scores(palm_tiny, stock_rows, tmp_path):
  rows = refilled(palm_tiny, tmp_path, 'predict_with_aux', Refill(slots=4, max_new_tokens=8))
  engine = Engine.load(palm_tiny, mesh='1x1x1', dtype='float32')
  found = engine.generate(
    [row['prompt_tokens'] for row in inference_tasks.rows()], max_new_tokens=8
  )
  np.testing.assert_allclose(
    [row['aux']['scores'] for row in rows], [c.score for c in found], rtol=1e-4
  )
  for row, stock in zip(rows, stock_rows('predict'), strict=True):
    assert row['prediction'] == stock['prediction'][:8]


@pytest.mark.parametrize('sampling', [SamplingParams(), SamplingParams(1.0, top_k=40)])
def test_an_interrupted_run_goes_on_after_its_last_chunk(
  palm_tiny, sampling, tmp_path, monkeypatch
):
  """T5X keeps the chunks that are done; they are not predicted again."""
  refill = Refill(slots=2, sampling=sampling, max_new_tokens=6)
  predict, calls = Predictor.__call__, []

  def counted(self, *arguments):
    calls.append(arguments)
    return predict(self, *arguments)

  def interrupted(self, *arguments):
    if calls:  # once the first chunk is written, which T5X does in a thread
      deadline = time.monotonic() + 60
      while glob.glob(f'{tmp_path}/cut/tmp-*/0.ckpt*') or not glob.glob(
        f'{tmp_path}/cut/tmp-*/input.ckpt*'
      ):
        assert time.monotonic() < deadline
        time.sleep(0.05)
      raise KeyboardInterrupt
    return counted(self, *arguments)

  run = functools.partial(refilled, palm_tiny, mode='predict', refill=refill, checkpoint_period=1)
  whole = run(output_dir=tmp_path / 'whole')
  with monkeypatch.context() as patch:
    patch.setattr(Predictor, '__call__', interrupted)
    with pytest.raises(KeyboardInterrupt):
      run(output_dir=tmp_path / 'cut')
  calls.clear()
  monkeypatch.setattr(Predictor, '__call__', counted)
  assert run(output_dir=tmp_path / 'cut') == whole
  assert len(calls) == 2  # of three batches


def test_num_decodes_share_a_prefill_and_come_from_the_worst_to_the_best(palm_tiny, batch):
  refill = Refill(slots=4, sampling=SamplingParams(3.0, top_k=40), max_new_tokens=6)
  model = running.adapter_model(palm_tiny, refill=refill)
  state, _, _ = running.restored(model, palm_tiny)
  predict = functools.partial(
    model.predict_batch_with_aux, state.params, batch, jax.random.PRNGKey(3), num_decodes=3
  )
  tokens, aux = predict(return_all_decodes=True)
  assert tokens.shape == (3, 3, 96) and aux['scores'].shape == (3, 3)
  assert np.all(np.diff(aux['scores'], axis=1) >= 0)
  assert len({row.tobytes() for row in tokens.reshape(9, -1)}) > 5
  best, best_aux = predict()
  np.testing.assert_array_equal(best, tokens[:, -1])
  # The second time beginnings of the prompts are cached: sums may be rounded otherwise.
  np.testing.assert_allclose(best_aux['scores'], aux['scores'][:, -1], rtol=1e-6)
  other, _ = model.predict_batch_with_aux(state.params, batch, jax.random.PRNGKey(4))
  assert not np.array_equal(other, best)


def test_a_longer_batch_has_slots_made_for_it(palm_tiny, batch):
  """After a batch of 64 positions one of 96, of the same parameters; and the shorter one again."""
  model = running.adapter_model(palm_tiny, refill=Refill(slots=2))
  state, _, _ = running.restored(model, palm_tiny)
  predict = lambda size: model.predict_batch(
    state.params, {name: x[:, :size] for name, x in batch.items()}
  )
  short, whole, again = predict(64), predict(96), predict(64)
  np.testing.assert_array_equal(short, again)
  assert short.shape == (3, 64) and whole.shape == (3, 96)
  for row, long_row in zip(short, whole):
    made = np.count_nonzero(row)
    np.testing.assert_array_equal(row[:made], long_row[:made])


def test_a_traced_step_is_t5x_s_loop(palm_tiny, batch):
  """Export and precompile trace the step: there is no host in it."""
  model = running.adapter_model(palm_tiny, refill=Refill(slots=2))
  state, _, _ = running.restored(model, palm_tiny)
  traced = jax.jit(lambda params, batch: model.predict_batch(params, batch))(state.params, batch)
  np.testing.assert_array_equal(model.predict_batch(state.params, batch), traced)


def test_predictions_with_a_saved_prompt(palm_tiny, batch, tmp_path):
  """A prompt of T5X's prompt tuning, in front of every example; scores and T5X's loop refuse it."""
  prompt = np.random.default_rng(0).normal(size=(5, 256)).astype(np.float32)
  file = tmp_path / 'decoder.prompt.prompt.prompt'
  with file.open('wb') as f:
    np.save(f, prompt)
  model = running.adapter_model(palm_tiny, refill=Refill(max_new_tokens=6, adapter=str(file)))
  state, _, _ = running.restored(model, palm_tiny)
  found = model.predict_batch(state.params, batch)
  engine = Engine.load(palm_tiny, mesh='1x1x1', dtype='float32', adapters={'task': file})
  prompts = [row['prompt_tokens'] for row in inference_tasks.rows()][: len(found)]
  wanted = engine.generate(prompts, max_new_tokens=6, adapter='task')
  plain = engine.generate(prompts, max_new_tokens=6)
  for row, each in zip(found, wanted, strict=True):
    assert row[: len(each.tokens)].tolist() == each.tokens
  assert [each.tokens for each in wanted] != [each.tokens for each in plain]
  with pytest.raises(RequestError, match='score_batch does not take Refill.adapter'):
    model.score_batch(state.params, batch)
  with pytest.raises(RequestError, match="T5X's own loop does not take Refill.adapter"):
    jax.jit(lambda params, batch: model.predict_batch(params, batch))(state.params, batch)


def test_what_is_refused(palm_tiny, tmp_path):
  with pytest.raises(RequestError, match='Refill.slots must be a whole number, 1 or more, got 0'):
    Refill(slots=0)
  with pytest.raises(
    RequestError, match="Refill.max_new_tokens must be a whole number, 1 or more, got '5'"
  ):
    Refill(max_new_tokens='5')
  with pytest.raises(RequestError, match='a model with refill has none: use one of the two'):
    InferencePartitioner(
      running.adapter_model(palm_tiny, refill=Refill()), executable=str(tmp_path)
    )


def test_only_the_step_of_a_batch_runs_on_the_host(palm_tiny):
  partitioner = InferencePartitioner(running.adapter_model(palm_tiny, refill=Refill()))
  assert not isinstance(partitioner.partition(lambda x: x, (None,), None), HostStep)
