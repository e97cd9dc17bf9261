"""Axis rules in T5X's form: pairs of a logical axis and the mesh axes that split it.

A logical axis names the meaning of a dimension, which does not depend on layout or phase. The mesh
axes come from Layout.weight_axes and ActivationSharding.axes; this module only converts them.
"""

from collections.abc import Mapping

from t5x_inference_ext.sharding.activations import ActivationSharding
from t5x_inference_ext.sharding.layout import Axes, Layout

# None: not split. A single mesh axis is a str, not a tuple, as T5X prints it.
Rules = tuple[tuple[str, str | tuple[str, ...] | None], ...]


def logical_axis_rules(layout: Layout) -> Rules:
  """Return a layout's rules of stored weights, which both phases share."""
  return _rules(layout.weight_axes)


def activation_rules(sharding: ActivationSharding) -> Rules:
  """Return the rules of activations and KV cache in one phase.

  The rules of the weights have to follow them: a function that declares weights without rules for
  them gathers all weights on every device.
  """
  return _rules(sharding.axes)


def _rules(axes: Mapping[str, Axes]) -> Rules:
  return tuple(
    (name, mesh_axes[0] if len(mesh_axes) == 1 else mesh_axes or None)
    for name, mesh_axes in axes.items()
  )
