"""The adapter's tests run against the real T5X and flaxformer; without them they are skipped."""

import functools
import importlib.util
import pathlib

import jax
import numpy as np
import pytest

from t5x_inference_ext.checkpoints.convert import convert


def _missing() -> str:
  for module in ('t5x', 'flaxformer.architectures.t5.parallel_fused_decoder'):
    try:
      found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
      found = None
    if found is None:
      return module.split('.')[0]
  return ''


MISSING = _missing()
REASON = f'needs T5X and flaxformer ({MISSING} is not importable): docs/t5x.md has the versions'


class _SkippedModule(pytest.Module):
  def collect(self):
    pytest.skip(REASON, allow_module_level=True)


def pytest_pycollect_makemodule(module_path, parent):
  if MISSING:
    return _SkippedModule.from_parent(parent, path=module_path)
  return None


@pytest.fixture(autouse=True)
def rank_promotion():
  """T5X and flaxformer rely on implicit broadcasting, which this package's own tests forbid."""
  with jax.numpy_rank_promotion('allow'):
    yield


@pytest.fixture(scope='session')
def int8_checkpoint(palm_tiny, tmp_path_factory) -> pathlib.Path:
  """palm_tiny as an int8 serving checkpoint, in a directory that has no step in its name."""
  path = tmp_path_factory.mktemp('int8') / 'serving'
  convert(str(palm_tiny), str(path), 'int8')
  return path


@pytest.fixture(scope='session')
def stock_rows(palm_tiny, tmp_path_factory):
  """A function of an inference mode: the rows that T5X writes with flaxformer's model."""
  from tests.t5x_adapter import running

  @functools.cache
  def rows(mode):
    if mode == 'predict':  # T5X's predict_batch is the first half of predict_batch_with_aux
      return [{k: v for k, v in row.items() if k != 'aux'} for row in rows('predict_with_aux')]
    with jax.numpy_rank_promotion('allow'):
      return running.stock_infer(palm_tiny, tmp_path_factory.mktemp('stock'), mode)

  return rows


@pytest.fixture(scope='session')
def batch():
  """Three golden prompts as T5X's feature converter makes them, 96 positions."""
  from tests.t5x_adapter import inference_tasks

  rows = inference_tasks.rows()[:3]
  inputs, mask = np.zeros((3, 96), np.int32), np.zeros((3, 96), np.int32)
  for i, row in enumerate(rows):
    inputs[i, 1 : len(row['prompt_tokens']) + 1] = row['prompt_tokens']
    mask[i, : len(row['prompt_tokens']) + 1] = 1
  return {'decoder_input_tokens': inputs, 'decoder_causal_attention': mask}
