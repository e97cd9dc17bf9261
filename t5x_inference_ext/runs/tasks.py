"""Examples of a seqio task, read exactly as T5X's infer reads them."""

from collections.abc import Iterator, Mapping
import difflib
import importlib
import itertools
from typing import Any, NamedTuple

import numpy as np
import seqio
import tensorflow as tf

from t5x_inference_ext.engine.scoring import ScoringExample
from t5x_inference_ext.errors import RequestError


class Source(NamedTuple):
  """The examples to run over.

  Attributes:
    name: Name of a registered seqio task or mixture, or the task or mixture itself.
    feature_lengths: {'inputs': ..., 'targets': ...}, the lengths to trim to. Without 'inputs',
      examples can only be scored.
    split: Split of the task.
    use_cached: Whether to read seqio's cached form.
    seed: Seed of the task's own preprocessing.
    shard: Index of this run among `num_shards`. The run takes every num_shards-th example.
    num_shards: Number of runs that share the examples.
  """

  name: str | seqio.Task | seqio.Mixture
  feature_lengths: Mapping[str, int]
  split: str = 'test'
  use_cached: bool = False
  seed: int = 0
  shard: int = 0
  num_shards: int = 1


class TaskExample(NamedTuple):
  """One example, as the task's features and as the model's features."""

  task: dict[str, Any]
  model: dict[str, np.ndarray]


def import_tasks(module: str | None) -> None:
  """Import the module that registers the user's tasks. Raises RequestError if that fails."""
  if not module:
    return
  try:
    importlib.import_module(module)
  except ModuleNotFoundError as error:
    raise RequestError(
      f"MIXTURE_OR_TASK_MODULE={module} can't be imported ({error}): is its directory on "
      'PYTHONPATH?'
    ) from error


def find_tasks(source: Source) -> list[seqio.Task]:
  """Return the task, or the mixture's tasks. Raises RequestError for an unknown name."""
  if not isinstance(source.name, str):
    return list(seqio.get_subtasks(source.name))
  known = sorted({*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()})
  if source.name not in known:
    close = difflib.get_close_matches(source.name, known, n=5, cutoff=0.5)
    hint = f'did you mean {" or ".join(close)}?' if close else f'{len(known)} are registered'
    raise RequestError(
      f'no seqio task or mixture is called {source.name!r}: {hint} (MIXTURE_OR_TASK_MODULE names '
      'the module that registers it)'
    )
  return list(seqio.get_subtasks(seqio.get_mixture_or_task(source.name)))


def check_source(source: Source, mode: str, tasks: list[seqio.Task]) -> None:
  """Raise RequestError if `source` does not fit the tasks: lengths, features, split or shard."""
  lengths = source.feature_lengths
  if (
    not isinstance(lengths, Mapping)
    or 'targets' not in lengths
    or not all(isinstance(n, int) and n > 0 for n in lengths.values())
  ):
    raise RequestError(
      "TASK_FEATURE_LENGTHS must give positive lengths of 'inputs' and 'targets', such as "
      f"{{'inputs': 48, 'targets': 16}}, got {lengths!r}"
    )
  if mode != 'score' and 'inputs' not in lengths:
    raise RequestError(
      f"mode {mode} continues the task's inputs, and TASK_FEATURE_LENGTHS has no 'inputs': add it, "
      'or use mode score'
    )
  for task in tasks:
    if source.split.split('[')[0] not in task.splits:  # TFDS takes slices, such as test[:100]
      raise RequestError(
        f'task {task.name} has no split {source.split!r}; it has {", ".join(sorted(task.splits))}'
      )
    for name in lengths:
      if name not in task.output_features:
        known = ', '.join(sorted(task.output_features))
        raise RequestError(f'task {task.name} has no feature {name!r}; it has {known}')
  if not 0 <= source.shard < source.num_shards:
    raise RequestError(
      f'shard_id must be 0 to num_shards - 1 = {source.num_shards - 1}, got {source.shard}'
    )


def check_vocabularies(source: Source, tasks: list[seqio.Task], vocab_size: int) -> None:
  """Raise RequestError if a task's vocabulary has more ids than the model's `vocab_size` rows."""
  for task in tasks:
    for name in source.feature_lengths:
      size = task.output_features[name].vocabulary.vocab_size
      if size > vocab_size:
        raise RequestError(
          f'the vocabulary of {name} of task {task.name} has {size} ids and the model {vocab_size} '
          'rows: it is not the vocabulary that this model was trained with'
        )


def vocabulary_text(task: seqio.Task) -> str:
  """Return a description of the vocabulary that decodes a task's predictions."""
  vocabulary = task.output_features['targets'].vocabulary
  return f'{type(vocabulary).__name__} of task {task.name}, {vocabulary.vocab_size} ids'


def examples(task: seqio.Task, source: Source) -> Iterator[TaskExample]:
  """Yield a task's examples as T5X's infer reads them.

  seqio converts them for a decoder-only model, without packing.
  """
  ds = task.get_dataset(
    sequence_length=source.feature_lengths,
    split=source.split,
    shuffle=False,
    num_epochs=1,
    shard_info=seqio.ShardInfo(index=source.shard, num_shards=source.num_shards),
    use_cached=source.use_cached,
    seed=source.seed,
  )
  model_ds = seqio.DecoderFeatureConverter(pack=False)(
    ds, task_feature_lengths=source.feature_lengths
  )
  return itertools.starmap(TaskExample, tf.data.Dataset.zip((ds, model_ds)).as_numpy_iterator())


def prompt(example: TaskExample) -> list[int]:
  """Return the prompt of T5X's predict: the inputs without BOS and padding."""
  inputs = example.model['decoder_input_tokens'] * example.model['decoder_causal_attention']
  return inputs[1:][: np.count_nonzero(inputs[1:])].tolist()


def with_bos(row: int, tokens: list[int], bos: tuple[int, ...]) -> tuple[int, ...]:
  """Return a prompt with the model's BOS in front; `row` is the example's number.

  Raises:
    RequestError: There is neither a prompt nor BOS.
  """
  if not bos and not tokens:
    raise RequestError(f'example {row} has an empty prompt, and this model has no BOS')
  return (*bos, *tokens)


def scoring_example(example: TaskExample, bos_id: int | None) -> ScoringExample:
  """Return an example to score, cut after its last position with a loss weight.

  Args:
    example: The example. seqio puts T5X's BOS, 0, in front of its inputs.
    bos_id: The model's BOS; None: the model has none, and the first token is not scored.

  Raises:
    RequestError: The first token has a loss weight, and there is no BOS to predict it from.
  """
  features: list[Any] = [
    example.model[f'decoder_{name}'] for name in ('input_tokens', 'target_tokens', 'loss_weights')
  ]
  length = int(np.max(np.flatnonzero(features[2]), initial=-1)) + 1
  inputs, targets, weights = (feature[:length] for feature in features)
  if bos_id is not None:
    return ScoringExample([bos_id, *inputs[1:]][:length], targets, weights)
  if weights[:1].any():
    raise RequestError(
      'an example of the task has no inputs in front of its targets, and this model has no BOS to '
      'start from'
    )
  return ScoringExample(inputs[1:], targets[1:], weights[1:])
