"""A plan as gin: macros that `infer`, the T5X adapter and `precompile` take, each those it knows."""

import dataclasses

from t5x_inference_ext.config import PRESETS, ModelConfig, preset
from t5x_inference_ext.planner.request import Plan


def gin_text(plan: Plan) -> str:
  """The file: given as a --gin_file after a run's own, it makes the run that which was planned."""
  request = plan.request
  prefill, decode = plan.layouts
  cache = None if request.cache == 'bfloat16' else repr(request.cache)  # None: as DTYPE
  slice_ = f"SLICE = '{plan.machine}'\n" if plan.machine.chip.torus else ''
  return f"""# Made by `python -m t5x_inference_ext.plan` for {plan.machine}, {plan.machine.chips} chips, \
{request.weights} weights.
# {request.batch} rows of {request.input_length} tokens, {request.output_length} new ones each. Predicted: prefill \
{plan.prefill.seconds:.4g} s, {plan.decode.seconds * 1e3:.4g} ms a step.
#
# Give it as a --gin_file after the run's own: configs/runs/infer.gin, T5X's and configs/t5x/infer.gin (T5X's batch is
# utils.DatasetConfig.batch_size: {plan.rows}), or configs/runs/precompile.gin: one decode step. For the prefill add
# --gin.PHASE='"prefill"' --gin.LAYOUT=%PREFILL_LAYOUT --gin.OTHER_LAYOUT=%DECODE_LAYOUT.
from __gin__ import dynamic_registration

{_model(request.config)}
MESH = '{plan.mesh_text}'
PREFILL_LAYOUT = '{prefill}'
DECODE_LAYOUT = '{decode}'
DTYPE = 'bfloat16'
CACHE = {cache}
BATCH_SIZE = {plan.rows}
MAX_NEW_TOKENS = {request.output_length}

# Of precompile alone.
{slice_}BATCH = {plan.rows}
WEIGHTS = '{request.weights}'
CONTEXT = {request.context}
PROMPT = {request.input_length}
PHASE = 'decode'
LAYOUT = %DECODE_LAYOUT
OTHER_LAYOUT = %PREFILL_LAYOUT
"""


def _model(config: ModelConfig) -> str:
  name = next((name for name in PRESETS if preset(name) == config), None)
  if name:
    return (
      'from t5x_inference_ext import config\n\n'
      f"config.preset.name = '{name}'\nMODEL_CONFIG = @config.preset()"
    )
  fields = ''.join(f'\n  {name} = {value!r}' for name, value in dataclasses.asdict(config).items())
  return (
    'from t5x_inference_ext import config\n\n'
    f'config.ModelConfig:{fields}\nMODEL_CONFIG = @config.ModelConfig()'
  )
