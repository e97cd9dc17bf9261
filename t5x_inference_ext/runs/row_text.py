"""Stop texts of rows: token ids that end a row early on the devices, and cutting its text."""

from collections.abc import Sequence
import dataclasses
from typing import Any

from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.text.detokenizer import Detokenizer
from t5x_inference_ext.text.stop_texts import StopTexts, likely_stop_ids
from t5x_inference_ext.text.vocabulary import Vocabulary


def with_early_ends(
  sampling: SamplingParams, stop: Sequence[str], vocabulary: Any, end_ids: Sequence[int] = ()
) -> SamplingParams:
  """Add the token ids that usually encode a stop text to the stop sequences of `sampling`.

  Args:
    sampling: How tokens are chosen, and which ids end the row.
    stop: Stop texts.
    vocabulary: A Vocabulary, or one of seqio. Not needed without stop texts.
    end_ids: Ids that end a row besides EOS.
  """
  ends: list[tuple[int, ...]] = [(token,) for token in end_ids]
  ends += [tuple(ids) for text in stop for ids in likely_stop_ids(vocabulary, text)]
  return dataclasses.replace(sampling, stop=(*sampling.stop, *ends)) if ends else sampling


def completed_text(
  vocabulary: Vocabulary,
  prompt: Sequence[int],
  tokens: list[int],
  sampling: SamplingParams,
  stop: Sequence[str],
) -> tuple[str, int]:
  """Return a completion's text, and the number of its tokens to keep.

  The text ends before the first stop text and before stop ids. The tokens of the stop text are
  kept.

  Args:
    vocabulary: Decodes the tokens.
    prompt: Ids of the prompt, so that the completion's first space stays.
    tokens: Generated ids.
    sampling: The row's parameters, with only the stop ids that the user gave.
    stop: Stop texts.
  """
  detokenizer, stops, parts = Detokenizer(vocabulary, prompt), StopTexts(stop), []
  for place, token in enumerate(sampling.before_stop(tokens), 1):
    text, found = stops.push(detokenizer.push([token]), place > sampling.min_new_tokens)
    parts.append(text)
    if found is not None:
      return ''.join(parts), place
  text, found = stops.push(detokenizer.finish())
  return ''.join([*parts, text, '' if found else stops.finish()]), len(tokens)
