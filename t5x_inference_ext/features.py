"""Allowed values of ModelConfig's fields, and combinations that exclude each other."""

import reprlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from t5x_inference_ext.config import ModelConfig

BLOCKS = ('parallel', 'serial')
# MLP -> the names of its input matrices. model/activations.py has the functions.
MLPS: dict[str, tuple[str, ...]] = {
  **dict.fromkeys(('swiglu', 'geglu', 'geglu_erf', 'reglu', 'glu', 'bilinear'), ('gate', 'linear')),
  **dict.fromkeys(('gelu', 'gelu_erf', 'relu', 'relu_squared', 'swish'), ('linear',)),
}
NORMS = ('rms', 'layer')
NORM_SCALES = ('zero', 'one')
CHOICES: dict[str, tuple[Any, ...]] = {
  'block': BLOCKS,
  'mlp': tuple(MLPS),
  'norm': NORMS,
  'norm_scale': NORM_SCALES,
  'parallel_norms': (1, 2),
  'norm_position': ('before', 'after', 'both'),
  'qk_norm': ('none', 'rms', 'layer', 'rms_all', 'layer_all'),
  'positions': ('rotary', 'alibi', 'learned', 'relative', 'none'),
  'rope_scaling': ('none', 'linear', 'llama3'),
  'alibi_slopes': ('bloom', 'falcon', 'falcon_eager'),
}
# Fields that are used only with rotary positions.
ROTARY = (
  'rotary_dims',
  'rope_scaling',
  'local_rope_max_timescale',
  'global_rotary',
  'xpos_scale_base',
)


_LARGEST = 3.4e38  # of float32


def check_features(config: 'ModelConfig') -> None:
  """Raise ValueError if a model can't have these sizes and features; see ModelConfig."""
  _check_values(config)
  c = config
  if c.num_heads % c.num_kv_heads:
    raise ValueError(
      f'num_kv_heads={c.num_kv_heads} must divide num_heads={c.num_heads}: each key head serves '
      'the same number of query heads'
    )
  if c.rotary_size % 2 or c.rotary_size > c.d_head:
    name = 'd_head' if c.rotary_dims is None else 'rotary_dims'
    raise ValueError(
      f'rotary positions need an even {name}, at most d_head={c.d_head}, got {c.rotary_size}'
    )
  if c.block == 'serial' and c.parallel_norms != 1:
    raise ValueError("parallel_norms=2 needs block='parallel': a serial block has a norm for each")
  if c.block == 'parallel' and c.norm_position != 'before':
    raise ValueError(
      f"norm_position={c.norm_position!r} needs block='serial': no known parallel block has norms "
      'after its sublayers'
    )
  if (c.positions == 'learned') != (c.num_positions is not None):
    raise ValueError(
      "num_positions is for positions='learned', which need it: got "
      f'positions={c.positions!r}, num_positions={c.num_positions}'
    )
  for name in ROTARY if c.positions != 'rotary' else ():
    if name in c.features:
      raise ValueError(f"{name} is for positions='rotary', got positions={c.positions!r}")
  if c.positions == 'relative' and c.relative_max_distance <= c.relative_buckets // 2:
    raise ValueError(
      f'relative_max_distance={c.relative_max_distance} must be above half of '
      f'relative_buckets={c.relative_buckets}: each smaller distance has its own bucket'
    )
  if any(c.local_layers) != (c.window is not None):
    raise ValueError(
      f'window is for local layers, which need it: got window={c.window}, '
      f'layer_pattern={c.layer_pattern}'
    )
  if c.rope_scaling == 'llama3' and c.rope_low_factor >= c.rope_high_factor:
    raise ValueError(
      f'rope_low_factor={c.rope_low_factor} must be below rope_high_factor={c.rope_high_factor}'
    )


def _check_values(config: 'ModelConfig') -> None:
  """Check the value of each field by itself."""
  for name, field in config.__dataclass_fields__.items():
    value, kind = getattr(config, name), field.type
    if value is None and kind in (int | None, float | None):
      continue
    if name in CHOICES:
      # True == 1 in Python, but is not a number of norms.
      if isinstance(value, bool) or value not in CHOICES[name]:
        raise ValueError(
          f'ModelConfig.{name} must be one of {CHOICES[name]}, got {reprlib.repr(value)}'
        )
    elif kind in (int, int | None):
      if type(value) is not int or not 1 <= value < 2**31:
        raise ValueError(
          f'ModelConfig.{name} must be a whole number above 0 and below 2**31, got '
          f'{reprlib.repr(value)}'
        )
    elif kind in (float, float | None):
      if type(value) not in (int, float) or not 0 < value <= _LARGEST:
        raise ValueError(
          f'ModelConfig.{name} must be a number above 0 and in the range of float32, got '
          f'{reprlib.repr(value)}'
        )
    elif kind is bool and not isinstance(value, bool):
      raise ValueError(f'ModelConfig.{name} must be True or False, got {reprlib.repr(value)}')
  pattern = config.layer_pattern
  if not 1 <= len(pattern) <= config.num_layers or not set(pattern) <= {'global', 'local'}:
    raise ValueError(
      f"ModelConfig.layer_pattern must be 1 to {config.num_layers} times 'global' or 'local', "
      f'got {pattern!r:.200}'
    )
