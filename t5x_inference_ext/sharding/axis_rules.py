"""Logical axis names: what each dimension of a tensor means, and by a layout's rules which mesh axes split it.

The names are the same in every layout and phase. Rules, pairs of a name and mesh axes in T5X's and flax's form, are
read off the specs of a Layout and a ActivationSharding, so that nothing is decided here.
"""

from collections.abc import Iterable

from jax.sharding import PartitionSpec as P

from t5x_inference_ext.sharding.activations import ActivationSharding
from t5x_inference_ext.sharding.layout import Layout

# None: not split. One axis goes by itself, as T5X prints it.
Rules = tuple[tuple[str, str | tuple[str, ...] | None], ...]

# In front of a layer's dimensions where one array holds all layers.
STACKED = 'layers'
# 'hidden' is the width between the matrices: MLP columns and heads, block by block. 'features' is d_model unsplit.
WEIGHT_AXES = {
  'embedding': ('vocab', 'embed'),
  'w_in': ('embed', 'hidden'),
  'w_out': ('hidden', 'embed'),
  'in_scale': ('hidden',),
  **dict.fromkeys(
    ('out_scale', 'norm', 'norm_bias', 'final_norm', 'final_norm_bias'), ('features',)
  ),
}
ACTIVATION_AXES = {
  'residual': ('residual_rows', 'residual_positions', 'residual'),
  'mlp': ('rows', 'positions', 'mlp'),
  'queries': ('attention_rows', 'attention_positions', 'attention_heads', 'd_head'),
  'cache': ('attention_rows', 'cache_positions', 'kv_heads', 'd_head'),
}


def weight_axes(name: str, stacked: bool = False) -> tuple[str, ...]:
  """The logical axes of a tensor of arrangement.packed_tensors: 'mlp/w_in' -> ('embed', 'hidden').

  Args:
    name: as there.
    stacked: whether the array has all layers, in front.
  """
  axes = WEIGHT_AXES[name.rpartition('/')[2]]
  return (STACKED, *axes) if stacked else axes


def weight_rules(layout: Layout) -> Rules:
  """The rules of weights as stored: those of both phases, since two phases share one set of weights."""
  return (
    (STACKED, None),
    *_rules(
      (
        (WEIGHT_AXES['embedding'], layout.embedding),
        (WEIGHT_AXES['w_in'], layout.input_matrix),
        (WEIGHT_AXES['norm'], layout.vector),
      )
    ),
  )


def activation_rules(sharding: ActivationSharding) -> Rules:
  """The rules of activations and KV cache in one phase, for the placement's rows and positions."""
  queries = P(sharding.attention_rows, sharding.attention_positions, sharding.attention_heads)
  return _rules(
    (
      (ACTIVATION_AXES['residual'], P(*sharding.residual)),
      (ACTIVATION_AXES['mlp'], P(sharding.rows, sharding.positions, sharding.layout.hidden_axes)),
      (ACTIVATION_AXES['queries'], queries),
      (ACTIVATION_AXES['cache'], sharding.cache),
    )
  )


def logical_axis_rules(layout: Layout, sharding: ActivationSharding | None = None) -> Rules:
  """A layout's rules for T5X.

  Args:
    layout: of either phase.
    placement: adds, in front, the rules of one phase. They never replace those of weights: where a function declares
      weights anew, names without a rule would have them gathered onto every device.
  """
  return (*(() if sharding is None else activation_rules(sharding)), *weight_rules(layout))


def _rules(tensors: Iterable[tuple[tuple[str, ...], P]]) -> Rules:
  rules = {}
  for names, spec in tensors:
    for name, axes in zip(names, (*spec, *(None,) * (len(names) - len(spec)))):
      axes = (axes,) if isinstance(axes, str) else tuple(axes or ())
      rules[name] = (axes[0] if len(axes) == 1 else axes) or None
  return tuple(rules.items())
