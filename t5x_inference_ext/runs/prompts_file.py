"""A run over a prompts file: JSONL prompts in, JSONL completions out, in the same order."""

from collections.abc import Iterator
import dataclasses
import os
from typing import Any

import numpy as np

from t5x_inference_ext import distributed
from t5x_inference_ext.engine.adapters import AdapterNames, read_adapters
from t5x_inference_ext.engine.engine import Engine
from t5x_inference_ext.engine.request import NOT_FINITE, Completion, Request, Sample
from t5x_inference_ext.engine.scoring import ScoringExample
from t5x_inference_ext.errors import RequestError, printable
from t5x_inference_ext.runs import batches, infer_options, loading, memory, output, prompt_rows
from t5x_inference_ext.runs.clock import Clock
from t5x_inference_ext.runs.job import Job
from t5x_inference_ext.runs.journal import Journal, check_journal_path
from t5x_inference_ext.runs.progress import Progress, print_on_main
from t5x_inference_ext.runs.row_sampling import RowSampling
from t5x_inference_ext.runs.row_text import completed_text, with_early_ends
from t5x_inference_ext.runs.work import NoWork, ScoreWork, StaticWork, Work, refill_work
from t5x_inference_ext.text.settings import TextSettings
from t5x_inference_ext.text.vocabulary import Vocabulary
from t5x_inference_ext.text.vocabulary_files import choose_settings
from t5x_inference_ext.text_files import json_line

_IDS_ALONE = ': completions have tokens only, no text'


def prepare(
  options: infer_options.InferOptions, files: infer_options.PromptsFiles
) -> Iterator[Job]:
  """Context manager: prepare a run over a file. Errors are raised before weights are loaded.

  Args:
    options: Options of the run.
    files: Paths of the files to read and write.

  Yields:
    One job.

  Raises:
    UserError: Anything that the user can fix.
  """
  scoring = options.mode == 'score'
  with distributed.together():
    output.check_output(files.output, overwrite=files.overwrite, source=files.prompts)
    check_journal_path(_journal_path(files.output))
    rows = prompt_rows.read_rows(files.prompts, score=scoring)
    model = loading.open_model(options)
    checkpoint, mesh, _ = model
    rows_of_model = checkpoint.config.vocab_size
    text = choose_settings(
      files.vocabulary,
      checkpoint.text,
      rows_of_model,
      needed=bool(options.stop) or any(row.is_text for row in rows),
    )
    # The engine takes its text settings from the checkpoint, so put the chosen ones there.
    checkpoint = dataclasses.replace(checkpoint, text=text)
    vocabulary = text.vocabulary
    name, source = printable(text.name), printable(text.source)
    print_on_main(f'vocabulary: {name} ({source}){"" if vocabulary else _IDS_ALONE}')
    infer_options.check_vocab_size(options, rows_of_model)
    default = RowSampling(
      options.sampling, options.max_new_tokens, stop=options.stop, adapter=options.adapter
    )
    adapters = read_adapters(options.adapter_paths, checkpoint)
    names = AdapterNames.of(adapters, rows_of_model)
    tokenized = prompt_rows.tokenize(
      files.prompts, rows, checkpoint, default, None if scoring else options.max_prompt, names
    )
    if not scoring:
      samples = options.num_decodes * len(rows)
      memory.check_fits(
        options,
        model,
        min(options.batch_size, samples),
        options.cache_length
        or max(len(row.prompt) + row.options.max_new_tokens for row in tokenized),
      )
    own = (dataclasses.replace(row.options, adapter=default.adapter) for row in tokenized)
    if not options.continuous and not scoring and any(each != default for each in own):
      raise RequestError('some rows have `grammar` or `sampling`, which need batching=continuous')
    if not options.continuous:
      # A saved program supports only one end token.
      ends = text.end_ids[1:] if options.executable else ()
      sampling = with_early_ends(options.sampling, options.stop, vocabulary, ends)
      options = dataclasses.replace(options, sampling=sampling)
  distributed.check_same(
    options=options, prompts=tokenized, checkpoint=(checkpoint.notes, text.to_dict())
  )
  engine = loading.load_engine(options, checkpoint, mesh, adapters)
  journal = Journal(
    _journal_path(files.output),
    (options, tokenized, checkpoint.path, checkpoint.step, checkpoint.notes, text.to_dict()),
  )
  if journal.done:
    print_on_main(
      f'resumed: {len(journal.done)} of {len(rows)} rows were done when an earlier run ended'
    )
  todo = [(row, each) for row, each in enumerate(tokenized) if row not in journal.done]
  clock = Clock()
  with journal.closed_on_error():
    with distributed.together():  # again: another run may have written the output meanwhile
      output.check_output(files.output, overwrite=files.overwrite, source=files.prompts)
    work, shape = _work(engine, options, todo, clock)

  def to_json(row: int, result: Any) -> list[dict[str, Any]]:
    if scoring:
      return [_score_fields(tokenized[row], result, options)]
    samples = [result] if isinstance(result, Completion) else result
    return [_sample_fields(sample, options) for sample in samples]

  def write() -> None:
    with output.whole_file(files.output) as file:
      for row, each, results in zip(rows, tokenized, journal.in_order()):
        samples = _with_text(row, each, vocabulary, results)
        fields = samples[0] if options.num_decodes == 1 else {'samples': samples}
        file.write(json_line({**row.fields, 'prompt': row.prompt, **fields}) + '\n')
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
    print_on_main(loading.run_summary(clock, options.mode))
    print_on_main(f'wrote {files.output} and {record}')

  yield Job(
    work, journal, to_json, write, Progress('scoring' if scoring else 'generating', len(todo))
  )


def _journal_path(path: str) -> str:
  directory, name = os.path.split(os.path.abspath(path))
  return os.path.join(directory, f'.{name}.unfinished')


def _work(
  engine: Engine,
  options: infer_options.InferOptions,
  todo: list[tuple[int, prompt_rows.TokenizedRow]],
  clock: Clock,
) -> tuple[Work, dict[str, Any]]:
  """Return the work of the remaining rows, and its sizes for the record of the run."""
  text = engine.checkpoint.text
  if not todo:
    return NoWork(), {}
  loading.say_compiling(engine)
  if options.mode == 'score':
    longest = max(len(row.prompt) + len(row.completion) for _, row in todo)
    tokens = loading.batch_rows(options, engine, len(todo)) * batches.prompt_size(longest)
    groups: dict[str | None, list[tuple[int, ScoringExample]]] = {}
    for i, row in todo:
      example = ScoringExample.of(row.prompt, row.completion, text.bos_id)
      groups.setdefault(row.options.adapter, []).append((i, example))
    return ScoreWork(engine, groups.items(), tokens, clock), {'tokens': tokens}
  if options.continuous:
    requests = [(i, _request(i, row, options, text)) for i, row in todo]
    return refill_work(
      engine,
      options,
      requests,
      clock,
      vocabulary=text.vocabulary,
      slots=min(options.batch_size, options.num_decodes * len(todo)),
      max_length=options.cache_length,
    )
  shape = _shape(options, engine, [row for _, row in todo])
  prompts = [(i, row.prompt, row.options.adapter) for i, row in todo]
  in_step = distributed.lockstep(batches.batched(prompts, shape.batch))
  ends = text.end_ids[:1] if options.executable else text.end_ids
  work = StaticWork(engine, in_step, shape, clock, options, ends)
  return work, dataclasses.asdict(shape)


def _request(
  index: int, row: prompt_rows.TokenizedRow, options: infer_options.InferOptions, text: TextSettings
) -> Request:
  samples = options.num_decodes
  seeds = batches.row_seeds(options.seed, index, samples)
  if row.options.seed is not None:
    seeds = tuple((row.options.seed + i) % 2**32 for i in range(samples))
  return Request(
    (*text.front, *row.prompt),
    seeds,
    row.options.max_new_tokens,
    row.options.sampling,
    end_ids=text.end_ids,
    stop_texts=row.options.stop,
    top_log_probs=options.top_log_probs,
    grammar=row.options.grammar,
    adapter=row.options.adapter,
  )


def _shape(
  options: infer_options.InferOptions, engine: Engine, rows: list[prompt_rows.TokenizedRow]
) -> batches.BatchShape:
  """Return the one shape of every static batch of a run."""
  batch = loading.batch_rows(options, engine, len(rows))
  longest = max(len(r.prompt) for r in rows)
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


def _sample_fields(
  sample: Sample | Completion, options: infer_options.InferOptions
) -> dict[str, Any]:
  """Return the fields to write for a generated sample, except its text."""
  fields: dict[str, Any] = {
    'tokens': sample.tokens,
    'score': sample.score,
    'finish_reason': sample.finish_reason,
  }
  if sample.finish_reason == 'error':
    fields['error'] = (isinstance(sample, Sample) and sample.error) or NOT_FINITE
  if isinstance(sample, Sample):
    if options.token_log_probs or options.top_log_probs:
      fields['log_probs'] = sample.log_probs
    if options.top_log_probs:
      fields['top_log_probs'] = sample.top
  return fields


def _score_fields(
  row: prompt_rows.TokenizedRow, scores: np.ndarray, options: infer_options.InferOptions
) -> dict[str, Any]:
  """Return the fields to write for a scored row. The completion has the last of `scores`."""
  fields: dict[str, Any] = {'tokens': row.completion, 'score': float(np.sum(scores))}
  if options.token_log_probs:
    fields['log_probs'] = scores[len(scores) - len(row.completion) :].tolist()
  return fields


def _with_text(
  row: prompt_rows.PromptRow,
  tokenized: prompt_rows.TokenizedRow,
  vocabulary: Vocabulary | None,
  results: list[dict[str, Any]],
) -> list[dict[str, Any]]:
  """Add the text of each sample before the sample's other fields.

  The text ends before EOS, stop ids or a stop text; without a vocabulary, the text is None.
  """
  own = tokenized.options

  def text(tokens: list[int]) -> str | None:
    if isinstance(row.completion, str):
      return row.completion
    if vocabulary is None:
      return None
    return completed_text(vocabulary, tokenized.prompt, tokens, own.sampling, own.stop)[0]

  return [{'completion': text(sample['tokens']), **sample} for sample in results]
