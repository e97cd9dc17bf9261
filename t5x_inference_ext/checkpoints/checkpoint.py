"""Opening a checkpoint of any supported format: its model, and its tensors to read from."""

from collections.abc import Iterator, Mapping
import dataclasses
import os
from typing import Any

import numpy as np

from t5x_inference_ext import params
from t5x_inference_ext.checkpoints import serving, storage, unfinished
from t5x_inference_ext.checkpoints.arrays import SourceArray, whole_array
from t5x_inference_ext.checkpoints.missing import missing_checkpoint
from t5x_inference_ext.checkpoints.readers import flaxformer, legacy, orbax
from t5x_inference_ext.checkpoints.readers.tree import Tree
from t5x_inference_ext.checkpoints.tensor import Tensor
from t5x_inference_ext.config import NORM_SCALES, ModelConfig
from t5x_inference_ext.errors import CheckpointError, printable


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """An open checkpoint.

  Attributes:
    path: Directory of the checkpoint.
    format: 't5x' (T5X's legacy format), 'orbax' or 'serving'.
    step: Training step, where recorded.
    config: The model.
    weights: What the matrices are: 'float32', 'bfloat16' or 'int8'.
    tensors: Canonical tensors by name: exactly params.parameters(config), and with int8
      params.scales(config) too.
    arrays: The stored arrays that hold the canonical tensors, without the scales of int8 weights.
    form: How a T5X tree arranges its parameters (flaxformer.Reading.form); None where nobody
      recorded it.
    notes: What was found and assumed, a line each, for commands to print.
    rescale_logits: The option of a T5X checkpoint, as it was given to open_checkpoint.
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
  rescale_logits: bool | None = None


def open_checkpoint(
  path: str | os.PathLike,
  *,
  norm_scale: str | None = None,
  config: ModelConfig | None = None,
  rescale_logits: bool | None = None,
) -> Checkpoint:
  """Open a checkpoint and check the names and shapes of its parameters.

  Values are read from the tensors later.

  Args:
    path: A checkpoint directory of any name, or the msgpack file in one; local or gs://.
    norm_scale: How the norm scales are stored, 'zero' or 'one'. None takes what the checkpoint
      records. T5X checkpoints record nothing: 'zero', PaLM's form, is then assumed for fused
      parallel blocks, 'one' for other layers and for layer norms, and noted.
    config: The model that the checkpoint must hold. None takes what the checkpoint records, or for
      T5X's formats what names and shapes say. Multihead kernels [E, H Q] do not say H: they need a
      model.
    rescale_logits: flaxformer's option, for T5X's formats: True, the default, if attention logits
      were divided by sqrt(Q) in training. If not, queries are multiplied by sqrt(Q) as they are
      read, since the program always divides.

  Raises:
    CheckpointError: There is no checkpoint, or not one of this model. The message says what to do.
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
      f'{path} is not a checkpoint, but a conversion that has not finished: run the same '
      'convert_checkpoint again, it goes on from there'
    )
  header = storage.read_file(path, serving.CONFIG)
  if header is not None:
    if rescale_logits is not None:
      raise CheckpointError(
        f'rescale_logits is for T5X checkpoints: {path} was converted from one, with the answer of '
        'that time in its queries'
      )
    return _from_serving(path, header, norm_scale, config)
  found = read_tree(path)
  if found is None:
    raise CheckpointError(missing_checkpoint(path))
  return _from_tree(*found, norm_scale, config, rescale_logits)


def is_finished(path: str | os.PathLike) -> bool:
  """Return whether a conversion into `path` has nothing left to do."""
  path = storage.normalize(path)
  if not storage.is_remote(path):
    return os.path.isdir(path)
  names = storage.list_objects(path)
  return bool(names) and unfinished.MARKER not in names


def read_tree(path: str) -> tuple[str, Tree] | None:
  """Return the format and the parameters of a T5X checkpoint of any model, or None.

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
  """Return the checkpoint of a tree in format `kind`; other arguments as in open_checkpoint."""
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
    False: 'not divided by sqrt(d_head) (given): queries are read multiplied by it',
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
    rescale_logits,
  )


def _norm_doubts(scale: str, final_norm: Tensor) -> Iterator[str]:
  """Yield a note where norms look like the other convention.

  With the wrong convention a model only babbles.
  """
  mean = float(np.mean(final_norm.read()))
  if (mean > 0.5) != (scale == 'one'):
    other = 'zero' if scale == 'one' else 'one'
    yield (
      f'  but they average {mean:.2f} in {final_norm.path}: if the output makes no sense, try '
      f'norm_scale={other}'
    )


def _query_doubts(found: flaxformer.Reading) -> Iterator[str]:
  """Yield a note where queries look as flaxformer initializes them without rescale_logits.

  Such queries are smaller than keys, by sqrt(Q) at initialization.
  """
  if found.weights == 'int8' or not found.kind.folds_logit_scale:
    return
  head = (slice(0, 1), slice(None), slice(0, found.config.d_head))
  query, key = (
    float(np.std(found.tensors[n].read(head).astype(np.float32))) for n in ('query', 'key')
  )
  if query < key * found.config.d_head**-0.25:
    yield (
      f'  but in layer 0 queries are {query / key:.2f} of the keys: if the output makes no sense, '
      'try rescale_logits=False'
    )


def _from_serving(
  path: str, data: bytes, norm_scale: str | None, config: ModelConfig | None
) -> Checkpoint:
  """Return the serving checkpoint `path`, whose serving_config.json is `data`.

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
  )


def _compare(config: ModelConfig, found: ModelConfig, weights: str, path: str) -> None:
  """Raise CheckpointError for the first difference between a model and the recorded one."""
  kinds = ('block', 'mlp', 'norm')  # which tensors there are
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
