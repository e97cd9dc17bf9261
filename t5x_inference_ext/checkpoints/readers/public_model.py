"""What readers of public formats return: a model, its tensors, and what they say about text."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from t5x_inference_ext import params
from t5x_inference_ext.checkpoints.arrays import SourceArray, whole_array
from t5x_inference_ext.checkpoints.tensor import Tensor
from t5x_inference_ext.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class SourceText:
  """What a source says about text. Nothing of it is interpreted here.

  Attributes:
    directory: Directory with tokenizer.json, tokenizer.model or tokenizer_config.json; None for a
      GGUF file.
    lists: The keys of a GGUF file that begin with `tokenizer.`, without it, such as 'ggml.tokens'.
    bos_id: Id of the token that begins a text, or None.
    eos_ids: Ids of the tokens that end one.
  """

  directory: str | None
  lists: Mapping[str, Any]
  bos_id: int | None
  eos_ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class PublicModel:
  """A model in a public format. No values of weights have been read yet.

  Attributes:
    path: Directory or file.
    format: 'safetensors' or 'gguf'.
    config: The model.
    weights: Dtype of the matrices: 'float32' or 'bfloat16'.
    tensors: The canonical tensors, by name.
    stored: The stored tensors, by stored name.
    notes: Lines for commands to print: what was found, and what was assumed.
    text: What the source says about text.
    index_crc32: CRC-32 of all headers, which identifies the source.
  """

  path: str
  format: str
  config: ModelConfig
  weights: str
  tensors: Mapping[str, Tensor]
  stored: Mapping[str, Tensor]
  notes: tuple[str, ...]
  text: SourceText
  index_crc32: int

  @property
  def arrays(self) -> tuple[SourceArray, ...]:
    """Each canonical tensor as a stored array, for conversions."""
    return tuple(
      whole_array(tensor, name, None if name in params.OUTSIDE_LAYERS else 0)
      for name, tensor in self.tensors.items()
    )
