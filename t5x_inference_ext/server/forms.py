"""Forms: answers as the API's JSON objects, whole or as the chunks of a stream."""

from collections.abc import Sequence
import secrets
import time
from typing import Any

from t5x_inference_ext.engine.request import Event, Sample
from t5x_inference_ext.server.bodies import ChatBody, CompletionBody
from t5x_inference_ext.server.token_text import TokenTexts

# The engine's finish reason -> the API's finish reason.
FINISHES = {'eos': 'stop', 'stop': 'stop', 'length': 'length'}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
  """Return the API's token counts. BOS and the token that ends a sample are counted."""
  return {
    'prompt_tokens': prompt_tokens,
    'completion_tokens': completion_tokens,
    'total_tokens': prompt_tokens + completion_tokens,
  }


class _Form:
  """The fields that all chunks of an answer share.

  Args:
    kind: Prefix of the answer's id.
    name: Value of the field `object` in a whole answer.
    chunk_name: Value of the field `object` in a chunk.
    model: Name of the model.
  """

  def __init__(self, kind: str, name: str, chunk_name: str, model: str) -> None:
    self.id = f'{kind}-{secrets.token_hex(12)}'  # can't be guessed
    self._name = name
    self._head = {'id': self.id, 'object': chunk_name, 'created': int(time.time()), 'model': model}

  def _whole(self, choices: list[dict[str, Any]], counts: dict[str, int]) -> dict[str, Any]:
    return {**self._head, 'object': self._name, 'choices': choices, 'usage': counts}

  def chunk(self, *choices: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Return a chunk of a stream."""
    return {**self._head, 'choices': choices, **more}


class CompletionForm(_Form):
  """Answers of /v1/completions.

  Args:
    body: The request.
    model: Name of the model.
    texts: Converts tokens and log-probabilities to texts.
    echoes: For requests with `echo`, each prompt's text and its tokens' log-probabilities (from
      TokenTexts.completion, or None).
    prompt_ids: The tokens of each prompt, without BOS.
  """

  def __init__(
    self,
    body: CompletionBody,
    model: str,
    texts: TokenTexts,
    echoes: Sequence[tuple[str, dict[str, Any] | None]],
    prompt_ids: Sequence[Sequence[int]],
  ) -> None:
    super().__init__('cmpl', 'text_completion', 'text_completion', model)
    self._body, self._texts, self._echoes, self._prompts = body, texts, echoes, prompt_ids
    self._offsets: dict[int, int] = {}

  def whole(self, samples: Sequence[Sequence[Sample]], counts: dict[str, int]) -> dict[str, Any]:
    """Return the whole answer.

    Args:
      samples: The samples of each prompt.
      counts: See `usage`.
    """
    choices = []
    for prompt, each in enumerate(samples):
      for number, sample in enumerate(each):
        log_probs = self._log_probs(prompt, sample, len(self._echo(prompt)[0]))
        choices.append(
          self._choice(
            prompt,
            number,
            self._echo(prompt)[0] + sample.text,
            sample.tokens,
            joined(self._echo(prompt)[1], log_probs),
            sample.finish_reason,
          )
        )
    return self._whole(choices, counts)

  def first(self, prompt: int, sample: int) -> dict[str, Any] | None:
    """Return a sample's first chunk, which holds the echoed prompt; None without echo."""
    text, log_probs = self._echo(prompt)
    self._offsets[prompt * self._body.choices + sample] = len(text)
    if not text and log_probs is None:
      return None
    return self.chunk(self._choice(prompt, sample, text, [], log_probs, None))

  def next(self, prompt: int, event: Event) -> dict[str, Any] | None:
    """Return the chunk of an event; None if there is nothing to send."""
    log_probs = None
    if self._body.logprobs is not None:
      index = prompt * self._body.choices + event.sample
      log_probs = self._log_probs(prompt, event, self._offsets[index])
      self._offsets[index] += sum(len(self._texts.text(token)) for token in event.tokens)
    if not event.text and event.finish is None and not (log_probs or self._body.return_token_ids):
      return None
    return self.chunk(
      self._choice(prompt, event.sample, event.text, event.tokens, log_probs, event.finish)
    )

  def _echo(self, prompt: int) -> tuple[str, dict[str, Any] | None]:
    return self._echoes[prompt] if self._echoes else ('', None)

  def _log_probs(self, prompt: int, new: Event | Sample, offset: int) -> dict[str, Any] | None:
    wanted = self._body.logprobs
    if wanted is None:
      return None
    return self._texts.completion(new.tokens, new.log_probs, new.top, offset, wanted)

  def _choice(
    self,
    prompt: int,
    sample: int,
    text: str,
    tokens: Sequence[int],
    log_probs: dict[str, Any] | None,
    finish: str | None,
  ) -> dict[str, Any]:
    choice = {
      'index': prompt * self._body.choices + sample,
      'text': text,
      'logprobs': log_probs,
      'finish_reason': None if finish is None else FINISHES.get(finish, finish),
    }
    if self._body.return_token_ids:
      choice['token_ids'] = list(tokens)
      choice['prompt_token_ids'] = list(self._prompts[prompt])
    return choice


class ChatForm(_Form):
  """Answers of /v1/chat/completions; arguments are those of CompletionForm."""

  def __init__(self, body: ChatBody, model: str, texts: TokenTexts) -> None:
    super().__init__('chatcmpl', 'chat.completion', 'chat.completion.chunk', model)
    self._body, self._texts = body, texts

  def whole(self, samples: Sequence[Sequence[Sample]], counts: dict[str, int]) -> dict[str, Any]:
    """Return the answer; arguments are those of CompletionForm.whole."""
    choices = [
      self._choice(
        index,
        {'message': {'role': 'assistant', 'content': sample.text, 'refusal': None}},
        sample,
        sample.finish_reason,
      )
      for index, sample in enumerate(samples[0])
    ]
    return self._whole(choices, counts)

  def first(self, prompt: int, sample: int) -> dict[str, Any] | None:
    """Return the first chunk of a sample, with its role."""
    del prompt
    return self.chunk(
      {
        'index': sample,
        'delta': {'role': 'assistant', 'content': ''},
        'logprobs': None,
        'finish_reason': None,
      }
    )

  def next(self, prompt: int, event: Event) -> dict[str, Any] | None:
    """Return the chunk of an event; None if there is nothing to send."""
    del prompt
    tells = self._body.logprobs or self._body.return_token_ids
    if not event.text and event.finish is None and not tells:
      return None
    delta = {'content': event.text} if event.text or event.finish is None else {}
    return self.chunk(self._choice(event.sample, {'delta': delta}, event, event.finish))

  def _choice(
    self, index: int, content: dict[str, Any], new: Event | Sample, finish: str | None
  ) -> dict[str, Any]:
    choice = {
      'index': index,
      **content,
      'logprobs': self._texts.chat(new.tokens, new.log_probs, new.top)
      if self._body.logprobs
      else None,
      'finish_reason': None if finish is None else FINISHES.get(finish, finish),
    }
    if self._body.return_token_ids:
      choice['token_ids'] = list(new.tokens)
    return choice


def joined(first: dict[str, Any] | None, second: dict[str, Any] | None) -> dict[str, Any] | None:
  """Concatenate the log-probabilities of two consecutive parts of a text."""
  if first is None or second is None:
    return second if first is None else first
  return {name: None if first[name] is None else first[name] + second[name] for name in first}
