"""Rows of a run over a seqio task, as T5X writes them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from t5x_inference_ext.runs.tasks import TaskExample


def predicted_row(
  example: TaskExample,
  samples: Sequence[tuple[list[int], float]],
  length: int,
  vocabulary: seqio.Vocabulary,
  mode: str,
) -> dict[str, Any]:
  """A predicted example.

  Args:
    example: what was continued.
    samples: tokens and scores. Several come out from the worst to the best, as lists, which is T5X's return_all_decodes.
    length: that tokens are padded to: vocabularies that decode padding show it.
    vocabulary: decodes.
    mode: 'predict' or 'predict_with_aux'.
  """
  samples = sorted(samples, key=lambda sample: sample[1])
  ids = np.zeros((len(samples), length), np.int32)
  for row, (tokens, _) in zip(ids, samples):
    row[: len(tokens)] = tokens
  texts = [_json(vocabulary.decode_tf(tf.constant(row)).numpy()) for row in ids]
  scores = [score for _, score in samples]
  if len(samples) == 1:
    (texts,), (scores,) = texts, scores
  aux = {'aux': {'scores': scores}} if mode == 'predict_with_aux' else {}
  return {'inputs': _pretokenized(example), 'prediction': texts, **aux}


def scored_row(example: TaskExample, value: float) -> dict[str, Any]:
  """A scored example."""
  return {'inputs': _pretokenized(example), 'score': value}


def _pretokenized(example: TaskExample) -> dict[str, Any]:
  return {
    name: _json(value) for name, value in example.task.items() if name.endswith('_pretokenized')
  }


def _json(value: Any) -> Any:
  """numpy's values as JSON's; bytes that are no UTF-8 are replaced rather than refused at the end of a run."""
  if isinstance(value, bytes):
    return value.decode('utf-8', errors='replace')
  if isinstance(value, (np.ndarray, np.generic)):
    return _json(value.tolist())
  if isinstance(value, list):
    return [_json(v) for v in value]
  return value
