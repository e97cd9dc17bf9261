"""The input of the cost model: one pass of a model, its rows, positions, layout and mesh."""

from collections.abc import Collection, Iterable
import dataclasses
import functools
import math
from typing import Any

from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.planner.machine import Machine, Mesh
from t5x_inference_ext.planner.network import axis_sizes
from t5x_inference_ext.quantization.formats import served_format, weight_format
from t5x_inference_ext.sharding import activations, cache_moves, traffic
from t5x_inference_ext.sharding.activations import ActivationSharding
from t5x_inference_ext.sharding.collective import Collective
from t5x_inference_ext.sharding.layout import Layout
from t5x_inference_ext.sharding.packing import PackedTensor, matrix_bytes, packed_tensors

PASSES = ('prefill', 'decode')
# Bytes of an element. Activations are always bfloat16, as in section 3.6 of the paper.
CACHE_ELEMENT_BYTES = {'int8': 1, 'bfloat16': 2}
SCALE_BYTES = 4  # an int8 cache has a float32 scale for each row, position and head
ACTIVATION_BYTES = 2


def check_choices(fields: Any, known: dict[str, Collection[str]]) -> None:
  """Raise RequestError for a field whose value is not one of its known values."""
  for name, values in known.items():
    if getattr(fields, name) not in tuple(values):
      raise RequestError(
        f'{name} must be one of {", ".join(values)}, got {getattr(fields, name)!r}'
      )


def check_counts(fields: Any, names: Iterable[str]) -> None:
  """Raise RequestError for a field that is not a whole number above 0."""
  for name in names:
    value = getattr(fields, name)
    if not isinstance(value, int) or value < 1:
      raise RequestError(f'{name} must be a whole number above 0, got {value!r}')


@dataclasses.dataclass(frozen=True)
class PassCase:
  """One pass of one phase, the input of the cost model.

  Attributes:
    config: The model.
    machine: The chips.
    mesh: (X, Y, Z) over all chips of the machine.
    layout: Layout of the phase.
    phase: 'prefill', 'decode', or 'verify': a decode step that checks drafts.
    batch: B, the rows of the pass. For a decode step the layout must be able to split them
      (sharding/activations.py).
    length: T, positions of each row in the pass; 1 in decode; of 'verify', a draft's and one more.
    context: S, positions of each row that attention sees at the end of the pass, including those of
      the pass.
    weights: Format of the weights, as in PlanRequest.
    cache: 'int8' or 'bfloat16'. Dtype of keys and values.
    decode_layout: Of a prefill, layout of the decode steps that take its cache; None: keys and
      values stay where they are.
    least_padded: Least number of positions of each row that the pass runs. Positions beyond
      `length` are padding on the right, to which no token attends. They may let the mesh split the
      tokens.

  Raises:
    RequestError: A number or dtype is out of its range.
    MeshError: The mesh does not divide the model, or the layout does not split the rows.
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
  decode_layout: Layout | None = None
  least_padded: int = 0

  def __post_init__(self) -> None:
    object.__setattr__(self, 'weights', served_format(self.weights, self.config))
    check_choices(self, {'phase': (*PASSES, 'verify'), 'cache': CACHE_ELEMENT_BYTES})
    check_counts(self, ('batch', 'length', 'context'))
    if self.phase == 'decode' and self.length != 1:
      raise RequestError(f'a decode step takes one position of each row, not {self.length}')
    if self.context < self.length:
      raise RequestError(
        f'context={self.context} must hold the {self.length} positions of the pass'
      )
    if math.prod(self.mesh) != self.machine.chips:
      raise RequestError(
        f'the mesh {self.mesh_text} has {math.prod(self.mesh)} positions and '
        f'{self.machine} has {self.machine.chips} chips'
      )
    assert self.sharding  # raises MeshError here, before a search uses the case

  @property
  def mesh_text(self) -> str:
    """The mesh as 'XxYxZ'."""
    return 'x'.join(map(str, self.mesh))

  @property
  def layout_text(self) -> str:
    """The layout's name. It has '(1D)' if ws_2d does not split d_model, with one chip along x."""
    one_dimensional = self.layout.feedforward == 'ws_2d' and self.mesh[0] == 1 < math.prod(
      self.mesh
    )
    return f'{self.layout} (1D)' if one_dimensional else str(self.layout)

  @property
  def gathers_partly(self) -> bool:
    """Whether weights are gathered over some of the chips, which nobody has published times of."""
    return 1 < self.size(self.layout.gathered_axes) < self.machine.chips

  @functools.cached_property
  def sharding(self) -> ActivationSharding:
    """The activation sharding: the layout, resolved for this pass."""
    return activations.shard_activations(
      self.layout,
      self.config,
      axis_sizes(self.mesh),
      self.batch,
      self.padded,
      cached=self.phase == 'verify',
    )

  @functools.cached_property
  def padded(self) -> int:
    """T after padding the positions so that the layout can split them evenly."""
    if self.phase == 'decode':
      return 1
    least = max(self.length, self.least_padded)
    return activations.padded_length(self.layout, axis_sizes(self.mesh), self.batch, least)

  @property
  def seen(self) -> int:
    """S after padding: the number of positions that attention reads."""
    return self.context + self.padded - self.length

  @property
  def packing(self) -> tuple[ModelConfig, bool, Mesh, str]:
    """The arguments of packed_weights, all that the packed weights depend on."""
    return self.config, self.layout.feedforward == 'ws_1d', self.mesh, self.weights

  @property
  def tensors(self) -> dict[str, PackedTensor]:
    """The weights as packed on the chips, including padding and copies of heads."""
    return packed_weights(*self.packing)

  @property
  def head(self) -> PackedTensor:
    """The table of the logits: the head, or the embedding if it is tied."""
    return self.tensors['embedding' if self.config.tied_head else 'head']

  @property
  def weight_bytes(self) -> dict[str, float]:
    """Bytes of a weight element of each array of matrices, by name."""
    return _matrix_bytes(*self.packing)

  @property
  def collectives(self) -> tuple[list[Collective], list[Collective]]:
    """The collectives of one layer, and the collectives of lookup, final norm and logits."""
    arguments = self.config, self.sharding, axis_sizes(self.mesh), self.batch, self.padded
    # logits_collectives takes the prefill layout, which decides how rows are split for sampling.
    # Any layout that can share weights with prefill's splits the rows in the same way, so pass this
    # one.
    cache = [] if self.decode_layout is None else self.collectives_into(self.decode_layout)
    return (
      traffic.layer_collectives(*arguments, ACTIVATION_BYTES, self.weight_bytes) + cache,
      traffic.embedding_collectives(*arguments, ACTIVATION_BYTES)
      + traffic.logits_collectives(
        *arguments,
        self.layout,
        ACTIVATION_BYTES,
        last=self.phase != 'verify',
        greedy=self.phase == 'decode',
      ),
    )

  def collectives_into(self, decode_layout: Layout) -> list[Collective]:
    """Return the collectives that bring a layer's keys and values into a decode layout."""
    sizes = axis_sizes(self.mesh)
    decode = activations.shard_activations(decode_layout, self.config, sizes, self.batch, 1)
    return cache_moves.cache_collectives(
      self.sharding, decode, sizes, self.batch, self.length, self.cached_head_bytes
    )

  @property
  def cached_head_bytes(self) -> int:
    """Bytes of one position of a key head, or of a value head, in the cache."""
    scale = SCALE_BYTES if self.cache == 'int8' else 0
    return self.config.d_head * CACHE_ELEMENT_BYTES[self.cache] + scale

  def size(self, axes: Iterable[str]) -> int:
    """Return the number of chips along some mesh axes."""
    return math.prod([self._sizes[a] for a in axes])

  @functools.cached_property
  def _sizes(self) -> dict[str, int]:
    return axis_sizes(self.mesh)


def packed_weights(
  config: ModelConfig, one_dimensional: bool, mesh: Mesh, weights: str
) -> dict[str, PackedTensor]:
  """Return the packed weights, cached: all layouts other than ws_1d share one packing."""
  return _packed(config, one_dimensional, mesh, weight_format(weights).scaled)


@functools.lru_cache(maxsize=256)
def _packed(
  config: ModelConfig, one_dimensional: bool, mesh: Mesh, scaled: frozenset[str]
) -> dict[str, PackedTensor]:
  layout = Layout('ws_1d' if one_dimensional else 'ws_2d')
  return packed_tensors(config, layout, axis_sizes(mesh), scaled)


@functools.lru_cache(maxsize=256)
def _matrix_bytes(
  config: ModelConfig, one_dimensional: bool, mesh: Mesh, weights: str
) -> dict[str, float]:
  """Return PassCase.weight_bytes, cached."""
  tensors = packed_weights(config, one_dimensional, mesh, weights)
  return matrix_bytes(tensors, weights, 'bfloat16')
