"""Dequantization of ggml's blocks to float32.

A row of a tensor is cut into blocks, each with its own scale. Below are each type's fields, in the
order of their bytes, and the formula of a value. d and m are float16, and one byte holds two values
of 4 bits:

  Q8_0  d, 32 x int8                                        value d q
  Q4_0  d, 16 bytes: low halves, then high halves           value d (q - 8)
  Q4_1  d, m, 16 bytes likewise                             value d q + m
  Q4_K  d, m, 12 bytes of 8 scales and minima of 6 bits,    value d scale q - m minimum
        128 bytes: 4 groups of 32 low, then 32 high halves
  Q6_K  128 bytes of low 4 bits, 64 of high 2 bits,         value d scale (q - 32)
        16 scales of int8, d
"""

from collections.abc import Callable
import dataclasses

import numpy as np

_LOW = np.uint8(15)


@dataclasses.dataclass(frozen=True)
class BlockType:
  """A kind of quantized blocks.

  Attributes:
    values: Number of values in a block.
    nbytes: Bytes of a block.
    dequantize: Function from blocks [n, nbytes] uint8 to values [n, values] float32.
  """

  values: int
  nbytes: int
  dequantize: Callable[[np.ndarray], np.ndarray]


def _half(blocks: np.ndarray, place: int) -> np.ndarray:
  """Return the float16 at byte `place` of each block, as float32 [n, 1]."""
  return np.ascontiguousarray(blocks[:, place : place + 2]).view('<f2').astype(np.float32)


def _halves(packed: np.ndarray) -> np.ndarray:
  """Return the low 4 bits of bytes [n, m], followed by their high 4 bits, as float32 [n, 2m]."""
  return np.concatenate([packed & _LOW, packed >> np.uint8(4)], -1).astype(np.float32)


def _q8_0(blocks: np.ndarray) -> np.ndarray:
  return _half(blocks, 0) * blocks[:, 2:].view(np.int8)


def _q4_0(blocks: np.ndarray) -> np.ndarray:
  return _half(blocks, 0) * (_halves(blocks[:, 2:]) - np.float32(8))


def _q4_1(blocks: np.ndarray) -> np.ndarray:
  return _half(blocks, 0) * _halves(blocks[:, 4:]) + _half(blocks, 2)


def _q4_k(blocks: np.ndarray) -> np.ndarray:
  n, packed = len(blocks), blocks[:, 4:16]
  low, high, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
  # The upper 2 bits of bytes 0 to 3 belong to scales 4 to 7, those of bytes 4 to 7 to minima 4 to
  # 7.
  scales = np.concatenate([low & 63, (rest & _LOW) | (low >> 6 << 4)], 1)
  minima = np.concatenate([high & 63, (rest >> 4) | (high >> 6 << 4)], 1)
  quants = _halves(blocks[:, 16:].reshape(n * 4, 32)).reshape(n, 8, 32)
  steps = (_half(blocks, 0) * scales)[..., None]
  return (steps * quants - (_half(blocks, 2) * minima)[..., None]).reshape(n, 256)


def _q6_k(blocks: np.ndarray) -> np.ndarray:
  n = len(blocks)
  packed, upper = blocks[:, :128].reshape(n, 2, 64), blocks[:, 128:192].reshape(n, 2, 1, 32)
  low = np.concatenate([packed & _LOW, packed >> np.uint8(4)], -1).reshape(n, 2, 4, 32)
  high = upper >> np.array([0, 2, 4, 6], np.uint8)[:, None] & np.uint8(3)
  quants = (low | high << np.uint8(4)).astype(np.float32) - np.float32(32)
  scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8)
  steps = (_half(blocks, 208) * scales)[..., None]
  return (steps * quants.reshape(n, 16, 16)).reshape(n, 256)


BLOCK_TYPES = {
  'Q4_0': BlockType(32, 18, _q4_0),
  'Q4_1': BlockType(32, 20, _q4_1),
  'Q8_0': BlockType(32, 34, _q8_0),
  'Q4_K': BlockType(256, 144, _q4_k),
  'Q6_K': BlockType(256, 210, _q6_k),
}
