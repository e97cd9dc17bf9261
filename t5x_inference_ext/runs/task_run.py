"""A run over a seqio task: T5X's features in, T5X's JSONL out, under T5X's file names."""

from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
import itertools
import json
import os
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from t5x_inference_ext import distributed
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.engine.engine import Engine
from t5x_inference_ext.engine.request import Completion, Request
from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.options import pop_options, takes_options
from t5x_inference_ext.rendezvous import ProcessOptions
from t5x_inference_ext.runs import batches, loading, task_rows, tasks
from t5x_inference_ext.runs.clock import Clock
from t5x_inference_ext.runs.infer_options import InferOptions, check_vocab_size
from t5x_inference_ext.runs.job import Job
from t5x_inference_ext.runs.journal import Journal
from t5x_inference_ext.runs.progress import Progress, print_on_main
from t5x_inference_ext.runs.row_text import with_early_ends
from t5x_inference_ext.runs.task_output import (
  COMPLETED_SUFFIX,
  gfile,
  make_directory,
  open_output,
  output_path,
  write_rows,
)
from t5x_inference_ext.runs.tasks import Source, TaskExample
from t5x_inference_ext.runs.work import ScoreWork, StaticWork, Work, refill_work
from t5x_inference_ext.text.settings import EOS_ID

RECORD = 'infer.config.json'
SCORED_BATCHES = 128  # number of batches whose examples are sorted by length together
# Options of InferOptions that a run over a task lacks, or has under another name.
_OTHER_OPTIONS = (
  'checkpoint',
  'max_new_tokens',
  'cache_length',
  'executable',
  'token_log_probs',
  'top_log_probs',
)


@takes_options(InferOptions, skip=_OTHER_OPTIONS)
@takes_options(ProcessOptions)
def infer(
  *,
  mixture_or_task_name: str | seqio.Task | seqio.Mixture,
  task_feature_lengths: Mapping[str, int],
  checkpoint_path: str,
  output_dir: str,
  module: str | None = None,
  split: str = 'test',
  use_cached: bool = False,
  max_new_tokens: int | None = None,
  sampling: SamplingParams = SamplingParams(),
  model_config: ModelConfig | None = None,
  shard_id: int = 0,
  num_shards: int = 1,
  config_text: str = '',
  explain_layout: bool = False,
  **options: Any,
) -> Iterator[Job]:
  """Prepare to predict or score all examples of a task or mixture; yield a job for each task.

  gin binds the arguments (configs/runs/infer.gin).

  Args:
    mixture_or_task_name: Name in seqio's registry, or the task or mixture itself.
    task_feature_lengths: Lengths that 'inputs' and 'targets' are trimmed to.
    checkpoint_path: Checkpoint directory, of any format.
    output_dir: Directory for the output; made if it does not exist.
    module: Module to import first, which registers the task.
    split: Split of the task.
    use_cached: Whether to read seqio's cached form of the task.
    max_new_tokens: Maximum number of tokens of each prediction. None: prompt and prediction may
      fill the whole sequence, as in T5X.
    sampling: How tokens are chosen.
    model_config: Model that the checkpoint must hold; None: any.
    shard_id: Index of this run among `num_shards` runs that share the task's examples.
    num_shards: Number of runs that share the task's examples.
    config_text: Configuration of the run, written as config.gin beside the results.
    explain_layout: Whether to print the sharding of every tensor and do nothing else.
    **options: Options of InferOptions and ProcessOptions, by name.

  Raises:
    UserError: Anything that the user can fix. Raised before weights are loaded.
  """
  distributed.initialize(pop_options(ProcessOptions, options))
  with contextlib.suppress(RuntimeError):  # the user's module already uses TensorFlow
    # Otherwise TensorFlow would reserve the GPU memory that jax needs.
    tf.config.set_visible_devices([], 'GPU')
  with distributed.together():
    tasks.import_tasks(module)
    run = InferOptions(
      checkpoint=checkpoint_path, config=model_config, sampling=sampling, **options
    )
    source = Source(
      mixture_or_task_name, task_feature_lengths, split, use_cached, run.seed, shard_id, num_shards
    )
    found = tasks.find_tasks(source)
    tasks.check_source(source, run.mode, found)
    run = _with_limits(run, sum(task_feature_lengths.values()), max_new_tokens)
    if explain_layout:
      feature = 'targets' if run.mode == 'score' else 'inputs'
      loading.explain_layout(run, task_feature_lengths[feature])
      return
    checkpoint, mesh, _ = loading.open_model(run)
    tasks.check_vocabularies(source, found, checkpoint.config.vocab_size)
    check_vocab_size(run, checkpoint.config.vocab_size)
    for task in found:
      _with_task_vocabulary(run, task)
  distributed.check_same(
    options=run,
    tasks=(source._replace(name=''), [task.name for task in found]),
    checkpoint=checkpoint.notes,
  )
  todo = _uncompleted(found, source, run.mode, output_dir)
  if not todo:
    return
  with distributed.together():
    make_directory(output_dir)
    with open_output(os.path.join(output_dir, 'config.gin')) as file:
      file.write(config_text)
  engine = loading.load_engine(run, checkpoint, mesh)
  record = loading.description(run, engine)
  for task in todo:
    clock = Clock()
    with distributed.together():
      job = _prepare_task(task, source, run, engine, output_dir, clock)
    yield job
    record[task.name] = {'vocabulary': tasks.vocabulary_text(task), 'time': clock.to_dict()}
  with distributed.together(), open_output(os.path.join(output_dir, RECORD)) as file:
    file.write(json.dumps(record, indent=2) + '\n')


def _with_limits(options: InferOptions, length: int, max_new_tokens: int | None) -> InferOptions:
  """Return options with a limit of max_new_tokens. None: of `length` for prompt and prediction."""
  if max_new_tokens is not None:
    return dataclasses.replace(options, max_new_tokens=max_new_tokens)
  return dataclasses.replace(options, max_new_tokens=length, max_length=length, cache_length=length)


def _with_task_vocabulary(options: InferOptions, task: seqio.Task) -> InferOptions:
  """Return options whose stop sequences include ids that usually encode the stop texts."""
  vocabulary = task.output_features['targets'].vocabulary
  sampling = with_early_ends(options.sampling, options.stop, vocabulary)
  return dataclasses.replace(options, sampling=sampling)


def _uncompleted(
  found: list[seqio.Task], source: Source, mode: str, output_dir: str
) -> list[seqio.Task]:
  """Return the tasks whose output no earlier run has completed."""

  def completed() -> list[str]:
    paths = {task.name: output_path(task.name, source, mode, output_dir) for task in found}
    return [name for name, path in paths.items() if gfile.exists(path + COMPLETED_SUFFIX)]

  # Only process 0 looks, because other processes may not have the output directory.
  names = distributed.from_main(completed)
  for name in names:
    path = output_path(name, source, mode, output_dir)
    print_on_main(f'{name}: {path}{COMPLETED_SUFFIX} exists, skipped')
  return [task for task in found if task.name not in names]


def _prepare_task(
  task: seqio.Task,
  source: Source,
  options: InferOptions,
  engine: Engine,
  output_dir: str,
  clock: Clock,
) -> Job:
  """Return the job of a task, which writes <task>-<mode>.jsonl-SSSSS-of-NNNNN, then .COMPLETED."""
  path = output_path(task.name, source, options.mode, output_dir)
  sampling = options.sampling
  options = _with_task_vocabulary(options, task)
  scoring = options.mode == 'score'
  rows = tasks.examples(task, source)
  first = list(itertools.islice(rows, options.batch_size))
  if not first:
    shard = f', shard {source.shard} of {source.num_shards}' if source.num_shards > 1 else ''
    raise RequestError(f'task {task.name} has no examples in split {source.split!r}{shard}')
  print_on_main(f'vocabulary: {tasks.vocabulary_text(task)}')
  # With fewer examples than a batch, a smaller batch suffices.
  samples = len(first) * options.num_decodes if len(first) < options.batch_size else None
  silent = options.continuous and not scoring  # refill_work prints the batch instead
  batch = loading.batch_rows(options, engine, samples, shown=not silent)
  checkpoint = engine.checkpoint
  journal = Journal(
    f'{path}.unfinished',
    (options, source._replace(name=task.name), checkpoint.path, checkpoint.step),
    gfile,
  )
  if journal.done:
    print_on_main(f'resumed: {len(journal.done)} rows were done when an earlier run ended')
  everything = enumerate(itertools.chain(first, rows))
  in_step = distributed.lockstep(batches.batched(everything, batch), _features)
  todo = ((row, each) for some in in_step for row, each in some if row not in journal.done)
  under_way: dict[int, TaskExample] = {}

  def remembered() -> Iterator[tuple[int, TaskExample]]:
    for row, example in todo:
      under_way[row] = example
      yield row, example

  loading.say_compiling(engine)
  with journal.closed_on_error():
    work = _work(remembered(), task, source, options, engine, batch, clock)
  vocabulary = task.output_features['targets'].vocabulary
  # Pad tokens to the whole sequence, as T5X does: some vocabularies decode padding as text.
  length = max(sum(source.feature_lengths.values()), options.max_new_tokens)

  def to_json(row: int, result: Any) -> dict[str, Any]:
    example = under_way.pop(row)
    if scoring:
      return task_rows.scored_row(example, float(np.sum(result)))
    samples = [result] if isinstance(result, Completion) else result
    predicted = [(sampling.before_stop(s.tokens), s.score) for s in samples]
    return task_rows.predicted_row(
      example, predicted, length, vocabulary, options.mode, options.stop, sampling.min_new_tokens
    )

  def write() -> None:
    write_rows(path, journal.in_order())
    print_on_main(f'{task.name}: {loading.run_summary(clock, options.mode)}')
    print_on_main(f'wrote {path}')

  return Job(work, journal, to_json, write, Progress(task.name))


def _features(batch: list[tuple[int, TaskExample]]) -> list[list]:
  """Return a batch's model inputs, which must be equal in all processes."""
  return [
    [(name, value.tolist()) for name, value in sorted(example.model.items())]
    for _, example in batch
  ]


def _work(
  todo: Iterator[tuple[int, TaskExample]],
  task: seqio.Task,
  source: Source,
  options: InferOptions,
  engine: Engine,
  batch: int,
  clock: Clock,
) -> Work:
  """Return the work of the remaining examples, which are read lazily."""
  if options.mode == 'score':
    bos_id = engine.checkpoint.bos_id
    groups = (
      (options.adapter, [(row, tasks.scoring_example(each, bos_id)) for row, each in some])
      for some in batches.batched(todo, SCORED_BATCHES * batch)
    )
    return ScoreWork(engine, groups, batch * sum(source.feature_lengths.values()), clock)
  eos_id = task.output_features['targets'].vocabulary.eos_id or EOS_ID
  prompts = ((row, tasks.prompt(example), options.adapter) for row, example in todo)
  longest = source.feature_lengths['inputs']
  if options.continuous:
    work, _ = refill_work(
      engine,
      options,
      ((row, _request(row, tokens, options, engine.bos)) for row, tokens, _ in prompts),
      clock,
      ahead=batch,
      slots=batch,
      max_length=(options.max_length or longest + options.max_new_tokens) + 1,
      end_ids=(eos_id,),
    )
    return work
  shape = batches.BatchShape(batch, longest, options.cache_length, options.max_length)
  return StaticWork(engine, batches.batched(prompts, batch), shape, clock, options, eos_id)


def _request(row: int, tokens: list[int], options: InferOptions, bos: tuple[int, ...]) -> Request:
  limit = options.max_new_tokens
  if options.max_length is not None:
    limit = min(limit, options.max_length - len(tokens))
  seeds = batches.row_seeds(options.seed, row, options.num_decodes)
  prompt, sampling = tasks.with_bos(row, tokens, bos), options.sampling
  return Request(prompt, seeds, limit, sampling, adapter=options.adapter)
