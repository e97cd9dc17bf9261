"""Conversion of request bodies to engine requests: token ids and sampling parameters."""

from collections.abc import Mapping, Sequence
import contextlib
import json
import secrets
from typing import Any

from t5x_inference_ext.engine.adapters import NO_ADAPTERS, AdapterNames
from t5x_inference_ext.engine.inputs import check_tokens
from t5x_inference_ext.engine.request import Request
from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.errors import CheckpointError, RequestError, UserError, printable
from t5x_inference_ext.server.api_errors import ApiError, invalid
from t5x_inference_ext.server.bodies import ChatBody, GenerationBody, Message
from t5x_inference_ext.server.response_formats import grammar_of, refused_grammar
from t5x_inference_ext.text.settings import TextSettings
from t5x_inference_ext.text.stop_texts import check_stop_texts
from t5x_inference_ext.text_files import parse_json

DEFAULT_TOKENS = 16  # default max_tokens of a completion, as in OpenAI's API
# Sampling parameter of the engine -> its name in requests.
_NAMES = {'min_new_tokens': 'min_tokens', 'max_new_tokens': 'max_tokens'}


class Translator:
  """Converts request bodies to engine requests.

  Args:
    settings: The checkpoint's text settings: vocabulary, BOS, chat template.
    vocab_size: V.
    max_length: Maximum number of tokens of a prompt and its answer together, BOS included.
    adapters: Names of the adapters that requests can choose, as models.
  """

  def __init__(
    self,
    settings: TextSettings,
    vocab_size: int,
    max_length: int,
    adapters: AdapterNames = NO_ADAPTERS,
  ) -> None:
    self.adapters = adapters
    self.settings, self.vocabulary, self._chat = settings, settings.vocabulary, settings.chat
    self._vocab_size, self.max_length = vocab_size, max_length

  @property
  def bos(self) -> tuple[int, ...]:
    """The ids in front of every prompt: [BOS] or []."""
    return self.settings.front

  def prompt_ids(self, prompt: str | Sequence[int], param: str = 'prompt') -> list[int]:
    """Return the token ids of a prompt, without BOS.

    Raises:
      ApiError: Ids outside the vocabulary, or a text that can't be encoded.
    """
    if not isinstance(prompt, str):
      try:
        check_tokens(param, prompt, self._vocab_size)
      except RequestError as error:
        raise invalid(str(error), param) from None
      return list(prompt)
    if self.vocabulary is None:
      raise invalid(
        f'{param} is text, and the vocabulary of this model is not known: send token ids', param
      )
    try:
      return self.vocabulary.encode(prompt)
    except UnicodeEncodeError:
      raise invalid(f'{param} is not valid Unicode (a lone surrogate)', param) from None

  def chat_ids(
    self,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    values: Mapping[str, Any] | None,
  ) -> tuple[int, ...]:
    """Return the token ids of a conversation, BOS included.

    Raises:
      ApiError: The checkpoint has no chat template, or the template refuses the messages.
    """
    if self._chat is None or self.vocabulary is None:
      raise invalid(
        'this checkpoint has no chat template: use /v1/completions', 'messages', 'no_chat_template'
      )
    bos, ends = self.settings.bos_id, self.settings.end_ids
    reserved = {'messages', 'tools', 'add_generation_prompt', 'bos_token', 'eos_token'}
    if values and reserved & values.keys():
      raise invalid(
        f'chat_template_kwargs holds {sorted(reserved & values.keys())[0]}, which the server sets',
        'chat_template_kwargs',
      )
    try:
      text = self._chat.render(
        [_message(i, message) for i, message in enumerate(messages)],
        tools=tools,
        bos_token='' if bos is None else self._name(bos),
        eos_token=self._name(ends[0]) if ends else '',
        **dict(values or {}),
      )
    except (RequestError, CheckpointError) as error:
      raise invalid(str(error), 'messages', 'chat_template_failed') from None
    ids = self.prompt_ids(text, 'messages')
    # The template writes BOS as text, unless BOS has no text.
    return (*(() if bos is None or self._name(bos) else (bos,)), *ids)

  def _name(self, token: int) -> str:
    assert self.vocabulary is not None
    return self.vocabulary.piece(token, special=True).decode(errors='replace')

  def room(self, length: int, param: str) -> int:
    """Return the maximum number of new tokens after a prompt of `length` tokens, BOS included.

    Raises:
      ApiError: There is no room for a new token, or the prompt is empty.
    """
    if not length:
      raise invalid(f'{param} is empty, and this model has no BOS to start from', param)
    room = self.max_length + 1 - length
    if room < 1:
      raise invalid(
        f'{param} has {length} tokens, and this server takes at most {self.max_length} '
        '(--max_length): shorten it',
        param,
        'context_length_exceeded',
      )
    return room

  def request(
    self, body: GenerationBody, tokens: Sequence[int], top: int, param: str, seed: int
  ) -> Request:
    """Return the request of one prompt.

    Args:
      body: The body of the HTTP request.
      tokens: Token ids, BOS included.
      top: Number of most likely tokens to return.
      param: Name of the field that the prompt came from.
      seed: Seed of the first sample.

    Raises:
      ApiError: The prompt is too long, too many tokens are requested, or an option is invalid.
    """
    adapter = body.model if body.model in self.adapters.prompts else None
    length = len(tokens) and len(self.adapters.prompt(adapter)) + len(tokens)
    room = self.room(length, param)
    chat = isinstance(body, ChatBody)
    limit, name = body.max_tokens, 'max_tokens'
    if isinstance(body, ChatBody) and body.max_completion_tokens is not None:
      limit, name = body.max_completion_tokens, 'max_completion_tokens'
    if limit is None:
      limit = room if chat else min(DEFAULT_TOKENS, room)
    if limit > room:
      raise invalid(
        f'{name}={limit} does not fit: the prompt has {length} tokens, and prompt and answer '
        f'together at most {self.max_length} (--max_length): ask for at most {room}',
        name,
        'context_length_exceeded',
      )
    ends = () if body.ignore_eos else self.settings.end_ids
    return Request(
      tuple(tokens),
      tuple((seed + i) % 2**32 for i in range(body.choices)),
      limit,
      self.sampling(body),
      end_ids=ends,
      stop_texts=body.stops,
      text=self.vocabulary is not None,
      top_log_probs=top,
      salt=body.cache_salt,
      grammar=grammar_of(body.response_format),
      cache_reply=chat,
      adapter=adapter,
    )

  def given_tokens(self, request: Request) -> tuple[int, ...]:
    """Return a checked request's tokens as its client gave them: without a soft prompt."""
    return request.tokens[len(self.adapters.prompt(request.adapter)) :]

  def sampling(self, body: GenerationBody) -> SamplingParams:
    """Return sampling parameters; the checkpoint's recommendations are the defaults.

    Raises:
      ApiError: A value is out of its range.
    """
    defaults: dict[str, Any] = {'temperature': 1.0, **self.settings.generation_defaults}
    given = {
      'temperature': body.temperature,
      'top_p': body.top_p,
      'top_k': None if body.top_k is None else max(body.top_k, 0),
      'repetition_penalty': body.repetition_penalty,
      'frequency_penalty': body.frequency_penalty,
      'presence_penalty': body.presence_penalty,
      'min_new_tokens': body.min_tokens,
      'logit_bias': None if body.logit_bias is None else self._bias(body.logit_bias),
    }
    try:
      check_stop_texts(body.stops)
    except RequestError as error:
      raise invalid(str(error), 'stop') from None
    try:
      return SamplingParams(**defaults | {k: v for k, v in given.items() if v is not None})
    except RequestError as error:
      raise refused(error) from None

  def _bias(self, bias: Mapping[str, float]) -> dict[int, float]:
    found = {}
    for name, value in bias.items():
      known = name.isascii() and name.isdecimal() and len(name) < 10
      if not known or int(name) >= self._vocab_size or str(int(name)) != name:
        raise invalid(
          f'logit_bias holds {printable(name, 40)!r}: keys are token ids from 0 to '
          f'{self._vocab_size - 1}',
          'logit_bias',
        )
      found[int(name)] = value
    return found


def first_seed(body: GenerationBody) -> int:
  """Return the seed of a request's first sample: the one given, or a random one."""
  return secrets.randbits(32) if body.seed is None else body.seed % 2**32


def refused(error: UserError) -> ApiError:
  """Convert an engine error, whose message begins with an option's name, to an ApiError."""
  message = str(error)
  if isinstance(error, RequestError) and message.startswith('grammar: '):
    return refused_grammar(error)
  name = message.split()[0]
  shown = _NAMES.get(name, name)
  param = shown if shown in GenerationBody.model_fields else None
  return invalid(message.replace(name, shown, 1) if param else message, param, 'invalid_value')


def _message(index: int, message: Message) -> dict[str, Any]:
  """Convert a message to the form for templates: text content, call arguments as objects."""
  fields = message.model_dump(exclude_none=True)
  if isinstance(message.content, list):
    texts = []
    for i, part in enumerate(message.content):
      if part.get('type') != 'text' or not isinstance(part.get('text'), str):
        where = f'messages[{index}].content[{i}]'
        raise invalid(f'{where} should be {{"type": "text", "text": TEXT}}', where)
      texts.append(part['text'])
    fields['content'] = '\n'.join(texts)
  fields.setdefault('content', '')
  for call in fields.get('tool_calls', []):
    function = call.get('function')
    if isinstance(function, dict) and isinstance(function.get('arguments'), str):
      with contextlib.suppress(ValueError):  # otherwise the template gets the arguments as text
        call['function'] = {**function, 'arguments': parse_json(function['arguments'])}
  return fields


def size_of(value: Any) -> int:
  """Return the bytes of a text, the number of ids, or the bytes of a value as JSON."""
  if isinstance(value, str):
    return len(value.encode('utf-8', 'surrogatepass'))
  if isinstance(value, list) and value and type(value[0]) is int:
    return len(value)
  return len(json.dumps(value))
