"""The shape of a model: what every other room of the package is told, and nothing of devices.

Dimension letters, used in every docstring and shape comment of the package:

  B batch   T query length   S cache length   L layers   V vocabulary
  E d_model   F d_ff   H query heads   K key/value heads   Q d_head
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

BLOCKS = ('parallel', 'serial')
MLPS = ('swiglu', 'gelu')
NORMS = ('rms', 'layer')
NORM_SCALES = ('zero', 'one')


@dataclasses.dataclass(frozen=True)
class BlockPart:
  """A norm, what reads it, and one addition to the residual stream.

  Attributes:
    name: 'parallel', 'attention' or 'mlp'.
    attention, mlp: what it holds.
  """

  name: str
  attention: bool
  mlp: bool


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder with rotary positions and a tied embedding; by default PaLM's: parallel block, SwiGLU, RMS norm.

  Attributes:
    num_layers: L.
    d_model: E.
    d_ff: F, the width of the MLP; SwiGLU has two inputs of it.
    num_heads: H, query heads.
    d_head: Q.
    vocab_size: V, rows of the embedding.
    num_kv_heads: K; 1 is multiquery attention, H multihead, between them (a divisor of H) grouped-query.
    block: 'parallel', attention and MLP read one norm and are summed, or 'serial', the MLP after attention (the paper's
      section 3.4).
    mlp: 'swiglu', swish(gate) * linear, three matrices; or 'gelu', of linear alone, two (its tanh approximation).
    norm: 'rms', or 'layer': centred on the mean, with a learned bias.
    norm_scale: how the *stored* norm scales are meant: 'zero' applies 1 + scale (flaxformer's center_scale_at_zero,
      PaLM's form), 'one' applies scale itself.
    norm_epsilon: added to the mean square (the variance) before the root.
    rope_max_timescale: the longest rotary wavelength is 2 pi times this.

  Raises:
    ValueError: a size that no model can have, naming the field.
  """

  num_layers: int
  d_model: int
  d_ff: int
  num_heads: int
  d_head: int
  vocab_size: int
  num_kv_heads: int = 1
  block: str = 'parallel'
  mlp: str = 'swiglu'
  norm: str = 'rms'
  norm_scale: str = 'zero'
  norm_epsilon: float = 1e-6
  rope_max_timescale: float = 1e4

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.type in (int, 'int') and (not isinstance(value, int) or value < 1):
        raise ValueError(f'ModelConfig.{field.name} must be a whole number above 0, got {value!r}')
    for name, known in (
      ('block', BLOCKS),
      ('mlp', MLPS),
      ('norm', NORMS),
      ('norm_scale', NORM_SCALES),
    ):
      if getattr(self, name) not in known:
        raise ValueError(f'ModelConfig.{name} must be one of {known}, got {getattr(self, name)!r}')
    if self.d_head % 2:
      raise ValueError(f'rotary positions need an even d_head, got {self.d_head}')
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f'num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}: each key head serves '
        'as many query heads'
      )

  @property
  def block_parts(self) -> tuple[BlockPart, ...]:
    """What a layer is made of, in order."""
    if self.block == 'parallel':
      return (BlockPart('parallel', True, True),)
    return BlockPart('attention', True, False), BlockPart('mlp', False, True)

  @property
  def mlp_inputs(self) -> tuple[str, ...]:
    """The parameters [E, F] that feed the MLP."""
    return ('gate', 'linear') if self.mlp == 'swiglu' else ('linear',)

  @property
  def num_params(self) -> int:
    """Parameters, with the tied embedding counted once and the norms included."""
    attention = 2 * self.d_model * self.d_head * (self.num_heads + self.num_kv_heads)
    mlp = (len(self.mlp_inputs) + 1) * self.d_model * self.d_ff
    norms = (
      (self.num_layers * len(self.block_parts) + 1)
      * self.d_model
      * (1 if self.norm == 'rms' else 2)
    )
    return self.num_layers * (attention + mlp) + norms + self.vocab_size * self.d_model

  def to_dict(self) -> dict[str, Any]:
    """A JSON-ready dict; from_dict is its inverse."""
    return dataclasses.asdict(self)

  @classmethod
  def from_dict(cls, fields: Mapping[str, Any]) -> 'ModelConfig':
    """Raises ValueError for fields this version does not know: a newer writer may mean something by them."""
    unknown = set(fields) - {f.name for f in dataclasses.fields(cls)}
    if unknown:
      raise ValueError(
        f'unknown model config fields {sorted(unknown)}: written by a newer version of this package?'
      )
    return cls(**fields)

  def __str__(self) -> str:
    return (
      f'{self.num_layers} layers, d_model {self.d_model}, d_ff {self.d_ff}, {self.num_heads} heads x '
      f'{self.d_head}, {self.num_kv_heads} kv head(s), {self.block} block, {self.mlp} MLP, {self.norm} norm, '
      f'vocabulary {self.vocab_size}: {self.num_params:,} parameters'
    )


# PaLM's published shapes (the paper's section 4 and PaLM's own Table 1), the Megatron-Turing model that the paper compares
# with (its section 5), and the small model of the test fixtures.
PRESETS = {
  'palm_tiny': dict(num_layers=4, d_model=256, d_ff=1024, num_heads=8, d_head=32, vocab_size=384),
  'palm_8b': dict(
    num_layers=32, d_model=4096, d_ff=16384, num_heads=16, d_head=256, vocab_size=256128
  ),
  'palm_62b': dict(
    num_layers=64, d_model=8192, d_ff=32768, num_heads=32, d_head=256, vocab_size=256128
  ),
  'palm_540b': dict(
    num_layers=118, d_model=18432, d_ff=73728, num_heads=48, d_head=256, vocab_size=256128
  ),
  'megatron_530b': dict(
    num_layers=105,
    d_model=20480,
    d_ff=81920,
    num_heads=128,
    d_head=160,
    vocab_size=51200,
    num_kv_heads=128,
    block='serial',
    mlp='gelu',
    norm='layer',
    norm_scale='one',
    norm_epsilon=1e-5,
  ),
}


def preset(name: str, **overrides) -> ModelConfig:
  """The named preset, with fields replaced by `overrides`. Raises ValueError for an unknown name, listing the known."""
  if name not in PRESETS:
    raise ValueError(f'unknown model {name!r}; known: {", ".join(sorted(PRESETS))}')
  return ModelConfig(**{**PRESETS[name], **overrides})
