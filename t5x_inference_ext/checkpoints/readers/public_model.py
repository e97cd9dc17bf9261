"""The result of readers of public formats: a model, its tensors, its text settings."""

from collections.abc import Collection, Mapping
import dataclasses

from t5x_inference_ext import params
from t5x_inference_ext.checkpoints.arrays import SourceArray, whole_array
from t5x_inference_ext.checkpoints.families.family import FamilyModel
from t5x_inference_ext.checkpoints.families.module_map import ModuleMap
from t5x_inference_ext.checkpoints.families.tensors import canonical_tensors, weights_dtype
from t5x_inference_ext.checkpoints.tensor import Tensor
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.text.settings import TextSettings


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
    notes: Lines for commands to print: properties that were found or assumed.
    text: The source's text settings, without those that can't be used.
    index_crc32: CRC-32 of all headers, which identifies the source.
    module_map: Modules that hold the matrices in transformers; None if it has no such model.
  """

  path: str
  format: str
  config: ModelConfig
  weights: str
  tensors: Mapping[str, Tensor]
  stored: Mapping[str, Tensor]
  notes: tuple[str, ...]
  text: TextSettings
  index_crc32: int
  module_map: ModuleMap | None = None

  @classmethod
  def of_family(
    cls,
    path: str,
    source_format: str,
    model: FamilyModel,
    stored: Mapping[str, Tensor],
    text: TextSettings,
    index_crc32: int,
    *,
    title: str,
    notes: Collection[str] = (),
    types: str = '',
    settings: Collection[str] = (),
    module_map: ModuleMap | None = None,
  ) -> 'PublicModel':
    """Make a PublicModel from a model of a family and the stored tensors.

    Args:
      path: See the attributes.
      source_format: Attribute `format`.
      model: The model, and where its tensors are.
      stored: See the attributes.
      text: See the attributes.
      index_crc32: See the attributes.
      title: The first note.
      notes: The last notes.
      types: Text with the stored types, if these differ from the dtype of the values that are read.
      settings: Names of stored tensors that hold settings, not weights.
      module_map: See the attributes.

    Raises:
      CheckpointError: A tensor is missing, has a wrong shape, or is not used by the model.
    """
    weights = {name: tensor for name, tensor in stored.items() if name not in settings}
    tensors = canonical_tensors(model, weights, path)
    dtype = weights_dtype(tensors, model.config)
    lines = (
      title,
      f'model: {model.config}',
      f'weights: {types}, read as {dtype}' if types else f'weights: {dtype}',
      *model.notes,
      *notes,
    )
    return cls(
      path,
      source_format,
      model.config,
      dtype,
      tensors,
      stored,
      lines,
      text,
      index_crc32,
      module_map,
    )

  @property
  def arrays(self) -> tuple[SourceArray, ...]:
    """Each canonical tensor as a stored array, for conversions."""
    return tuple(
      whole_array(tensor, name, None if name in params.OUTSIDE_LAYERS else 0)
      for name, tensor in self.tensors.items()
    )
