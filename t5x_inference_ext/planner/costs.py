"""The time of one pass as a sum of parts: compute, weight load, cache load, collectives and others.

The formulas are those of the paper's sections 2 and 3.

The parts do not overlap, with one exception for each convention (see network.py):

  paper     Gathering of weights overlaps with the matmuls (section 3.5). Only the time by which
            gathering exceeds them is counted.
  torus     Gathering over all chips (wg_xyz) overlaps as in 'paper'. Nobody has published times of
            gathering over some axes (wg_x, wg_xy): it is priced cautiously, without overlap.
  compiled  Loading of weights from HBM overlaps with the matmuls: the TPU compiler prefetches them.
            How much of a gather of weights it overlaps differs from program to program, from a
            quarter to all (docs/planner.md): it is priced without overlap.
"""

import dataclasses

from t5x_inference_ext.planner.case import PassCase
from t5x_inference_ext.planner.efficiency import FITTED, IDEAL, Efficiency
from t5x_inference_ext.planner.machine import Machine
from t5x_inference_ext.planner.network import Network
from t5x_inference_ext.planner.work import PassWork, work
from t5x_inference_ext.quantization.formats import weight_format
from t5x_inference_ext.sharding.collective import Collective
from t5x_inference_ext.sharding.layout import Layout
from t5x_inference_ext.sharding.packing import tensor_dtype

# Part of the time -> the resource that limits it.
LIMITS = {
  'matmuls': 'compute',
  'logits': 'compute',
  'attention': 'compute',
  'softmax': 'elementwise',
  'elementwise': 'elementwise',
  'weight load': 'weight load',
  'cache load': 'cache load',
  'activations moved': 'network',
  'weights moved': 'network',
  'launches': 'host',
}
PARTS = tuple(LIMITS)
# Resource -> the field of Efficiency by which times of that resource are divided; None: no field.
_SHARE = {
  'compute': 'matmul',
  'elementwise': 'memory',
  'weight load': 'memory',
  'cache load': 'memory',
  'network': 'network',
  'host': None,
}
# Convention -> factor on the TPU compiler's estimate of the time of elementwise operations.
# Programs measured on a TPU took 0.3 of it (precompile/calibration.py). The paper has none.
_ELEMENTWISE = {'torus': 0.3, 'compiled': 1.0, 'paper': 0.0}
# Small operations of a layer, and of lookup, logits and choice of tokens: norms, rotary embeddings,
# cuts, softmax, writes to the cache. The compiler charges each at least the chip's
# operation_latency. Counted in six decode steps of four models, 43 to 55 and 56 to 126.
_LAYER_OPERATIONS, _OTHER_OPERATIONS = 45, 60
# Chip -> dtype of weights -> share of HBM's bandwidth at which the compiler's estimates read them
# in products of few rows, where it is much below 1. In decode steps of PaLM on v5p: 1.07 and 1.16
# TB/s of int8 in a layer, 1.29 TB/s of the bfloat16 head.
_COMPILED_READS = {'v5p': {'int8': 0.40, 'bfloat16': 0.46}}


@dataclasses.dataclass(frozen=True)
class CollectiveTime:
  """A collective with all its runs in a pass.

  Attributes:
    collective: The collective.
    count: Number of runs.
    seconds: Total time of all runs, with no other traffic on the links.
  """

  collective: Collective
  count: int
  seconds: float


@dataclasses.dataclass(frozen=True)
class PassCost:
  """The predicted time of a pass, in parts.

  Attributes:
    case: The pass.
    efficiency: Shares of the chip's peak rates.
    convention: Convention of the network.
    work: FLOPs and bytes of one chip.
    collectives: The collectives of the layers, then those of the lookup and the logits.
    whole: Name from PARTS -> seconds at the chip's peak rates, overlapped time included.
    parts: Name from PARTS -> seconds at `efficiency`, without overlapped time.
    hidden_seconds: Time of gathering weights that overlaps with matmuls.
  """

  case: PassCase
  efficiency: Efficiency
  convention: str
  work: PassWork
  collectives: tuple[CollectiveTime, ...]
  whole: dict[str, float]
  parts: dict[str, float]
  hidden_seconds: float

  @property
  def seconds(self) -> float:
    """Time of the pass in seconds: the sum of its parts."""
    return sum(self.parts.values())

  @property
  def tokens(self) -> int:
    """B T, the tokens of the pass, padding not counted."""
    return self.case.batch * self.case.length

  @property
  def mfu(self) -> float:
    """Model FLOPs utilization (MFU) of the pass."""
    return mfu(self.case.config.num_params, self.tokens, self.case.machine, self.seconds)

  @property
  def chip_seconds_per_token(self) -> float:
    """The paper's cost: chips times seconds, divided by tokens."""
    return self.case.machine.chips * self.seconds / self.tokens

  @property
  def limits(self) -> dict[str, float]:
    """Limiting resource -> seconds: 'compute', 'weight load', 'network' and others of LIMITS."""
    totals = dict.fromkeys(LIMITS.values(), 0.0)
    for part, seconds in self.parts.items():
      totals[LIMITS[part]] += seconds
    return totals

  @property
  def limit(self) -> str:
    """The resource that takes the most time."""
    limits = self.limits
    return max(limits, key=lambda name: limits[name])

  def into(self, decode: Layout) -> 'PassCost':
    """Return the cost of this prefill if its keys and values go on to a decode layout."""
    case = self.case
    found = case.collectives_into(decode)
    if not found:
      return self
    network = Network(case.machine, case.mesh, self.convention)
    moves = _timed(found, case.config.num_layers, network, self.efficiency.network)
    seconds, moved = sum(move.seconds for move in moves), 'activations moved'
    return dataclasses.replace(
      self,
      case=dataclasses.replace(case, decode_layout=decode),
      collectives=self.collectives + moves,
      whole=self.whole | {moved: self.whole[moved] + seconds * self.efficiency.network},
      parts=self.parts | {moved: self.parts[moved] + seconds},
    )

  def at(self, efficiency: Efficiency) -> 'PassCost':
    """Return the cost of this pass at other shares of the chip's peak rates."""
    loads = _load_seconds(self.work, self.case, self.convention)
    parts, hidden = _without_overlap(self.whole, loads, efficiency, self.case, self.convention)
    slower = self.efficiency.network / efficiency.network
    return dataclasses.replace(
      self,
      efficiency=efficiency,
      collectives=tuple(
        CollectiveTime(c.collective, c.count, c.seconds * slower) for c in self.collectives
      ),
      parts=parts,
      hidden_seconds=hidden,
    )


def _load_seconds(done: PassWork, case: PassCase, convention: str) -> tuple[float, float]:
  """Return the seconds, at the chip's peak rates, of loading the layers' weights and the head."""
  chip = case.machine.chip
  shares = _COMPILED_READS.get(chip.name, {}) if convention == 'compiled' else {}
  layers = done.weight_bytes - done.head_bytes + done.unpacking_bytes
  head = tensor_dtype(case.head, case.weights, 'bfloat16').name
  return (
    layers / chip.hbm_bandwidth / shares.get(weight_format(case.weights).name, 1.0),
    done.head_bytes / chip.hbm_bandwidth / shares.get(head, 1.0),
  )


def _without_overlap(
  whole: dict[str, float],
  loads: tuple[float, float],
  efficiency: Efficiency,
  case: PassCase,
  convention: str,
) -> tuple[dict[str, float], float]:
  """Return (parts of a pass at an efficiency, time of gathering weights that overlaps)."""
  parts = {}
  for name, seconds in whole.items():
    share = _SHARE[LIMITS[name]]
    parts[name] = seconds / getattr(efficiency, share) if share else seconds
  if convention == 'compiled':
    layers, head = (seconds / efficiency.memory for seconds in loads)
    parts['weight load'] = max(0.0, layers - parts['matmuls']) + max(0.0, head - parts['logits'])
    return parts, 0.0
  if convention == 'torus' and case.gathers_partly:
    return parts, 0.0
  gathering = parts['weights moved']
  parts['weights moved'] = max(0.0, gathering - parts['matmuls'])
  return parts, gathering - parts['weights moved']


def mfu(params: float, tokens: float, machine: Machine, seconds: float) -> float:
  """Return the model FLOPs utilization: 2 N FLOPs per token over all chips' peak (section 2).

  N is `params`, the parameters of the model itself. Padding and attention's FLOPs are not counted.
  """
  return 2 * params * tokens / (machine.chips * machine.chip.bf16_flops * seconds)


def cost(
  case: PassCase, convention: str = 'torus', efficiency: Efficiency | None = None
) -> PassCost:
  """Predict the time of a pass.

  Args:
    case: The pass.
    convention: Convention of the network, one of network.CONVENTIONS.
    efficiency: Shares of the chip's peak rates. None: the shares fitted for the convention.

  Raises:
    UserError: The convention is unknown.
  """
  collectives = _collectives(case, Network(case.machine, case.mesh, convention))
  done, chip = work(case), case.machine.chip

  def product_seconds(flops: float, rows: float) -> float:
    # A product with fewer rows than the matrix unit takes as long as a full one.
    return flops * max(1, chip.matrix_rows / rows) / chip.bf16_flops

  matmuls = product_seconds(done.matmul_flops, done.matmul_rows)
  gathering = sum(c.seconds for c in collectives if c.collective.of_weights)
  elementwise = _ELEMENTWISE[convention] / chip.hbm_bandwidth
  operations = case.config.num_layers * _LAYER_OPERATIONS + _OTHER_OPERATIONS
  small = operations * chip.operation_latency if convention == 'compiled' else 0.0
  whole = {
    'matmuls': matmuls,
    'logits': product_seconds(done.logits_flops, done.logits_rows),
    'attention': done.attention_flops / chip.bf16_flops,
    'softmax': elementwise * done.softmax_bytes,
    'elementwise': elementwise * done.elementwise_bytes + small,
    'weight load': sum(_load_seconds(done, case, convention)),
    'cache load': done.cache_bytes / chip.hbm_bandwidth,
    'activations moved': sum(c.seconds for c in collectives if not c.collective.of_weights),
    'weights moved': gathering,
    'launches': 0.0 if convention == 'paper' else case.config.num_layers * chip.layer_latency,
  }
  ideal = PassCost(case, IDEAL, convention, done, collectives, whole, whole, 0.0)
  return ideal.at(FITTED[convention] if efficiency is None else efficiency)


def _collectives(case: PassCase, network: Network) -> tuple[CollectiveTime, ...]:
  """Return the collectives of the layers, then those of the lookup and the logits."""
  layer, others = case.collectives
  return _timed(layer, case.config.num_layers, network) + _timed(others, 1, network)


def _timed(
  collectives: list[Collective], count: int, network: Network, share: float = 1.0
) -> tuple[CollectiveTime, ...]:
  """Return collectives that run `count` times each, with their times at a share of full rate."""
  return tuple(CollectiveTime(c, count, count * network.seconds(c) / share) for c in collectives)
