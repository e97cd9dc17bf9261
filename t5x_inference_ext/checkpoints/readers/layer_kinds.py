"""flaxformer's decoder layers: the names, axes and canonical matrices of their kernels.

flaxformer.py reads trees by these tables, which hold all differences between kinds of layers.
Shapes are those of one layer, without the layer axis. C is the number of columns per head.

  ParallelFusedDecoderLayer, for multiquery only; C = Q + 2F/H with a gate, else Q + F/H
    q_wi_fused [E, H, C]
    kv_fused [E, 1, 2Q]
    o_wo_fused [H, Q + F/H, E]
  DecoderLayer, with heads on a separate axis (split_head_kernel) or merged, [E, H Q]
    self_attention/{query, key, value} [E, H, Q], for multiquery key and value [E, Q];
      or kv_fused [E, 2, H, Q]; or qkv_fused [E, 3, H, Q]
    self_attention/out [H, Q, E]
    mlp/wi, or wi_0 (the gate) and wi_1, [E, F]; or wi_fused [E, 1 or 2, F]
    mlp/wo [F, E]

T5X's examples/decoder_only has the tree of a DecoderLayer with merged heads.
"""

from collections.abc import Callable, Mapping, Set
import dataclasses
from typing import Any, TypeAlias

from t5x_inference_ext.checkpoints.readers.kernel import Kernel
from t5x_inference_ext.config import ModelConfig

# Module -> shape of its stored kernel.
Shapes: TypeAlias = Mapping[str, tuple[int, ...]]


class UnknownSizes(ValueError):
  """The shapes fit no model, or more than one."""


class UnknownHeads(UnknownSizes):
  """The shapes do not determine the number of heads."""


@dataclasses.dataclass(frozen=True)
class LayerKind:
  """A kind of layer.

  Attributes:
    name: flaxformer's name of the layer, for messages.
    block: Value of ModelConfig.block for such layers.
    norms: (canonical name, module) of each norm.
    alternatives: A list of choices. Each choice is a list of sets of modules, and a tree has
      exactly one set of each choice.
    ranks: Module -> the numbers of axes that its kernel may have.
    sizes: Function from stored shapes, and the number of heads if it is known, to (d_ff, num_heads,
      d_head, num_kv_heads). Raises UnknownSizes.
    mlp_inputs: Function from stored shapes to the number of matrices that feed the MLP, 1 or 2.
    kernels: Function from a model to {module -> kernel}, for the modules of all alternatives.
    output_factor: Factor by which the layer multiplies the outputs of attention and MLP before it
      adds them.
    is_palms: Whether PaLM's conventions are assumed if no source states any.
  """

  name: str
  block: str
  norms: tuple[tuple[str, str], ...]
  alternatives: tuple[tuple[tuple[str, ...], ...], ...]
  ranks: Mapping[str, tuple[int, ...]]
  sizes: Callable[[Shapes, int | None], dict[str, int]]
  mlp_inputs: Callable[[Shapes], int]
  kernels: Callable[[ModelConfig, Shapes], dict[str, Kernel]]
  output_factor: float = 1.0
  is_palms: bool = False

  def modules(self, stored: Set[str]) -> tuple[str, ...]:
    """Return the kernel modules that a tree must have, given its modules `stored`."""

    def fit(modules: tuple[str, ...]) -> int:
      return sum(1 if module in stored else -1 for module in modules)

    return tuple(module for choice in self.alternatives for module in max(choice, key=fit))

  def factors(self, model: ModelConfig, rescale_logits: bool = True) -> dict[str, float]:
    """Return the factors from stored to canonical matrices, by canonical name; 1 if missing.

    With rescale_logits=False, flaxformer trains without dividing attention logits by sqrt(Q). The
    program here always divides, so queries are multiplied by sqrt(Q).
    """
    return {
      'attention_output': self.output_factor,
      'mlp_output': self.output_factor,
      'query': 1.0 if rescale_logits else model.d_head**0.5,
    }


Q_WI, KV, O_WO = 'q_wi_fused', 'kv_fused', 'o_wo_fused'


def _fused_inputs(shapes: Shapes) -> int:
  return 1 if shapes[Q_WI][2] == shapes[O_WO][1] else 2


def _fused_sizes(shapes: Shapes, known_heads: int | None) -> dict[str, int]:
  del known_heads  # unused: the shapes determine the number of heads
  (_, heads, columns), (_, kv_heads, kv_columns) = shapes[Q_WI], shapes[KV]
  inputs = _fused_inputs(shapes)
  q = kv_columns // 2
  if kv_columns % 2 or columns <= q or (columns - q) % inputs:
    raise UnknownSizes(
      f'{KV} {list(shapes[KV])} and {Q_WI} {list(shapes[Q_WI])} (per layer) do not match each '
      'other: their last axes should be 2Q and Q + 2F/H'
    )
  return dict(
    d_ff=(columns - q) // inputs * heads, num_heads=heads, d_head=q, num_kv_heads=kv_heads
  )


def _fused_kernels(c: ModelConfig, shapes: Shapes) -> dict[str, Kernel]:
  del shapes  # unused: there is only one form
  if c.d_ff % c.num_heads:
    raise UnknownSizes(
      f'd_ff {c.d_ff} is not a multiple of {c.num_heads} heads: no fused kernel has this shape'
    )
  e, h, q, g = c.d_model, c.num_heads, c.d_head, c.d_ff // c.num_heads
  columns = q + len(c.mlp_inputs) * g
  kernels = (
    Kernel(Q_WI, (e,), (h, columns), (('query', q), *((name, g) for name in c.mlp_inputs)), 2),
    Kernel(KV, (e,), (c.num_kv_heads, 2 * q), (('key', q), ('value', q)), 2),
    Kernel(O_WO, (h, q + g), (e,), (('attention_output', q), ('mlp_output', g)), 1),
  )
  return {kernel.module: kernel for kernel in kernels}


QUERY, KEY, VALUE, OUT, ATTENTION_KV, ATTENTION_QKV = (
  f'self_attention/{name}' for name in ('query', 'key', 'value', 'out', 'kv_fused', 'qkv_fused')
)
WI, WI_0, WI_1, WI_FUSED, WO = (f'mlp/{name}' for name in ('wi', 'wi_0', 'wi_1', 'wi_fused', 'wo'))


def _separate_inputs(shapes: Shapes) -> int:
  return 1 if WI in shapes or shapes.get(WI_FUSED, (0, 2))[1] == 1 else 2


def _separate_sizes(shapes: Shapes, known_heads: int | None) -> dict[str, int]:
  d_ff = shapes[WO][0]
  if ATTENTION_QKV in shapes:
    _, _, heads, q = shapes[ATTENTION_QKV]
    return dict(d_ff=d_ff, num_heads=heads, d_head=q, num_kv_heads=heads)
  queries, out = shapes[QUERY], shapes[OUT]
  key = shapes[KEY] if KEY in shapes else (shapes[ATTENTION_KV][0], *shapes[ATTENTION_KV][2:])
  if len(queries) == 3:
    q = queries[2]
  elif len(out) == 3:
    q = out[1]
  elif len(key) == 3:
    q = key[-1]
  elif known_heads is not None:
    if queries[1] % known_heads:
      raise UnknownSizes(f'{QUERY} {list(queries)} is not made of {known_heads} heads')
    q = queries[1] // known_heads
  elif key[1] < queries[1]:
    q = key[-1]  # two axes, [E, Q]: multiquery
  else:
    raise UnknownHeads(
      f'{QUERY} {list(queries)} and {KEY} {list(key)} do not determine the number of heads'
    )
  columns, kv_columns = (x[1] * x[2] if len(x) == 3 else x[1] for x in (queries, key))
  if columns % q or kv_columns % q:
    raise UnknownSizes(
      f'{QUERY} {list(queries)} and {KEY} {list(key)} do not match: both should be whole '
      f'heads of {q} columns'
    )
  return dict(d_ff=d_ff, num_heads=columns // q, d_head=q, num_kv_heads=kv_columns // q)


def _separate_kernels(c: ModelConfig, shapes: Shapes) -> dict[str, Kernel]:
  e, f, h, k, q = c.d_model, c.d_ff, c.num_heads, c.num_kv_heads, c.d_head
  mlp_inputs = c.mlp_inputs

  def heads(count: int, module: str) -> tuple[int, ...]:  # as stored: split or merged
    return (count, q) if len(shapes.get(module, ())) == 3 else (count * q,)

  def one(module: str, inputs: tuple[int, ...], outputs: tuple[int, ...], name: str) -> Kernel:
    return Kernel(module, inputs, outputs, ((name, inputs[0]),), 0)

  def stacked(module: str, outputs: tuple[int, ...], names: tuple[str, ...]) -> Kernel:
    return Kernel(module, (e,), (len(names), *outputs), tuple((name, 1) for name in names), 1)

  kernels = (
    one(QUERY, (e,), heads(h, QUERY), 'query'),
    one(KEY, (e,), heads(k, KEY), 'key'),
    one(VALUE, (e,), heads(k, VALUE), 'value'),
    stacked(ATTENTION_KV, (k, q), ('key', 'value')),
    stacked(ATTENTION_QKV, (h, q), ('query', 'key', 'value')),
    one(OUT, heads(h, OUT), (e,), 'attention_output'),
    one(WI, (e,), (f,), mlp_inputs[-1]),
    one(WI_0, (e,), (f,), mlp_inputs[0]),
    one(WI_1, (e,), (f,), mlp_inputs[-1]),
    stacked(WI_FUSED, (f,), mlp_inputs),
    one(WO, (f,), (e,), 'mlp_output'),
  )
  return {kernel.module: kernel for kernel in kernels}


_SEPARATE: dict[str, Any] = dict(
  alternatives=(
    ((QUERY, KEY, VALUE), (QUERY, ATTENTION_KV), (ATTENTION_QKV,)),
    ((OUT,),),
    ((WI_0, WI_1), (WI,), (WI_FUSED,)),
    ((WO,),),
  ),
  ranks={
    **dict.fromkeys((QUERY, KEY, VALUE, OUT), (2, 3)),
    **dict.fromkeys((ATTENTION_KV, ATTENTION_QKV), (4,)),
    **dict.fromkeys((WI, WI_0, WI_1, WO), (2,)),
    WI_FUSED: (3,),
  },
  sizes=_separate_sizes,
  mlp_inputs=_separate_inputs,
  kernels=_separate_kernels,
)

# If two kinds fit a tree equally well, the first one is taken.
LAYER_KINDS = (
  LayerKind(
    'ParallelFusedDecoderLayer',
    'parallel',
    (('layer_norm', 'layer_norm'),),
    alternatives=(((Q_WI, KV, O_WO),),),
    ranks={Q_WI: (3,), KV: (3,), O_WO: (3,)},
    sizes=_fused_sizes,
    mlp_inputs=_fused_inputs,
    kernels=_fused_kernels,
    is_palms=True,
  ),
  LayerKind(
    'DecoderLayer',
    'serial',
    (('attention_norm', 'pre_self_attention_layer_norm'), ('mlp_norm', 'pre_mlp_layer_norm')),
    **_SEPARATE,
  ),
  # This layer adds (attention + MLP) / sqrt(2). The factor is multiplied into both output matrices.
  LayerKind(
    'DecoderLayer(parallel=True)',
    'parallel',
    (('layer_norm', 'layer_norm'),),
    **_SEPARATE,
    output_factor=2**-0.5,
  ),
)
