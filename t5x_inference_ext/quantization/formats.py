"""Formats of weights: the dtype of each matrix and table of a model, as data.

A format is one dtype for all matrices, with other bits for some. The tables of the vocabulary are
float, unless the format gives them bits. Its text, such as 'int8', 'int4,mlp_output:8' or
'int8,embedding:8', is what headers, receipts and saved programs record.
"""

import contextlib
import dataclasses
import functools

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from t5x_inference_ext import params
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.errors import RequestError, UserError, printable

# Dtypes that the matrices of a serving checkpoint can have.
SERVED_WEIGHTS = ('int8', 'int4', 'bfloat16')
# Dtypes of quantized weights, by their bits.
QUANTIZED = {8: np.dtype(np.int8), 4: np.dtype(ml_dtypes.int4)}
_BITS = {dtype: bits for bits, dtype in QUANTIZED.items()}
_FLOATS = {'float32': np.dtype(np.float32), 'bfloat16': np.dtype(ml_dtypes.bfloat16)}
_DTYPES = {**_FLOATS, **{dtype.name: dtype for dtype in _BITS}}
# Bits of a quantized table.
_TABLE_BITS = 8


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
  """The dtypes of a model's matrices and tables.

  Attributes:
    name: Dtype of the matrices: 'float32', 'bfloat16', 'int8' or 'int4'.
    exceptions: (tensor, bits) of the matrices with other bits, only in quantized formats, and of
      the quantized tables, by name.
  """

  name: str
  exceptions: tuple[tuple[str, int], ...] = ()

  def __str__(self) -> str:
    return ','.join([self.name, *(f'{tensor}:{bits}' for tensor, bits in self.exceptions)])

  @property
  def quantized(self) -> bool:
    """Whether the matrices are integers with scales."""
    return is_quantized(_DTYPES[self.name])

  @property
  def scaled(self) -> frozenset[str]:
    """The weights that are integers with scales: params.MATRICES, names of params.TABLES."""
    tables = (name for name, _ in self.exceptions if name in params.TABLES)
    return frozenset([*([params.MATRICES] if self.quantized else []), *tables])

  def dtype(self, *tensors: str) -> np.dtype:
    """Return a checkpoint's dtype of a matrix or table, or of several matrices in one array.

    Without a name, return that of the matrices without bits of their own. Several matrices have the
    dtype of the widest. Float tables beside integers are bfloat16.
    """
    return max(map(self._own_dtype, tensors), key=bits_of, default=_DTYPES[self.name])

  def _own_dtype(self, tensor: str) -> np.dtype:
    bits = dict(self.exceptions).get(tensor)
    if bits is not None:
      return QUANTIZED[bits]
    is_float_table = self.quantized and tensor in (*params.TABLES, 'position_embedding')
    return _DTYPES['bfloat16' if is_float_table else self.name]

  def with_float_tables(self) -> 'WeightFormat':
    """Return the format with equal matrices and no quantized table."""
    matrices = (e for e in self.exceptions if e[0] not in params.TABLES)
    return dataclasses.replace(self, exceptions=tuple(matrices))

  def on_devices(self, dtype: str) -> str:
    """Return the text of the format on devices, where float matrices have the dtype `dtype`."""
    return str(self if self.quantized else dataclasses.replace(self, name=dtype))


@functools.lru_cache(maxsize=256)
def served_format(weights: str, config: ModelConfig) -> str:
  """Return the text of a serving checkpoint's format, whose exceptions may be in any order.

  Raises:
    UserError: A serving checkpoint of the model can't have this format.
  """
  name, _, bits = weights.partition(',')
  if name not in SERVED_WEIGHTS:
    raise RequestError(
      f'weights must be one of {", ".join(SERVED_WEIGHTS)}, got {printable(weights, 80)}'
    )
  return with_bits(name, bits, config)


@functools.lru_cache(maxsize=256)
def weight_format(text: str) -> WeightFormat:
  """Return the format that `text` names.

  Raises:
    ValueError: No format has this text.
  """
  name, *exceptions = text.split(',')
  with contextlib.suppress(ValueError):
    found = WeightFormat(name, tuple(sorted(map(_exception, exceptions))))
    sound = name in _DTYPES and all(
      bits == _TABLE_BITS if tensor in params.TABLES else found.quantized
      for tensor, bits in found.exceptions
    )
    if sound and str(found) == text:
      return found
  raise ValueError(f'{printable(text, 80)} is no format of weights')


def with_bits(weights: str, bits: str, config: ModelConfig) -> str:
  """Return the format of a model's matrices with other bits for some, or with quantized tables.

  Matrices that share a scale have equal bits: bits for one of them are for all.

  Args:
    weights: Dtype of the matrices. Bits for matrices are for 'int8' and 'int4'.
    bits: 'TENSOR:BITS,...', as in 'mlp_output:8,embedding:8'; '' changes nothing.
    config: The model.

  Raises:
    UserError: A tensor is no matrix or table of the model, can't have these bits, or shares a scale
      with one that is given other bits.
  """
  if not bits:
    return weights
  base = weight_format(weights)
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
        f'bits: {printable(name, 80)} is no matrix of this model, and no table of its vocabulary: '
        f'it has {", ".join(scales)}'
      )
    if name in params.TABLES and count != _TABLE_BITS:
      raise UserError(
        f'bits={printable(each, 80)}: a table is int8 or float, so give {name}:{_TABLE_BITS}'
      )
    if name not in params.TABLES and not base.quantized:
      raise UserError(
        f'bits={printable(each, 80)} is for int8 and int4 weights, not for {weights}, with which '
        f'only tables can be quantized: {", ".join(n for n in scales if n in params.TABLES)}'
      )
    other, before = given.setdefault(scales[name], (name, count))
    if before != count:
      raise UserError(
        f'bits: {other} and {name} share one scale a channel, so both have {before} or both {count}'
      )
  exceptions = {
    name: given[scale][1]
    for name, scale in scales.items()
    if scale in given and QUANTIZED[given[scale][1]] != base.dtype(name)
  }
  return str(WeightFormat(base.name, tuple(sorted(exceptions.items()))))


def _exception(text: str) -> tuple[str, int]:
  name, _, bits = text.partition(':')
  if not name or bits not in map(str, QUANTIZED):
    raise ValueError(text)
  return name, int(bits)
