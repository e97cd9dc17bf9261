"""A plan as gin bindings: macros for `infer`, the T5X adapter and `precompile`.

Each command ignores the macros that it does not use.
"""

import dataclasses

from t5x_inference_ext.config import PRESETS, ModelConfig, preset
from t5x_inference_ext.planner.request import Plan


def gin_text(plan: Plan) -> str:
  """Return a plan as a gin file, to be given as --gin_file after a run's own files."""
  request = plan.request
  prefill, decode = plan.layouts
  cache = None if request.cache == 'bfloat16' else repr(request.cache)  # None: equal to DTYPE
  slice_macro = f"SLICE = '{plan.machine}'\n" if plan.machine.chip.torus else ''
  step_ms = plan.decode.seconds * 1e3
  machine = plan.machine
  return f"""# Made by `python -m t5x_inference_ext.plan` for {machine}, {machine.chips} chips.
# {request.batch} rows of {request.input_length} tokens, {request.output_length} new ones each, \
{request.weights} weights.
# Predicted: prefill {plan.prefill.seconds:.4g} s, {step_ms:.4g} ms a step.
#
# Give it as a --gin_file after the run's own: configs/runs/infer.gin, T5X's and
# configs/t5x/infer.gin (T5X's batch is utils.DatasetConfig.batch_size: {plan.rows}), or
# configs/runs/precompile.gin: one decode step. For the prefill add
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

# For precompile only.
{slice_macro}BATCH = {plan.rows}
WEIGHTS = '{request.weights}'
CONTEXT = {request.context}
PROMPT = {request.input_length}
PHASE = 'decode'
LAYOUT = %DECODE_LAYOUT
OTHER_LAYOUT = %PREFILL_LAYOUT
"""


def preset_name(config: ModelConfig) -> str | None:
  """Return the name of the preset that equals a model, or None."""
  return next((name for name in PRESETS if preset(name) == config), None)


def _model(config: ModelConfig) -> str:
  """Return gin code that binds MODEL_CONFIG: a preset by name, any other model by its fields."""
  name = preset_name(config)
  if name:
    maker, bindings = 'preset', f"config.preset.name = '{name}'"
  else:
    fields = dataclasses.asdict(config).items()
    maker = 'ModelConfig'
    bindings = 'config.ModelConfig:' + ''.join(f'\n  {key} = {value!r}' for key, value in fields)
  return f'from t5x_inference_ext import config\n\n{bindings}\nMODEL_CONFIG = @config.{maker}()'
