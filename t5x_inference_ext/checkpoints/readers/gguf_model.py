"""GGUF files as models."""

import collections
from collections.abc import Mapping
from typing import Any

from t5x_inference_ext.checkpoints.families.gguf_architectures import ROPE_FREQS, gguf_family_model
from t5x_inference_ext.checkpoints.families.tensors import canonical_tensors, weights_dtype
from t5x_inference_ext.checkpoints.readers.gguf import read_gguf
from t5x_inference_ext.checkpoints.readers.huggingface import describe_ids
from t5x_inference_ext.checkpoints.readers.public_model import PublicModel, SourceText
from t5x_inference_ext.errors import CheckpointError, printable

_TEXT = 'tokenizer.'


def read_gguf_model(path: str) -> PublicModel:
  """Return the model in a GGUF file.

  Raises:
    CheckpointError: The architecture is unknown, has a feature that can't be served, or the file is
      damaged.
  """
  header, stored, types = read_gguf(path)
  model = gguf_family_model(header.metadata, stored, path)
  weights = {name: tensor for name, tensor in stored.items() if name != ROPE_FREQS}
  tensors = canonical_tensors(model, weights, path)
  lists = {k.removeprefix(_TEXT): v for k, v in header.metadata.items() if k.startswith(_TEXT)}
  ends = (_id(lists, f'ggml.{name}_token_id', path) for name in ('eos', 'eot'))
  text = SourceText(
    None,
    lists,
    _id(lists, 'ggml.bos_token_id', path),
    tuple(dict.fromkeys(i for i in ends if i is not None)),
  )
  counts = collections.Counter(types.values())
  kinds = ', '.join(f'{name} ({count})' for name, count in counts.most_common())
  notes = (
    f'GGUF file at {path}, architecture {header.metadata["general.architecture"]}',
    f'model: {model.config}',
    f'weights: {kinds}, read as {weights_dtype(tensors, model.config)}',
    *model.notes,
    describe_ids(text),
  )
  return PublicModel(
    path,
    'gguf',
    model.config,
    weights_dtype(tensors, model.config),
    tensors,
    stored,
    notes,
    text,
    header.crc,
  )


def _id(lists: Mapping[str, Any], key: str, path: str) -> int | None:
  """Return the id of a token in the metadata, or None if it is not there."""
  value = lists.get(key)
  if value is not None and not (type(value) is int and 0 <= value < 2**31):
    raise CheckpointError(f'{path}: {_TEXT}{key} is {printable(value, 80)}, not an id')
  return value
