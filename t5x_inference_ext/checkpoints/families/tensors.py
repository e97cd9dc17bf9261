"""Canonical tensors as views of a family's stored tensors (one stored tensor per layer)."""

from collections.abc import Callable, Mapping
import itertools
import re

import ml_dtypes
import numpy as np
import numpy.typing as npt

from t5x_inference_ext import params
from t5x_inference_ext.checkpoints.families.family import FamilyModel
from t5x_inference_ext.checkpoints.tensor import Cast, Stack, Tensor
from t5x_inference_ext.checkpoints.views import Affine, Constant, Reordered, Reshaped, Transposed
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.errors import CheckpointError, name_list, printable

_HEADS = {'query': 'num_heads', 'key': 'num_kv_heads', 'value': 'num_kv_heads'}
_CODEGEN_BLOCKS = 4
# Stored tensors that are not parameters: masks and rotary frequencies of old transformers versions.
_CONSTANTS = re.compile(
  r'.*(\.rotary_emb\.(inv_freq|scale)|\.attn\.(masked_)?bias|\.attention\.(masked_)?bias|causal_mask'
  r'|embed_positions)$'
)
_FLOATS = (np.float32, ml_dtypes.bfloat16)


def canonical_tensors(
  model: FamilyModel, stored: Mapping[str, Tensor], where: str
) -> dict[str, Tensor]:
  """Return the canonical tensors of a model, by name.

  Args:
    model: The model, and where its tensors are.
    stored: The stored tensors, by name.
    where: Path of the stored tensors, for messages.

  Raises:
    CheckpointError: A tensor is missing, has a wrong shape, or is not used by the model.
  """
  used: set[str] = set()

  def take(name: str) -> Tensor:
    if name not in stored:
      raise CheckpointError(f'{where} lacks {name}, which a model of this family has')
    used.add(name)
    return _as_float(stored[name], name)

  found = {name: _tensor(model, name, take, where) for name in params.parameters(model.config)}
  head = f'{model.modules["head"]}.weight'
  ignored = {head} if model.config.tied_head else set()
  extra = [n for n in stored if n not in used | ignored and not _CONSTANTS.fullmatch(n)]
  if extra:
    raise CheckpointError(
      f'{where} holds tensors that a model of this family does not use: '
      f'{name_list(sorted(extra), len(extra))}'
    )
  return found


def _tensor(model: FamilyModel, name: str, take: Callable[[str], Tensor], where: str) -> Tensor:
  """Return one canonical tensor; `take(name)` returns a stored tensor."""
  c, p, factor = model.config, params.parameters(model.config)[name], model.factor(name)
  if name in model.absent:
    return Constant(p.shape, factor if p.kind == 'norm' else 0.0, where)
  is_bias = p.kind == 'bias' and name.endswith('_bias')
  base = name.removesuffix('_bias') if is_bias else name
  leaves = model.norm_leaves if base.endswith('_norm') else ('weight', 'bias')
  stored_name = f'{model.modules[base]}.{leaves[is_bias]}'
  layered = p.axes[0] == params.LAYERS_AXIS
  shape = p.shape[1:] if layered else p.shape
  is_matrix = p.kind == 'matrix'
  columns_axis = 0 if not is_matrix or model.transposed else 1
  if is_matrix and model.transposed:
    shape = shape[::-1]

  def one(stored_name: str) -> Tensor:
    if base in ('query_norm', 'key_norm'):
      return _head_norm(model, base, stored_name, take)
    tensor = take(stored_name)
    if base in _HEADS or model.fused == 'lucidrains' and base in ('linear', 'gate'):
      return _heads(model, base, tensor, shape, columns_axis, stored_name)
    if base == 'position_embedding' and model.skipped_positions:
      skipped = model.skipped_positions
      _check_shape(tensor, (shape[0] + skipped, shape[1]), stored_name)
      return Reordered(tensor, 0, np.arange(skipped, shape[0] + skipped), 1024)
    _check_shape(tensor, shape, stored_name)
    return tensor

  names = [stored_name.replace('{}', str(i)) for i in range(c.num_layers if layered else 1)]
  layers = [one(stored_name) for stored_name in names]
  tensor: Tensor = Stack(layers, 0) if layered else layers[0]
  if is_matrix and model.transposed:
    tensor = Transposed(tensor)
  offset = model.norm_offset if p.kind == 'norm' else 0.0
  if p.kind == 'norm' and c.norm_scale == 'zero':  # factor * (1 + scale) is 1 + another scale
    offset += (factor - 1) / factor
  if factor != 1 or offset:
    return Affine(tensor, factor, offset)
  if p.kind in ('norm', 'bias') and tensor.dtype != np.float32:
    return Cast(tensor, np.float32, name)
  return tensor


def _heads(
  model: FamilyModel, name: str, tensor: Tensor, shape: tuple[int, ...], axis: int, stored_name: str
) -> Tensor:
  """Return the canonical tensor `name` out of a stored matrix or bias, which may be fused.

  Args:
    model: The model.
    name: 'query', 'key' or 'value', or 'linear' or 'gate'.
    tensor: The stored matrix or bias.
    shape: Shape of the result.
    axis: Axis of the heads' dimensions.
    stored_name: Name of the stored tensor.
  """
  c = model.config
  stored_shape = list(shape)
  if model.fused:
    stored_shape[axis] = (c.num_heads + 2 * c.num_kv_heads) * c.d_head
    stored_shape[axis] += 2 * c.d_ff * (model.fused == 'lucidrains')
  _check_shape(tensor, tuple(stored_shape), stored_name)
  order = column_order(c, name, model.fused, model.interleaved)
  return tensor if order is None else Reordered(tensor, axis, order, c.d_head)


def column_order(
  c: ModelConfig, name: str, fused: str, interleaved: bool
) -> npt.NDArray[np.int64] | None:
  """Return the stored index of each column of a canonical matrix; None: they are equal.

  Args:
    c: The model.
    name: Name of the matrix.
    fused: See FamilyModel. Only some matrices are part of a fused one.
    interleaved: See FamilyModel.
  """
  if name not in _HEADS and not (fused == 'lucidrains' and name in ('linear', 'gate')):
    return None
  rotated = interleaved and name in ('query', 'key') and c.rotary_size
  if not fused and not rotated:
    return None
  heads = getattr(c, _HEADS.get(name, 'num_heads'))
  order = fused_order(c, fused, name) if fused else np.arange(heads * c.d_head)
  return order[halves_order(c, len(order) // c.d_head)] if rotated else order


def fused_order(c: ModelConfig, fused: str, name: str) -> npt.NDArray[np.int64]:
  """Return the indices of the rows of `name` in a fused matrix; see FamilyModel.fused."""
  heads, kv, q = c.num_heads, c.num_kv_heads, c.d_head
  if fused in ('stacked', 'lucidrains'):
    sizes = {'query': heads * q, 'key': kv * q, 'value': kv * q, 'linear': c.d_ff, 'gate': c.d_ff}
    ends = dict(zip(sizes, itertools.accumulate(sizes.values())))
    return np.arange(ends[name] - sizes[name], ends[name])
  if fused == 'codegen':
    local = heads // _CODEGEN_BLOCKS * q
    groups, width, first = _CODEGEN_BLOCKS, 3 * local, {'query': 0, 'value': 1, 'key': 2}[name]
    return (np.arange(groups)[:, None] * width + first * local + np.arange(local)).reshape(-1)
  group = heads // kv
  first, count = {'query': (0, group), 'key': (group, 1), 'value': (group + 1, 1)}[name]
  rows = np.arange(kv)[:, None] * (group + 2) * q + first * q + np.arange(count * q)
  return rows.reshape(-1)


def halves_order(c: ModelConfig, heads: int) -> npt.NDArray[np.int64]:
  """Return the permutation of all heads' dimensions that turns interleaved rotation into halves."""
  rotated = c.rotary_size
  within = np.concatenate(
    [np.arange(0, rotated, 2), np.arange(1, rotated, 2), np.arange(rotated, c.d_head)]
  )
  return (np.arange(heads)[:, None] * c.d_head + within).reshape(-1)


def _head_norm(
  model: FamilyModel, name: str, stored_name: str, take: Callable[[str], Tensor]
) -> Tensor:
  """Return the scale or bias of a layer's norm of queries or keys, [heads * Q].

  The file stores either one head's values, used for all heads, or all heads' values: in one tensor
  or, if the name has [], in one tensor per head.
  """
  c = model.config
  heads = getattr(c, _HEADS[name.removesuffix('_norm')])
  size = heads * c.d_head
  if '[]' in stored_name:
    tensors = [take(stored_name.replace('[]', str(i))) for i in range(heads)]
    for i, tensor in enumerate(tensors):
      _check_shape(tensor, (c.d_head,), stored_name.replace('[]', str(i)))
    tensor = Reshaped(Stack(tensors, 0), (size,))
  else:
    tensor = take(stored_name)
    if c.qk_norm.endswith('_all'):
      _check_shape(tensor, (size,), stored_name)
    elif tensor.shape == (heads, c.d_head):
      tensor = Reshaped(tensor, (size,))
    else:
      _check_shape(tensor, (c.d_head,), stored_name)
      tensor = Reordered(tensor, 0, np.tile(np.arange(c.d_head), heads), c.d_head)
  if model.interleaved and c.rotary_size:
    tensor = Reordered(tensor, 0, halves_order(c, heads), c.d_head)
  return tensor


def _as_float(tensor: Tensor, name: str) -> Tensor:
  """Return a stored tensor as float32 or bfloat16; float16 is converted to float32."""
  if tensor.dtype in _FLOATS:
    return tensor
  if tensor.dtype in (np.float16, np.float64):
    return Cast(tensor, np.float32, name)
  raise CheckpointError(
    f'{printable(name)} in {tensor.path} holds {tensor.dtype.name}: quantized weights of this kind '
    'are not read; take the model with float32, float16 or bfloat16 weights, or a GGUF file'
  )


def _check_shape(tensor: Tensor, shape: tuple[int, ...], name: str) -> None:
  if tensor.shape != shape:
    raise CheckpointError(
      f'{name} in {tensor.path} has shape {list(tensor.shape)}, but the settings of the model say '
      f'{list(shape)}'
    )


def weights_dtype(tensors: Mapping[str, Tensor], config: ModelConfig) -> str:
  """Return the dtype of a model's matrices: 'bfloat16' if all have it, else 'float32'."""
  matrices = [tensors[n].dtype for n, p in params.parameters(config).items() if p.kind == 'matrix']
  return 'bfloat16' if all(dtype == ml_dtypes.bfloat16 for dtype in matrices) else 'float32'
