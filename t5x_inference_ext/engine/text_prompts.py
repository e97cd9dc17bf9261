"""Tokens of text prompts, and texts of completions."""

from collections.abc import Sequence

from t5x_inference_ext.engine.inputs import plain, plain_prompts
from t5x_inference_ext.engine.request import Completion
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.text.detokenizer import Detokenizer
from t5x_inference_ext.text.vocabulary import Vocabulary

# A text, or token ids without BOS.
TextOrIds = str | Sequence[int]


def encode_prompts(
  prompts: Sequence[TextOrIds], vocabulary: Vocabulary | None
) -> tuple[list[Sequence[int]], list[bool]]:
  """Return the token ids of prompts, and for each whether it was a text.

  Raises:
    RequestError: There are texts but no vocabulary, or a text is not valid Unicode.
  """
  found = plain(prompts)
  if not isinstance(found, list) or not any(isinstance(prompt, str) for prompt in found):
    ids = plain_prompts(found)
    return ids, [False] * len(ids)
  if vocabulary is None:
    raise RequestError(
      'the prompts are text and the checkpoint has no vocabulary: give token ids, or convert the '
      'checkpoint with --vocabulary'
    )
  ids = []
  for i, prompt in enumerate(found):
    try:
      ids.append(vocabulary.encode(prompt) if isinstance(prompt, str) else plain(prompt))
    except UnicodeEncodeError:
      raise RequestError(f'prompt {i} is not valid Unicode (a lone surrogate)') from None
  return ids, [isinstance(prompt, str) for prompt in found]


def decode_completion(
  vocabulary: Vocabulary | None, prompt: Sequence[int], completion: Completion
) -> str:
  """Return the text of a completion, without the token that ended it."""
  assert vocabulary is not None
  tokens = completion.tokens[:-1] if completion.finish_reason == 'eos' else completion.tokens
  text = Detokenizer(vocabulary, prompt)
  return text.push(tokens) + text.finish()
