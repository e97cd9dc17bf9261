"""The vocabulary of a checkpoint, for seqio tasks."""

from collections.abc import Iterable, Sequence
import os

import numpy as np
import seqio
import tensorflow as tf

from t5x_inference_ext.checkpoints import open_checkpoint
from t5x_inference_ext.errors import CheckpointError


class CheckpointVocabulary(seqio.Vocabulary):
  """The vocabulary of a public model or a serving checkpoint, read from its files.

  Use it as the vocabulary of a task's features. Rows end with the first of the model's end ids. In
  texts to encode, names of special tokens become their ids. Decoding drops special tokens.

  Args:
    checkpoint: Path of the checkpoint whose vocabulary the task uses.

  Raises:
    CheckpointError: There is no checkpoint, or it has no vocabulary.
  """

  def __init__(self, checkpoint: str | os.PathLike) -> None:
    super().__init__()
    self.path = os.fspath(checkpoint)
    found = open_checkpoint(checkpoint).vocabulary
    if found is None:
      raise CheckpointError(
        f'{self.path} has no vocabulary: use a seqio one, such as PassThroughVocabulary for ids'
      )
    self._vocabulary = found

  @property
  def bos_id(self) -> int | None:
    """The id in front of a text, or None. seqio does not add it: the model does."""
    return self._vocabulary.bos_id

  @property
  def eos_id(self) -> int | None:
    """The id that ends a row, or None."""
    return next(iter(self._vocabulary.end_ids), None)

  @property
  def unk_id(self) -> int | None:
    """None, because every text can be encoded without an unknown id."""
    return None

  @property
  def _base_vocab_size(self) -> int:
    return self._vocabulary.size

  def _encode(self, s: str) -> Sequence[int]:
    return self._vocabulary.encode(s)

  def _decode(self, ids: Iterable[int]) -> str:
    return self._vocabulary.decode([int(i) for i in ids])

  def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
    def encoded(text: bytes | np.ndarray) -> np.ndarray:
      data = text.item() if isinstance(text, np.ndarray) else text  # eager calls pass an array
      return np.asarray(self._encode(data.decode()), np.int32)

    ids = tf.numpy_function(encoded, [tf.convert_to_tensor(s)], tf.int32)
    ids.set_shape([None])
    return ids

  def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
    text = tf.numpy_function(lambda row: self._decode(row).encode(), [ids], tf.string)
    text.set_shape([])
    return text

  def __eq__(self, other: object) -> bool:
    if not isinstance(other, CheckpointVocabulary):
      return False
    mine, theirs = self._vocabulary, other._vocabulary
    return (mine.kind, mine.end_ids, mine.files()) == (theirs.kind, theirs.end_ids, theirs.files())

  __hash__ = None  # type: ignore[assignment]  # as of every class with __eq__ alone
