"""A request to the planner, and one answer: a mesh, a number of rows, a layout for each phase."""

import dataclasses
import functools
from typing import Any

from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.planner.case import (
  CACHE_ELEMENT_BYTES,
  PassCase,
  check_choices,
  check_counts,
)
from t5x_inference_ext.planner.costs import PassCost
from t5x_inference_ext.planner.efficiency import Efficiency
from t5x_inference_ext.planner.machine import Machine, Mesh
from t5x_inference_ext.planner.memory import PlannedMemory, memory
from t5x_inference_ext.planner.network import CONVENTIONS
from t5x_inference_ext.quantization.formats import served_format
from t5x_inference_ext.sharding.layout import Layout, check_pair

OBJECTIVES = ('latency', 'throughput', 'cost')
# Phases that this machine runs: both, or one of them if another machine runs the other.
PLAN_PHASES = ('both', 'prefill', 'decode')


@dataclasses.dataclass(frozen=True)
class PlanRequest:
  """A model and its work.

  Attributes:
    config: The model.
    batch: Rows run together.
    input_length: Tokens of each prompt.
    output_length: Tokens to generate for each prompt, one decode step each.
    weights: Format of the weights: 'int8', 'int4', 'bfloat16', or one with other bits for some
      tensors (quantization.formats).
    cache: 'int8' or 'bfloat16'. Dtype of keys and values.
    convention: Convention of the network, one of network.CONVENTIONS.
    efficiency: Shares of the chip's peak rates. None: the shares fitted for the convention.
    mesh: The only mesh (X, Y, Z) to consider. None: every candidate mesh.
    phase: The phases that run on this machine, one of PLAN_PHASES. Only these phases are counted
      and have to fit.
    layouts: The only (prefill layout, decode layout) to consider. None: every pair.

  Raises:
    RequestError: A value is out of its range.
    MeshError: The layouts can't share weights.
  """

  config: ModelConfig
  batch: int
  input_length: int = 1920
  output_length: int = 64
  weights: str = 'int8'
  cache: str = 'bfloat16'
  convention: str = 'torus'
  efficiency: Efficiency | None = None
  mesh: Mesh | None = None
  phase: str = 'both'
  layouts: tuple[Layout, Layout] | None = None

  def __post_init__(self) -> None:
    object.__setattr__(self, 'weights', served_format(self.weights, self.config))
    check_counts(self, ('batch', 'input_length', 'output_length'))
    check_choices(
      self, {'cache': CACHE_ELEMENT_BYTES, 'convention': CONVENTIONS, 'phase': PLAN_PHASES}
    )
    if self.layouts is not None:
      check_pair(*self.layouts)

  @property
  def context(self) -> int:
    """Positions of each row's cache."""
    return self.input_length + self.output_length

  @property
  def mean_context(self) -> int:
    """Positions that attention reads in the middle decode step, whose time represents all steps."""
    return self.input_length + (self.output_length + 1) // 2

  def replace(self, **fields: Any) -> 'PlanRequest':
    """Return a copy with other values in some fields."""
    return dataclasses.replace(self, **fields)


def pair_memories(
  request: PlanRequest, prefill: PassCase, decode: PassCase
) -> dict[str, PlannedMemory]:
  """Return the memory of one chip, by phase.

  Prefill also writes the cache in decode's sharding, so its memory includes the larger of the two
  phases' caches.
  """
  in_prefill = memory(prefill, request.input_length)
  in_decode = memory(decode, request.context)
  cache = max(in_prefill.cache, in_decode.cache)
  return {'prefill': dataclasses.replace(in_prefill, cache=cache), 'decode': in_decode}


def tightest_phase(request: PlanRequest, memories: dict[str, PlannedMemory]) -> str:
  """Return the phase that needs the most memory, among those that run here."""
  if request.phase != 'both':
    return request.phase
  return max(memories, key=lambda phase: memories[phase].needed)


@dataclasses.dataclass(frozen=True)
class Plan:
  """One way to serve a request.

  Attributes:
    request: The request.
    prefill: Cost of all prompts in one pass.
    decode: Cost of the middle decode step, on the same machine and mesh, with as many rows.
  """

  request: PlanRequest
  prefill: PassCost
  decode: PassCost

  @property
  def machine(self) -> Machine:
    """The chips."""
    return self.decode.case.machine

  @property
  def mesh(self) -> Mesh:
    """(X, Y, Z) over all chips."""
    return self.decode.case.mesh

  @property
  def mesh_text(self) -> str:
    """The mesh as 'XxYxZ'."""
    return self.decode.case.mesh_text

  @property
  def rows(self) -> int:
    """B: the requested rows plus empty rows, so that the mesh can split them."""
    return self.decode.case.batch

  @property
  def layouts(self) -> tuple[str, str]:
    """(prefill layout, decode layout)."""
    return str(self.prefill.case.layout), str(self.decode.case.layout)

  @property
  def phases(self) -> tuple[PassCost, ...]:
    """The costs of the phases that run here.

    If only one phase runs here, the cost of the other one is for the fastest layout that can share
    weights with the first.
    """
    return {
      'both': (self.prefill, self.decode),
      'prefill': (self.prefill,),
      'decode': (self.decode,),
    }[self.request.phase]

  @property
  def seconds(self) -> float:
    """Seconds of the phases that run here. For both phases: from the prompts to the last token."""
    return sum(c.seconds * self.runs(c) for c in self.phases)

  def runs(self, phase: PassCost) -> int:
    """Return the number of passes of a phase."""
    return self.request.output_length if phase.case.phase == 'decode' else 1

  @property
  def tokens_per_second(self) -> float:
    """Throughput over the requested rows, in tokens/s.

    Counts generated tokens, or prompt tokens when `phase == 'prefill'`.
    """
    r = self.request
    length = r.input_length if r.phase == 'prefill' else r.output_length
    return r.batch * length / self.seconds

  @property
  def chip_seconds_per_token(self) -> float:
    """Chip-seconds per token, for the tokens that tokens_per_second counts.

    The cost of a generated token includes its share of the prefill.
    """
    return self.machine.chips / self.tokens_per_second

  def cost_of(self, phase: PassCost) -> float:
    """Return a phase's chip-seconds per token, the paper's cost. Empty rows are not counted."""
    return self.machine.chips * phase.seconds / (self.request.batch * phase.case.length)

  def mfu_of(self, phase: PassCost) -> float:
    """Return a phase's MFU. Empty rows are not counted."""
    return phase.mfu * self.request.batch / self.rows

  @functools.cached_property
  def memories(self) -> dict[str, PlannedMemory]:
    """Memory of one chip by phase, for both phases, even if only one runs here."""
    return pair_memories(self.request, self.prefill.case, self.decode.case)

  @functools.cached_property
  def memory(self) -> PlannedMemory:
    """Memory of one chip in the phase that needs the most, among those that run here."""
    return self.memories[tightest_phase(self.request, self.memories)]

  @property
  def fits(self) -> bool:
    """Whether a chip has the needed memory."""
    return self.memory.fits
