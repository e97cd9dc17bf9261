"""The rows of a calibration: token ids of a .npy file, or a text in the model's vocabulary."""

import dataclasses
import io
import os
import zlib

import numpy as np

from t5x_inference_ext.checkpoints.checkpoint import Checkpoint
from t5x_inference_ext.errors import UserError
from t5x_inference_ext.text.vocabulary import check_in_vocabulary

# The beginning of the note in checkpoints that a calibration made.
CALIBRATED_NOTE = 'rounded by GPTQ on '
# A text is cut into rows of this length, and rows after these are not read.
TEXT_LENGTH, TEXT_ROWS = 512, 128
# Attention over a whole row takes memory that grows with the square of its length.
MAX_LENGTH = 4096


@dataclasses.dataclass(frozen=True)
class CalibrationRows:
  """The tokens of a calibration text.

  Attributes:
    path: The file that they come from.
    crc32: CRC-32 of the file.
    inputs: [rows, T] int32. Model inputs, BOS first, right-padded.
    counted: [rows, T] bool. False for padding.
  """

  path: str
  crc32: int
  inputs: np.ndarray
  counted: np.ndarray

  def __str__(self) -> str:
    rows, length = self.inputs.shape
    return f'{self.path}, {rows} rows of {length} tokens, CRC-32 {self.crc32:08x}'


def read_calibration(path: str, source: Checkpoint) -> CalibrationRows:
  """Read a calibration text.

  Args:
    path: A .npy file of token ids [rows, length], in which zeros at the end of a row are padding;
      or a UTF-8 text, of which the first 128 rows of 512 tokens are used.
    source: The model, with its vocabulary.

  Raises:
    UserError: The file can't be read, is empty, or does not fit the model.
  """
  if not os.path.isfile(path):
    raise UserError(f'no file at calibration={path}')
  with open(path, 'rb') as f:
    data = f.read()
  tokens = _stored_ids(path, data) if path.endswith('.npy') else _text_ids(path, data, source)
  rows, length = tokens.shape
  longest = min(MAX_LENGTH, source.config.num_positions or MAX_LENGTH)
  if length > longest:
    raise UserError(
      f'calibration={path} has rows of {length} tokens, and at most {longest} can be used: cut them'
    )
  check_in_vocabulary(tokens, f'calibration={path}', source.config.vocab_size)
  tokens = tokens.astype(np.int32)
  counted = np.cumsum(tokens[:, ::-1] != 0, axis=1)[:, ::-1] > 0
  counted = counted[:, : counted.any(0).sum()]
  inputs = tokens[:, : counted.shape[1]]
  if source.bos_id is not None:
    inputs = np.pad(inputs, ((0, 0), (1, 0)), constant_values=source.bos_id)[:, :-1]
  return CalibrationRows(path, zlib.crc32(data), np.ascontiguousarray(inputs), counted)


def _stored_ids(path: str, data: bytes) -> np.ndarray:
  """Return the token ids [rows, length] of a .npy file."""
  try:
    tokens = np.load(io.BytesIO(data), allow_pickle=False)
  except (OSError, ValueError, EOFError) as e:
    raise UserError(f'calibration={path} is no .npy file: {str(e).splitlines()[0]}') from e
  if tokens.ndim != 2 or tokens.dtype.kind not in 'iu':
    raise UserError(
      f'calibration={path} must hold whole numbers [rows, length], got {tokens.dtype} '
      f'{list(tokens.shape)}'
    )
  tokens = tokens[(tokens != 0).any(1)]
  if not tokens.size:
    raise UserError(f'calibration={path} holds no token other than 0, which is padding')
  return tokens


def _text_ids(path: str, data: bytes, source: Checkpoint) -> np.ndarray:
  """Return the token ids [rows, length] of a text, without the tokens after the last whole row."""
  if source.vocabulary is None:
    raise UserError(
      f'{source.path} has no vocabulary to read calibration={path} with: give --vocabulary, or '
      'token ids as a .npy file'
    )
  try:
    ids = source.vocabulary.encode(data.decode('utf-8'))
  except UnicodeDecodeError as e:
    raise UserError(
      f'calibration={path} is no UTF-8 text (byte {e.start}): a file of ids must be named .npy'
    ) from e
  if not ids:
    raise UserError(f'calibration={path} is empty')
  length = min(TEXT_LENGTH, len(ids), source.config.num_positions or TEXT_LENGTH)
  rows = min(TEXT_ROWS, len(ids) // length)
  return np.asarray(ids[: rows * length], np.int64).reshape(rows, length)
