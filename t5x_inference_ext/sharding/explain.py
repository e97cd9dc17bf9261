"""The tensors of a run under a pair of layouts: axes, sharding and bytes on each device.

Nothing is loaded or compiled, and no device is needed. A mesh is given by the sizes of its axes, so
4x4x4 can be examined on any machine. explain_text.py formats the result.
"""

from collections.abc import Mapping
import dataclasses
import math

import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.params import LAYERS_AXIS
from t5x_inference_ext.quantization.formats import stored_size, weight_format
from t5x_inference_ext.quantization.kv import whole_tiles
from t5x_inference_ext.sharding import activations, traffic
from t5x_inference_ext.sharding.activations import ACTIVATION_AXES, ActivationSharding
from t5x_inference_ext.sharding.collective import Collective
from t5x_inference_ext.sharding.columns import PackedPart
from t5x_inference_ext.sharding.layout import Axes, Layout, check_pair, num_shards
from t5x_inference_ext.sharding.packing import matrix_bytes, packed_tensors, tensor_dtype


@dataclasses.dataclass(frozen=True)
class ExplainSetting:
  """The run to explain.

  Attributes:
    config: The model.
    mesh: Axis name -> size.
    prefill, decode: The layouts of the phases.
    dtype: The dtype of activations and float weights, 'float32' or 'bfloat16'.
    cache: The dtype of the KV cache: a float dtype, 'int8', or None for `dtype`.
    weights: Format of the matrices (quantization.formats); float ones have `dtype`.
    stacked: Whether one array holds all layers.
    batch: Requested number of rows. As in a run, it is rounded up for the mesh.
    prompt_length: T of the prefill.
    cache_length: S, positions of the cache for each row.
  """

  config: ModelConfig
  mesh: Mapping[str, int]
  prefill: Layout = Layout()
  decode: Layout = Layout()
  dtype: str = 'bfloat16'
  cache: str | None = None
  weights: str = 'float32'
  stacked: bool = True
  batch: int = 1
  prompt_length: int = 1
  cache_length: int = 1

  @property
  def scaled(self) -> frozenset[str]:
    """The weights that have scales."""
    return weight_format(self.weights).scaled

  @property
  def rows(self) -> int:
    """B, the number of rows after rounding up."""
    return activations.padded_batch(self.decode, self.batch, self.mesh)


@dataclasses.dataclass(frozen=True)
class ExplainedTensor:
  """One array, or several arrays with equal shapes and shardings.

  Attributes:
    name: Name of a weight, as in packed_tensors, or of an activation.
    axes: The logical axis of each dimension.
    shape: Shape of the whole array, padding included.
    dtype: Name of the dtype.
    split: The mesh axes that split each dimension.
    arrays: Number of arrays.
    bytes: Bytes of all these arrays together on each device.
  """

  name: str
  axes: tuple[str, ...]
  shape: tuple[int, ...]
  dtype: str
  split: tuple[Axes, ...]
  arrays: int
  bytes: int

  @property
  def spec(self) -> P:
    """The sharding."""
    return P(*self.split)


@dataclasses.dataclass(frozen=True)
class ExplainedPhase:
  """One phase: prefill, or a decode step.

  Attributes:
    name: 'prefill' or 'decode'.
    sharding: The layout, resolved for these rows and positions.
    length: T, padding included.
    tensors: Activations, keys and values, logits.
    collectives: The collectives of one layer.
  """

  name: str
  sharding: ActivationSharding
  length: int
  tensors: tuple[ExplainedTensor, ...]
  collectives: tuple[Collective, ...]

  def tensor(self, name: str) -> ExplainedTensor:
    """Return the tensor with a given name."""
    return next(t for t in self.tensors if t.name == name)

  @property
  def gathered(self) -> int:
    """Bytes of the largest gathered matrix on each device; 0 if no matrix is gathered whole."""
    return max((m.bytes for m in self.collectives if m.name.startswith('weights: ')), default=0)


@dataclasses.dataclass(frozen=True)
class Explanation:
  """A run's settings, with the resulting tensors and collectives.

  Attributes:
    setting: The run's settings.
    weights: The arrays that both phases share.
    blocks: Name of a weight -> the parts of its columns or rows on each device, in order.
    phases: Prefill and decode.
  """

  setting: ExplainSetting
  weights: tuple[ExplainedTensor, ...]
  blocks: Mapping[str, tuple[PackedPart, ...]]
  phases: tuple[ExplainedPhase, ExplainedPhase]

  @property
  def weight_bytes(self) -> int:
    """Bytes of all weights on each device."""
    return sum(t.bytes for t in self.weights)

  @property
  def cache(self) -> tuple[ExplainedTensor, ...]:
    """The KV cache, as sharded for decode."""
    return tuple(t for t in self.phases[1].tensors if t.name.startswith('cache'))

  @property
  def cache_bytes(self) -> int:
    """Bytes of the KV cache on each device."""
    return sum(t.bytes for t in self.cache)


def explain_setting(setting: ExplainSetting) -> Explanation:
  """Resolve both layouts for a run.

  Raises:
    MeshError: The mesh does not divide the model, or the two layouts can't share weights.
  """
  s = setting
  check_pair(s.prefill, s.decode)
  packed = packed_tensors(s.config, s.prefill, s.mesh, s.scaled)
  weights = tuple(
    _tensor(
      s,
      s.prefill.weight_axes,
      name,
      t.axes,
      t.shape,
      tensor_dtype(t, s.weights, s.dtype).name,
      per_layer=t.per_layer,
    )
    for name, t in packed.items()
  )
  blocks = {name: t.parts for name, t in packed.items() if t.kind in ('embedding', 'matrix')}
  length = activations.padded_length(s.prefill, s.mesh, s.rows, s.prompt_length)
  phases = _phase(s, 'prefill', s.prefill, length), _phase(s, 'decode', s.decode, 1)
  return Explanation(s, weights, blocks, phases)


def _phase(s: ExplainSetting, name: str, layout: Layout, length: int) -> ExplainedPhase:
  """Resolve one layout for `length` positions of each row."""
  c, rows = s.config, s.rows
  sharding = activations.shard_activations(layout, c, s.mesh, rows, length)
  split = {
    **sharding.axes,
    'sampled_rows': activations.sampling_axes(s.prefill, rows, s.mesh),
    'whole_vocab': (),
  }
  axes = ACTIVATION_AXES
  heads = sharding.heads.heads * num_shards(sharding.attention_heads, s.mesh)
  tensors = [
    _tensor(s, split, 'residual', axes['residual'], (rows, length, c.d_model), s.dtype),
    _tensor(s, split, 'mlp', axes['mlp'], (rows, length, c.d_ff), s.dtype),
    _tensor(s, split, 'queries', axes['queries'], (rows, length, heads, c.d_head), s.dtype),
  ]
  kv, positions, cache_dtype = 'keys, values', length, s.cache or s.dtype
  if name == 'decode':
    kv, positions = 'cache', whole_tiles(s.cache_length, cache_dtype)
  kv_tensors = {kv: (c.d_head, cache_dtype)}
  if s.cache == 'int8':
    kv_tensors[f'{kv} scales'] = (1, 'float32')
  for kv_name, (width, dtype) in kv_tensors.items():
    shape = (rows, len(sharding.heads.cached()), positions, width)
    tensors.append(_tensor(s, split, kv_name, axes['cache'], shape, dtype, True, arrays=2))
  if name == 'decode':
    tensors.append(_tensor(s, split, 'cache lengths', axes['cache'][:1], (rows,), 'int32'))
  logits_axes = ('sampled_rows', 'whole_vocab')
  tensors.append(_tensor(s, split, 'logits', logits_axes, (rows, c.vocab_size), 'float32'))
  itemsize = jnp.dtype(s.dtype).itemsize
  packed = packed_tensors(c, s.prefill, s.mesh, s.scaled)
  collectives = traffic.layer_collectives(
    *(c, sharding, s.mesh, rows, length, itemsize), matrix_bytes(packed, s.weights, s.dtype)
  )
  return ExplainedPhase(name, sharding, length, tuple(tensors), tuple(collectives))


def _tensor(
  s: ExplainSetting,
  split: Mapping[str, Axes],
  name: str,
  axes: tuple[str, ...],
  shape: tuple[int, ...],
  dtype: str,
  per_layer: bool = False,
  arrays: int = 1,
) -> ExplainedTensor:
  """Explain a tensor.

  Args:
    s: The run.
    split: The mesh axes that split each logical axis.
    name: Name of the tensor.
    axes: The logical axis of each dimension, without layers.
    shape: The dimensions, without layers.
    dtype: Name of the dtype.
    per_layer: Whether each layer has the tensor.
    arrays: Number of such arrays in each layer, or in the model.
  """
  if per_layer and s.stacked:
    axes, shape = (LAYERS_AXIS, *axes), (s.config.num_layers, *shape)
  elif per_layer:
    arrays *= s.config.num_layers
  mesh_axes = tuple(split.get(axis, ()) for axis in axes)
  count = math.prod(shape) // math.prod(num_shards(a, s.mesh) for a in mesh_axes)
  return ExplainedTensor(
    name, axes, shape, dtype, mesh_axes, arrays, arrays * stored_size(count, dtype)
  )
