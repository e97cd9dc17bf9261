"""The time of one pass as a sum of parts: the paper's section 2 (compute, weight load, KV load) and 3 (collectives).

Nothing overlaps, except the gathering of weights: it depends on no activation, so that it runs beside the products of
the layer before (section 3.5), and only what is longer than these counts.
"""

import dataclasses

from t5x_inference_ext.planner.case import PassCase
from t5x_inference_ext.planner.efficiency import FITTED, IDEAL, Efficiency
from t5x_inference_ext.planner.machine import Machine
from t5x_inference_ext.planner.network import Network
from t5x_inference_ext.planner.work import PassWork, work
from t5x_inference_ext.sharding.collective import Collective

# Part -> what limits it.
LIMITS = {
  'matmuls': 'compute',
  'logits': 'compute',
  'attention': 'compute',
  'weight load': 'weight load',
  'cache load': 'cache load',
  'activations moved': 'network',
  'weights moved': 'network',
}
PARTS = tuple(LIMITS)
# Limit -> the field of Efficiency that stretches its parts.
_STRETCHED_BY = {
  'compute': 'matmul',
  'weight load': 'memory',
  'cache load': 'memory',
  'network': 'network',
}
_EFFICIENCIES = {part: _STRETCHED_BY[limit] for part, limit in LIMITS.items()}


@dataclasses.dataclass(frozen=True)
class CollectiveTime:
  """A collective, all its runs in a pass together.

  Attributes:
    move: what is moved.
    count: runs.
    seconds: that they take, alone.
    of_weights: whether it gathers weights, beside compute.
  """

  move: Collective
  count: int
  seconds: float
  of_weights: bool


@dataclasses.dataclass(frozen=True)
class PassCost:
  """What a pass takes.

  Attributes:
    case: of what.
    efficiency: of the chips.
    convention: of the network.
    work: per chip.
    collectives: those of the layers, then of lookup and logits.
    parts: name of PARTS -> seconds.
    hidden_seconds: of gathering weights, beside products.
  """

  case: PassCase
  efficiency: Efficiency
  convention: str
  work: PassWork
  collectives: tuple[CollectiveTime, ...]
  parts: dict[str, float]
  hidden_seconds: float

  @property
  def seconds(self) -> float:
    """Of the pass: the sum of the parts."""
    return sum(self.parts.values())

  @property
  def tokens(self) -> int:
    """B T, as asked for."""
    return self.case.batch * self.case.length

  @property
  def mfu(self) -> float:
    """Of the pass."""
    return mfu(self.case.config.num_params, self.tokens, self.case.machine, self.seconds)

  @property
  def chip_seconds_per_token(self) -> float:
    """The paper's cost."""
    return self.case.machine.chips * self.seconds / self.tokens

  @property
  def limits(self) -> dict[str, float]:
    """'compute', 'weight load', 'cache load', 'network' -> seconds."""
    totals = dict.fromkeys(LIMITS.values(), 0.0)
    for part, seconds in self.parts.items():
      totals[LIMITS[part]] += seconds
    return totals

  @property
  def limit(self) -> str:
    """What takes most."""
    return max(self.limits, key=self.limits.get)

  def at(self, efficiency: Efficiency) -> 'PassCost':
    """The same pass where chips reach other shares of their peaks."""
    before, now = dataclasses.asdict(self.efficiency), dataclasses.asdict(efficiency)
    slower = {name: before[name] / now[name] for name in now}
    collectives = tuple(
      dataclasses.replace(c, seconds=c.seconds * slower['network']) for c in self.collectives
    )
    parts = {name: seconds * slower[_EFFICIENCIES[name]] for name, seconds in self.parts.items()}
    gathering = (self.parts['weights moved'] + self.hidden_seconds) * slower['network']
    parts['weights moved'] = max(0.0, gathering - parts['matmuls'])
    return dataclasses.replace(
      self,
      efficiency=efficiency,
      collectives=collectives,
      parts=parts,
      hidden_seconds=gathering - parts['weights moved'],
    )


def mfu(params: float, tokens: float, machine: Machine, seconds: float) -> float:
  """Model FLOPs utilization (the paper's section 2): 2 N FLOPs a token at the peak of all chips, over the time.

  N is `params`, the model's own: neither padding nor attention's FLOPs count.
  """
  return 2 * params * tokens / (machine.chips * machine.chip.bf16_flops * seconds)


def cost(
  case: PassCase, convention: str = 'torus', efficiency: Efficiency | None = None
) -> PassCost:
  """Prices a pass.

  Args:
    case: what.
    convention: of the network, one of network.CONVENTIONS.
    efficiency: of the chips; None: the fitted one of the convention.

  Raises:
    UserError: an unknown convention.
  """
  network = Network(case.machine, case.mesh, convention)
  done, chip = work(case), case.machine.chip
  collectives = _collectives(case, network)

  def products(flops, rows):  # fewer rows than a tile of weights takes cost as many
    return flops * max(1, chip.matrix_rows / rows) / chip.bf16_flops

  matmuls = products(done.matmul_flops, done.matmul_rows)
  gathering = sum(c.seconds for c in collectives if c.of_weights)
  exposed = max(0.0, gathering - matmuls)
  parts = {
    'matmuls': matmuls,
    'logits': products(done.logits_flops, done.logits_rows),
    'attention': done.attention_flops / chip.bf16_flops,
    'weight load': done.weight_bytes / chip.hbm_bandwidth,
    'cache load': done.cache_bytes / chip.hbm_bandwidth,
    'activations moved': sum(c.seconds for c in collectives if not c.of_weights),
    'weights moved': exposed,
  }
  ideal = PassCost(case, IDEAL, convention, done, collectives, parts, gathering - exposed)
  return ideal.at(FITTED[convention] if efficiency is None else efficiency)


def _collectives(case: PassCase, network: Network) -> tuple[CollectiveTime, ...]:
  found = []
  for moves, count in zip(case.moves, (case.config.num_layers, 1)):
    for move in moves:
      of_weights = move.name.startswith(('weights: ', 'scales: '))
      found.append(CollectiveTime(move, count, count * network.seconds(move), of_weights))
  return tuple(found)
