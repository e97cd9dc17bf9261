"""Conventions in files beside a T5X tree, and notes on the tree for commands to print."""

from collections.abc import Iterator
import os

import numpy as np

from t5x_inference_ext.checkpoints import storage
from t5x_inference_ext.checkpoints.conventions import (
  CONVENTION_NAMES,
  STOCK,
  Conventions,
  ConventionSources,
)
from t5x_inference_ext.checkpoints.readers.flaxformer import ParsedModel
from t5x_inference_ext.checkpoints.readers.flaxformer_names import FINAL_NORM
from t5x_inference_ext.checkpoints.readers.training_gin import CONFIG_GIN, training_conventions
from t5x_inference_ext.checkpoints.readers.tree import Tree
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.errors import CheckpointError
from t5x_inference_ext.text_files import load_json

# The manifest of a T5X checkpoint that a conversion wrote.
MANIFEST = 't5x_inference_ext.json'


def recorded_conventions(
  path: str, stock: Conventions | None = None
) -> tuple[tuple[str, Conventions], ...]:
  """Return pairs (source, conventions) recorded about a checkpoint, in order of precedence.

  First comes the manifest in the checkpoint, if a conversion wrote it; then T5X's own model; then
  the config.gin that T5X writes into the directory of its checkpoints. Sources that state nothing
  are left out.

  Args:
    path: Directory of the checkpoint, local or in a bucket.
    stock: Conventions of T5X's own model, as the user's gin configures it; None without one.

  Raises:
    CheckpointError: A file is damaged, or describes a model that can't be served.
  """
  found = []
  if (data := storage.read_file(path, MANIFEST)) is not None:
    found.append((f'{path}/{MANIFEST}', _of_manifest(data, f'{path}/{MANIFEST}')))
  if stock is not None:
    found.append((STOCK, stock))
  for directory in (path, os.path.dirname(path)):
    data = None if directory.endswith(':/') else storage.read_file(directory, CONFIG_GIN)
    if data is not None:
      where = f'{directory}/{CONFIG_GIN}'
      found.append((where, training_conventions(_text(data, where), where)))
  return tuple((name, conventions) for name, conventions in found if conventions.stated())


def _of_manifest(data: bytes, where: str) -> Conventions:
  """Return the conventions in a conversion's manifest. A converted tree has rescale_logits=True."""
  content = load_json(data, where)
  try:
    model = vars(ModelConfig.from_dict(content['model']))
    stated = {name: model[name] for name in CONVENTION_NAMES if name in model}
    return Conventions(**stated, rescale_logits=True)
  except (ValueError, TypeError, KeyError) as e:
    raise CheckpointError(f'{where} is damaged: {type(e).__name__} {e!s:.200}') from e


def _text(data: bytes, where: str) -> str:
  try:
    return data.decode()
  except UnicodeDecodeError as e:
    raise CheckpointError(f'{where} is not a gin file: it is not UTF-8') from e


def tree_notes(tree: Tree, found: ParsedModel, sources: ConventionSources) -> tuple[str, ...]:
  """Return lines that describe a tree's contents and the sources of its conventions, to print.

  Args:
    tree: The parameters, as stored.
    found: The tree, parsed as a model.
    sources: Sources of the conventions.
  """
  step = '' if tree.step is None else f', step {tree.step}'
  scale = found.conventions['norm_scale'].value
  return (
    f'{tree.description} at {tree.path}{step}',
    f'model: {found.config}',
    f"layers: flaxformer's {found.kind.name}, layer axis {found.layer_axis}",
    f'weights: {found.weights}',
    *(f'{name}: {stated}' for name, stated in found.conventions.items()),
    *sources.overruled(found.conventions),
    *_norm_doubts(scale, tree),
  )


def _norm_doubts(scale: str, tree: Tree) -> Iterator[str]:
  """Yield a note if the values of norm scales suggest the other norm_scale, zero or one.

  With the wrong convention, a model's output is nonsense.
  """
  final_norm = tree.leaves[f'{FINAL_NORM}/scale']
  mean = float(np.mean(final_norm.read()))
  if (mean > 0.5) != (scale == 'one'):
    other = 'zero' if scale == 'one' else 'one'
    yield (
      f'  but norm scales average {mean:.2f} in {final_norm.path}: if the output makes no sense, '
      f'try norm_scale={other}'
    )
