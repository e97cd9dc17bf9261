"""A checkpoint's text settings: vocabulary, BOS, end tokens, chat template, sampling defaults."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import math
from typing import Any

from t5x_inference_ext.errors import CheckpointError, UserError, printable
from t5x_inference_ext.text.chat_template import MAX_TEMPLATE, ChatTemplate
from t5x_inference_ext.text.sentencepiece_model import MODEL_FILE, SentencePieceVocabulary
from t5x_inference_ext.text.tokenizer_json import TOKENIZER_FILE, TokenizerVocabulary
from t5x_inference_ext.text.vocabulary import BYTE_ROWS, ByteVocabulary, Vocabulary, check_size

BOS_ID, EOS_ID = 0, 1  # T5X shifts targets right, with 0 as BOS; its vocabularies' EOS is 1
# Kind of vocabulary -> its files. 'none': only BOS and end tokens are known.
KINDS: dict[str, tuple[str, ...]] = {
  'none': (),
  'bytes': (),
  'sentencepiece': (MODEL_FILE,),
  'tokenizer.json': (TOKENIZER_FILE,),
}
# Sampling options that a checkpoint may recommend -> their valid ranges.
DEFAULTS: dict[str, tuple[float, float]] = {
  'temperature': (0, math.inf),
  'top_p': (0, 1),
  'top_k': (0, 2**31 - 1),
  'repetition_penalty': (0, math.inf),
}


@dataclasses.dataclass(frozen=True)
class TextSettings:
  """A checkpoint's text settings.

  Attributes:
    kind: Kind of the vocabulary, a key of KINDS.
    files: The vocabulary's files: name -> content.
    name: Name of the vocabulary in messages, such as its file's path.
    source: Why this vocabulary is used: 'given', 'recorded', or the reason of an assumption.
      Without a vocabulary, why it is unknown.
    bos_id: The id in front of every prompt; None if there is none.
    end_ids: The ids that end a row.
    chat_template: The chat template, or None.
    generation_defaults: Recommended sampling options, with keys of DEFAULTS.
  """

  kind: str
  files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
  name: str = 'bytes'
  source: str = 'given'
  bos_id: int | None = BOS_ID
  end_ids: tuple[int, ...] = (EOS_ID,)
  chat_template: str | None = None
  generation_defaults: Mapping[str, float] = dataclasses.field(default_factory=dict)

  @functools.cached_property
  def vocabulary(self) -> Vocabulary | None:
    """The vocabulary, parsed at its first use; None if it is not known.

    Raises RequestError for damaged files.
    """
    if self.kind == 'none':
      return None
    if self.kind == 'bytes':
      return ByteVocabulary(self.bos_id, self.end_ids)
    (data,) = (self.files[name] for name in KINDS[self.kind])
    make = SentencePieceVocabulary if self.kind == 'sentencepiece' else TokenizerVocabulary
    return make(self.name, data, self.bos_id, self.end_ids)

  @functools.cached_property
  def chat(self) -> ChatTemplate | None:
    """The chat template, compiled once, at its first use; None without one."""
    return None if self.chat_template is None else ChatTemplate(self.chat_template, self.name)

  @property
  def front(self) -> tuple[int, ...]:
    """The ids in front of every prompt: (BOS,) or ()."""
    return () if self.bos_id is None else (self.bos_id,)

  def to_dict(self) -> dict[str, Any]:
    """Return all fields except the files' content, JSON-ready; from_dict is the inverse."""
    fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    return {**fields, 'files': sorted(self.files), 'end_ids': list(self.end_ids)}

  @classmethod
  def from_dict(
    cls, fields: Any, rows: int, where: str, read: Callable[[str], bytes]
  ) -> 'TextSettings':
    """Restore the settings of a serving checkpoint.

    Args:
      fields: The result of to_dict, as read from a file.
      rows: V, rows of the model's embedding.
      where: Name of the file, for messages.
      read: Function that returns the content of a file of the checkpoint.

    Raises:
      CheckpointError: A field has a value that to_dict never writes.
    """
    known = {field.name for field in dataclasses.fields(cls)}
    if not isinstance(fields, dict) or set(fields) != known or fields['kind'] not in KINDS:
      raise CheckpointError(
        f'{where}: this version does not know the form of the text settings: convert again'
      )
    if fields['files'] != sorted(KINDS[fields['kind']]):
      raise CheckpointError(f'{where}: the files of the vocabulary do not match its kind')
    settings = cls(**{**fields, 'files': {}, 'end_ids': _ids(where, fields['end_ids'])})
    if settings.source == 'given':
      settings = dataclasses.replace(settings, source='recorded')
    settings.check(rows, where)
    return dataclasses.replace(settings, files={name: read(name) for name in fields['files']})

  def check(self, rows: int, where: str) -> None:
    """Raise CheckpointError for ids beyond a model's rows, and for values of the wrong kind."""
    ids = self.end_ids if self.bos_id is None else (self.bos_id, *self.end_ids)
    for token in _ids(where, ids):
      if not 0 <= token < rows:
        raise CheckpointError(
          f'{where}: BOS or end token {token} is outside the vocabulary of {rows} rows'
        )
    if not isinstance(self.name, str) or not isinstance(self.source, str):
      raise CheckpointError(f'{where}: the name of the vocabulary is not text')
    template = self.chat_template
    if template is not None and not (isinstance(template, str) and len(template) <= MAX_TEMPLATE):
      raise CheckpointError(
        f'{where}: the chat template is not a text of at most {MAX_TEMPLATE} characters'
      )
    defaults = self.generation_defaults
    if not isinstance(defaults, Mapping) or any(
      name not in DEFAULTS or not _within(value, *DEFAULTS[name])
      for name, value in defaults.items()
    ):
      raise CheckpointError(
        f'{where}: generation_defaults must be numbers in range, with names of '
        f'{", ".join(DEFAULTS)}, got {printable(repr(defaults))}'
      )

  def __str__(self) -> str:
    bos = 'no BOS' if self.bos_id is None else f'BOS {self.bos_id}'
    ends = ' or '.join(map(str, self.end_ids)) or 'no token'
    more = ['' if self.chat_template is None else ', a chat template']
    more += [f', {name} {value:g}' for name, value in self.generation_defaults.items()]
    size = '' if self.vocabulary is None else f'{self.vocabulary.size} ids, '
    return (
      f'{self.kind} ({printable(self.source)}), {size}{bos}, rows end with {ends}{"".join(more)}'
    )


def settings_of_vocabulary(vocabulary: Vocabulary, **fields: Any) -> TextSettings:
  """Return settings with this vocabulary. `fields`: other attributes of TextSettings."""
  settings = TextSettings(
    vocabulary.kind,
    vocabulary.files(),
    vocabulary.name,
    bos_id=vocabulary.bos_id,
    end_ids=vocabulary.end_ids,
    **fields,
  )
  settings.__dict__['vocabulary'] = vocabulary  # parsed already
  return settings


def unknown_vocabulary(**fields: Any) -> TextSettings:
  """Return settings without a vocabulary. `fields`: other attributes of TextSettings."""
  return TextSettings('none', name='none', **fields)


def assumed_settings(rows: int) -> TextSettings:
  """Return the settings assumed for a T5X checkpoint that has none: bytes if V is 384."""
  if rows != BYTE_ROWS:
    return unknown_vocabulary(source=f'not known for {rows} rows')
  return settings_of_vocabulary(ByteVocabulary(), source=f'assumed from {rows} rows')


def check_settings(settings: TextSettings, rows: int) -> None:
  """Check that a vocabulary's files can be used, with a model of `rows` embedding rows.

  Raises:
    UserError: A file is damaged, or the vocabulary has more ids than the model has rows.
  """
  if settings.vocabulary is not None:
    check_size(settings.vocabulary, rows)
  settings.check(rows, printable(settings.name))
  size = rows if settings.vocabulary is None else settings.vocabulary.size
  for token in settings.end_ids:
    if token >= size:
      raise UserError(
        f'vocabulary {printable(settings.name)} has {size} ids, and the end token is {token}'
      )


def _ids(where: str, ids: Any) -> tuple[int, ...]:
  if isinstance(ids, Sequence) and all(type(token) is int for token in ids):
    return tuple(ids)
  raise CheckpointError(f'{where}: BOS and end tokens must be ids, got {printable(repr(ids))}')


def _within(value: Any, least: float, most: float) -> bool:
  return isinstance(value, (int, float)) and type(value) is not bool and least <= value <= most
