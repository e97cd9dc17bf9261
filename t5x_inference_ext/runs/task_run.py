"""The run over a seqio task: T5X's features in, T5X's JSONL out, under T5X's file names."""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import itertools
import json
import os
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from t5x_inference_ext import distributed
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.engine import scheduler_config, scoring
from t5x_inference_ext.engine.engine import Engine
from t5x_inference_ext.engine.inputs import BOS_ID, EOS_ID
from t5x_inference_ext.engine.request import Completion, Request
from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.rendezvous import ProcessOptions
from t5x_inference_ext.runs import batches, infer_options, loading, task_rows
from t5x_inference_ext.runs.clock import Clock
from t5x_inference_ext.runs.job import Job
from t5x_inference_ext.runs.journal import Journal
from t5x_inference_ext.runs.progress import Progress, print_on_main, progress
from t5x_inference_ext.runs.tasks import (
  Source,
  TaskExample,
  check_source,
  check_vocabularies,
  examples,
  find_tasks,
  import_tasks,
  prompt,
  vocabulary_text,
)
from t5x_inference_ext.runs.work import NoWork, RefillWork, ScoreWork, StaticWork, Work

gfile = tf.io.gfile
RECORD = 'infer.config.json'
SCORED_BATCHES = 128  # examples that are sorted by length together


def infer(
  *,
  mixture_or_task_name: str | seqio.Task | seqio.Mixture,
  task_feature_lengths: Mapping[str, int],
  checkpoint_path: str,
  output_dir: str,
  module: str | None = None,
  split: str = 'test',
  use_cached: bool = False,
  mode: str = 'predict',
  max_new_tokens: int | None = None,
  sampling: SamplingParams = SamplingParams(),
  num_decodes: int = 1,
  stop: Sequence[str] = (),
  seed: int = 0,
  mesh: str | None = None,
  prefill_layout: str = 'ws_2d/batch',
  decode_layout: str = 'ws_2d/batch',
  scan_layers: bool | None = None,
  dtype: str = 'bfloat16',
  cache: str | None = None,
  batch_size: int = 32,
  batching: str = 'continuous',
  prefill_chunk: int = 256,
  prefill_budget: int = 2048,
  model_config: ModelConfig | None = None,
  norm_scale: str | None = None,
  shard_id: int = 0,
  num_shards: int = 1,
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  config_text: str = '',
  explain_layout: bool = False,
) -> Iterator[Job]:
  """Prepare to predict or score every example of a task or mixture.

  Gin binds the arguments (configs/runs/infer.gin).

  Args:
    mixture_or_task_name: of seqio, registered.
    task_feature_lengths: of 'inputs' and 'targets', to trim to.
    checkpoint_path: directory, of any format.
    output_dir: is made where it does not exist.
    module: to import first; it registers the task.
    split: of the task.
    use_cached: whether to read seqio's cached form of it.
    mode: 'predict', 'predict_with_aux' (with each prediction's score) or 'score' (the targets).
    max_new_tokens: the limit for each prediction; None: as T5X, until prompt and prediction fill the whole sequence.
    sampler: how tokens are chosen.
    num_decodes: predictions for each example, which share its prefill.
    stop: texts that end a prediction.
    seed: of the run: each example's own seed comes from it and the example's place.
    mesh: 'XxYxZ'; None: over all devices that divide the model.
    prefill_layout, decode_layout: 'feedforward/attention', for each phase.
    scan_layers: as Engine.load's.
    dtype: of activations and float weights.
    cache: what the KV cache holds: 'float32', 'bfloat16', 'int8', or None: dtype.
    batch_size: examples a batch, or decode slots.
    batching, prefill_chunk, prefill_budget: as infer_options.InferOptions'.
    model_config: the model that the checkpoint must hold; None: the one it holds.
    norm_scale: how its norm scales are stored, 'zero' or 'one'; None: what it says.
    shard_id: of num_shards runs that share the task, this one.
    num_shards: as above.
    coordinator_address, num_processes, process_id: as distributed.initialize's: processes that share the mesh.
    config_text: the configuration of the run, kept as config.gin beside the results.
    explain_layout: only say where the run's tensors would live.

  Raises:
    UserError: anything the user can mend, before the weights are loaded.
  """
  distributed.initialize(ProcessOptions(coordinator_address, num_processes, process_id))
  with contextlib.suppress(RuntimeError):  # already in use by the user's own module
    tf.config.set_visible_devices(
      [], 'GPU'
    )  # TensorFlow would reserve the memory of devices that are jax's
  with distributed.together():
    import_tasks(module)
    source = Source(
      mixture_or_task_name, task_feature_lengths, split, use_cached, seed, shard_id, num_shards
    )
    tasks = find_tasks(source)
    check_source(source, mode, tasks)
    options = infer_options.InferOptions(
      checkpoint=checkpoint_path,
      mode=mode,
      mesh=mesh,
      dtype=dtype,
      cache=cache,
      prefill_layout=prefill_layout,
      decode_layout=decode_layout,
      norm_scale=norm_scale,
      config=model_config,
      batch_size=batch_size,
      sampling=sampling,
      num_decodes=num_decodes,
      stop=stop,
      seed=seed,
      scan_layers=scan_layers,
      batching=batching,
      prefill_chunk=prefill_chunk,
      prefill_budget=prefill_budget,
      **_limits(sum(task_feature_lengths.values()), max_new_tokens),
    )
    if explain_layout:
      loading.explain_layout(
        options, task_feature_lengths['targets' if mode == 'score' else 'inputs']
      )
      return
    checkpoint, devices = loading.open_model(options)
    check_vocabularies(source, tasks, checkpoint.config.vocab_size)
    for task in tasks:
      _of_task(options, task, checkpoint.config)
  distributed.check_same(
    options=options,
    tasks=source._replace(name=[task.name for task in tasks]),
    checkpoint=checkpoint.notes,
  )
  # The output directory may be process 0's alone.
  completed = distributed.from_main(
    lambda: [
      task.name
      for task in tasks
      if gfile.exists(output_path(task.name, source, mode, output_dir) + '.COMPLETED')
    ]
  )
  for name in completed:
    print_on_main(
      f'{name}: {output_path(name, source, mode, output_dir)}.COMPLETED exists, skipped'
    )
  todo = [task for task in tasks if task.name not in completed]
  if not todo:
    return
  with distributed.together():
    if distributed.is_main():
      gfile.makedirs(output_dir)
    with _output(os.path.join(output_dir, 'config.gin')) as file:
      file.write(config_text)
  engine = loading.load_engine(
    options, checkpoint, devices, lambda jobs: progress(jobs, 'loading weights', len(jobs))
  )
  record = loading.description(options, engine)
  for task in todo:
    clock = Clock()
    with distributed.together():
      job = _prepare_task(task, source, options, engine, output_dir, clock)
    yield job
    record[task.name] = {'vocabulary': vocabulary_text(task), 'time': clock.to_dict()}
  with distributed.together(), _output(os.path.join(output_dir, RECORD)) as file:
    file.write(json.dumps(record, indent=2) + '\n')


def _limits(length: int, max_new_tokens: int | None) -> dict[str, int]:
  """The options that bound a prediction: by max_new_tokens, or else by the length of the whole sequence."""
  if max_new_tokens is not None:
    return {'max_new_tokens': max_new_tokens}
  return {'max_new_tokens': length, 'max_length': length, 'cache_length': length}


def _of_task(
  options: infer_options.InferOptions, task: seqio.Task, config: ModelConfig
) -> infer_options.InferOptions:
  """The options with the texts that end rows in the task's own ids."""
  return infer_options.with_vocabulary(
    options, task.output_features['targets'].vocabulary, config.vocab_size
  )


def _prepare_task(
  task: seqio.Task,
  source: Source,
  options: infer_options.InferOptions,
  engine: Engine,
  output_dir: str,
  clock: Clock,
) -> Job:
  """Return the job of one task. It writes `<task>-<mode>.jsonl-SSSSS-of-NNNNN`, then `.COMPLETED`."""
  path = output_path(task.name, source, options.mode, output_dir)
  options = _of_task(options, task, engine.model.config)
  scoring = options.mode == 'score'
  rows = examples(task, source)
  first = list(itertools.islice(rows, options.batch_size))
  if not first:
    raise RequestError(
      f'task {task.name} has no examples in split {source.split!r}'
      + (f', shard {source.shard} of {source.num_shards}' if source.num_shards > 1 else '')
    )
  print_on_main(f'vocabulary: {vocabulary_text(task)}')
  # Fewer examples than a batch: a smaller one does.
  samples = len(first) * options.num_decodes if len(first) < options.batch_size else None
  silent = options.continuous and not scoring  # slots are told of when they are made
  say = (lambda text: None) if silent else print_on_main
  batch = loading.batch_rows(options, engine, samples, say)
  checkpoint = engine.checkpoint
  journal = Journal(
    f'{path}.unfinished',
    (options, source._replace(name=task.name), checkpoint.path, checkpoint.step),
    gfile,
  )
  if journal.done:
    print_on_main(f'resumed: {len(journal.done)} rows were done when an earlier run ended')
  everything = enumerate(itertools.chain(first, rows))
  in_step = distributed.lockstep(_batched(everything, batch), _features)
  todo = ((row, each) for some in in_step for row, each in some if row not in journal.done)
  examples_of: dict[int, TaskExample] = {}  # those on their way

  def remembered() -> Iterator[tuple[int, TaskExample]]:
    for row, example in todo:
      examples_of[row] = example
      yield row, example

  with journal.closed_on_error():
    work = _work(remembered(), task, source, options, engine, batch, clock)
  vocabulary = task.output_features['targets'].vocabulary
  # T5X's predictions have the length of the whole sequence: vocabularies that decode padding would
  # show it.
  length = max(sum(source.feature_lengths.values()), options.max_new_tokens)

  def tell(row: int, result: Any) -> dict[str, Any]:
    example = examples_of.pop(row)
    if scoring:
      return task_rows.scored_row(example, float(np.sum(result)))
    samples = [result] if isinstance(result, Completion) else result
    predicted = [(options.sampling.before_stop(s.tokens), s.score) for s in samples]
    return task_rows.predicted_row(example, predicted, length, vocabulary, options.mode)

  def write() -> None:
    temporary = f'{path}.incomplete'
    with _output(temporary) as file:
      for result in journal.in_order():
        file.write(json.dumps(result) + '\n')
    if distributed.is_main():
      gfile.rename(temporary, path, overwrite=True)
    with _output(path + '.COMPLETED') as file:
      file.write('')
    print_on_main(f'{task.name}: {loading.run_summary(clock, options.mode)}')
    print_on_main(f'wrote {path}')

  return Job(work, journal, tell, write, Progress(task.name))


def output_path(name: str, source: Source, mode: str, output_dir: str) -> str:
  return os.path.join(
    output_dir, f'{name}-{mode}.jsonl-{source.shard:05}-of-{source.num_shards:05}'
  )


def _output(path: str) -> gfile.GFile:
  """A file to write, of process 0; what other processes write is dropped."""
  return gfile.GFile(path if distributed.is_main() else os.devnull, 'w')


def _features(batch: list[tuple[int, TaskExample]]) -> list[list]:
  """What the model is given, the same in all processes."""
  return [
    [(name, value.tolist()) for name, value in sorted(example.model.items())]
    for _, example in batch
  ]


def _work(
  todo: Iterator[tuple[int, TaskExample]],
  task: seqio.Task,
  source: Source,
  options: infer_options.InferOptions,
  engine: Engine,
  batch: int,
  clock: Clock,
) -> Work:
  """Return the work of the examples that are left; they are read as they are needed."""
  if options.mode == 'score':
    groups = (
      [(row, _scored(example)) for row, example in some]
      for some in _batched(todo, SCORED_BATCHES * batch)
    )
    return ScoreWork(engine, groups, batch * sum(source.feature_lengths.values()), clock)
  eos_id = task.output_features['targets'].vocabulary.eos_id or EOS_ID
  prompts = ((row, prompt(example)) for row, example in todo)
  if options.continuous:
    return _refill(prompts, source, options, engine, batch, clock, eos_id)
  shape = batches.BatchShape(
    batch, source.feature_lengths['inputs'], options.cache_length, options.max_length
  )
  return StaticWork(
    engine,
    _batched(prompts, batch),
    shape,
    clock,
    max_new_tokens=options.max_new_tokens,
    sampling=options.sampling,
    seed=options.seed,
    eos_id=eos_id,
  )


def _refill(
  prompts: Iterator[tuple[int, list[int]]],
  source: Source,
  options: infer_options.InferOptions,
  engine: Engine,
  batch: int,
  clock: Clock,
  eos_id: int,
) -> Work:
  def request(row: int, tokens: list[int]) -> tuple[int, Request]:
    limit = options.max_new_tokens
    if options.max_length is not None:
      limit = min(limit, options.max_length - len(tokens))
    seeds = batches.row_seeds(options.seed, row, options.num_decodes)
    return row, Request((BOS_ID, *tokens), seeds, limit, options.sampling)

  requests = itertools.starmap(request, prompts)
  first = list(itertools.islice(requests, 4 * batch))  # enough to see what they share
  if not first:
    return NoWork()
  longest = source.feature_lengths['inputs'] + 1
  config, shared = scheduler_config.config_for(
    engine.model,
    [r for _, r in first],
    slots=batch,
    prompt_size=longest,
    cache_size=options.max_length or longest - 1 + options.max_new_tokens,
    eos_id=eos_id,
    prefill_chunk=options.prefill_chunk,
    prefill_budget=options.prefill_budget,
  )
  loading.say_slots(options, config, shared, engine.model)
  return RefillWork(engine, itertools.chain(first, requests), config, shared, clock)


def _scored(example: TaskExample) -> scoring.ScoringExample:
  """Up to the last position that counts."""
  features = [
    example.model[f'decoder_{name}'] for name in ('input_tokens', 'target_tokens', 'loss_weights')
  ]
  length = int(np.max(np.flatnonzero(features[2]), initial=-1)) + 1
  return scoring.ScoringExample(*(x[:length] for x in features))


def _batched(rows: Iterator, size: int) -> Iterator[list]:
  while some := list(itertools.islice(rows, size)):
    yield some
