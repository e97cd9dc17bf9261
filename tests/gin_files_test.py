"""The gin files this package ships: the models they bind, and that a run's comments tell of all that it takes."""

import pathlib
import re

import gin
import pytest

from t5x_inference_ext import config
from t5x_inference_ext.config import ModelConfig

CONFIGS = pathlib.Path(__file__).resolve().parent.parent / 't5x_inference_ext' / 'configs'
MODELS = sorted(path.stem for path in (CONFIGS / 'models').glob('*.gin'))
RUNS = sorted(path.name for path in (CONFIGS / 'runs').glob('*.gin'))


@gin.configurable(module='gin_files_test')
def checked(model_config: ModelConfig = gin.REQUIRED) -> ModelConfig:
  """Takes MODEL_CONFIG as a run does."""
  return model_config


@pytest.fixture(autouse=True)
def no_configuration():
  gin.clear_config()
  yield
  gin.clear_config()


def _model(name: str, bindings: str = '') -> ModelConfig:
  gin.parse_config(f"include 't5x_inference_ext/configs/models/{name}.gin'\n"
                   f'gin_files_test.checked.model_config = %MODEL_CONFIG\n{bindings}')
  return checked()


def test_every_preset_has_a_file():
  assert MODELS == sorted(config.PRESETS)


@pytest.mark.parametrize('name', MODELS)
def test_a_model_file_binds_its_preset(name):
  assert _model(name) == config.preset(name)


def test_a_field_of_a_preset_can_be_overridden():
  assert _model('palm_8b', "config.preset.norm_scale = 'one'") == config.preset('palm_8b', norm_scale='one')


def test_an_unknown_field_of_a_preset_is_refused():
  with pytest.raises(TypeError, match='num_experts'):
    _model('palm_8b', 'config.preset.num_experts = 2')


@pytest.mark.parametrize('name', RUNS)
def test_a_runs_comments_tell_of_every_macro(name):
  text = (CONFIGS / 'runs' / name).read_text(encoding='utf-8')
  comments = ' '.join(re.findall(r'^#(.*)$', text, re.MULTILINE))
  untold = [macro for macro in re.findall(r'^([A-Z_]+) = ', text, re.MULTILINE)
            if not re.search(rf'\b{macro}\b', comments)]
  assert untold == []
