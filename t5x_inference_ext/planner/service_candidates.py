"""Services to simulate: for each slice and number of slots, the layouts with the least work."""

from collections.abc import Iterator, Sequence
import dataclasses
import math

from jax.sharding import AbstractMesh

from t5x_inference_ext.config import PRESETS, ModelConfig, preset
from t5x_inference_ext.engine.scheduler_config import SchedulerConfig, config_for
from t5x_inference_ext.errors import MeshError, RequestError
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.options import short_repr
from t5x_inference_ext.planner import search
from t5x_inference_ext.planner.costs import PassCost, cost
from t5x_inference_ext.planner.machine import Machine, Mesh
from t5x_inference_ext.planner.memory import memory
from t5x_inference_ext.planner.request import PlanRequest
from t5x_inference_ext.planner.service_prices import PlannedPrices
from t5x_inference_ext.planner.work import cache_bytes
from t5x_inference_ext.sharding.layout import Layout
from t5x_inference_ext.sharding.mesh import AXES
from t5x_inference_ext.simulator.prices import PricedService, Prices, PriceTable
from t5x_inference_ext.simulator.trace import Arrival
from t5x_inference_ext.speculation import Speculation

SLOTS = (8, 32, 128)  # numbers of slots to try if none is requested


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A service that can be simulated.

  Attributes:
    machine: The chips.
    model: The model, on an abstract mesh.
    config: Sizes of the scheduler.
    prices: Times of the scheduler's programs.
    block_bytes: Bytes of a prefix store's block on each chip.
    memory: Bytes that a chip needs; None if unknown, with measured prices.
    shared: Whether the host's cores are the devices.
  """

  machine: Machine
  model: Model
  config: SchedulerConfig
  prices: Prices
  block_bytes: int
  memory: float | None
  shared: bool = False

  @property
  def text(self) -> str:
    """The layouts, the mesh and the memory, in words."""
    mesh = 'x'.join(map(str, self.model.mesh.shape.values()))
    layouts = f'prefill {self.model.prefill_layout}, decode {self.model.decode_layout} on {mesh}'
    if self.memory is None:
      return layouts
    room = self.machine.chip.usable_bytes
    return f'{layouts}, {self.memory / 2**30:.1f} of {room / 2**30:.2f} GiB a chip'


def _model(request: PlanRequest, mesh: Mesh, layouts: tuple[Layout, Layout]) -> Model:
  """Return the model on a mesh without devices."""
  return Model(request.config, AbstractMesh(mesh, AXES), *layouts, 'bfloat16', request.cache)  # type: ignore[arg-type]  # has a Mesh's shape


def longest_row(arrivals: Sequence[Arrival]) -> int:
  """Return the number of positions of a trace's longest request."""
  return max(len(arrival.tokens) + arrival.limit - 1 for arrival in arrivals)


def priced_candidate(
  request: PlanRequest, machine: Machine, path: str, arrivals: Sequence[Arrival]
) -> Candidate:
  """Return the service described by a file of program times (--prices).

  Raises:
    RequestError: The file is invalid, or is for another number of chips or for shorter requests.
  """
  priced = PricedService.read(path)
  if math.prod(priced.mesh) != machine.chips:
    raise RequestError(
      f'{path} is for {math.prod(priced.mesh)} chips and {machine} has {machine.chips}'
    )
  longest = longest_row(arrivals)
  if longest > priced.config.max_length:
    raise RequestError(
      f'{path} is for rows of at most max_length={priced.config.max_length}, and a request takes '
      f'{longest}'
    )
  model = _model(request, priced.mesh, priced.layouts)
  size = request.config.d_head * request.config.num_kv_heads * request.config.num_layers
  block_bytes = 4 * size * priced.config.block_size
  table = PriceTable(priced.programs, path)
  return Candidate(machine, model, priced.config, table, block_bytes, None, priced.shared)


def planned_candidates(
  request: PlanRequest,
  machine: Machine,
  slots: Sequence[int],
  arrivals: Sequence[Arrival],
  host_seconds: float,
  speculate: Speculation | None = None,
) -> list[Candidate]:
  """Return a service for each number of slots that fits, with predicted prices.

  Each service has the mesh and the pair of layouts with the least chip time per mean request. That
  time is: the chunks of its prompt, and its share of decode steps with all slots full.

  Raises:
    MeshError: The chips, or the requested mesh, do not divide the model.
  """
  found = []
  for count in slots:
    ways = sorted(_ways(request, machine, count, arrivals), key=lambda way: way[0])
    for _, prefill, decode in ways:
      candidate = _planned(request, prefill, decode, count, arrivals, host_seconds, speculate)
      if candidate.memory is not None and candidate.memory <= machine.chip.usable_bytes:
        found.append(candidate)
        break
  return found


def _ways(
  request: PlanRequest, machine: Machine, slots: int, arrivals: Sequence[Arrival]
) -> Iterator[tuple[float, PassCost, PassCost]]:
  """Yield (seconds per mean request, cost of a chunk, cost of a step) for each mesh and layouts."""
  prompt = max(1, round(sum(len(a.tokens) for a in arrivals) / len(arrivals)))
  new = max(1, round(sum(a.limit for a in arrivals) / len(arrivals)))
  chunk = min(prompt, SchedulerConfig.prefill_chunk)
  candidate = request.replace(batch=slots, input_length=prompt, output_length=new)
  chunked = request.replace(batch=1, input_length=chunk)
  for mesh in search.meshes(request, machine):
    prefills = search.phase_costs(chunked, machine, mesh, 'prefill', 1)
    for rows in search.row_choices(slots, mesh):
      for decode in search.phase_costs(candidate, machine, mesh, 'decode', rows):
        for prefill in prefills:
          if search.share_weights(prefill.case, decode.case):
            work = prompt / chunk * prefill.seconds + new * decode.seconds / slots
            yield work, prefill, decode


def _planned(
  request: PlanRequest,
  prefill: PassCost,
  decode: PassCost,
  slots: int,
  arrivals: Sequence[Arrival],
  host_seconds: float,
  speculate: Speculation | None,
) -> Candidate:
  """Return the service that runs with the layouts of two costs."""
  mesh, layouts = decode.case.mesh, (prefill.case.layout, decode.case.layout)
  model = _model(request, mesh, layouts)
  config = config_for(
    model,
    (),
    slots=slots,
    max_length=longest_row(arrivals),
    end_ids=(),
    speculate=None if speculate is None else str(speculate),
  )
  # `config` has the engine's numbers of rows, which it rounds up so that the mesh can split them.
  prefill = dataclasses.replace(
    prefill, case=dataclasses.replace(prefill.case, batch=config.prefill_rows)
  )
  decode = dataclasses.replace(decode, case=dataclasses.replace(decode.case, batch=config.slots))
  draft = None
  if (config_of_draft := _draft_model(request, speculate)) is not None:
    case = dataclasses.replace(decode.case, config=config_of_draft)
    draft = cost(case, decode.convention, decode.efficiency)
  prices = PlannedPrices(prefill, decode, config, host_seconds, draft)
  block_bytes = math.ceil(prices.position_bytes * config.block_size)
  needed = _needed_bytes(prefill, decode, config)
  if draft is not None:
    held = memory(draft.case, config.max_length)
    needed += held.weights + held.cache
  return Candidate(decode.case.machine, model, config, prices, block_bytes, needed)


def _draft_model(request: PlanRequest, speculate: Speculation | None) -> ModelConfig | None:
  """Return the draft model, which is a preset; None without one.

  Raises:
    RequestError: No preset has the draft model's name, or its vocabulary is another one.
  """
  if speculate is None or speculate.path is None:
    return None
  if speculate.path not in PRESETS:
    raise RequestError(
      f'a plan knows draft models by the names of presets ({", ".join(sorted(PRESETS))}), got '
      f'speculate={short_repr(str(speculate))}'
    )
  config, size = preset(speculate.path), request.config.vocab_size
  if config.vocab_size != size:
    raise RequestError(
      f'{speculate.path} has a vocabulary of {config.vocab_size} tokens and the model one of '
      f'{size}: choose a draft model with the same vocabulary'
    )
  return config


def _needed_bytes(prefill: PassCost, decode: PassCost, config: SchedulerConfig) -> float:
  """Return the bytes used on a chip: weights, pages, prompts, prefix store and temporaries."""
  case = decode.case
  shards = case.size(case.sharding.attention_rows)
  rows = case.batch / shards
  pages = config.pages_of_shard(shards) + config.shared_pages
  held = memory(case, math.ceil(pages * config.page_size / rows))
  chunk = memory(
    dataclasses.replace(
      prefill.case,
      length=config.later_chunks[-1],
      context=config.max_length + config.later_chunks[-1],
    ),
    1,
  )
  prompts = cache_bytes(prefill.case, config.max_length)
  working = max(held.working, chunk.working)
  return held.weights + held.cache + prompts + config.prefix_bytes + working


def all_candidates(
  request: PlanRequest,
  machines: Sequence[Machine],
  slots: Sequence[int],
  arrivals: Sequence[Arrival],
  host_seconds: float,
  speculate: Speculation | None = None,
) -> list[Candidate]:
  """Return the services of some slices, with predicted prices.

  Args:
    request: The model.
    machines: The slices.
    slots: Numbers of slots to try.
    arrivals: The requests, whose lengths decide sizes and layouts.
    host_seconds: The host's own work in a step of the scheduler.
    speculate: Drafts that steps check; the path of a draft model is the name of a preset.

  Raises:
    MeshError: None of the slices divides the model.
    RequestError: No slice has enough memory, or the draft model can't be used.
  """
  _draft_model(request, speculate)  # refuse it before the search
  refusal, found = None, []
  for machine in machines:
    try:
      found += planned_candidates(request, machine, slots, arrivals, host_seconds, speculate)
    except MeshError as e:
      refusal = refusal or e
  if found:
    return found
  if refusal is not None:
    raise refusal
  names = ', '.join(map(str, machines))
  raise RequestError(
    f'no service fits: {min(slots)} slots of {longest_row(arrivals)} positions need more memory '
    f'than a chip of {names} has; take a larger slice, int8 or int4 weights, an int8 cache, or '
    'fewer slots'
  )
