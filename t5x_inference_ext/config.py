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
from t5x_inference_ext.features import MLPS, check_features
from t5x_inference_ext.presets import PRESETS

# Fields that every serving checkpoint records. Other fields are recorded only if not the default.
_RECORDED = 13


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
  """Sizes and features of a decoder. docs/models.md lists the features by family.

  The defaults are PaLM's: parallel block, multiquery attention, SwiGLU, RMS norm, rotary positions,
  tied head, no biases. Each attribute lists the model families that use each value.

  Attributes:
    num_layers: L.
    d_model: E.
    d_ff: F, the width of the MLP: 4 E in PaLM and Megatron-Turing, about 8/3 E or more in
      Llama-like models.
    num_heads: H, query heads.
    d_head: Q. H * Q may differ from E: it is less in PaLM and more in Gemma 7B.
    vocab_size: V, rows of the embedding.
    num_kv_heads: K, key/value heads; a divisor of H. 1: multiquery (PaLM, Falcon-7B, Gemma 2B). H:
      multihead (Megatron-Turing, Llama 7B and 13B, Command-R, OLMo). Between: grouped-query (Llama
      2 70B, Llama 3, Mistral, SmolLM2).
    block: 'parallel': attention and MLP read one residual stream and are summed (PaLM, Falcon,
      GPT-J, GPT-NeoX, Phi, Command-R; the paper's section 3.4). 'serial': the MLP follows attention
      (Llama, Mistral, Qwen, Gemma, OLMo, BLOOM, GPT-2, Megatron-Turing).
    mlp: Two matrices in, f(gate) * linear: 'swiglu' (PaLM, Llama, Mistral, Qwen, Command-R, OLMo),
      'geglu' with GELU's tanh approximation (Gemma, T5X's decoders), 'geglu_erf' with exact GELU;
      'reglu', 'glu' (sigmoid) and 'bilinear' (flaxformer). One matrix in, f(linear): 'gelu' in its
      tanh approximation (GPT-2, GPT-J, Phi, BLOOM, StarCoder, Megatron-Turing), 'gelu_erf' (Falcon,
      GPT-NeoX, MPT), 'relu' (OPT), 'relu_squared' and 'swish' (flaxformer).
    norm: 'rms' (PaLM, Llama, Mistral, Qwen, Gemma), or 'layer': centred on the mean, with a learned
      bias (Falcon, GPT-NeoX, BLOOM). If a checkpoint has no bias, zeros are used (Command-R, MPT);
      if it has no scale, ones (OLMo).
    norm_scale: The meaning of the *stored* norm scales. 'zero' applies 1 + scale (PaLM in T5X,
      which is flaxformer's center_scale_at_zero; Gemma). 'one' applies the scale itself (all other
      families).
    norm_epsilon: Added to the mean square, or to the variance, before the square root. 1e-6 in
      PaLM, 1e-5 or 1e-6 in Llama-like models.
    rope_max_timescale: The base of rotary positions: the longest wavelength is 2 pi times this many
      positions. 1e4 in PaLM and Llama 2, 1e5 in SmolLM2, 5e5 in Llama 3, 1e6 in some Mistral
      models.
    tied_head: Whether logits are products with the embedding (PaLM, Gemma, Falcon, BLOOM, small
      Llama-like models); otherwise with a matrix of their own (Llama, GPT-NeoX, GPT-J, Phi).
    head_bias: Whether a bias is added to the logits (GPT-J, CodeGen, Phi).
    qkv_bias: Whether query, key and value have biases (Qwen2, GPT-NeoX, Phi, BLOOM, GPT-2, OPT).
    attention_output_bias: Whether attention's output has a bias (as qkv_bias, without Qwen2).
    mlp_bias: Whether all matrices of the MLP have biases (GPT-J, GPT-NeoX, Phi, BLOOM, GPT-2, OPT).
    parallel_norms: Norms of a parallel block: 1, or 2, of which one feeds attention and one the MLP
      (Falcon-40B and 180B, GPT-NeoX).
    norm_position: Where a serial block's norms are: 'before' each sublayer, 'after' it (on the sum
      that is added to the residual stream: OLMo 2), or 'both' (Gemma 2 and 3).
    qk_norm: Norm of queries and of keys before rotary positions: of each head, 'rms' (Qwen3, Gemma
      3) or 'layer' (Command-R+, StableLM 2 12B); of all heads together, 'rms_all' (OLMo 2) or
      'layer_all'; or 'none'.
    qkv_clip: Queries, keys and values are clipped to +- this value, or None (OLMo, some MPT).
    attention_soft_cap: Attention logits x become cap * tanh(x / cap); None: unchanged. 50 in Gemma
      2.
    logit_soft_cap: Soft cap of the model's logits, like attention_soft_cap. 30 in Gemma 2.
    positions: 'rotary'; 'alibi' (BLOOM, MPT, Falcon-RW); 'learned', a table that is added to the
      embedding (GPT-2, OPT, StarCoder); 'relative', T5's bias by distance, one table for all layers
      (T5X's decoders); or 'none'.
    rotary_dims: Number of dimensions of a head, from the first on, that rotary positions rotate, by
      halves (Phi, GPT-NeoX, GPT-J, StableLM 2). None: all.
    rope_scaling: Change of rotary frequencies: 'none'; 'linear', all divided by rope_factor; or
      'llama3', those of long wavelengths divided (Llama 3.1 and later).
    rope_factor, rope_low_factor, rope_high_factor, rope_original_length: Parameters of
      rope_scaling; the last three only of 'llama3'.
    local_rope_max_timescale: rope_max_timescale of local layers, without rope_scaling (Gemma 3).
      None: as in global layers.
    global_rotary: Whether global layers have rotary positions; False only in Command-R7B.
    xpos_scale_base: Positions over which xPos decays, or None: plain rotary. 512 in lucidrains'
      PaLM.
    alibi_slopes: 'bloom' (BLOOM, MPT); 'falcon', in bfloat16 and divided by sqrt(Q) like the logits
      (Falcon-RW); 'falcon_eager', twice 'falcon', as transformers computes Falcon-RW with eager
      attention, whose mask also holds the bias.
    alibi_max: Slopes are powers of two down to 2**-alibi_max: 8 in all but some MPT models.
    num_positions: Rows of the learned table of positions.
    relative_buckets, relative_max_distance: Parameters of T5's relative bias.
    embedding_norm: Whether a norm follows the embedding (BLOOM).
    layer_pattern: Kinds of layers, repeated over all layers: 'global' layers attend to all
      positions, 'local' ones to the last `window`. ('local',) in Mistral v0.1, ('local', 'global')
      in Gemma 2, five local layers and one global in Gemma 3, three and one in Command-R7B.
    window: Positions that a token of a local layer attends to, itself included.

  Raises:
    ValueError: A size is impossible, or features exclude each other; the message names the
      attribute.
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
  tied_head: bool = True
  head_bias: bool = False
  qkv_bias: bool = False
  attention_output_bias: bool = False
  mlp_bias: bool = False
  parallel_norms: int = 1
  norm_position: str = 'before'
  qk_norm: str = 'none'
  qkv_clip: float | None = None
  attention_soft_cap: float | None = None
  logit_soft_cap: float | None = None
  positions: str = 'rotary'
  rotary_dims: int | None = None
  rope_scaling: str = 'none'
  rope_factor: float = 1.0
  rope_low_factor: float = 1.0
  rope_high_factor: float = 4.0
  rope_original_length: int = 8192
  local_rope_max_timescale: float | None = None
  global_rotary: bool = True
  xpos_scale_base: float | None = None
  alibi_slopes: str = 'bloom'
  alibi_max: float = 8.0
  num_positions: int | None = None
  relative_buckets: int = 32
  relative_max_distance: int = 128
  embedding_norm: bool = False
  layer_pattern: tuple[str, ...] = ('global',)
  window: int | None = None

  def __post_init__(self) -> None:
    object.__setattr__(self, 'layer_pattern', tuple(self.layer_pattern))  # JSON gives a list
    check_features(self)

  @property
  def block_parts(self) -> tuple[BlockPart, ...]:
    """The parts of a layer, in order."""
    if self.block == 'parallel':
      return (BlockPart('parallel', True, True),)
    return BlockPart('attention', True, False), BlockPart('mlp', False, True)

  def has_two_norms(self, block_part: BlockPart) -> bool:
    """Return whether attention and MLP of a block part each have their own norm."""
    return block_part.name == 'parallel' and self.parallel_norms == 2

  @property
  def mlp_inputs(self) -> tuple[str, ...]:
    """The names of the matrices [E, F] that feed the MLP."""
    return MLPS[self.mlp]

  @property
  def local_layers(self) -> tuple[bool, ...]:
    """Whether each layer is local."""
    kinds = self.layer_pattern
    return tuple(kinds[i % len(kinds)] == 'local' for i in range(self.num_layers))

  @property
  def has_attention_rules(self) -> bool:
    """Whether attention's logits have a soft cap, position biases or windows."""
    biased = self.positions in ('alibi', 'relative')
    return biased or self.attention_soft_cap is not None or self.window is not None

  @property
  def rotary_size(self) -> int:
    """Dimensions of a head that rotary positions rotate; 0 without rotary positions."""
    if self.positions != 'rotary':
      return 0
    return self.d_head if self.rotary_dims is None else self.rotary_dims

  @property
  def features(self) -> dict[str, Any]:
    """Features in which the model differs from PaLM: the fields without their default value."""
    fields = dataclasses.fields(self)[_RECORDED:]
    return {f.name: v for f in fields if (v := getattr(self, f.name)) != f.default}

  @property
  def num_params(self) -> int:
    """The number of parameters. A tied head counts once; norms and biases are included."""
    c, q, kv = self, self.num_heads * self.d_head, self.num_kv_heads * self.d_head
    attention = 2 * c.d_model * (q + kv)
    mlp = (len(c.mlp_inputs) + 1) * c.d_model * c.d_ff
    biases = c.qkv_bias * (q + 2 * kv) + c.attention_output_bias * c.d_model
    biases += c.mlp_bias * (len(c.mlp_inputs) * c.d_ff + c.d_model)
    qk_norms = (c.qk_norm != 'none') * (1 + c.qk_norm.startswith('layer')) * (q + kv)
    per_layer = {'parallel': c.parallel_norms, 'serial': 2 + 2 * (c.norm_position == 'both')}
    norms = c.num_layers * per_layer[c.block] + 1 + c.embedding_norm
    norms *= (2 if c.norm == 'layer' else 1) * c.d_model
    tables = (1 + (not c.tied_head)) * c.vocab_size + (c.num_positions or 0)
    rest = tables * c.d_model + c.head_bias * c.vocab_size
    rest += (c.positions == 'relative') * c.num_heads * c.relative_buckets
    return c.num_layers * (attention + mlp + biases + qk_norms) + norms + rest

  def to_dict(self) -> dict[str, Any]:
    """Return the fields as a JSON-ready dict; from_dict is the inverse.

    Features that equal PaLM's are left out, so that versions without these features can read the
    dict.
    """
    fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)[:_RECORDED]}
    features = {k: [*v] if isinstance(v, tuple) else v for k, v in self.features.items()}
    return {**fields, **features}

  @classmethod
  def from_dict(cls, fields: Mapping[str, Any]) -> 'ModelConfig':
    """Make a config from the fields that to_dict returned.

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
      f'{self.norm} norm, vocabulary {self.vocab_size}'
      + ''.join(f', {name} {value}' for name, value in self.features.items())
      + f': {self.num_params:,} parameters'
    )


def preset(name: str, **overrides: Any) -> ModelConfig:
  """Return the ModelConfig of a named model.

  Args:
    name: A key of PRESETS.
    **overrides: Attributes of ModelConfig that replace the preset's values.

  Raises:
    ValueError: The name is unknown; the message lists the known ones.
  """
  if name not in PRESETS:
    raise ValueError(f'unknown model {name!r}; known: {", ".join(sorted(PRESETS))}')
  return ModelConfig(**{**PRESETS[name], **overrides})
