"""Formats of weights: the dtype of each matrix of a model, as data.

A format is one dtype for all matrices, with other bits for some. Its text, such as 'int8' or
'int4,mlp_output:8', is what headers, receipts and saved programs record.
"""

import contextlib
import dataclasses
import functools

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from t5x_inference_ext import params
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.errors import UserError, printable

# Dtypes that the matrices of a serving checkpoint can have.
SERVED_WEIGHTS = ('int8', 'int4', 'bfloat16')
# Dtypes of quantized matrices, by their bits.
QUANTIZED = {8: np.dtype(np.int8), 4: np.dtype(ml_dtypes.int4)}
_BITS = {dtype: bits for bits, dtype in QUANTIZED.items()}
_FLOATS = {'float32': np.dtype(np.float32), 'bfloat16': np.dtype(ml_dtypes.bfloat16)}
_DTYPES = {**_FLOATS, **{dtype.name: dtype for dtype in _BITS}}


def is_quantized(dtype: DTypeLike) -> bool:
  """Return whether values of a dtype are units of a scale: int8 or int4."""
  return np.dtype(dtype) in _BITS


def bits_of(dtype: DTypeLike) -> int:
  """Return the bits of a value on the devices, where two int4 values share a byte."""
  dtype = np.dtype(dtype)
  return _BITS.get(dtype, 8 * dtype.itemsize)


def stored_size(count: int, dtype: DTypeLike) -> int:
  """Return the bytes of `count` values on the devices, rounded up."""
  return -(-count * bits_of(dtype) // 8)


@dataclasses.dataclass(frozen=True)
class WeightFormat:
  """The dtypes of a model's matrices.

  Attributes:
    name: Dtype of the matrices: 'float32', 'bfloat16', 'int8' or 'int4'.
    exceptions: (tensor, bits) of the matrices with other bits, by name; only in quantized formats.
  """

  name: str
  exceptions: tuple[tuple[str, int], ...] = ()

  def __str__(self) -> str:
    return ','.join([self.name, *(f'{tensor}:{bits}' for tensor, bits in self.exceptions)])

  @property
  def quantized(self) -> bool:
    """Whether the matrices are integers with scales."""
    return is_quantized(_DTYPES[self.name])

  def dtype(self, *tensors: str) -> np.dtype:
    """Return the dtype of a matrix, or the widest of several that one array holds."""
    exceptions = dict(self.exceptions)
    own = (QUANTIZED[exceptions[t]] if t in exceptions else _DTYPES[self.name] for t in tensors)
    return max(own, key=bits_of, default=_DTYPES[self.name])


@functools.lru_cache(maxsize=256)
def weight_format(text: str) -> WeightFormat:
  """Return the format that `text` names.

  Raises:
    ValueError: No format has this text.
  """
  name, *exceptions = text.split(',')
  with contextlib.suppress(ValueError):
    found = WeightFormat(name, tuple(sorted(map(_exception, exceptions))))
    if name in _DTYPES and (found.quantized or not exceptions) and str(found) == text:
      return found
  raise ValueError(f'{printable(text, 80)} is no format of weights')


def with_bits(weights: str, bits: str, config: ModelConfig) -> str:
  """Return the format of a model's matrices with other bits for some.

  Matrices that share a scale have equal bits: bits for one of them are for all.

  Args:
    weights: 'int8' or 'int4'.
    bits: 'TENSOR:BITS,...', as in 'mlp_output:8'; '' changes nothing.
    config: The model.

  Raises:
    UserError: A tensor is no matrix of the model, has other bits than 8 and 4, or shares a scale
      with one that is given other bits.
  """
  if not bits:
    return weights
  base = weight_format(weights)
  if not base.quantized:
    raise UserError(f'bits={printable(bits, 80)} is for int8 and int4 weights, not for {weights}')
  scales = {name: p.scale for name, p in params.parameters(config).items() if p.scale is not None}
  given: dict[str, tuple[str, int]] = {}  # name of a scale -> the tensor that was named, its bits
  for each in bits.split(','):
    try:
      name, count = _exception(each)
    except ValueError as e:
      raise UserError(
        f'bits must be TENSOR:8 or TENSOR:4, separated by commas, got {printable(each, 80)}'
      ) from e
    if name not in scales:
      raise UserError(
        f'bits: {printable(name, 80)} is no matrix of this model, which has {", ".join(scales)}'
      )
    other, before = given.setdefault(scales[name], (name, count))
    if before != count:
      raise UserError(
        f'bits: {other} and {name} share one scale a channel, so both have {before} or both {count}'
      )
  exceptions = {
    name: given[scale][1]
    for name, scale in scales.items()
    if scale in given and QUANTIZED[given[scale][1]] != base.dtype()
  }
  return str(WeightFormat(base.name, tuple(sorted(exceptions.items()))))


def _exception(text: str) -> tuple[str, int]:
  name, _, bits = text.partition(':')
  if not name or bits not in map(str, QUANTIZED):
    raise ValueError(text)
  return name, int(bits)
