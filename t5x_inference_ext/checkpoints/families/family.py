"""The description of a family of models: how to make a ModelConfig, and tensor names."""

from collections.abc import Callable, Collection, Mapping
import dataclasses
from typing import Any

from t5x_inference_ext.checkpoints.families.settings import Settings
from t5x_inference_ext.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class FamilyModel:
  """A model of a family, as its settings describe it.

  Attributes:
    config: The model.
    modules: Canonical tensor -> path of the module that holds it; {} stands for the layer's index,
      and [] for the head's index if each head has its own module. A bias is in the same module as
      its matrix or norm.
    fused: Order of rows in a matrix that holds query, key and value. 'stacked': all queries, all
      keys, all values. 'grouped': for each key head, its queries, key and value. 'codegen': four
      times queries, values, keys. 'lucidrains': stacked, then linear and gate.
    interleaved: Whether rotary positions rotate neighbouring dimensions of a head, not its halves.
    transposed: Whether matrices are stored [out, in], as torch.nn.Linear has them.
    absent: Canonical norm scales and biases that are not stored: ones and zeros.
    norm_offset: Number to add to stored norm scales: 1 if the family applies 1 + scale but `config`
      has norm_scale='one'.
    embedding_scale: Factor by which looked-up rows of the embedding are multiplied.
    logit_scale: Factor of the logits.
    attention_scale: Factor of attention logits; None: Q**-0.5.
    norm_leaves: Names of a norm's scale and bias in its module.
    skipped_positions: Number of unused rows at the beginning of the table of positions.
    notes: Lines that state assumptions.
  """

  config: ModelConfig
  modules: Mapping[str, str]
  fused: str = ''
  interleaved: bool = False
  transposed: bool = True
  absent: frozenset[str] = frozenset()
  norm_offset: float = 0.0
  embedding_scale: float = 1.0
  logit_scale: float = 1.0
  attention_scale: float | None = None
  norm_leaves: tuple[str, str] = ('weight', 'bias')
  skipped_positions: int = 0
  notes: tuple[str, ...] = ()

  def factor(self, name: str) -> float:
    """Return the factor from stored to canonical values of a tensor.

    The program multiplies attention logits by Q**-0.5 and logits by E**-0.5. For a family with
    other scales, the ratio is folded into the query (or its norm) and into the final norm.
    """
    c = self.config
    if name == 'embedding':
      return self.embedding_scale
    if name in ('final_norm', 'final_norm_bias'):
      factor = self.logit_scale * c.d_model**0.5
      return factor / self.embedding_scale if c.tied_head else factor
    queries = ('query', 'query_bias') if c.qk_norm == 'none' else ('query_norm', 'query_norm_bias')
    if self.attention_scale is not None and name in queries:
      return self.attention_scale * c.d_head**0.5
    return 1.0


@dataclasses.dataclass(frozen=True)
class Family:
  """A family of models, with one `model_type` in config.json.

  Attributes:
    prefix: Prefix of the stored names. Some files leave it out.
    model: Function from settings to a model. Raises CheckpointError.
  """

  prefix: str
  model: Callable[[Settings], FamilyModel]


# transformers' name of an activation -> ModelConfig.mlp (with a gate, without a gate).
GATED = {
  'silu': 'swiglu',
  'swish': 'swiglu',
  'gelu': 'geglu_erf',
  'gelu_new': 'geglu',
  'gelu_pytorch_tanh': 'geglu',
  'gelu_fast': 'geglu',
  'relu': 'reglu',
  'sigmoid': 'glu',
  'linear': 'bilinear',
}
PLAIN = {
  'gelu': 'gelu_erf',
  'gelu_new': 'gelu',
  'gelu_pytorch_tanh': 'gelu',
  'gelu_fast': 'gelu',
  'relu': 'relu',
  'relu2': 'relu_squared',
  'silu': 'swish',
  'swish': 'swish',
}
_LAYERS = {'full_attention': 'global', 'sliding_attention': 'local'}


def even_sizes(
  s: Settings, d_model: int, heads: int, *, d_ff: int, layers: Collection[str], tied: bool
) -> dict[str, Any]:
  """Return the fields of ModelConfig for sizes and tied_head, if the heads divide d_model.

  Args:
    s: The settings.
    d_model: E.
    heads: Number of query heads, and of key/value heads.
    d_ff: F.
    layers: Names that the setting for the number of layers may have.
    tied: Default of the setting tie_word_embeddings.
  """
  return {
    'num_layers': s.layers(*layers),
    'd_model': d_model,
    'd_ff': d_ff,
    'vocab_size': s.integer('vocab_size'),
    'num_heads': heads,
    'num_kv_heads': heads,
    'd_head': max(1, d_model // heads),
    'tied_head': s.flag('tie_word_embeddings', tied),
  }


def head_sizes(s: Settings, d_model: int, heads: int, default: int | None = None) -> dict[str, int]:
  """Return num_heads, d_head and num_kv_heads, from settings with Llama's names."""
  d_head = s.integer('head_dim', default=default or max(1, d_model // heads))
  kv_heads = s.integer('num_key_value_heads', default=heads)
  return {'num_heads': heads, 'd_head': d_head, 'num_kv_heads': kv_heads}


def rotary_fields(
  s: Settings, d_head: int, *, theta: float = 1e4, part: float = 1.0
) -> dict[str, Any]:
  """Return the ModelConfig fields of rotary positions, from settings of any transformers version.

  Args:
    s: The settings.
    d_head: Q.
    theta: The family's default base of rotary positions.
    part: The family's default fraction of a head's dimensions that is rotated.
  """
  names = 'rope_theta', 'rotary_emb_base'
  parts = 'partial_rotary_factor', 'rotary_pct', 'rope_pct'
  part = s.number(*parts, default=part)
  theta = s.number(*names, default=theta)
  scaling = s.group('rope_parameters') or s.group('rope_scaling')
  fields: dict[str, Any] = {}
  if scaling is not None:
    part = scaling.number(*parts, default=part)
    theta = scaling.number(*names, default=theta)
    fields = _scaling_fields(scaling)
  rotated = int(d_head * part)
  if rotated != d_head:
    fields['rotary_dims'] = rotated
  return {'rope_max_timescale': theta, **fields}


def _scaling_fields(scaling: Settings) -> dict[str, Any]:
  """Return the ModelConfig fields for the setting rope_scaling."""
  known = {name: name for name in ('default', 'linear', 'llama3')}
  name = 'rope_type' if scaling.value('rope_type', default=None) is not None else 'type'
  kind = scaling.choice(name, known, default='default')
  if kind == 'default':
    return {}
  fields: dict[str, Any] = {'rope_scaling': kind, 'rope_factor': scaling.number('factor')}
  if kind == 'llama3':
    fields |= {
      'rope_low_factor': scaling.number('low_freq_factor'),
      'rope_high_factor': scaling.number('high_freq_factor'),
      'rope_original_length': scaling.integer('original_max_position_embeddings'),
    }
  return fields


def window_fields(s: Settings, num_layers: int, window: int | None, every: int) -> dict[str, Any]:
  """Return the ModelConfig fields of sliding windows.

  Args:
    s: The settings. layer_types, if present, gives the kind of each layer.
    num_layers: L.
    window: Width of the sliding window in positions; None if all layers attend to all positions.
    every: Without layer_types, every `every`-th layer attends to all positions; 0: no layer does.
  """
  kinds = s.value('layer_types', default=None)
  pattern: tuple[str, ...]
  if kinds is None:
    pattern = ('local',) * (every - 1) + ('global',) if every else ('local',)
    pattern = pattern[:num_layers]
  else:
    if not isinstance(kinds, list) or len(kinds) != num_layers:
      raise s.error('layer_types', kinds, f'it must list the kinds of {num_layers} layers')
    unknown = [kind for kind in kinds if not isinstance(kind, str) or kind not in _LAYERS]
    if unknown:
      raise s.error('layer_types', unknown[0], f'supported are {", ".join(_LAYERS)}')
    pattern = tuple(_LAYERS[kind] for kind in kinds)
  if window is None or 'local' not in pattern:
    return {}
  period = next(
    n for n in range(1, len(pattern) + 1) if pattern == (pattern[:n] * len(pattern))[: len(pattern)]
  )
  return {'layer_pattern': pattern[:period], 'window': window}
