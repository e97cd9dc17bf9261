"""t5x.infer with a step compiled beforehand; a step of another run is refused."""

import pytest

from t5x_inference_ext.checkpoints.convert import convert
from t5x_inference_ext.engine import saved_program
from t5x_inference_ext.engine.saved_program import SavedError
from t5x_inference_ext.precompile import slices
from t5x_inference_ext.sharding.torus import parse_slice
from t5x_inference_ext.t5x.partitioning import InferencePartitioner
from t5x_inference_ext.t5x.saved_step import save_infer_step
from tests.t5x_adapter import inference_tasks, running


@pytest.fixture(scope='module')
def path(palm_tiny, tmp_path_factory):
  model = running.adapter_model(palm_tiny, '2x2x2', task_feature_lengths=inference_tasks.LENGTHS)
  path = tmp_path_factory.mktemp('saved') / 'step'
  header = save_infer_step(
    path, model, InferencePartitioner(model), inference_tasks.LENGTHS, batch_size=3
  )
  assert header['mesh'] == {'data': 1, 'x': 2, 'y': 2, 'z': 2}
  return path


def _infer(palm_tiny, tmp_path, path, mode='predict', **options):
  model = running.adapter_model(
    palm_tiny, '2x2x2', task_feature_lengths=inference_tasks.LENGTHS, **options
  )
  return running.infer_with(
    model, InferencePartitioner(model, executable=path), palm_tiny, tmp_path, mode
  )


def test_predictions_are_the_same(palm_tiny, stock_rows, tmp_path, path, monkeypatch):
  loads, load = [], saved_program.load
  monkeypatch.setattr(
    saved_program, 'load', lambda *arguments: loads.append(arguments[0]) or load(*arguments)
  )
  assert _infer(palm_tiny, tmp_path, path) == stock_rows('predict')
  assert loads == [path]  # once, for all batches


def test_a_step_with_int4_weights(palm_tiny, tmp_path):
  """JAX itself refuses int4 arrays as arguments of programs that are loaded."""
  rounded, found = tmp_path / 'int4', []
  convert(palm_tiny, rounded, 'int4')
  model = running.adapter_model(rounded, '1x1x1', task_feature_lengths=inference_tasks.LENGTHS)
  lengths = inference_tasks.LENGTHS
  save_infer_step(tmp_path / 'step', model, InferencePartitioner(model), lengths, batch_size=3)
  for executable in None, tmp_path / 'step':
    (tmp_path / str(len(found))).mkdir()
    partitioner = InferencePartitioner(model, executable=executable)
    output = tmp_path / str(len(found))
    found.append(running.infer_with(model, partitioner, rounded, output, 'predict'))
  assert found[0] == found[1] and found[0]


@pytest.mark.parametrize('options', [dict(prefill_layout='wg_x/batch'), dict(mode='score')])
def test_another_program_is_refused(palm_tiny, tmp_path, path, options):
  with pytest.raises(SavedError, match='was compiled for'):
    _infer(palm_tiny, tmp_path, path, **options)


def test_a_missing_file_is_found_out_at_once(palm_tiny, tmp_path):
  with pytest.raises(SavedError, match="can't read the executable"):
    InferencePartitioner(mesh='2x2x2', executable=tmp_path / 'missing')


def test_a_step_is_compiled_for_a_slice_that_is_not_here(tmp_path, palm_tiny):
  pytest.importorskip('libtpu', reason='libtpu, the TPU compiler, is not installed (extra `test`)')
  model = running.adapter_model(palm_tiny, None)
  mesh = slices.slice_mesh(parse_slice('v4:2x2x1'), model.model.config, (1, 2, 2))
  model = running.adapter_model(
    palm_tiny, mesh, dtype='bfloat16', task_feature_lengths=inference_tasks.LENGTHS
  )
  header = save_infer_step(
    tmp_path / 'step', model, InferencePartitioner(model), inference_tasks.LENGTHS, batch_size=4
  )
  assert (
    header['platform'] == 'tpu'
    and header['device_kind'] == 'TPU v4'
    and len(header['devices']) == 4
  )
  with pytest.raises(
    SavedError, match='libtpu .*and here it is None|platform tpu, and here it is cpu'
  ):
    _infer(palm_tiny, tmp_path, tmp_path / 'step')
