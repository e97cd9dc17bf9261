"""Open a checkpoint of any supported format: its model, and lazy tensors."""

from collections.abc import Callable, Mapping
import dataclasses
import os
from typing import Any

from t5x_inference_ext import params
from t5x_inference_ext.checkpoints import serving, storage, unfinished
from t5x_inference_ext.checkpoints.arrays import SourceArray, whole_array
from t5x_inference_ext.checkpoints.conventions import (
  Conventions,
  ConventionSources,
  ResolvedOption,
  check_stated,
  recorded_in,
)
from t5x_inference_ext.checkpoints.families.module_map import ModuleMap
from t5x_inference_ext.checkpoints.missing import missing_checkpoint
from t5x_inference_ext.checkpoints.public import check_required, read_public
from t5x_inference_ext.checkpoints.readers import flaxformer, legacy, orbax
from t5x_inference_ext.checkpoints.readers.tree import Tree
from t5x_inference_ext.checkpoints.tensor import Tensor
from t5x_inference_ext.checkpoints.tree_notes import recorded_conventions, tree_notes
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.errors import CheckpointError, printable
from t5x_inference_ext.options import takes_options
from t5x_inference_ext.text.chat_template import ChatTemplate
from t5x_inference_ext.text.settings import TextSettings, assumed_settings
from t5x_inference_ext.text.vocabulary import Vocabulary

# Formats of T5X's parameter trees.
TREES = ('t5x', 'orbax')


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """An open checkpoint.

  Attributes:
    path: Directory of the checkpoint, or path of a GGUF file.
    format: 't5x' (T5X's legacy format), 'orbax', 'serving', 'safetensors' or 'gguf'.
    step: Training step, or None if not recorded.
    config: The model.
    weights: Format of the weights (quantization.formats), such as 'float32' or 'int8'.
    tensors: Canonical tensors by name: exactly params.parameters(config), and params.scales of the
      quantized ones.
    arrays: The stored arrays that hold the canonical tensors, except scales.
    form: The arrangement of parameters in a T5X tree (flaxformer.ParsedModel.form); None if not
      recorded.
    notes: Lines for commands to print: properties that were found or assumed.
    conventions: Name -> value and source of each property that T5X weights do not show. A serving
      checkpoint converted from T5X's records them.
    text: Vocabulary, BOS, end tokens, chat template and generation defaults.
    index_crc32: CRC-32 of the headers of a checkpoint in a public format; None for other formats.
    module_map: Modules that hold the matrices in transformers, for adapters made with it; None if
      the checkpoint is not of a public model, or does not record the modules.
  """

  path: str
  format: str
  step: int | None
  config: ModelConfig
  weights: str
  tensors: Mapping[str, Tensor]
  arrays: tuple[SourceArray, ...]
  form: dict[str, Any] | None
  notes: tuple[str, ...]
  conventions: Mapping[str, ResolvedOption]
  text: TextSettings
  index_crc32: int | None = None
  module_map: ModuleMap | None = None

  @property
  def vocabulary(self) -> Vocabulary | None:
    """The vocabulary, parsed at its first use; None if it is not known."""
    return self.text.vocabulary

  @property
  def bos_id(self) -> int | None:
    """The id in front of every prompt; None if there is none."""
    return self.text.bos_id

  @property
  def end_ids(self) -> tuple[int, ...]:
    """The ids that end a row."""
    return self.text.end_ids

  @property
  def chat_template(self) -> ChatTemplate | None:
    """The chat template; None if there is none."""
    return self.text.chat


@takes_options(Conventions)
def open_checkpoint(
  path: str | os.PathLike,
  *,
  config: ModelConfig | None = None,
  stock: Callable[[], Conventions | None] = lambda: None,
  **conventions: Any,
) -> Checkpoint:
  """Open a checkpoint, and check the names and shapes of its parameters.

  No weight is read here: the returned tensors read their values on demand.

  Args:
    path: A checkpoint directory of any name, or the msgpack file in it, or a GGUF file; local or
      gs://; or a model's name on a hub, hf:OWNER/NAME.
    config: The model that the checkpoint must hold. None takes what the checkpoint records or, in
      T5X's formats, derives the model from names and shapes.
    stock: Function that returns the conventions of T5X's own model, as the user's gin configures
      it; called only for a T5X checkpoint. docs/serving_checkpoint.md has the order of all sources.
    **conventions: Fields of Conventions, for a T5X checkpoint that does not record them. If no
      source states a required convention, only a tree of ParallelFusedDecoderLayer can be opened:
      it gets PaLM's. `notes` names the source of each convention.

  Raises:
    CheckpointError: There is no checkpoint, it holds another model, or a convention is not stated.
      The message says what to do.
    RequestError: A convention has an invalid value.
  """
  given = Conventions(**conventions)
  path = storage.normalize(path)
  if (
    not storage.is_remote(path) and os.path.isfile(path) and os.path.basename(path) == legacy.INDEX
  ):
    path = os.path.dirname(path)
  if not storage.is_remote(path) and unfinished.is_unfinished(path):
    raise CheckpointError(
      f'{path} is not a checkpoint but an unfinished conversion: run the same '
      'convert_checkpoint command again to finish it'
    )
  header = None if storage.is_on_hub(path) else storage.read_file(path, serving.CONFIG)
  if header is not None:
    return _from_serving(path, header, given, config)
  found = None if storage.is_on_hub(path) else read_tree(path)
  if found is not None:
    return _from_tree(*found, ConventionSources(recorded_conventions(path, stock()), given, config))
  model = read_public(path, given.norm_scale or (config.norm_scale if config else None))
  if model is None:
    raise CheckpointError(missing_checkpoint(path))
  check_stated(given, model.config, model.path)
  if config is not None:
    check_required(config, model)
  return Checkpoint(
    model.path,
    model.format,
    None,
    model.config,
    model.weights,
    model.tensors,
    model.arrays,
    None,
    model.notes,
    {},
    model.text,
    index_crc32=model.index_crc32,
    module_map=model.module_map,
  )


def is_finished(path: str | os.PathLike) -> bool:
  """Return whether a conversion into `path` is complete."""
  path = storage.normalize(path)
  if not storage.is_remote(path):
    return os.path.isdir(path)
  names = storage.list_objects(path)
  return bool(names) and unfinished.MARKER not in names


def read_tree(path: str) -> tuple[str, Tree] | None:
  """Return the format and parameters of a T5X checkpoint of any model; None if there is none.

  Raises:
    CheckpointError: The checkpoint is damaged.
  """
  index = storage.read_file(path, legacy.INDEX)
  if index is not None:
    return 't5x', legacy.read_legacy(path, index)
  state = orbax.find_state(path)
  return None if state is None else ('orbax', orbax.read_orbax(path, state))


def _from_tree(kind: str, tree: Tree, sources: ConventionSources) -> Checkpoint:
  """Interpret a parameter tree in format `kind` as a checkpoint."""
  found = flaxformer.canonical(tree, sources)
  return Checkpoint(
    tree.path,
    kind,
    tree.step,
    found.config,
    found.weights,
    found.tensors,
    found.arrays,
    found.form,
    tree_notes(tree, found, sources),
    found.conventions,
    assumed_settings(found.config.vocab_size),
  )


def _from_serving(
  path: str, data: bytes, given: Conventions, config: ModelConfig | None
) -> Checkpoint:
  """Return the serving checkpoint at `path`, given the content `data` of serving_config.json.

  Other arguments are as in open_checkpoint.
  """
  header, found = serving.read_serving_header(path, data)
  where = f'{path}/{serving.CONFIG}'
  check_stated(given, found, where)
  if config is not None and config != found:
    _compare(config, found, header['weights'], path)
  listed = serving.serving_tensors(found, header['weights'])
  tensors = serving.unpacked(serving.read_listed(path, listed, serving.CONFIG), listed)
  step = header['source'].get('step')
  conventions = recorded_in(header)
  notes = (
    f'serving checkpoint at {path}, from {printable(header["source"].get("path"))}'
    + ('' if step is None else f', step {printable(step)}'),
    f'model: {found}',
    f'weights: {header["weights"]}',
    *(f'{name}: {stated}' for name, stated in conventions.items()),
  )
  arrays = tuple(
    whole_array(t, name, 0 if serving.is_layered(name) else None)
    for name, t in tensors.items()
    if name in params.parameters(found)
  )
  return Checkpoint(
    path,
    'serving',
    step,
    found,
    header['weights'],
    tensors,
    arrays,
    header['source'].get('form'),
    notes,
    conventions,
    serving.read_text(path, header, found.vocab_size),
    module_map=ModuleMap.from_dict(header['source'].get('module_map')),
  )


def _compare(config: ModelConfig, found: ModelConfig, weights: str, path: str) -> None:
  """Raise CheckpointError for the first difference between a model and the recorded model."""
  kinds = ('block', 'mlp', 'norm')  # these fields decide which tensors a model has
  fields = [*kinds, *(f.name for f in dataclasses.fields(config) if f.name not in kinds)]
  differing = next(name for name in fields if getattr(config, name) != getattr(found, name))
  if differing not in kinds:
    required = serving.serving_tensors(config, weights)
    for name, (shape, _) in serving.serving_tensors(found, weights).items():
      if shape != required[name][0]:
        raise CheckpointError(
          f'{name}: shape {list(shape)} in {path}/{name}, but the model asked for needs '
          f'{list(required[name][0])}'
        )
  raise CheckpointError(
    f'{differing}={getattr(config, differing)} was asked for, but {path}/{serving.CONFIG} records '
    f'{getattr(found, differing)}'
  )
