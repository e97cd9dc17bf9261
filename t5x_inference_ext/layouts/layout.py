"""Where every tensor lives on the mesh: the sharding of weights, activations and KV cache, each written once.

Notation of the paper's section 3.1: a subscript names the mesh axes that a dimension is split over, e.g. `E_xF_yz`.
"""

import dataclasses
import itertools
import math
from typing import Mapping

from jax.sharding import PartitionSpec as P

from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.errors import MeshError
from t5x_inference_ext.layouts.mesh import AXES

FEEDFORWARD = ('ws_2d',)
ATTENTION = ('batch',)


@dataclasses.dataclass(frozen=True)
class Layout:
  """A feedforward layout (section 3.2) with an attention layout (section 3.3).

  Attributes:
    feedforward: 'ws_2d': weights `E_xF_yz` stay where they are, activations move.
    attention: 'batch': queries, keys, values and the cache are split by batch over as many axes as the batch fills.

  Raises:
    MeshError: a layout that is not known, listing those that are.
  """

  feedforward: str = 'ws_2d'
  attention: str = 'batch'

  def __post_init__(self):
    for value, known in ((self.feedforward, FEEDFORWARD), (self.attention, ATTENTION)):
      if value not in known:
        raise MeshError(f'unknown layout part {value!r}; known: {", ".join(known)}')

  @classmethod
  def parse(cls, text: str) -> 'Layout':
    """'ws_2d/batch' -> Layout('ws_2d', 'batch')."""
    if text.count('/') != 1:
      raise MeshError(f'a layout is written feedforward/attention, e.g. ws_2d/batch, got {text!r}')
    return cls(*text.split('/'))

  def __str__(self) -> str:
    return f'{self.feedforward}/{self.attention}'

  # Axes that d_model and the hidden columns of the weights are split over.
  embed_axes = ('x',)
  hidden_axes = ('y', 'z')

  @property
  def norm(self) -> P:
    """[E] or activations' last axis: E_xyz."""
    return P(AXES)

  @property
  def embedding(self) -> P:
    """[V, E]: V_yzE_x, so that the lookup and the logits move no weights."""
    return P(self.hidden_axes, self.embed_axes)

  @property
  def input_matrix(self) -> P:
    """[E, columns]: E_xF_yz."""
    return P(self.embed_axes, self.hidden_axes)

  @property
  def output_matrix(self) -> P:
    """[rows, E]: F_yzE_x."""
    return P(self.hidden_axes, self.embed_axes)

  @property
  def input_scale(self) -> P:
    """[columns]: the output channels of the input matrix."""
    return P(self.hidden_axes)

  @property
  def output_scale(self) -> P:
    """[E]: applied to the reduced output, E_xyz."""
    return P(AXES)


def hidden_shards(layout: Layout, mesh: Mapping[str, int]) -> int:
  return math.prod(mesh[a] for a in layout.hidden_axes)


def batch_axes(batch: int, mesh: Mapping[str, int]) -> tuple[str, ...]:
  """The mesh axes that a batch of this size is split over in attention: as many as it fills (section 3.3).

  Args:
    batch: B.
    mesh: axis name -> size.

  Returns:
    A subset of (x, y, z), in that order; attention is replicated over the others.

  Raises:
    MeshError: a batch that fills no set of axes evenly, naming the sizes that do.
  """
  chips = math.prod(mesh[a] for a in AXES)
  if batch % chips == 0:
    return AXES
  for axes in _axis_subsets():
    if math.prod(mesh[a] for a in axes) == batch:
      return axes
  raise MeshError(
      f'a batch of {batch} does not divide over the mesh {"x".join(str(mesh[a]) for a in AXES)}: pad it to '
      f'{padded_batch(batch, mesh)} rows, or use a mesh whose axes\' product divides it')


def padded_batch(batch: int, mesh: Mapping[str, int]) -> int:
  """The smallest batch of at least `batch` rows that batch_axes accepts."""
  chips = math.prod(mesh[a] for a in AXES)
  sizes = {math.prod(mesh[a] for a in axes) for axes in _axis_subsets()}
  sizes.add(-(-batch // chips) * chips)
  return min(s for s in sizes if s >= batch)


def _axis_subsets():
  # Larger subsets first; x first among equals: its reduce-scatter is then over batch, with no gather after it.
  return (axes for k in (3, 2, 1, 0) for axes in itertools.combinations(AXES, k))


def check_model(config: ModelConfig, mesh: Mapping[str, int]) -> None:
  """Raises MeshError where the mesh does not divide the model, naming the sizes, before anything is loaded."""
  chips = math.prod(mesh[a] for a in AXES)
  for name, size in (('d_model', config.d_model), ('d_ff', config.d_ff)):
    if size % chips:
      raise MeshError(
          f'{name}={size} does not divide over the {chips} devices of the mesh '
          f'{"x".join(str(mesh[a]) for a in AXES)}: choose a mesh whose device count divides {size}')


def default_mesh(config: ModelConfig, devices: int) -> tuple[int, int, int]:
  """A mesh over as many devices as divide the model, shaped for the 2D weight-stationary layout.

  The activations that move are least where X = sqrt(chips * E / F), half the root of the chips for F = 4 E (the paper's
  section 3.2.2); Y and Z share the rest as evenly as they can.
  """
  for chips in range(devices, 0, -1):
    try:
      check_model(config, dict(x=chips, y=1, z=1))
    except MeshError:
      continue
    x = _nearest_divisor(chips, math.sqrt(chips * config.d_model / config.d_ff))
    y = _nearest_divisor(chips // x, math.sqrt(chips // x))
    return x, y, chips // x // y
  raise AssertionError('one device divides every model')


def _nearest_divisor(n: int, value: float) -> int:
  """The divisor of n whose ratio to `value` is nearest to 1; the larger of two as near."""
  return min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: (round(abs(math.log(d / value)), 9), -d))
