"""The layouts of the paper's sections 3.2 and 3.3: which mesh axes split weights, activations and attention.

Notation of section 3.1: a subscript names the mesh axes that a dimension is split over, e.g. `E_xF_zy`. All layouts are
one program with different axes in it:

  stored   weights lie `E_[embed axes] F_[hidden axes]`: `E_xF_zy`, or for ws_1d `EF_xzy`.
  gathered the axes that weights are gathered over before use, none where weights are stationary. Tokens, not features,
           are split over these: rows of the batch, and positions where there are too few rows.
  working  the embed and hidden axes that are left: what activations are split over inside a layer.
"""

from collections.abc import Mapping
import dataclasses
import math

from jax.sharding import PartitionSpec as P

from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.errors import MeshError
from t5x_inference_ext.sharding.mesh import AXES

Axes = tuple[str, ...]

# Of axes that split one dimension the slowest comes first. y is last, so that gathering over y (wg_xy) leaves whole runs
# of columns, in order, on each z.
ORDER = ('x', 'z', 'y')

# Feedforward layout -> the axes that weights are gathered over (section 3.2).
FEEDFORWARD: dict[str, Axes] = {
  'ws_1d': (),
  'ws_2d': (),
  'wg_x': ('x',),
  'wg_xy': ('x', 'y'),
  'wg_xyz': ORDER,
}
ATTENTION = ('batch', 'heads')
# How the collectives beside matmuls run: at once, or in steps around a ring, one way or both (section 3.5). The number
# is that of directions.
RING_DIRECTIONS = {'plain': 0, 'one_way': 1, 'two_way': 2}


@dataclasses.dataclass(frozen=True)
class Layout:
  """A feedforward layout with an attention layout, written 'ws_2d/batch' or 'wg_xyz/batch/two_way'.

  Attributes:
    feedforward: 'ws_1d', 'ws_2d': weights stay, activations move; 'wg_x', 'wg_xy', 'wg_xyz': weights, stored as for
      ws_2d, are gathered over these axes.
    attention: 'batch': queries, keys, values and the cache are split by rows over as many axes as the rows fill, by
      heads over the others; 'heads': by heads alone.
    collectives: 'plain', or looped: 'one_way', 'two_way'.

  Raises:
    MeshError: a layout that is not known, or makes no sense, saying why.
  """

  feedforward: str = 'ws_2d'
  attention: str = 'batch'
  collectives: str = 'plain'

  def __post_init__(self):
    for value, known in (
      (self.feedforward, FEEDFORWARD),
      (self.attention, ATTENTION),
      (self.collectives, RING_DIRECTIONS),
    ):
      if value not in known:
        raise MeshError(f'unknown layout part {value!r}; known: {", ".join(known)}')
    if self.attention == 'heads' and not self.embed_axes + self.hidden_axes:
      raise MeshError(
        f'{self.feedforward}/heads makes no sense: {self.feedforward} splits rows over every axis, which '
        f'leaves none to split heads over; use {self.feedforward}/batch'
      )

  @classmethod
  def parse(cls, text: str) -> 'Layout':
    """'ws_2d/batch' -> Layout('ws_2d', 'batch')."""
    if not isinstance(text, str) or text.count('/') not in (1, 2):
      raise MeshError(
        'a layout is written feedforward/attention, e.g. ws_2d/batch, or with its collectives, e.g. '
        f'ws_2d/batch/two_way, got {text!r}'
      )
    return cls(*text.split('/'))

  def __str__(self) -> str:
    collectives = '' if self.collectives == 'plain' else f'/{self.collectives}'
    return f'{self.feedforward}/{self.attention}{collectives}'

  @property
  def ring_directions(self) -> int:
    """0 for plain collectives, else in how many directions of a ring the looped ones send."""
    return RING_DIRECTIONS[self.collectives]

  # As stored.

  @property
  def stored_embed(self) -> Axes:
    """The axes that d_model is split over in the weights."""
    return () if self.feedforward == 'ws_1d' else ('x',)

  @property
  def stored_hidden(self) -> Axes:
    """The axes that the weights' other dimension (MLP columns, heads, vocabulary) is split over."""
    return tuple(a for a in ORDER if a not in self.stored_embed)

  @property
  def embedding(self) -> P:
    """[V, E], so that the lookup and the logits move no weights."""
    return P(self.stored_hidden, self.stored_embed)

  @property
  def input_matrix(self) -> P:
    """[E, columns]."""
    return P(self.stored_embed, self.stored_hidden)

  @property
  def output_matrix(self) -> P:
    """[rows, E]."""
    return P(self.stored_hidden, self.stored_embed)

  @property
  def input_scale(self) -> P:
    """[columns]: the output channels of the input matrix."""
    return P(self.stored_hidden)

  @property
  def vector(self) -> P:
    """[E], norms and output scales: whole everywhere, being small; each device uses its part."""
    return P()

  # At work.

  @property
  def gathered_axes(self) -> Axes:
    """The axes that weights are gathered over, and tokens split over."""
    return FEEDFORWARD[self.feedforward]

  @property
  def embed_axes(self) -> Axes:
    """Over these, products of the input matrix are partial sums."""
    return tuple(a for a in self.stored_embed if a not in self.gathered_axes)

  @property
  def hidden_axes(self) -> Axes:
    """Over these, products of the output matrix are partial sums."""
    return tuple(a for a in self.stored_hidden if a not in self.gathered_axes)


def num_shards(axes: Axes, mesh: Mapping[str, int]) -> int:
  """The product of the axes' sizes."""
  return math.prod(mesh[a] for a in axes)


def shape_text(mesh: Mapping[str, int]) -> str:
  return 'x'.join(str(mesh[a]) for a in AXES)


def check_pair(prefill: Layout, decode: Layout) -> None:
  """Raises MeshError for two phases that can't share one set of weights on the chips."""
  if prefill.input_matrix != decode.input_matrix:
    raise MeshError(
      f'{prefill} for prefill and {decode} for decode place the weights differently (ws_1d splits them over d_ff '
      "alone, all others over d_model and d_ff), so that one set can't serve both: use ws_1d for both phases, or "
      'for neither'
    )


def check_model(config: ModelConfig, mesh: Mapping[str, int]) -> None:
  """Raises MeshError where the mesh does not divide the model, naming the sizes, before anything is loaded."""
  chips = num_shards(AXES, mesh)
  for name, width in (('d_model', config.d_model), ('d_ff', config.d_ff)):
    if width % chips:
      raise MeshError(
        f'{name}={width} does not divide over the {chips} devices of the mesh {shape_text(mesh)}: choose a mesh '
        f'whose device count divides {width}'
      )
