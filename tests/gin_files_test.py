"""The gin files this package ships: models and layouts that they bind, macros that they explain."""

import pathlib
import re

import gin
import pytest

from t5x_inference_ext import config
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.sharding.layout import Layout, check_pair

CONFIGS = pathlib.Path(__file__).resolve().parent.parent / 't5x_inference_ext' / 'configs'
MODELS = sorted(path.stem for path in (CONFIGS / 'models').glob('*.gin'))
LAYOUTS = sorted(path.stem for path in (CONFIGS / 'layouts').glob('*.gin'))
RUNS = sorted(
  path.relative_to(CONFIGS).as_posix()
  for path in [*CONFIGS.glob('*.gin'), *CONFIGS.glob('runs/*.gin'), *CONFIGS.glob('t5x/*.gin')]
)


@gin.configurable(module='gin_files_test')
def checked(model_config: ModelConfig = gin.REQUIRED) -> ModelConfig:
  """Takes MODEL_CONFIG as a run does."""
  return model_config


@gin.configurable(module='gin_files_test')
def layouts(
  prefill_layout: str = gin.REQUIRED, decode_layout: str = gin.REQUIRED
) -> tuple[str, str]:
  """Takes the macros of configs/layouts as a run does."""
  return prefill_layout, decode_layout


@pytest.fixture(autouse=True)
def no_configuration():
  gin.clear_config()
  yield
  gin.clear_config()


def _model(name: str, bindings: str = '') -> ModelConfig:
  gin.parse_config(
    f"include 't5x_inference_ext/configs/models/{name}.gin'\n"
    f'gin_files_test.checked.model_config = %MODEL_CONFIG\n{bindings}'
  )
  return checked()


def test_every_preset_has_a_file():
  assert sorted(config.PRESETS) == MODELS


@pytest.mark.parametrize('name', MODELS)
def test_a_model_file_binds_its_preset(name):
  assert _model(name) == config.preset(name)


def test_a_field_of_a_preset_can_be_overridden():
  assert _model('palm_8b', "config.preset.norm_scale = 'one'") == config.preset(
    'palm_8b', norm_scale='one'
  )


def test_an_unknown_field_of_a_preset_is_refused():
  with pytest.raises(TypeError, match='num_experts'):
    _model('palm_8b', 'config.preset.num_experts = 2')


@pytest.mark.parametrize('name', RUNS)
def test_a_runs_comments_tell_of_every_macro(name):
  text = (CONFIGS / name).read_text(encoding='utf-8')
  comments = ' '.join(re.findall(r'^#(.*)$', text, re.MULTILINE))
  untold = [
    macro
    for macro in re.findall(r'^([A-Z_]+) = ', text, re.MULTILINE)
    if not re.search(rf'\b{macro}\b', comments)
  ]
  assert untold == []


def test_there_are_files_of_layouts():
  assert {'ws_1d', 'ws_2d', 'wg_x', 'wg_xy', 'low_latency', 'high_throughput'} <= set(LAYOUTS)


def _layouts(name: str) -> tuple[Layout, Layout]:
  for phase in ('prefill', 'decode'):
    macro = f'{phase.upper()}_LAYOUT'
    gin.parse_config(
      [f"{macro} = 'a default'", f'gin_files_test.layouts.{phase}_layout = %{macro}']
    )
  gin.parse_config_file(f't5x_inference_ext/configs/layouts/{name}.gin')
  return tuple(map(Layout.parse, layouts()))


@pytest.mark.parametrize('name', LAYOUTS)
def test_a_file_of_layouts_binds_a_pair_over_a_runs_own(name):
  prefill, decode = _layouts(name)
  check_pair(prefill, decode)  # raises for two that can't share weights
  gin_macros = re.findall(
    r'^(\w+) =', (CONFIGS / 'layouts' / f'{name}.gin').read_text(encoding='utf-8'), re.MULTILINE
  )
  assert gin_macros == ['PREFILL_LAYOUT', 'DECODE_LAYOUT']


@pytest.mark.parametrize('name', LAYOUTS)
def test_the_guide_lists_a_file_of_layouts(name, repository):
  assert f'`{name}.gin`' in (repository / 'docs' / 'layouts.md').read_text(encoding='utf-8')


def test_a_file_named_after_a_layout_binds_it_for_prefill():
  for name in LAYOUTS:
    if name.startswith(('ws_', 'wg_')):
      assert _layouts(name)[0].feedforward == name
      gin.clear_config()


@pytest.mark.parametrize('name', ['runs/infer.gin', 't5x/model.gin'])
def test_runs_take_the_macros_that_files_of_layouts_bind(name):
  text = (CONFIGS / name).read_text(encoding='utf-8')
  assert re.search(r'^  prefill_layout = %PREFILL_LAYOUT$', text, re.MULTILINE)
  assert re.search(r'^  decode_layout = %DECODE_LAYOUT$', text, re.MULTILINE)
