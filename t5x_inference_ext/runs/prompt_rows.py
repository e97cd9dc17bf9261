"""Read, check and tokenize the rows of a prompts file. Errors name the line of each bad row."""

from collections.abc import Callable
import dataclasses
import io
import reprlib
from typing import Any, TypeAlias, TypeVar

from t5x_inference_ext.checkpoints import Checkpoint
from t5x_inference_ext.engine.adapters import NO_ADAPTERS, AdapterNames
from t5x_inference_ext.engine.grammars import Grammars
from t5x_inference_ext.engine.inputs import check_positions, check_start
from t5x_inference_ext.engine.scoring import tokens_read
from t5x_inference_ext.errors import RequestError, name_list
from t5x_inference_ext.runs.row_sampling import RowSampling, row_sampling
from t5x_inference_ext.text.grammar import Grammar
from t5x_inference_ext.text.vocabulary import encode_pair
from t5x_inference_ext.text_files import parse_json

MAX_COMPLAINTS = 10
UNSTATED = ''  # no adapter has this name
EXAMPLE = '{"prompt": "def f("}'

Text: TypeAlias = str | list[int]
_Item = TypeVar('_Item')
_Result = TypeVar('_Result')


@dataclasses.dataclass(frozen=True)
class PromptRow:
  """One row of a prompts file, as read.

  Attributes:
    line: Line number in the file, from 1.
    fields: The whole JSON object. Fields that the run does not use are copied to the output.
    prompt: Text or token ids. An empty prompt means BOS alone.
    completion: Text or token ids to score; None if nothing is scored.
    sampling: The row's own sampling options; None if it has none, or is scored.
    grammar: The row's grammar; None if it has none, or is scored.
    adapter: Name of the row's own adapter, null for none; UNSTATED if the row does not say.
  """

  line: int
  fields: dict[str, Any]
  prompt: Text
  completion: Text | None = None
  sampling: dict[str, Any] | None = None
  grammar: Grammar | None = None
  adapter: str | None = UNSTATED

  @property
  def is_text(self) -> bool:
    """Whether the row needs a vocabulary, because it has text or a grammar."""
    texts = self.prompt, self.completion
    return self.grammar is not None or any(isinstance(text, str) for text in texts)


@dataclasses.dataclass(frozen=True)
class TokenizedRow:
  """A row in token ids.

  Attributes:
    prompt: Ids of the prompt, without BOS.
    completion: Ids to score; empty if nothing is scored.
    options: Sampling options that apply to the row.
  """

  prompt: list[int]
  completion: list[int]
  options: RowSampling


def read_rows(path: str, *, score: bool) -> list[PromptRow]:
  """Read a JSONL file of prompts, skipping blank lines.

  Args:
    path: The file. Each line is an object with `prompt`. Rows to score also have `tokens` (ids) or
      `completion` (text or ids).
    score: Whether rows are to be scored.

  Raises:
    RequestError: The file does not exist, has no rows, or has invalid rows. The message gives the
      lines of invalid rows.
  """
  try:
    with open(path, 'rb') as file:
      data = file.read()
    # utf-8-sig drops the byte order mark that some editors write.
    lines = io.StringIO(data.decode('utf-8-sig'), newline=None)
  except FileNotFoundError:
    raise RequestError(
      f'no prompts file at {path}: --prompts is a file of JSON lines such as {EXAMPLE}'
    ) from None
  except OSError as error:
    raise RequestError(f"the prompts file {path} can't be read: {error.strerror}") from error
  except UnicodeDecodeError as error:
    number = len(error.object[: error.start + 1].splitlines())
    raise RequestError(f'{path}:{number}: the line is not UTF-8: save the file as UTF-8') from error
  numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
  rows = _map_rows(path, numbered, lambda item: _parse(*item, score), lambda item: item[0])
  if not rows:
    raise RequestError(f'the prompts file {path} has no rows')
  return rows


def tokenize(
  path: str,
  rows: list[PromptRow],
  checkpoint: Checkpoint,
  run: RowSampling,
  max_prompt: int | None = None,
  adapters: AdapterNames = NO_ADAPTERS,
) -> list[TokenizedRow]:
  """Tokenize rows. If prompt and completion are both text, they are encoded together.

  Args:
    path: File that the rows come from, for messages.
    rows: Rows from read_rows.
    checkpoint: The model, with a vocabulary if a row has text or a grammar.
    run: Sampling options for rows without their own.
    max_prompt: Maximum number of prompt tokens for which the cache has room; None: no limit.
    adapters: Names of the adapters that rows can choose.

  Raises:
    RequestError: Rows have an unknown adapter, ids outside the vocabulary, prompts longer than the
      cache or than the model's positions, empty prompts without BOS, invalid sampling options, or
      invalid grammars. The message gives their lines.
  """
  vocabulary, bos_id = checkpoint.vocabulary, checkpoint.bos_id
  config, vocab_size = checkpoint.config, checkpoint.config.vocab_size
  grammars = Grammars(vocabulary, vocab_size)

  def ids_of(name: str, text: Text) -> list[int]:
    if not isinstance(text, str):
      wrong = [token for token in text if not 0 <= token < vocab_size]
      if wrong:
        raise ValueError(
          f"`{name}` holds token {reprlib.repr(wrong[0])}, outside the model's vocabulary: ids are "
          f'0 to {vocab_size - 1}'
        )
      return text
    assert vocabulary is not None, 'rows of text need a vocabulary'
    _check_unicode(name, text)
    return vocabulary.encode(text)

  def scored(row: PromptRow) -> tuple[list[int], list[int]]:
    if row.completion is None:
      return ids_of('prompt', row.prompt), []
    if isinstance(row.prompt, str) and isinstance(row.completion, str):
      assert vocabulary is not None, 'rows of text need a vocabulary'
      _check_unicode('prompt', row.prompt)
      _check_unicode('completion', row.completion)
      prompt, completion = encode_pair(vocabulary, row.prompt, row.completion)
    else:
      prompt = ids_of('prompt', row.prompt)
      completion = ids_of('completion', row.completion)
    if not completion:
      raise ValueError('`completion` has no tokens in this vocabulary: there is nothing to score')
    return prompt, completion

  def tokenized(row: PromptRow) -> TokenizedRow:
    prompt, completion = scored(row)
    check_start('`prompt`', prompt, bos_id)
    adapter = run.adapter if row.adapter == UNSTATED else row.adapter
    adapters.number(adapter)  # raises if it is unknown
    soft = len(adapters.prompt(adapter))
    if row.completion is None:
      check_positions('the prompt', soft + len(prompt) + (bos_id is not None), config)
    else:
      check_positions('the row', soft + tokens_read(prompt, completion, bos_id), config)
    if max_prompt is not None and soft + len(prompt) > max_prompt:
      raise ValueError(
        f'the prompt is longer than the cache: {soft + len(prompt)} tokens, and there is room for '
        f'{max_prompt} beside the new ones: shorten it, raise --cache_length or lower '
        '--max_new_tokens'
      )
    options = run
    if row.sampling is not None:
      options = row_sampling(run, row.sampling, vocabulary, vocab_size)
    if row.grammar is not None:
      grammars.matchers(row.grammar, 1)  # raises if the grammar is invalid
      options = dataclasses.replace(options, grammar=row.grammar)
    return TokenizedRow(prompt, completion, dataclasses.replace(options, adapter=adapter))

  return _map_rows(path, rows, tokenized, lambda row: row.line)


def _check_unicode(name: str, text: str) -> None:
  try:
    text.encode('utf-8')
  except UnicodeEncodeError:
    raise ValueError(
      f'`{name}` is not valid Unicode (a lone surrogate): remove it, or give token ids'
    ) from None


def _parse(number: int, line: str, score: bool) -> PromptRow:
  """Parse a line; raise ValueError, without the line number, if it is not a valid row."""
  try:
    fields = parse_json(line)
  except ValueError as error:
    raise ValueError(f'{error}: a row is one object on one line, such as {EXAMPLE}') from None
  if not isinstance(fields, dict):
    raise ValueError(f'a row is an object such as {EXAMPLE}, not {_kind(fields)}')
  if 'prompt' not in fields:
    names = name_list(map(reprlib.repr, fields), len(fields))
    found = f'it has {names}' if fields else 'it is empty'
    raise ValueError(f'no "prompt" ({found}): write {{"prompt": TEXT or [token ids]}}')
  prompt = _text('prompt', fields['prompt'])
  adapter = fields.get('adapter', UNSTATED)
  if 'adapter' in fields and adapter is not None and not (isinstance(adapter, str) and adapter):
    raise ValueError(f'"adapter" must be the name of an adapter or null, not {_kind(adapter)}')
  if not score:
    sampling = fields.get('sampling')
    if sampling is not None and not isinstance(sampling, dict):
      raise ValueError(
        f'"sampling" must be an object such as {{"temperature": 0.7}}, not {_kind(sampling)}'
      )
    grammar = fields.get('grammar')
    if grammar is not None:
      grammar = Grammar.from_dict(grammar)
    return PromptRow(number, fields, prompt, sampling=sampling, grammar=grammar, adapter=adapter)
  for name in ('tokens', 'completion'):
    if fields.get(name) is not None:
      completion = _text(name, fields[name])
      if not completion:
        raise ValueError(f'"{name}" is empty: there is nothing to score')
      return PromptRow(number, fields, prompt, completion, adapter=adapter)
  raise ValueError(
    'no "completion" to score: write {"prompt": ..., "completion": TEXT or [token ids]}, or '
    '"tokens" with ids'
  )


def _text(name: str, value: Any) -> Text:
  """Return a value if it is text or token ids; raise ValueError for any other value."""
  if isinstance(value, str):
    return value
  if not isinstance(value, list):
    raise ValueError(f'"{name}" must be text or a list of token ids, not {_kind(value)}')
  for item in value:
    if not isinstance(item, int) or isinstance(item, bool):
      raise ValueError(
        f'"{name}" must be text or a list of token ids (whole numbers); the list holds '
        f'{_kind(item)}'
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
  return names.get(type(value), f'the number {reprlib.repr(value)}')


def _map_rows(
  path: str, items: list[_Item], function: Callable[[_Item], _Result], line: Callable[[_Item], int]
) -> list[_Result]:
  """Return function(item) for each item; raise one RequestError for all their ValueErrors."""
  results, complaints = [], []
  for item in items:
    try:
      results.append(function(item))
    except ValueError as error:
      complaints.append(f'{path}:{line(item)}: {error}')
  if len(complaints) == 1:
    raise RequestError(complaints[0])
  if complaints:
    shown = complaints[:MAX_COMPLAINTS]
    if len(complaints) > MAX_COMPLAINTS:
      shown.append(f'... and {len(complaints) - MAX_COMPLAINTS} more rows')
    heading = f"{len(complaints)} row(s) of the prompts file can't be used:"
    raise RequestError('\n  '.join([heading, *shown]))
  return results
