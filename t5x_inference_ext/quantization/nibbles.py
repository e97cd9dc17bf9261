"""int4 matrices as bytes: a byte has two rows' values of a column, the even row's in low bits."""

import ml_dtypes
import numpy as np

INT4 = np.dtype(ml_dtypes.int4)
LOW, HIGH = np.uint8(0x0F), np.uint8(0xF0)


def packed_rows(rows: int) -> int:
  """Return the number of rows of bytes that hold `rows` rows of int4 values."""
  return -(-rows // 2)


def packed_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
  """Return the shape [.., rows / 2, columns] of the bytes of int4 matrices [.., rows, columns]."""
  return (*shape[:-2], packed_rows(shape[-2]), shape[-1])


def pack(values: np.ndarray) -> np.ndarray:
  """Return the bytes [.., rows / 2, columns] uint8 of int4 values [.., rows, columns].

  If the number of rows is odd, the last high bits are zero.
  """
  units = values.view(np.uint8) & LOW
  packed = units[..., 0::2, :].copy()
  odd = units[..., 1::2, :]
  packed[..., : odd.shape[-2], :] |= odd << np.uint8(4)
  return packed


def unpack(packed: np.ndarray, first: int, rows: int) -> np.ndarray:
  """Return rows [first, first + rows) of the int4 values of `packed`; `first` is 0 or 1."""
  values = np.empty((*packed.shape[:-2], 2 * packed.shape[-2], packed.shape[-1]), np.uint8)
  values[..., 0::2, :] = packed & LOW
  values[..., 1::2, :] = packed >> np.uint8(4)
  return values[..., first : first + rows, :].view(INT4)
