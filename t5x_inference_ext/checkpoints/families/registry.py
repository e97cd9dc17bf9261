"""All families by the `model_type` of their config.json."""

import difflib

from t5x_inference_ext.checkpoints.families import bloom, gpt, llama
from t5x_inference_ext.checkpoints.families.family import Family, FamilyModel
from t5x_inference_ext.checkpoints.families.settings import Settings
from t5x_inference_ext.errors import CheckpointError, printable

FAMILIES = {
  'llama': Family('model.', llama.llama),
  'mistral': Family('model.', llama.mistral),
  'qwen2': Family('model.', llama.qwen2),
  'qwen3': Family('model.', llama.qwen3),
  'gemma': Family('model.', llama.gemma),
  'gemma2': Family('model.', llama.gemma2),
  'gemma3_text': Family('model.', llama.gemma3),
  'cohere': Family('model.', llama.cohere),
  'cohere2': Family('model.', llama.cohere2),
  'olmo': Family('model.', llama.olmo),
  'olmo2': Family('model.', llama.olmo2),
  'stablelm': Family('model.', llama.stablelm),
  'gpt2': Family('transformer.', gpt.gpt2),
  'gpt_bigcode': Family('transformer.', gpt.gpt_bigcode),
  'gptj': Family('transformer.', gpt.gptj),
  'codegen': Family('transformer.', gpt.codegen),
  'gpt_neox': Family('gpt_neox.', gpt.gpt_neox),
  'phi': Family('model.', gpt.phi),
  'opt': Family('model.', bloom.opt),
  'bloom': Family('transformer.', bloom.bloom),
  'mpt': Family('transformer.', bloom.mpt),
  'falcon': Family('transformer.', bloom.falcon),
}
# Setting -> its supported values, the default first. With any other value a model computes
# something else.
_FOREIGN = {
  'quantization_config': (None,),
  'is_encoder_decoder': (False,),
  'add_cross_attention': (False,),
  'residual_multiplier': (1.0,),
  'embedding_multiplier': (1.0,),
  'attention_multiplier': (None,),
  'logits_scaling': (1.0,),
  'num_local_experts': (1,),
  'num_experts': (1,),
  'rope_interleaved': (False,),
  'use_bidirectional_attention': (False,),
}


def family_of(settings: Settings) -> Family:
  """Return the family of a model.

  Raises:
    CheckpointError: The family is unknown; the message names the nearest one.
  """
  name = settings.value('model_type')
  if isinstance(name, str) and name in FAMILIES:
    return FAMILIES[name]
  near = difflib.get_close_matches(str(name)[:80], FAMILIES, 1, 0.0)[0]
  raise CheckpointError(
    f'{settings.where}: model_type is {printable(name, 80)}, which is not a known family; the '
    f'nearest is {near}; known are {", ".join(FAMILIES)}'
  )


def family_model(settings: Settings) -> FamilyModel:
  """Return the model that settings describe.

  Raises:
    CheckpointError: The family is unknown, or a setting is missing or can't be served.
  """
  family = family_of(settings)
  for name, supported in _FOREIGN.items():
    settings.only(name, *supported)
  try:
    return family.model(settings)
  except CheckpointError:
    raise
  except ValueError as e:  # raised by ModelConfig
    raise CheckpointError(f'{settings.where}: {e}') from e
