"""What is priced: a model in one phase, so many rows, on a mesh. Everything that costs.py and memory.py are told."""

import dataclasses
import functools
import math

from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.planner.machine import Machine, Mesh
from t5x_inference_ext.planner.network import sizes
from t5x_inference_ext.sharding import activations, traffic
from t5x_inference_ext.sharding.activations import ActivationSharding
from t5x_inference_ext.sharding.collective import Collective
from t5x_inference_ext.sharding.layout import Layout
from t5x_inference_ext.sharding.packing import PackedTensor, packed_tensors

PASSES = ('prefill', 'decode')
# Bytes of an element. Activations are bfloat16 whatever the weights are (section 3.6: int8 for weights only).
WEIGHT_BYTES = {'int8': 1, 'bfloat16': 2}
CACHE_ELEMENT_BYTES = {'int8': 1, 'bfloat16': 2}
ACTIVATION_BYTES = 2


@dataclasses.dataclass(frozen=True)
class PassCase:
  """One pass of one phase.

  Attributes:
    config: the model.
    machine, mesh: the chips, and (X, Y, Z) over all of them.
    layout: of the phase.
    phase: 'prefill' or 'decode'.
    batch: B, rows of the pass; a decode that can't split so many is refused by sharding/activations.py.
    length: T, positions that the pass takes of each row: 1 in decode.
    context: S, positions that attention sees at the end of the pass, those of the pass included.
    weights: 'int8' or 'bfloat16'.
    cache: 'int8' or 'bfloat16', of keys and values.

  Raises:
    RequestError: a number or dtype out of its range.
    MeshError: the mesh does not divide the model, or the layout does not split the rows.
  """

  config: ModelConfig
  machine: Machine
  mesh: Mesh
  layout: Layout
  phase: str
  batch: int
  length: int
  context: int
  weights: str = 'bfloat16'
  cache: str = 'bfloat16'

  def __post_init__(self):
    for name, known in (
      ('phase', PASSES),
      ('weights', WEIGHT_BYTES),
      ('cache', CACHE_ELEMENT_BYTES),
    ):
      if getattr(self, name) not in known:
        raise RequestError(f'{name} must be one of {", ".join(known)}, got {getattr(self, name)!r}')
    for name in ('batch', 'length', 'context'):
      value = getattr(self, name)
      if not isinstance(value, int) or value < 1:
        raise RequestError(f'{name} must be a whole number above 0, got {value!r}')
    if self.phase == 'decode' and self.length != 1:
      raise RequestError(f'a decode step takes one position of each row, not {self.length}')
    if self.context < self.length:
      raise RequestError(
        f'context={self.context} must hold the {self.length} positions of the pass'
      )
    if math.prod(self.mesh) != self.machine.chips:
      raise RequestError(
        f'the mesh {"x".join(map(str, self.mesh))} has {math.prod(self.mesh)} positions and '
        f'{self.machine} has {self.machine.chips} chips'
      )
    assert self.sharding  # refused here, not in the middle of a search's sums

  @functools.cached_property
  def sharding(self) -> ActivationSharding:
    return activations.shard_activations(
      self.layout, self.config, sizes(self.mesh), self.batch, self.padded
    )

  @property
  def padded(self) -> int:
    """T as it runs: what the layout splits is padded until it divides."""
    if self.phase == 'decode':
      return 1
    return activations.padded_length(self.layout, sizes(self.mesh), self.batch, self.length)

  @property
  def tensors(self) -> dict[str, PackedTensor]:
    """The arrays on the chips, padding and copies of heads included."""
    return _tensors(
      self.config, self.layout.feedforward == 'ws_1d', self.mesh, self.weights == 'int8'
    )

  @property
  def moves(self) -> tuple[list[Collective], list[Collective]]:
    """The collectives of one layer, and those of the lookup, the final norm and the logits."""
    mesh, width = sizes(self.mesh), WEIGHT_BYTES[self.weights]
    of_pass = self.config, self.sharding, mesh, self.batch, self.padded
    # How rows are split for the choice of tokens is alike for all layouts that can share weights with this one.
    return (
      traffic.layer_moves(*of_pass, ACTIVATION_BYTES, width),
      traffic.embedding_moves(*of_pass, ACTIVATION_BYTES)
      + traffic.logits_moves(*of_pass, self.layout, ACTIVATION_BYTES),
    )

  def size(self, axes) -> int:
    return math.prod(sizes(self.mesh)[a] for a in axes)


@functools.lru_cache(maxsize=256)
def _tensors(
  config: ModelConfig, one_dimensional: bool, mesh: Mesh, int8: bool
) -> dict[str, PackedTensor]:
  # All layouts but ws_1d place the weights alike.
  return packed_tensors(config, Layout('ws_1d' if one_dimensional else 'ws_2d'), sizes(mesh), int8)
