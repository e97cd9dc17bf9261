"""The shape of a model. Every other module uses it; it is independent of devices.

Dimension letters, used in every docstring and shape comment of the package:

  B batch   T query length   S cache length   L layers   V vocabulary
  E d_model   F d_ff   H query heads   K key/value heads   Q d_head
"""

from collections.abc import Mapping
import dataclasses
import reprlib
from typing import Any

from t5x_inference_ext.errors import name_list

BLOCKS = ('parallel', 'serial')
MLPS = ('swiglu', 'gelu')
NORMS = ('rms', 'layer')
NORM_SCALES = ('zero', 'one')
_LARGEST = 3.4e38  # of float32


@dataclasses.dataclass(frozen=True)
class BlockPart:
  """A part of a layer with one norm and one addition to the residual stream.

  Attributes:
    name: 'parallel', 'attention' or 'mlp'.
    attention: Whether the part holds attention.
    mlp: Whether the part holds the MLP.
  """

  name: str
  attention: bool
  mlp: bool


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder with rotary positions and a tied embedding.

  The defaults are PaLM's: parallel block, multiquery attention, SwiGLU, RMS norm. Each attribute
  lists the model families that use each value. Features without an attribute (untied heads, biases
  of linear layers, partial rotary, windows, soft caps) are not supported.

  Attributes:
    num_layers: L.
    d_model: E.
    d_ff: F, the width of the MLP: 4 E in PaLM and Megatron-Turing, about 8/3 E or more in
      Llama-like models.
    num_heads: H, query heads.
    d_head: Q. H * Q need not be E: it is less in PaLM and more in Gemma 7B.
    vocab_size: V, rows of the embedding.
    num_kv_heads: K, key/value heads; a divisor of H. 1: multiquery (PaLM, Falcon-7B, Gemma 2B). H:
      multihead (Megatron-Turing, Llama 7B and 13B, Command-R, OLMo). Between: grouped-query (Llama
      2 70B, Llama 3, Mistral, SmolLM2).
    block: 'parallel': attention and MLP read one norm and are summed (PaLM, Falcon-7B, GPT-J,
      Command-R; the paper's section 3.4). 'serial': the MLP follows attention (Llama, Mistral,
      SmolLM2, Gemma, OLMo, Megatron-Turing).
    mlp: 'swiglu': swish(gate) * linear, three matrices (PaLM, Llama, Mistral, SmolLM2, Command-R,
      OLMo). 'gelu': gelu(linear) in its tanh approximation, two matrices (Megatron-Turing).
    norm: 'rms' (PaLM, Llama, Mistral, SmolLM2), or 'layer': centred on the mean, with a learned
      bias (Megatron-Turing, Falcon). If a checkpoint has no bias, zeros are used
      (Command-R); if it has no scale, ones (OLMo).
    norm_scale: The meaning of the *stored* norm scales. 'zero' applies 1 + scale (PaLM in T5X,
      which is flaxformer's center_scale_at_zero; Gemma). 'one' applies the scale itself (Llama,
      Mistral, SmolLM2, Megatron-Turing, T5X's own decoders).
    norm_epsilon: Added to the mean square, or to the variance, before the square root. 1e-6 in
      PaLM, 1e-5 or 1e-6 in Llama-like models.
    rope_max_timescale: The base of rotary positions: the longest wavelength is 2 pi times this many
      positions. 1e4 in PaLM and Llama 2, 1e5 in SmolLM2, 5e5 in Llama 3, 1e6 in some Mistral
      models.

  Raises:
    ValueError: A size is impossible; the message names the attribute.
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

  def __post_init__(self) -> None:
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.type in (int, 'int') and (type(value) is not int or not 1 <= value < 2**31):
        raise ValueError(
          f'ModelConfig.{field.name} must be a whole number above 0 and below 2**31, got '
          f'{reprlib.repr(value)}'
        )
      if field.type in (float, 'float') and not (
        type(value) in (int, float) and 0 < value <= _LARGEST
      ):
        raise ValueError(
          f'ModelConfig.{field.name} must be a number above 0 and in the range of float32, got '
          f'{reprlib.repr(value)}'
        )
    for name, known in (
      ('block', BLOCKS),
      ('mlp', MLPS),
      ('norm', NORMS),
      ('norm_scale', NORM_SCALES),
    ):
      if getattr(self, name) not in known:
        raise ValueError(
          f'ModelConfig.{name} must be one of {known}, got {reprlib.repr(getattr(self, name))}'
        )
    if self.d_head % 2:
      raise ValueError(f'rotary positions need an even d_head, got {self.d_head}')
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f'num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}: each key head '
        'serves the same number of query heads'
      )

  @property
  def block_parts(self) -> tuple[BlockPart, ...]:
    """The parts of a layer, in order."""
    if self.block == 'parallel':
      return (BlockPart('parallel', True, True),)
    return BlockPart('attention', True, False), BlockPart('mlp', False, True)

  @property
  def mlp_inputs(self) -> tuple[str, ...]:
    """The names of the matrices [E, F] that feed the MLP."""
    return ('gate', 'linear') if self.mlp == 'swiglu' else ('linear',)

  @property
  def num_params(self) -> int:
    """The number of parameters. The tied embedding counts once; norms are included."""
    attention = 2 * self.d_model * self.d_head * (self.num_heads + self.num_kv_heads)
    mlp = (len(self.mlp_inputs) + 1) * self.d_model * self.d_ff
    vectors = 1 if self.norm == 'rms' else 2
    norms = (self.num_layers * len(self.block_parts) + 1) * vectors * self.d_model
    return self.num_layers * (attention + mlp) + norms + self.vocab_size * self.d_model

  def to_dict(self) -> dict[str, Any]:
    """Return the fields as a JSON-ready dict; from_dict is the inverse."""
    return dataclasses.asdict(self)

  @classmethod
  def from_dict(cls, fields: Mapping[str, Any]) -> 'ModelConfig':
    """Return the config with the fields that to_dict returned.

    Raises:
      ValueError: A field is unknown. A newer version may have written it.
    """
    if not isinstance(fields, Mapping):
      raise ValueError(f'a model config is an object, got {reprlib.repr(fields)}')
    unknown = set(fields) - {f.name for f in dataclasses.fields(cls)}
    if unknown:
      raise ValueError(
        f'unknown model config fields {name_list(sorted(unknown), len(unknown))}: written by a '
        'newer version of this package?'
      )
    return cls(**fields)

  def __str__(self) -> str:
    return (
      f'{self.num_layers} layers, d_model {self.d_model}, d_ff {self.d_ff}, {self.num_heads} heads '
      f'x {self.d_head}, {self.num_kv_heads} kv head(s), {self.block} block, {self.mlp} MLP, '
      f'{self.norm} norm, vocabulary {self.vocab_size}: {self.num_params:,} parameters'
    )


# PaLM's published shapes (the paper's section 4 and PaLM's own Table 1), the Megatron-Turing model
# that the paper compares with (its section 5), and the small model of the test fixtures.
PRESETS: dict[str, dict[str, Any]] = {
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


def preset(name: str, **overrides: Any) -> ModelConfig:
  """Return a named shape.

  Args:
    name: A key of PRESETS.
    **overrides: Attributes of ModelConfig that replace those of the preset.

  Raises:
    ValueError: The name is unknown; the message lists the known ones.
  """
  if name not in PRESETS:
    raise ValueError(f'unknown model {name!r}; known: {", ".join(sorted(PRESETS))}')
  return ModelConfig(**{**PRESETS[name], **overrides})
