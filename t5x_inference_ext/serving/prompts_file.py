"""The plain run: a JSONL file of prompts in, a JSONL file of completions out, in the same order."""

import dataclasses
import json
from typing import Callable

from t5x_inference_ext import distributed
from t5x_inference_ext.engine import EOS_ID, Engine
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.serving import batches, loading, output, requests
from t5x_inference_ext.serving.progress import print_line
from t5x_inference_ext.serving.vocabularies import find_vocabulary


@dataclasses.dataclass(frozen=True)
class Files:
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
    options: loading.Options, files: Files, progress: Callable, say: Callable[[str], None] = print_line) -> None:
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
    rows = requests.read_rows(files.prompts, score=scoring)
    checkpoint, mesh = loading.open_model(options, say)
    vocabulary, source = find_vocabulary(
        files.vocabulary, checkpoint.config.vocab_size, needed=any(row.is_text for row in rows))
    name = vocabulary.name if vocabulary else 'none'
    say(f'vocabulary: {name} ({source})')
    work = requests.tokenize(files.prompts, rows, vocabulary, checkpoint.config.vocab_size,
                             None if scoring else options.max_prompt)
  distributed.check_same(options=options, prompts=work, checkpoint=checkpoint.notes)
  loading_progress = lambda jobs: progress(jobs, 'loading weights', len(jobs))
  engine = loading.load_engine(options, checkpoint, mesh, loading_progress, say)
  shape = _shape(options, engine, work, say)
  clock = batches.Clock()
  if scoring:
    results = _score(engine, work, shape, clock)
  else:
    results = _generate(engine, options, work, shape, clock, vocabulary)
  with distributed.together():
    with output.whole_file(files.output) as file:
      done = 0
      for batch in progress(results, 'scoring' if scoring else 'generating', -(-len(work) // shape.batch)):
        for tokens, score in batch:
          file.write(json.dumps(_output_row(rows[done], tokens, score, vocabulary)) + '\n')
          done += 1
    record = output.write_record(files.output, {
        **loading.description(options, engine), 'prompts': files.prompts,
        'vocabulary': {'name': name, 'source': source}, 'shape': dataclasses.asdict(shape), 'time': clock.to_dict()})
  say(loading.summary(clock, options.mode))
  say(f'wrote {files.output} and {record}')


def _shape(options, engine: Engine, work: list[requests.Request], say) -> batches.Shape:
  batch = loading.batch_rows(options, engine, len(work), say)
  if options.mode == 'score':
    return batches.Shape(batch, batches.prompt_size(max(len(r.prompt) + len(r.completion) for r in work)))
  longest = max(len(r.prompt) for r in work)
  if engine.executable:
    run = engine.executable.run
    if longest > run.prompt:
      raise RequestError(f'the longest prompt has {longest} tokens, and {options.executable} was compiled for '
                         f'{run.prompt}: compile it with --prompt={longest} or more')
    return batches.Shape(batch, run.prompt, run.context)
  return batches.Shape(batch, batches.prompt_size(longest, options.max_prompt), options.cache_length)


def _generate(engine, options, work, shape, clock, vocabulary):
  prompts = distributed.lockstep(batches.split([r.prompt for r in work], shape.batch))
  return batches.generate(
      engine, prompts, shape, clock, max_new_tokens=options.max_new_tokens, sampler=options.sampler,
      seed=options.seed, eos_id=vocabulary.eos_id if vocabulary else EOS_ID)


def _score(engine, work, shape, clock):
  pairs = distributed.lockstep(batches.split([(r.prompt, r.completion) for r in work], shape.batch))
  for some, scores in zip(batches.split(work, shape.batch), batches.score(engine, pairs, shape, clock)):
    yield [(r.completion, s) for r, s in zip(some, scores)]


def _output_row(row: requests.Row, tokens: list[int], score: float, vocabulary) -> dict:
  """The row as it came, with the completion: its text (None where there is no vocabulary), ids and score."""
  if isinstance(row.completion, str):
    text = row.completion
  else:
    text = vocabulary.decode(tokens) if vocabulary else None
  return {**row.fields, 'prompt': row.prompt, 'completion': text, 'tokens': tokens, 'score': score}
