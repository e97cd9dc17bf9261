"""Request bodies: their fields, types and ranges. An unknown field is an error that names it."""

import re
from typing import Annotated, Any, Literal, TypeVar

import pydantic
import pydantic_core

from t5x_inference_ext.engine.sampling_arrays import BIAS_WIDTH
from t5x_inference_ext.errors import name_list, printable
from t5x_inference_ext.options import LARGEST_WHOLE, short_repr
from t5x_inference_ext.server.api_errors import ApiError, invalid

MAX_CHOICES = 128  # maximum number of samples of a prompt
MAX_SAMPLES = 1024  # maximum number of samples of all prompts of a request
MAX_TOP = 20  # maximum number of most likely tokens returned with each token
MAX_STOPS = 16  # maximum number of stop texts
_UNKNOWN = 'unknown_field'
# Parts of a pydantic error location that name a member of a union, not a field.
_TYPE = re.compile(r'str|list\[.*\]')

_Body = TypeVar('_Body', bound=pydantic.BaseModel)
# Ends the check of a list at its first error. By default pydantic collects all errors: two million
# of them, of a body of 4 MiB, took 24 s, in which no other client was served.
_FIRST: Any = pydantic.Field(fail_fast=True)
_Penalty = Annotated[float, pydantic.Field(ge=-1e9, le=1e9)]


class _Strict(pydantic.BaseModel):
  model_config = pydantic.ConfigDict(strict=True, allow_inf_nan=False, protected_namespaces=())

  @pydantic.model_validator(mode='before')
  @classmethod
  def _known(cls, value: Any) -> Any:
    """Refuse all unknown fields in one error; pydantic would make an error of each."""
    known = cls.model_fields
    if isinstance(value, dict) and (unknown := [name for name in value if name not in known]):
      raise pydantic_core.PydanticCustomError(_UNKNOWN, _UNKNOWN, {'names': unknown})
    return value


class StreamOptions(_Strict):
  """Options of a stream.

  Attributes:
    include_usage: Whether the last chunk counts tokens.
    include_obfuscation: Ignored.
  """

  include_usage: bool | None = None
  include_obfuscation: bool | None = None


class GenerationBody(_Strict):
  """Fields that completions and chats share: sampling, and which details to return.

  Attributes without an effect: user, metadata, store, service_tier, safety_identifier,
  prompt_cache_key. `timeout` (seconds), `top_k`, `min_tokens`, `repetition_penalty`, `ignore_eos`,
  `return_token_ids` and `cache_salt` are not OpenAI's.
  """

  model: str | None = None
  max_tokens: Annotated[int, pydantic.Field(ge=0, le=LARGEST_WHOLE)] | None = None
  min_tokens: Annotated[int, pydantic.Field(ge=0, le=LARGEST_WHOLE)] | None = None
  n: Annotated[int, pydantic.Field(ge=1, le=MAX_CHOICES)] | None = None
  temperature: Annotated[float, pydantic.Field(ge=0, le=1e9)] | None = None
  top_p: Annotated[float, pydantic.Field(gt=0, le=1)] | None = None
  top_k: Annotated[int, pydantic.Field(ge=-1, le=LARGEST_WHOLE)] | None = None
  frequency_penalty: _Penalty | None = None
  presence_penalty: _Penalty | None = None
  repetition_penalty: Annotated[float, pydantic.Field(ge=1e-9, le=1e9)] | None = None
  logit_bias: dict[str, Annotated[float, pydantic.Field(ge=-1e9, le=1e9)]] | None = None
  seed: Annotated[int, pydantic.Field(ge=-(2**63), le=2**63 - 1)] | None = None
  stop: str | Annotated[list[str], _FIRST] | None = None
  stream: bool | None = None
  stream_options: StreamOptions | None = None
  response_format: dict[str, Any] | None = None
  timeout: Annotated[float, pydantic.Field(gt=0, le=1e9)] | None = None
  ignore_eos: bool | None = None
  return_token_ids: bool | None = None
  cache_salt: str | None = None
  receipt: bool | None = None
  user: Any = None
  metadata: Any = None
  store: Any = None
  service_tier: Any = None
  safety_identifier: Any = None
  prompt_cache_key: Any = None

  @property
  def choices(self) -> int:
    """Number of samples of each prompt."""
    return self.n or 1

  @property
  def stops(self) -> tuple[str, ...]:
    """Texts that end a row."""
    if self.stop is None:
      return ()
    return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

  @property
  def includes_usage(self) -> bool:
    """Whether a stream ends with token counts (`usage`)."""
    return self.stream_options is not None and bool(self.stream_options.include_usage)

  @pydantic.field_validator('logit_bias', mode='before')
  @classmethod
  def _few_biases(cls, value: Any) -> Any:
    if isinstance(value, dict) and len(value) > BIAS_WIDTH:
      raise ValueError(f'should have at most {BIAS_WIDTH} tokens')
    return value

  @pydantic.field_validator('stop')
  @classmethod
  def _few_stops(cls, value: str | list[str] | None) -> str | list[str] | None:
    if isinstance(value, list) and len(value) > MAX_STOPS:
      raise ValueError(f'should have at most {MAX_STOPS} texts')
    if value is not None and not all([value] if isinstance(value, str) else value):
      raise ValueError('should hold texts that are not empty')
    return value


class CompletionBody(GenerationBody):
  """A request for completions.

  Attributes:
    prompt: A text, token ids, or a list of either.
    echo: Whether each answer begins with the prompt's text.
    logprobs: Number of most likely tokens to return with each token.
    best_of: Must equal `n` if given.
    suffix: Not supported.
  """

  prompt: Any
  echo: bool | None = None
  logprobs: Annotated[int, pydantic.Field(ge=0, le=MAX_TOP)] | None = None
  best_of: int | None = None
  suffix: str | None = None

  @property
  def prompts(self) -> list[str | list[int]]:
    """The prompts: texts, or token ids."""
    prompt = self.prompt
    if isinstance(prompt, str) or isinstance(prompt[0], int):
      return [prompt]
    return prompt

  @pydantic.field_validator('prompt')
  @classmethod
  def _prompts(cls, value: Any) -> Any:
    if isinstance(value, str) or _is_ids(value):
      return value
    if isinstance(value, list) and value and all(isinstance(each, str) for each in value):
      return value
    if isinstance(value, list) and value and all(map(_is_ids, value)):
      return value
    raise ValueError('should be a text, a list of token ids, or a list of texts or of such lists')

  @pydantic.field_validator('suffix')
  @classmethod
  def _no_suffix(cls, value: str | None) -> str | None:
    if value:
      raise ValueError('is not supported')
    return value

  @pydantic.model_validator(mode='after')
  def _as_many(self) -> 'CompletionBody':
    if self.best_of is not None and self.best_of != self.choices:
      raise ValueError('best_of should be n: other numbers are not supported')
    if len(self.prompts) * self.choices > MAX_SAMPLES:
      raise ValueError(f'n times the number of prompts should be at most {MAX_SAMPLES}')
    if self.max_tokens == 0 and not self.echo:
      raise ValueError('max_tokens should be 1 or more, unless echo is true')
    return self


class Message(_Strict):
  """A message of a conversation, in the form that the chat template gets."""

  role: str
  content: str | Annotated[list[dict[str, Any]], _FIRST] | None = None
  name: str | None = None
  tool_calls: Annotated[list[dict[str, Any]], _FIRST] | None = None
  tool_call_id: str | None = None
  refusal: str | None = None
  reasoning_content: str | None = None


class ChatBody(GenerationBody):
  """A request for the next message of a conversation.

  Attributes:
    messages: The conversation so far.
    max_completion_tokens: Another name of max_tokens.
    logprobs: Whether to return log-probabilities of tokens.
    top_logprobs: Number of most likely tokens to return with each token.
    tools: Descriptions of functions, passed to the chat template.
    tool_choice: 'auto' passes the tools to the template, 'none' does not.
    parallel_tool_calls: Ignored.
    chat_template_kwargs: Further variables of the chat template.
  """

  messages: Annotated[list[Message], pydantic.Field(min_length=1, fail_fast=True)]
  max_completion_tokens: Annotated[int, pydantic.Field(ge=1, le=LARGEST_WHOLE)] | None = None
  logprobs: bool | None = None
  top_logprobs: Annotated[int, pydantic.Field(ge=0, le=MAX_TOP)] | None = None
  tools: Annotated[list[dict[str, Any]], _FIRST] | None = None
  tool_choice: Literal['auto', 'none'] | None = None
  parallel_tool_calls: bool | None = None
  chat_template_kwargs: dict[str, Any] | None = None

  @pydantic.model_validator(mode='after')
  def _agrees(self) -> 'ChatBody':
    if self.top_logprobs and not self.logprobs:
      raise ValueError('top_logprobs needs logprobs to be true')
    if self.max_tokens == 0:
      raise ValueError('max_tokens should be 1 or more')
    return self


class TokenizeBody(_Strict):
  """A text or a conversation to encode.

  Attributes:
    prompt: The text.
    messages: The conversation, in place of `prompt`.
    add_special_tokens: Whether BOS is put in front of a text.
    tools: See ChatBody.
    chat_template_kwargs: See ChatBody.
  """

  model: str | None = None
  prompt: str | None = None
  messages: Annotated[list[Message], pydantic.Field(min_length=1, fail_fast=True)] | None = None
  add_special_tokens: bool | None = None
  tools: Annotated[list[dict[str, Any]], _FIRST] | None = None
  chat_template_kwargs: dict[str, Any] | None = None

  @pydantic.model_validator(mode='after')
  def _one_of_both(self) -> 'TokenizeBody':
    if (self.prompt is None) == (self.messages is None):
      raise ValueError('prompt or messages should be given, and not both')
    return self


class DetokenizeBody(_Strict):
  """Token ids to decode."""

  model: str | None = None
  tokens: Annotated[list[int], _FIRST]


def validated(kind: type[_Body], value: Any) -> _Body:
  """Check a JSON value and return the request body.

  Args:
    kind: The pydantic model of the body.
    value: The body as read from JSON.

  Raises:
    ApiError: A field is unknown, missing, of a wrong type or out of its range. `param` names it.
  """
  if not isinstance(value, dict):
    raise invalid(f'the body should be a JSON object, got {printable(short_repr(value))}')
  try:
    return kind.model_validate(value)
  except pydantic.ValidationError as error:
    raise _validation_error(error) from None


def _validation_error(error: pydantic.ValidationError) -> ApiError:
  """Return the error for an invalid body, which names unknown fields, else the first problem."""
  first = error.errors(include_url=False)[0]
  if first['type'] == _UNKNOWN:
    unknown = [_path((*first['loc'], name)) for name in first['ctx']['names']]
    return invalid(f'unknown fields: {name_list(unknown, len(unknown))}', unknown[0], _UNKNOWN)
  message = first['msg'].removeprefix('Input ').removeprefix('Value error, ')
  path = _path(first['loc'])
  if not path:  # a check of several fields: the message begins with the first field's name
    return invalid(printable(message), message.split()[0], 'invalid_value')
  if first['type'] == 'missing':
    return invalid(f'{path} is required', path, 'missing_field')
  got = printable(short_repr(first['input']), 100)
  return invalid(f'{path} {printable(message)}, got {got}', path, 'invalid_value')


def _path(loc: tuple[int | str, ...]) -> str:
  """Return the path of a field as text, such as messages[0].role."""
  path = ''
  for part in loc:
    if isinstance(part, int):
      path += f'[{part}]'
    elif not path or not _TYPE.fullmatch(part):
      path += f'.{printable(part, 60)}' if path else printable(part, 60)
  return path


def _is_ids(value: Any) -> bool:
  return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)
