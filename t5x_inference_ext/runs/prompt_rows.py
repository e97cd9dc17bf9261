"""Rows of a prompts file: read, checked and tokenized, with every complaint naming the line."""

from collections.abc import Callable, Iterable
import dataclasses
from typing import Any

from t5x_inference_ext.engine.vocabularies import Vocabulary
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.runs.row_sampling import Asked, asked
from t5x_inference_ext.text_files import parse_json

MAX_COMPLAINTS = 10

Text = str | list[int]


@dataclasses.dataclass(frozen=True)
class PromptRow:
  """One row as it was written.

  Attributes:
    line: where in the file, from 1.
    fields: the whole JSON object: what is not used here comes out again.
    prompt: text or token ids; empty starts from BOS alone.
    completion: what to score, text or ids; None where nothing is scored.
    sampling: how it is to be continued, as it says itself; None where it says nothing, or is scored.
  """

  line: int
  fields: dict[str, Any]
  prompt: Text
  completion: Text | None = None
  sampling: dict[str, Any] | None = None

  @property
  def is_text(self) -> bool:
    return isinstance(self.prompt, str) or isinstance(self.completion, str)


def read_rows(path: str, *, score: bool) -> list[PromptRow]:
  """Reads a JSONL file of prompts; blank lines are skipped.

  Args:
    path: each line an object with `prompt`, and to score `tokens` (ids) or `completion` (text or ids).
    score: whether rows are to be scored.

  Raises:
    RequestError: no such file, no rows, or rows that can't be used: each with its line, what is wrong and the fix.
  """
  try:
    # utf-8-sig: a byte order mark, as some editors write one, is not part of the first row.
    with open(path, encoding='utf-8-sig') as file:
      lines = file.readlines()
  except FileNotFoundError:
    raise RequestError(
      f'no prompts file at {path}: --prompts is a file of JSON lines such as {{"prompt": "def f("}}'
    ) from None
  except OSError as error:
    raise RequestError(f"the prompts file {path} can't be read: {error.strerror}") from error
  except UnicodeDecodeError as error:
    raise RequestError(
      f'the prompts file {path} is not UTF-8 (at byte {error.start}): save it as UTF-8'
    ) from error
  parse = _each(path, lambda item: _parse(*item, score=score), lambda item: item[0])
  rows = parse((number, line) for number, line in enumerate(lines, 1) if line.strip())
  if not rows:
    raise RequestError(f'the prompts file {path} has no rows')
  return rows


@dataclasses.dataclass(frozen=True)
class TokenizedRow:
  """A row in token ids: `completion` is empty where nothing is scored. `asked`: how it is to be continued."""

  prompt: list[int]
  completion: list[int]
  asked: Asked


def tokenize(
  path: str,
  rows: list[PromptRow],
  vocabulary: Vocabulary | None,
  vocab_size: int,
  run: Asked,
  max_prompt: int | None = None,
) -> list[TokenizedRow]:
  """Rows in token ids.

  Args:
    path: of the file they come from, for errors.
    rows: from read_rows.
    vocabulary: for text.
    vocab_size: V, rows of the model's embedding: ids are below it.
    run: how rows are continued that do not say it themselves.
    max_prompt: the longest prompt that the cache has room for.

  Raises:
    RequestError: ids outside the vocabulary, and prompts longer than the cache, by line.
  """

  def ids_of(what: str, text: Text) -> list[int]:
    if isinstance(text, str):
      try:
        return vocabulary.encode(text)
      except UnicodeEncodeError:
        raise ValueError(
          f'`{what}` is not valid Unicode (a lone surrogate): remove it, or give token ids'
        ) from None
    wrong = [t for t in text if not 0 <= t < vocab_size]
    if wrong:
      raise ValueError(
        f"`{what}` holds token {wrong[0]}, outside the model's vocabulary: ids are 0 to "
        f'{vocab_size - 1}'
      )
    return text

  def request(row: PromptRow) -> TokenizedRow:
    prompt = ids_of('prompt', row.prompt)
    if max_prompt is not None and len(prompt) > max_prompt:
      raise ValueError(
        f'the prompt is longer than the cache: {len(prompt)} tokens, and there is room for {max_prompt} beside the '
        'new ones: shorten it, raise --cache_length or lower --max_new_tokens'
      )
    own = run if row.sampling is None else asked(run, row.sampling, vocabulary, vocab_size)
    return TokenizedRow(
      prompt, [] if row.completion is None else ids_of('completion', row.completion), own
    )

  return _each(path, request, lambda row: row.line)(rows)


def _parse(number: int, line: str, score: bool) -> PromptRow:
  try:
    fields = parse_json(line)
  except ValueError as error:
    raise ValueError(
      f'{error}: a row is one object on one line, such as {{"prompt": "def f("}}'
    ) from None
  if not isinstance(fields, dict):
    raise ValueError(f'a row is an object such as {{"prompt": "def f("}}, not {_kind(fields)}')
  if 'prompt' not in fields:
    found = f'it has {", ".join(map(repr, fields))}' if fields else 'it is empty'
    raise ValueError(f'no "prompt" ({found}): write {{"prompt": TEXT or [token ids]}}')
  prompt = _text('prompt', fields['prompt'])
  if not score:
    sampling = fields.get('sampling')
    if sampling is not None and not isinstance(sampling, dict):
      raise ValueError(
        f'"sampling" must be an object such as {{"temperature": 0.7}}, not {_kind(sampling)}'
      )
    return PromptRow(number, fields, prompt, sampling=sampling)
  for name in ('tokens', 'completion'):
    if fields.get(name) is not None:
      completion = _text(name, fields[name])
      if not completion:
        raise ValueError(f'"{name}" is empty: there is nothing to score')
      return PromptRow(number, fields, prompt, completion)
  raise ValueError(
    'no "completion" to score: write {"prompt": ..., "completion": TEXT or [token ids]}, or "tokens" '
    'with ids'
  )


def _text(name: str, value: Any) -> Text:
  if isinstance(value, str):
    return value
  if not isinstance(value, list):
    raise ValueError(f'"{name}" must be text or a list of token ids, not {_kind(value)}')
  for item in value:
    if not isinstance(item, int) or isinstance(item, bool):
      raise ValueError(
        f'"{name}" must be text or a list of token ids (whole numbers); the list holds {_kind(item)}'
      )
  return value


def _kind(value: Any) -> str:
  names = {
    dict: 'an object',
    list: 'a list',
    str: 'text',
    bool: 'true or false',
    type(None): 'null',
  }
  return names.get(type(value), f'the number {value!r}')


def _each(path: str, function: Callable, line: Callable) -> Callable[[Iterable], list]:
  """Maps `function` over items; what it raises is gathered, so that one run tells of every bad row."""

  def run(items):
    results, complaints, bad = [], [], 0
    for item in items:
      try:
        results.append(function(item))
      except ValueError as error:
        bad += 1
        if bad <= MAX_COMPLAINTS:
          complaints.append(f'{path}:{line(item)}: {error}')
    if bad > MAX_COMPLAINTS:
      complaints.append(f'... and {bad - MAX_COMPLAINTS} more rows')
    if complaints:
      raise RequestError(
        '\n  '.join([f"{bad} row(s) of the prompts file can't be used:"] + complaints)
        if bad > 1
        else complaints[0]
      )
    return results

  return run
