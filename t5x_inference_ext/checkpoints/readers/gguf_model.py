"""Reader of models in GGUF files."""

import collections

from t5x_inference_ext.checkpoints.families.gguf_architectures import ROPE_FREQS, gguf_family_model
from t5x_inference_ext.checkpoints.readers.gguf import read_gguf
from t5x_inference_ext.checkpoints.readers.public_model import PublicModel
from t5x_inference_ext.checkpoints.source_text import settings_of_lists

_TEXT = 'tokenizer.'


def read_gguf_model(path: str) -> PublicModel:
  """Return the model in a GGUF file.

  Raises:
    CheckpointError: The architecture is unknown, the model can't be served, or the file is damaged.
  """
  header, stored, types = read_gguf(path)
  model, module_map = gguf_family_model(header.metadata, stored, path)
  lists = {k.removeprefix(_TEXT): v for k, v in header.metadata.items() if k.startswith(_TEXT)}
  counts = collections.Counter(types.values())
  return PublicModel.of_family(
    path,
    'gguf',
    model,
    stored,
    settings_of_lists(path, lists, model.config.vocab_size),
    header.crc,
    title=f'GGUF file at {path}, architecture {header.metadata["general.architecture"]}',
    types=', '.join(f'{name} ({count})' for name, count in counts.most_common()),
    settings=(ROPE_FREQS,),
    module_map=module_map,
  )
