"""Rows of a run over a seqio task, in T5X's form."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from t5x_inference_ext.runs.tasks import TaskExample
from t5x_inference_ext.text.stop_texts import cut_at_stop


def predicted_row(
  example: TaskExample,
  samples: Sequence[tuple[list[int], float]],
  length: int,
  vocabulary: seqio.Vocabulary,
  mode: str,
  stop: Sequence[str] = (),
  min_new_tokens: int = 0,
) -> dict[str, Any]:
  """Return the row of a predicted example.

  Args:
    example: The example that was continued.
    samples: Tokens and score of each prediction. Several predictions are written as lists, from the
      lowest score to the highest, as with T5X's return_all_decodes.
    length: Number of tokens to pad to before decoding: some vocabularies decode padding as text.
    vocabulary: Decodes the predictions.
    mode: 'predict' or 'predict_with_aux'.
    stop: Texts that end a prediction, and are cut from it.
    min_new_tokens: Stop texts that end within this many first tokens are ignored.
  """
  samples = sorted(samples, key=lambda sample: sample[1])
  ids = np.zeros((len(samples), length), np.int32)
  for padded, (tokens, _) in zip(ids, samples):
    padded[: len(tokens)] = tokens
  texts = [_json(vocabulary.decode_tf(tf.constant(padded)).numpy()) for padded in ids]
  if stop:
    early = [vocabulary.decode(tokens[: max(0, min_new_tokens - 1)]) for tokens, _ in samples]
    texts = [
      cut_at_stop(text, stop, len(before)) if isinstance(text, str) else text
      for text, before in zip(texts, early)
    ]
  scores = [score for _, score in samples]
  single = len(samples) == 1
  row: dict[str, Any] = {
    'inputs': _pretokenized(example),
    'prediction': texts[0] if single else texts,
  }
  if mode == 'predict_with_aux':
    row['aux'] = {'scores': scores[0] if single else scores}
  return row


def scored_row(example: TaskExample, score: float) -> dict[str, Any]:
  """Return the row of a scored example."""
  return {'inputs': _pretokenized(example), 'score': score}


def _pretokenized(example: TaskExample) -> dict[str, Any]:
  return {
    name: _json(value) for name, value in example.task.items() if name.endswith('_pretokenized')
  }


def _json(value: Any) -> Any:
  """Convert numpy values to JSON values. Bytes that are not UTF-8 are replaced, not refused."""
  if isinstance(value, bytes):
    return value.decode('utf-8', errors='replace')
  if isinstance(value, (np.ndarray, np.generic)):
    return _json(value.tolist())
  if isinstance(value, list):
    return [_json(v) for v in value]
  return value
