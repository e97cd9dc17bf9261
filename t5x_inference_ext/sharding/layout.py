"""Layouts: which mesh axes split weights, activations and attention (sections 3.2 and 3.3).

A layer multiplies activations [B, T, E] by an input matrix [E, F], applies the MLP's activation or
attention, and multiplies the result by an output matrix [F, E]. Here F stands for the MLP's columns
and for heads. In the paper's notation (section 3.1) a subscript names the mesh axes that split a
dimension: `E_xF_zy` is [E/X, F/(Z Y)] on each device.

A layout decides three things:

  - How weights are stored: `E_xF_zy`, split in two dimensions, or with ws_1d `EF_xzy`, split in
    one. See `stored_embed` and `stored_hidden`.
  - Whether activations or weights move in a layer. In a *weight-stationary* layout (ws_) each
    device multiplies by the weights that it stores, and activations move. In a *weight-gathered*
    layout (wg_) the devices along `gathered_axes` first gather each other's weights. They then
    divide the tokens: rows of the batch, or positions if there are too few rows.
  - How products are split: `embed_axes` split E and `hidden_axes` split F. They are the axes that
    weights are stored over, except `gathered_axes`.

All layouts run one program; they differ only in these axes.
"""

from collections.abc import Mapping
import dataclasses
import functools
import math

from jax.sharding import PartitionSpec as P

from t5x_inference_ext import params
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.errors import MeshError
from t5x_inference_ext.sharding.mesh import AXES

Axes = tuple[str, ...]

# Order, slowest first, of mesh axes that split one dimension together. y is the fastest, so that
# after a gather over y (wg_xy) a device holds consecutive columns.
ORDER = ('x', 'z', 'y')

# Feedforward layout -> the axes that its weights are gathered over (section 3.2).
FEEDFORWARD: dict[str, Axes] = {
  'ws_1d': (),
  'ws_2d': (),
  'wg_x': ('x',),
  'wg_xy': ('x', 'y'),
  'wg_xyz': ORDER,
}
ATTENTION = ('batch', 'heads')


@dataclasses.dataclass(frozen=True)
class Layout:
  """A feedforward layout and an attention layout, e.g. 'ws_2d/batch'.

  Attributes:
    feedforward: 'ws_1d' or 'ws_2d': weights stay, activations move. 'wg_x', 'wg_xy' or 'wg_xyz':
      weights are stored as in ws_2d and gathered over these axes.
    attention: How queries, keys, values and the KV cache are split. 'heads': by heads. 'batch': by
      rows over as many axes as the rows can fill, and by heads over the other axes.

  Raises:
    MeshError: A part is unknown, or the feedforward layout leaves no axis for attention's heads.
  """

  feedforward: str = 'ws_2d'
  attention: str = 'batch'

  def __post_init__(self) -> None:
    for value, known in ((self.feedforward, tuple(FEEDFORWARD)), (self.attention, ATTENTION)):
      if value not in known:
        raise MeshError(f'unknown layout part {value!r}; known: {", ".join(known)}')
    if self.attention == 'heads' and not self.embed_axes + self.hidden_axes:
      raise MeshError(
        f'{self.feedforward}/heads makes no sense: {self.feedforward} splits rows over every axis, '
        f'which leaves none to split heads over; use {self.feedforward}/batch'
      )

  @classmethod
  def parse(cls, text: str) -> 'Layout':
    """Return the layout that a text names: 'ws_2d/batch' -> Layout('ws_2d', 'batch').

    Raises:
      MeshError: The text names no layout. The message says why.
    """
    if not isinstance(text, str) or text.count('/') != 1:
      raise MeshError(f'a layout is written feedforward/attention, e.g. ws_2d/batch, got {text!r}')
    return _parse(text)

  def __str__(self) -> str:
    return f'{self.feedforward}/{self.attention}'

  # Stored weights.

  @functools.cached_property
  def stored_embed(self) -> Axes:
    """The axes that split E (d_model) in the weights."""
    return () if self.feedforward == 'ws_1d' else ('x',)

  @functools.cached_property
  def stored_hidden(self) -> Axes:
    """The axes that split the weights' other dimension: MLP columns, heads, vocabulary."""
    return tuple(a for a in ORDER if a not in self.stored_embed)

  @property
  def weight_axes(self) -> dict[str, Axes]:
    """The mesh axes that split each logical axis of a weight (params.py).

    The embedding [V, E] is split so that neither the lookup nor the logits need weights of other
    devices. Vectors are small: they are replicated on every device, and each device reads its part.
    """
    return {
      params.LAYERS_AXIS: (),
      params.VOCAB_AXIS: self.stored_hidden,
      params.EMBED_AXIS: self.stored_embed,
      params.HIDDEN_AXIS: self.stored_hidden,
      params.FEATURES_AXIS: (),
      params.BUCKETS_AXIS: (),
    }

  def weight_spec(self, axes: tuple[str, ...]) -> P:
    """Return the sharding of a weight with these logical axes."""
    return P(*(self.weight_axes[axis] for axis in axes))

  # Products inside a layer.

  @property
  def gathered_axes(self) -> Axes:
    """The axes that weights are gathered over before use; they split the tokens."""
    return FEEDFORWARD[self.feedforward]

  @functools.cached_property
  def embed_axes(self) -> Axes:
    """The axes that split E in products.

    In the input product each device sums over its part of E: the result is a partial sum over these
    axes.
    """
    return tuple(a for a in self.stored_embed if a not in self.gathered_axes)

  @functools.cached_property
  def hidden_axes(self) -> Axes:
    """The axes that split F in products.

    In the output product each device sums over its part of F: the result is a partial sum over
    these axes.
    """
    return tuple(a for a in self.stored_hidden if a not in self.gathered_axes)


@functools.lru_cache(maxsize=256)
def _parse(text: str) -> Layout:
  """Return the layout 'feedforward/attention', cached by text."""
  return Layout(*text.split('/'))


def num_shards(axes: Axes, mesh: Mapping[str, int]) -> int:
  """Return the number of devices along some axes of a mesh (axis name -> size)."""
  return math.prod([mesh[a] for a in axes])


def shape_text(mesh: Mapping[str, int]) -> str:
  """Return a mesh (axis name -> size) as text, 'XxYxZ'."""
  return 'x'.join(str(mesh[a]) for a in AXES)


def check_pair(prefill: Layout, decode: Layout) -> None:
  """Check that the layouts of two phases can share one copy of the weights.

  Raises:
    MeshError: The two layouts store weights differently.
  """
  if prefill.weight_axes != decode.weight_axes:
    raise MeshError(
      f'{prefill} for prefill and {decode} for decode place the weights differently (ws_1d splits '
      'them over d_ff alone, all others over d_model and d_ff), so one set '
      "can't serve both: use ws_1d for both phases, or for neither"
    )


def check_model(config: ModelConfig, mesh: Mapping[str, int]) -> None:
  """Check that a mesh divides a model, before anything is loaded.

  Args:
    config: The model.
    mesh: Axis name -> size.

  Raises:
    MeshError: The device count does not divide d_model or d_ff.
  """
  chips = num_shards(AXES, mesh)
  for name, width in (('d_model', config.d_model), ('d_ff', config.d_ff)):
    if width % chips:
      raise MeshError(
        f'{name}={width} does not divide over the {chips} devices of the mesh {shape_text(mesh)}: '
        f'choose a mesh whose device count divides {width}'
      )
