"""The plain run: a JSONL file of prompts in, a JSONL file of completions out, in the same order."""

from collections.abc import Callable
import contextlib
import dataclasses
import itertools
import json
import os

import numpy as np

from t5x_inference_ext import distributed
from t5x_inference_ext.engine import scheduler_config
from t5x_inference_ext.engine.engine import Engine
from t5x_inference_ext.engine.inputs import BOS_ID, EOS_ID
from t5x_inference_ext.engine.scheduler import Request
from t5x_inference_ext.engine.scoring import ScoringExample
from t5x_inference_ext.engine.vocabularies import find_vocabulary
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.runs import batches, infer_options, loading, output, prompt_rows, refill
from t5x_inference_ext.runs.journal import FileSystem, Journal
from t5x_inference_ext.runs.progress import print_on_main
from t5x_inference_ext.runs.row_sampling import Asked


@dataclasses.dataclass(frozen=True)
class PromptsFiles:
  """What a plain run reads and writes.

  Attributes:
    prompts: JSONL to read.
    output: JSONL to write; its directory exists.
    vocabulary: 'bytes', a SentencePiece .model file, or None for the default.
    overwrite: whether an existing output may be replaced.
  """

  prompts: str
  output: str
  vocabulary: str | None = None
  overwrite: bool = False


def infer_file(
  options: loading.InferOptions,
  files: PromptsFiles,
  progress: Callable,
  say: Callable[[str], None] = print_on_main,
) -> None:
  """Completes or scores every row of a file. What is wrong is said before the weights are loaded.

  Args:
    options: of the run.
    files: read and written.
    progress: wraps an iterable, with its name and length, to show how far it is: progress(items, what, total).
    say: prints a line.

  Raises:
    UserError: anything the user can mend.
  """
  scoring = options.mode == 'score'
  with distributed.together():
    output.check_output(files.output, overwrite=files.overwrite)
    rows = prompt_rows.read_rows(files.prompts, score=scoring)
    checkpoint, mesh = loading.open_model(options, say)
    vocabulary, source = find_vocabulary(
      files.vocabulary,
      checkpoint.config.vocab_size,
      needed=bool(options.stop) or any(row.is_text for row in rows),
    )
    name = vocabulary.name if vocabulary else 'none'
    say(f'vocabulary: {name} ({source})')
    options = infer_options.with_vocabulary(options, vocabulary, checkpoint.config.vocab_size)
    asked = Asked(options.sampling, options.max_new_tokens)
    work = prompt_rows.tokenize(
      files.prompts,
      rows,
      vocabulary,
      checkpoint.config.vocab_size,
      asked,
      None if scoring else options.max_prompt,
    )
    if not options.continuous and any(request.asked != asked for request in work):
      raise RequestError('rows have `sampling` of their own, which needs batching=continuous')
  distributed.check_same(options=options, prompts=work, checkpoint=checkpoint.notes)
  loading_progress = lambda jobs: progress(jobs, 'loading weights', len(jobs))
  engine = loading.load_engine(options, checkpoint, mesh, loading_progress, say)
  journal = Journal(
    _journal_path(files.output),
    (options, work, checkpoint.path, checkpoint.step, checkpoint.notes),
    FileSystem(output.open_text, os.path.exists, os.remove),
  )
  if journal.done:
    say(f'resumed: {len(journal.done)} of {len(work)} rows were done when an earlier run ended')
  clock = batches.Clock()
  shape, results = {}, ()
  if len(journal.done) < len(work):
    todo = [(row, request) for row, request in enumerate(work) if row not in journal.done]
    if scoring:
      shape, results = _score(engine, options, todo, clock, say)
    else:
      run = _refill if options.continuous else _batches
      shape, results = run(engine, options, todo, clock, vocabulary, say)
  with distributed.together():
    with contextlib.closing(journal.keep(results)) as kept:
      for _ in progress(
        kept, 'scoring' if scoring else 'generating', len(work) - len(journal.done)
      ):
        pass
    with output.whole_file(files.output) as file:
      for row, request, result in zip(rows, work, journal.in_order(len(work))):
        told = _told(row, request, vocabulary, result)
        told = told[0] if options.num_decodes == 1 else {'samples': told}
        file.write(json.dumps({**row.fields, 'prompt': row.prompt, **told}) + '\n')
    record = output.write_record(
      files.output,
      {
        **loading.description(options, engine),
        'prompts': files.prompts,
        'vocabulary': {'name': name, 'source': source},
        'shape': shape,
        'time': clock.to_dict(),
      },
    )
    journal.remove()
  say(loading.run_summary(clock, options.mode))
  say(f'wrote {files.output} and {record}')


def _journal_path(path: str) -> str:
  directory, name = os.path.split(os.path.abspath(path))
  return os.path.join(directory, f'.{name}.unfinished')


def _refill(engine: Engine, options, todo, clock, vocabulary, say):
  """The sizes of the run, and (row, [what is told of each sample]) as rows end."""

  def request(row, r):
    seeds = batches.row_seeds(options.seed, row, options.num_decodes)
    if r.asked.seed is not None:
      seeds = tuple((r.asked.seed + i) % 2**32 for i in range(options.num_decodes))
    return row, Request((BOS_ID, *r.prompt), seeds, r.asked.max_new_tokens, r.asked.sampling)

  asked = list(itertools.starmap(request, todo))
  plan, shared = scheduler_config.config_for(
    engine.model,
    [r for _, r in asked],
    slots=options.batch_size,
    size=options.cache_length,
    chunk=options.prefill_chunk,
    budget=options.prefill_budget,
    eos_id=vocabulary.eos_id if vocabulary else EOS_ID,
    top=options.top_log_probs,
  )
  loading.say_slots(options, plan, shared, engine.model, say)

  def told(sample):
    result = {'tokens': sample.tokens, 'score': sample.score}
    if options.token_log_probs or options.top_log_probs:
      result['log_probs'] = sample.log_probs
    return {**result, 'top_log_probs': sample.top} if options.top_log_probs else result

  results = (
    (row, list(map(told, samples)))
    for row, samples in refill.completions(engine, asked, plan, shared, clock)
  )
  return {
    'batch': plan.slots,
    'prompt': plan.prompt,
    'cache': plan.size,
    'shared': len(shared),
  }, results


def _batches(engine: Engine, options, todo, clock, vocabulary, say):
  """The same of batches that end as a whole."""
  shape = _shape(options, engine, [r for _, r in todo], say)
  return dataclasses.asdict(shape), _generate(engine, options, todo, shape, clock, vocabulary)


def _shape(
  options, engine: Engine, work: list[prompt_rows.TokenizedRow], say
) -> batches.BatchShape:
  batch = loading.batch_rows(options, engine, len(work), say)
  longest = max(len(r.prompt) for r in work)
  if engine.executable:
    run = engine.executable.run
    if longest > run.prompt:
      raise RequestError(
        f'the longest prompt has {longest} tokens, and {options.executable} was compiled for '
        f'{run.prompt}: compile it with --prompt={longest} or more'
      )
    return batches.BatchShape(batch, run.prompt, run.context)
  return batches.BatchShape(
    batch, batches.prompt_size(longest, options.max_prompt), options.cache_length
  )


def _generate(engine, options, todo, shape, clock, vocabulary):
  work = distributed.lockstep(batches.split([(row, r.prompt) for row, r in todo], shape.batch))
  for row, (tokens, score) in batches.generate_batches(
    engine,
    work,
    shape,
    clock,
    max_new_tokens=options.max_new_tokens,
    sampling=options.sampling,
    seed=options.seed,
    eos_id=vocabulary.eos_id if vocabulary else EOS_ID,
  ):
    yield row, [{'tokens': tokens, 'score': score}]


def _score(engine: Engine, options, todo, clock, say):
  """The same of completions that are given: those of like lengths together."""
  longest = max(len(r.prompt) + len(r.completion) for _, r in todo)
  tokens = loading.batch_rows(options, engine, len(todo), say) * batches.prompt_size(longest)

  def results():
    for item, scores in batches.score_batches(
      engine, [ScoringExample.of(r.prompt, r.completion) for _, r in todo], tokens, clock
    ):
      row, request = todo[item]
      each = (
        {'log_probs': scores[len(request.prompt) :].tolist()} if options.token_log_probs else {}
      )
      yield row, [{'tokens': request.completion, 'score': float(np.sum(scores)), **each}]

  return {'tokens': tokens}, results()


def _told(
  row: prompt_rows.PromptRow, request: prompt_rows.TokenizedRow, vocabulary, results: list[dict]
) -> list[dict]:
  """What is told of each sample of a row.

  The text of a completion is None where there is no vocabulary. It ends before EOS or a stop sequence.
  """

  def text(tokens):
    if isinstance(row.completion, str):
      return row.completion
    return vocabulary.decode(request.asked.sampling.before_stop(tokens)) if vocabulary else None

  return [{'completion': text(result['tokens']), **result} for result in results]
