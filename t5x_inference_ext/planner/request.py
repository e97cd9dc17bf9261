"""What is asked of the planner, and one answer to it: a mesh, a number of rows, and a layout for each phase."""

import dataclasses
import functools

from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.planner.case import CACHE_ELEMENT_BYTES, WEIGHT_BYTES
from t5x_inference_ext.planner.costs import PassCost
from t5x_inference_ext.planner.efficiency import Efficiency
from t5x_inference_ext.planner.machine import Machine, Mesh
from t5x_inference_ext.planner.memory import PlannedMemory, memory
from t5x_inference_ext.planner.network import CONVENTIONS

OBJECTIVES = ('latency', 'throughput', 'cost')
# Of a plan: both phases on one machine, or one, where the other runs elsewhere.
PLAN_PHASES = ('both', 'prefill', 'decode')


@dataclasses.dataclass(frozen=True)
class PlanRequest:
  """A model, and what is to be served.

  Attributes:
    config: the model.
    batch: rows at a time.
    input_length: tokens of each prompt.
    output_length: tokens to be made of each: as many decode steps.
    weights, cache: 'int8' or 'bfloat16'.
    convention: of the network (network.CONVENTIONS).
    efficiency: of the chips; None: the fitted one of the convention.
    mesh: (X, Y, Z), where it is not to be chosen.
    phase: what is to run there: 'both', 'prefill' or 'decode'. Only that is priced, and has to fit.

  Raises:
    RequestError: a value out of its range.
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

  def __post_init__(self):
    for name in ('batch', 'input_length', 'output_length'):
      value = getattr(self, name)
      if not isinstance(value, int) or value < 1:
        raise RequestError(f'{name} must be a whole number above 0, got {value!r}')
    for name, known in (
      ('weights', WEIGHT_BYTES),
      ('cache', CACHE_ELEMENT_BYTES),
      ('convention', CONVENTIONS),
      ('phase', PLAN_PHASES),
    ):
      if getattr(self, name) not in tuple(known):
        raise RequestError(f'{name} must be one of {", ".join(known)}, got {getattr(self, name)!r}')

  @property
  def context(self) -> int:
    """Positions of the cache for each row."""
    return self.input_length + self.output_length

  @property
  def mean_context(self) -> int:
    """What attention sees in the middle of the decode steps: the time of all of them is that of so many of this."""
    return self.input_length + (self.output_length + 1) // 2

  def replace(self, **fields) -> 'PlanRequest':
    return dataclasses.replace(self, **fields)


@dataclasses.dataclass(frozen=True)
class Plan:
  """How a request could be served.

  Attributes:
    request: what was asked.
    prefill: the cost of all prompts in one pass.
    decode: the cost of one step, in the middle of them. Of the same machine, mesh and rows.
  """

  request: PlanRequest
  prefill: PassCost
  decode: PassCost

  @property
  def machine(self) -> Machine:
    return self.decode.case.machine

  @property
  def mesh(self) -> Mesh:
    return self.decode.case.mesh

  @property
  def mesh_text(self) -> str:
    return 'x'.join(map(str, self.mesh))

  @property
  def rows(self) -> int:
    """B as it runs: those asked for, and empty ones that let the mesh split them."""
    return self.decode.case.batch

  @property
  def layouts(self) -> tuple[str, str]:
    """Of prefill and of decode."""
    return str(self.prefill.case.layout), str(self.decode.case.layout)

  @property
  def phases(self) -> tuple[PassCost, ...]:
    """What runs here. Of one phase alone the other is the fastest that can share its weights."""
    return {
      'both': (self.prefill, self.decode),
      'prefill': (self.prefill,),
      'decode': (self.decode,),
    }[self.request.phase]

  @property
  def seconds(self) -> float:
    """Of what runs here; of both phases from the prompts to the last token."""
    return sum(c.seconds * self.runs(c) for c in self.phases)

  def runs(self, phase: PassCost) -> int:
    """How often a phase's pass runs."""
    return self.request.output_length if phase.case.phase == 'decode' else 1

  @property
  def tokens_per_second(self) -> float:
    """That are made, or taken by a prefill alone, of all rows asked for."""
    each = (
      self.request.input_length if self.request.phase == 'prefill' else self.request.output_length
    )
    return self.request.batch * each / self.seconds

  @property
  def chip_seconds_per_token(self) -> float:
    """Of a token that is made, its share of the prefill included; or of one that a prefill alone takes."""
    return self.machine.chips / self.tokens_per_second

  def cost_of(self, phase: PassCost) -> float:
    """Chip-seconds per token of a phase, empty rows not counted: the paper's cost."""
    return self.machine.chips * phase.seconds / (self.request.batch * phase.case.length)

  def mfu_of(self, phase: PassCost) -> float:
    """The same for MFU."""
    return phase.mfu * self.request.batch / self.rows

  @functools.cached_property
  def memory(self) -> PlannedMemory:
    """Of the phase that needs more, of those that run here."""
    held = dict(zip(('prefill', 'decode'), self.memories))
    return max((held[c.case.phase] for c in self.phases), key=lambda m: m.needed)

  @functools.cached_property
  def memories(self) -> tuple[PlannedMemory, PlannedMemory]:
    """In prefill and in decode. Prefill hands over the whole cache, split as decode has it."""
    prefill = memory(self.prefill.case, self.request.input_length)
    decode = memory(self.decode.case, self.request.context)
    return dataclasses.replace(prefill, cache=max(prefill.cache, decode.cache)), decode

  @property
  def fits(self) -> bool:
    return self.memory.fits
