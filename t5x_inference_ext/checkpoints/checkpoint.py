"""Opening of checkpoints in any supported format: the model, and tensors to read values from."""

from collections.abc import Iterator, Mapping
import dataclasses
import os
from typing import Any

import numpy as np

from t5x_inference_ext import params
from t5x_inference_ext.checkpoints import serving, storage, unfinished
from t5x_inference_ext.checkpoints.arrays import SourceArray, whole_array
from t5x_inference_ext.checkpoints.missing import missing_checkpoint
from t5x_inference_ext.checkpoints.public import check_arguments, read_public
from t5x_inference_ext.checkpoints.readers import flaxformer, legacy, orbax
from t5x_inference_ext.checkpoints.readers.tree import Tree
from t5x_inference_ext.checkpoints.tensor import Tensor
from t5x_inference_ext.checkpoints.with_text import WithText
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.errors import CheckpointError, printable
from t5x_inference_ext.features import NORM_SCALES
from t5x_inference_ext.text.settings import TextSettings, assumed_settings


@dataclasses.dataclass(frozen=True)
class Checkpoint(WithText):
  """An open checkpoint.

  Attributes:
    path: Directory of the checkpoint, or a GGUF file.
    format: 't5x' (T5X's legacy format), 'orbax', 'serving', 'safetensors' or 'gguf'.
    step: Training step, or None if not recorded.
    config: The model.
    weights: Dtype of the matrices: 'float32', 'bfloat16' or 'int8'.
    tensors: Canonical tensors by name: exactly params.parameters(config), and with int8
      params.scales(config) too.
    arrays: The stored arrays that hold the canonical tensors, except the scales of int8 weights.
    form: The arrangement of parameters in a T5X tree (flaxformer.Reading.form); None if not
      recorded.
    notes: Lines for commands to print: what was found, and what was assumed.
    text: Vocabulary, BOS, end tokens, chat template and generation defaults.
    rescale_logits: The argument of open_checkpoint.
    index_crc32: CRC-32 of the headers of a checkpoint in a public format; None for other formats.
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
  text: TextSettings
  rescale_logits: bool | None = None
  index_crc32: int | None = None


def open_checkpoint(
  path: str | os.PathLike,
  *,
  norm_scale: str | None = None,
  config: ModelConfig | None = None,
  rescale_logits: bool | None = None,
) -> Checkpoint:
  """Open a checkpoint, and check the names and shapes of its parameters.

  Values are read later, from the tensors.

  Args:
    path: A checkpoint directory of any name, or the msgpack file in it, or a GGUF file; local or
      gs://; or a model's name on a hub, hf:OWNER/NAME.
    norm_scale: How the norm scales are stored, 'zero' or 'one'. None takes what the checkpoint
      records. T5X checkpoints do not record it; then 'zero', as in PaLM, is assumed for fused
      parallel blocks, and 'one' for other layers and for layer norms. Notes say what was assumed.
    config: The model that the checkpoint must hold. None takes what the checkpoint records or, in
      T5X's formats, derives the model from names and shapes. Multihead kernels [E, H Q] do not
      determine H: then the model is needed.
    rescale_logits: flaxformer's option, for T5X's formats: whether attention logits were divided by
      sqrt(Q) in training. True is the default. If False, queries are multiplied by sqrt(Q) as they
      are read, because the program always divides.

  Raises:
    CheckpointError: There is no checkpoint, or it is of another model. The message says what to do.
  """
  if norm_scale is not None and norm_scale not in NORM_SCALES:
    raise CheckpointError(f'norm_scale must be one of {", ".join(NORM_SCALES)}, got {norm_scale!r}')
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
    if rescale_logits is not None:
      raise CheckpointError(
        f'rescale_logits is for T5X checkpoints: {path} is a serving checkpoint, whose scaling '
        'of queries was fixed when it was converted'
      )
    return _from_serving(path, header, norm_scale, config)
  found = None if storage.is_on_hub(path) else read_tree(path)
  if found is not None:
    return _from_tree(*found, norm_scale, config, rescale_logits)
  model = read_public(path, norm_scale or (config.norm_scale if config else None))
  if model is None:
    raise CheckpointError(missing_checkpoint(path))
  check_arguments(model, norm_scale, config, rescale_logits)
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
    model.text,
    index_crc32=model.index_crc32,
  )


def is_finished(path: str | os.PathLike) -> bool:
  """Return whether a conversion into `path` is complete."""
  path = storage.normalize(path)
  if not storage.is_remote(path):
    return os.path.isdir(path)
  names = storage.list_objects(path)
  return bool(names) and unfinished.MARKER not in names


def read_tree(path: str) -> tuple[str, Tree] | None:
  """Return the format and the parameters of a T5X checkpoint of any model; None for no checkpoint.

  Raises:
    CheckpointError: The checkpoint is damaged.
  """
  index = storage.read_file(path, legacy.INDEX)
  if index is not None:
    return 't5x', legacy.read_legacy(path, index)
  state = orbax.find_state(path)
  return None if state is None else ('orbax', orbax.read_orbax(path, state))


def _from_tree(
  kind: str,
  tree: Tree,
  norm_scale: str | None,
  config: ModelConfig | None,
  rescale_logits: bool | None,
) -> Checkpoint:
  """Return the checkpoint of a tree in format `kind`. Other arguments are as in open_checkpoint."""
  found = flaxformer.canonical(tree, norm_scale, config, rescale_logits is not False)
  model = found.config
  step = '' if tree.step is None else f', step {tree.step}'
  source = 'given' if norm_scale else 'given with the model' if config else 'assumed'
  if source == 'assumed':
    convention = "PaLM's" if model.norm_scale == 'zero' else "flaxformer's default"
    source = f'assumed, {convention}: T5X checkpoints do not record it'
  logits = {
    None: "divided by sqrt(d_head) (assumed, flaxformer's rescale_logits: T5X checkpoints do not "
    'record it)',
    True: 'divided by sqrt(d_head) (given)',
    False: 'not divided by sqrt(d_head) (given): queries are multiplied by it as they are read',
  }[rescale_logits]
  notes = (
    f'{tree.description} at {tree.path}{step}',
    f'model: {model}',
    f"layers: flaxformer's {found.kind.name}, layer axis {found.layer_axis}",
    f'weights: {found.weights}',
    f'norm scales: stored around {model.norm_scale} ({source})',
    *_norm_doubts(model.norm_scale, found.tensors['final_norm']),
    f'attention logits: {logits}',
    *(_query_doubts(found) if rescale_logits is None else ()),
    f'assumed, not recorded: rotary positions up to {model.rope_max_timescale:g}, '
    + ('swish of the first MLP input' if model.mlp == 'swiglu' else 'tanh GELU'),
  )
  return Checkpoint(
    tree.path,
    kind,
    tree.step,
    model,
    found.weights,
    found.tensors,
    found.arrays,
    found.form,
    notes,
    assumed_settings(model.vocab_size),
    rescale_logits,
  )


def _norm_doubts(scale: str, final_norm: Tensor) -> Iterator[str]:
  """Yield a note if norm scales look as if they were stored in the other convention.

  With the wrong convention a model's output makes no sense.
  """
  mean = float(np.mean(final_norm.read()))
  if (mean > 0.5) != (scale == 'one'):
    other = 'zero' if scale == 'one' else 'one'
    yield (
      f'  but they average {mean:.2f} in {final_norm.path}: if the output makes no sense, try '
      f'norm_scale={other}'
    )


def _query_doubts(found: flaxformer.Reading) -> Iterator[str]:
  """Yield a note if queries look as if they were trained without rescale_logits.

  flaxformer then initializes queries smaller than keys, by a factor of sqrt(Q).
  """
  if found.weights == 'int8' or not found.kind.folds_logit_scale:
    return
  head = (slice(0, 1), slice(None), slice(0, found.config.d_head))
  query, key = (
    float(np.std(found.tensors[n].read(head).astype(np.float32))) for n in ('query', 'key')
  )
  if query < key * found.config.d_head**-0.25:
    yield (
      f'  but in layer 0 queries are {query / key:.2f} times as large as keys: if the output makes '
      'no sense, try rescale_logits=False'
    )


def _from_serving(
  path: str, data: bytes, norm_scale: str | None, config: ModelConfig | None
) -> Checkpoint:
  """Return the serving checkpoint at `path`, given the content `data` of serving_config.json.

  Other arguments are as in open_checkpoint.
  """
  header, found = serving.read_serving_header(path, data)
  where = f'{path}/{serving.CONFIG}'
  if norm_scale not in (None, found.norm_scale):
    raise CheckpointError(
      f'norm_scale={norm_scale} was asked for, but {where} records {found.norm_scale!r}: leave it '
      'out, or convert again'
    )
  if config is not None and config != found:
    _compare(config, found, header['weights'], path)
  tensors = serving.read_tensors(path, found, header['weights'])
  step = header['source'].get('step')
  notes = (
    f'serving checkpoint at {path}, from {printable(header["source"].get("path"))}'
    + ('' if step is None else f', step {printable(step)}'),
    f'model: {found}',
    f'weights: {header["weights"]}',
    f'norm scales: stored around {found.norm_scale} (recorded in the checkpoint)',
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
    serving.read_text(path, header, found.vocab_size),
  )


def _compare(config: ModelConfig, found: ModelConfig, weights: str, path: str) -> None:
  """Raise CheckpointError for the first difference between a model and the recorded model."""
  kinds = ('block', 'mlp', 'norm')  # these fields decide which tensors there are
  fields = [*kinds, *(f.name for f in dataclasses.fields(config) if f.name not in kinds)]
  differing = next(name for name in fields if getattr(config, name) != getattr(found, name))
  if differing not in kinds:
    asked = serving.serving_tensors(config, weights)
    for name, (shape, _) in serving.serving_tensors(found, weights).items():
      if shape != asked[name][0]:
        raise CheckpointError(
          f'{name}: shape {list(shape)} in {path}/{name}, but the model asked for needs '
          f'{list(asked[name][0])}'
        )
  raise CheckpointError(
    f'{differing}={getattr(config, differing)} was asked for, but {path}/{serving.CONFIG} records '
    f'{getattr(found, differing)}'
  )
