"""What a pair of layouts does to a model on a mesh, as tables: per tensor its axes, sharding and bytes on each device.

Nothing is loaded or compiled and no device is asked for: a mesh is the sizes of its axes, so 4x4x4 can be looked at
anywhere. `explain_text` makes text of it.
"""

from collections.abc import Mapping
import dataclasses
import itertools
import math

import jax
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.quantization.kv import whole_tiles
from t5x_inference_ext.sharding import activations, axis_rules, traffic
from t5x_inference_ext.sharding.activations import ActivationSharding
from t5x_inference_ext.sharding.layout import Axes, Layout, check_pair, num_shards
from t5x_inference_ext.sharding.mesh import AXES
from t5x_inference_ext.sharding.packing import (
  PackedPart,
  PackedTensor,
  packed_tensors,
  tensor_dtype,
)

# The dimensions of weights by field name; all others are vectors [E].
_DIMS = {
  'embedding': ('V', 'E'),
  'w_in': ('E', 'columns'),
  'w_out': ('rows', 'E'),
  'in_scale': ('columns',),
}


@dataclasses.dataclass(frozen=True)
class ExplainSetting:
  """What is explained.

  Attributes:
    config: the model.
    mesh: axis name -> size.
    prefill, decode: the layouts of the phases.
    dtype: of activations and float weights.
    cache: what the KV cache holds, a float's dtype or 'int8', or None: dtype.
    int8: whether the matrices are int8.
    stacked: whether one array holds all layers.
    batch: rows asked for; as in a run, rounded up to what the mesh takes.
    prompt_length: T of the prefill.
    cache_length: S, positions that the cache has for each row.
  """

  config: ModelConfig
  mesh: Mapping[str, int]
  prefill: Layout = Layout()
  decode: Layout = Layout()
  dtype: str = 'bfloat16'
  cache: str | None = None
  int8: bool = False
  stacked: bool = True
  batch: int = 1
  prompt_length: int = 1
  cache_length: int = 1

  @property
  def rows(self) -> int:
    """B."""
    return activations.padded_batch(self.decode, self.batch, self.mesh)


@dataclasses.dataclass(frozen=True)
class ExplainedTensor:
  """One array, or several alike.

  Attributes:
    name: as in weights.Weights, or what an activation is.
    dims: the letter of each dimension (config.py), 'columns' and 'rows' for what is made of blocks.
    axes: the logical name of each dimension, those of `rules` where it has one.
    shape: of the whole array, padding included.
    dtype: its name.
    spec: which mesh axes split it.
    arrays: how many there are.
    bytes: on each device, of all of them.
  """

  name: str
  dims: tuple[str, ...]
  axes: tuple[str, ...]
  shape: tuple[int, ...]
  dtype: str
  spec: P
  arrays: int
  bytes: int


@dataclasses.dataclass(frozen=True)
class ExplainedBlock:
  """A part of what a device holds of a matrix's columns (or rows), side by side with the other parts.

  Attributes:
    names: the canonical tensors in it.
    unit: columns of one head where the part is cut by heads, else 1.
    width: units on each device.
    total: units on all shards.
    padding: units of `total` that are zeros.
    copies: units of `total` that repeat others.
  """

  names: tuple[str, ...]
  unit: int
  width: int
  total: int
  padding: int
  copies: int


@dataclasses.dataclass(frozen=True)
class Phase:
  """Prefill, or a decode step.

  Attributes:
    name: 'prefill' or 'decode'.
    placement: the layout, resolved for these rows and positions.
    length: T, padding included.
    tensors: activations, keys and values, logits.
    repeated: axes along which attention's work is repeated, as neither rows, heads nor positions fill them.
    gathered: bytes of the largest matrix that is gathered on each device; 0: none is.
    moves: the collectives of one layer.
  """

  name: str
  sharding: ActivationSharding
  length: int
  tensors: tuple[ExplainedTensor, ...]
  repeated: Axes
  gathered: int
  moves: tuple[traffic.Collective, ...]


@dataclasses.dataclass(frozen=True)
class Explanation:
  """A setting and what follows from it.

  Attributes:
    setting: what was asked.
    weights: the arrays, of either phase.
    blocks: name of a weight -> what each device holds of its columns or rows, in order.
    phases: prefill and decode.
    moved: bytes of the prompts' keys and values that a device (that which gets most) receives when the cache goes from
      prefill's sharding to decode's.
  """

  setting: ExplainSetting
  weights: tuple[ExplainedTensor, ...]
  blocks: Mapping[str, tuple[ExplainedBlock, ...]]
  phases: tuple[Phase, Phase]
  moved: int

  @property
  def weight_bytes(self) -> int:
    """Of a device."""
    return sum(t.bytes for t in self.weights)

  @property
  def cache(self) -> tuple[ExplainedTensor, ...]:
    """The KV cache, as decode holds it."""
    return tuple(
      t for t in self.phases[1].tensors if t.name in ('cache', 'cache scales', 'cache lengths')
    )

  @property
  def cache_bytes(self) -> int:
    """Of a device."""
    return sum(t.bytes for t in self.cache)


def explain_setting(setting: ExplainSetting) -> Explanation:
  """Resolves a setting.

  Raises:
    MeshError: the mesh does not divide the model, or the two layouts can't share weights.
  """
  s = setting
  check_pair(s.prefill, s.decode)
  tensors = packed_tensors(s.config, s.prefill, s.mesh, s.int8)
  length = activations.padded_length(s.prefill, s.mesh, s.rows, s.prompt_length)
  prefill = activations.shard_activations(s.prefill, s.config, s.mesh, s.rows, length)
  decode = activations.shard_activations(s.decode, s.config, s.mesh, s.rows, 1)
  blocks = {
    name: tuple(_block(s, part) for part in t.parts)
    for name, t in tensors.items()
    if len(t.shape) == 2
  }
  return Explanation(
    s,
    tuple(_weight(s, name, t) for name, t in tensors.items()),
    blocks,
    (_phase(s, 'prefill', prefill, length, tensors), _phase(s, 'decode', decode, 1, tensors)),
    _moved(s, prefill, decode),
  )


def _tensor(s: ExplainSetting, name, dims, axes, shape, dtype, spec, arrays=1) -> ExplainedTensor:
  mesh = AbstractMesh(tuple(s.mesh[a] for a in AXES), AXES)
  shard = NamedSharding(mesh, spec).shard_shape(tuple(shape))
  return ExplainedTensor(
    name,
    tuple(dims),
    tuple(axes),
    tuple(shape),
    dtype,
    spec,
    arrays,
    arrays * math.prod(shard) * jax.numpy.dtype(dtype).itemsize,
  )


def _layered(s: ExplainSetting, name, dims, axes, shape, dtype, spec, arrays=1) -> ExplainedTensor:
  """A tensor of every layer: one array with all of them, or one a layer."""
  if not s.stacked:
    return _tensor(s, name, dims, axes, shape, dtype, spec, arrays * s.config.num_layers)
  return _tensor(
    s,
    name,
    ('L', *dims),
    (axis_rules.STACKED, *axes),
    (s.config.num_layers, *shape),
    dtype,
    P(None, *spec),
    arrays,
  )


def _weight(s: ExplainSetting, name: str, tensor: PackedTensor) -> ExplainedTensor:
  dims = _DIMS.get(name.rpartition('/')[2], ('E',))
  make = _layered if tensor.per_layer else _tensor
  return make(
    s, name, dims, axis_rules.weight_axes(name), tensor.shape, _dtype(s, tensor), tensor.spec
  )


def _dtype(s: ExplainSetting, tensor: PackedTensor) -> str:
  return tensor_dtype(tensor, 'int8' if s.int8 else s.dtype, s.dtype).name


def _block(s: ExplainSetting, part: PackedPart) -> ExplainedBlock:
  by_heads = len(part.names) == 1 and part.names[0] in ('query', 'key', 'value', 'attention_output')
  unit = s.config.d_head if by_heads else 1
  total, used = part.width * len(part.ranges), sum(stop - start for start, stop in part.ranges)
  return ExplainedBlock(
    part.names,
    unit,
    part.width // unit,
    total // unit,
    (total - used) // unit,
    (used - sum(part.sizes)) // unit,
  )


def _phase(
  s: ExplainSetting,
  name: str,
  p: ActivationSharding,
  length: int,
  tensors: Mapping[str, PackedTensor],
) -> Phase:
  c, layout, rows = s.config, p.layout, s.rows
  query_heads, kv_heads = (
    p.heads.heads * num_shards(p.attention_heads, s.mesh),
    len(p.heads.cached()),
  )
  axes = {
    **axis_rules.ACTIVATION_AXES,
    'mlp': ('rows', 'positions', 'mlp'),
    'lengths': axis_rules.ACTIVATION_AXES['cache'][:1],
  }

  def keys_values(name, letter, positions):
    shape, dims = (rows, positions, kv_heads, c.d_head), ('B', letter, 'K', 'Q')
    kv = _layered(s, name, dims, axes['cache'], shape, s.cache or s.dtype, p.cache, arrays=2)
    if s.cache != 'int8':
      return [kv]
    scales = _layered(
      s,
      f'{name} scales',
      (*dims[:3], '1'),
      axes['cache'],
      (*shape[:3], 1),
      'float32',
      p.cache,
      arrays=2,
    )
    return [kv, scales]

  made = [
    _tensor(
      s, 'residual', 'BTE', axes['residual'], (rows, length, c.d_model), s.dtype, P(*p.residual)
    ),
    _tensor(
      s,
      'mlp',
      'BTF',
      axes['mlp'],
      (rows, length, c.d_ff),
      s.dtype,
      P(p.rows, p.positions, layout.hidden_axes),
    ),
    _tensor(
      s,
      'queries',
      'BTHQ',
      axes['queries'],
      (rows, length, query_heads, c.d_head),
      s.dtype,
      P(p.attention_rows, p.attention_positions, p.attention_heads, None),
    ),
  ]
  if name == 'prefill':
    made += keys_values('keys, values', 'T', length)
  else:
    made += keys_values('cache', 'S', whole_tiles(s.cache_length, s.cache or s.dtype))
    made.append(
      _tensor(s, 'cache lengths', 'B', axes['lengths'], (rows,), 'int32', P(p.attention_rows))
    )
  sampling = activations.sampling_axes(s.prefill, rows, s.mesh)
  made.append(
    _tensor(
      s,
      'logits',
      'BV',
      ('sampled_rows', 'whole_vocab'),
      (rows, c.vocab_size),
      'float32',
      P(sampling),
    )
  )
  used = p.attention_rows + p.attention_heads + p.attention_positions
  repeated = tuple(a for a in AXES if s.mesh[a] > 1 and a not in used)
  matrices = [t for t in tensors.values() if t.kind == 'matrix']
  moves = traffic.layer_moves(
    c,
    p,
    s.mesh,
    rows,
    length,
    jax.numpy.dtype(s.dtype).itemsize,
    jax.numpy.dtype(_dtype(s, matrices[0])).itemsize,
  )
  return Phase(
    name,
    p,
    length,
    tuple(made),
    repeated,
    max(_gathered(s, layout, t) for t in matrices),
    tuple(moves),
  )


def _gathered(s: ExplainSetting, layout: Layout, tensor: PackedTensor) -> int:
  """Bytes on each device of the largest part of a matrix that is gathered at once; 0: none is."""
  if num_shards(layout.gathered_axes, s.mesh) == 1:
    return 0
  widths = [p.width for p in tensor.parts]
  if [p.names for p in tensor.parts[-2:]] == [('key',), ('value',)]:  # these two go together
    widths[-2:] = [sum(widths[-2:])]
  hidden = num_shards(tuple(a for a in layout.stored_hidden if a in layout.gathered_axes), s.mesh)
  itemsize = jax.numpy.dtype(_dtype(s, tensor)).itemsize
  return max(widths) * hidden * s.config.d_model // num_shards(layout.embed_axes, s.mesh) * itemsize


def _moved(s: ExplainSetting, prefill: ActivationSharding, decode: ActivationSharding) -> int:
  """See Explanation.moved. What a device has already, it does not receive."""
  c, most = s.config, 0
  for place in itertools.product(*(range(s.mesh[a]) for a in AXES)):
    device = dict(zip(AXES, place))
    (rows, heads), (new_rows, new_heads) = _held(s, prefill, device), _held(s, decode, device)
    common = len(range(max(rows.start, new_rows.start), min(rows.stop, new_rows.stop))) * len(
      heads & new_heads
    )
    most = max(most, len(new_rows) * len(new_heads) - common)
  head = c.d_head * jax.numpy.dtype(s.cache or s.dtype).itemsize + (
    4 if s.cache == 'int8' else 0
  )  # and its scale
  return most * s.prompt_length * head * 2 * c.num_layers


def _held(
  s: ExplainSetting, p: ActivationSharding, device: Mapping[str, int]
) -> tuple[range, set[int]]:
  """The rows and the key heads that a device has of the cache."""

  def part(count, axes):
    index = 0
    for axis in axes:  # the first is slowest
      index = index * s.mesh[axis] + device[axis]
    width = count // num_shards(axes, s.mesh)
    return range(index * width, (index + 1) * width)

  heads = p.heads.cached()
  here = part(len(heads), () if p.heads.multiquery else p.attention_heads)
  return part(s.rows, p.attention_rows), {heads[i] for i in here} - {None}
