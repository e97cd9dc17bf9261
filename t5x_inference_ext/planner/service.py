"""Simulation of a service on each requested slice; the cheapest that meets the latency targets."""

from collections.abc import Callable, Sequence
import dataclasses

from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.planner.machine import Machine
from t5x_inference_ext.planner.request import PlanRequest
from t5x_inference_ext.planner.service_candidates import (
  SLOTS,
  Candidate,
  all_candidates,
  priced_candidate,
)
from t5x_inference_ext.planner.service_options import ServiceOptions
from t5x_inference_ext.simulator.service import ServedTrace, WaitingLimits
from t5x_inference_ext.simulator.simulate import simulate
from t5x_inference_ext.simulator.trace import Arrival, RandomTrace, at_rate, rate_of, read_trace
from t5x_inference_ext.speculation import Speculation, check_acceptance

_HOUR = 3600


@dataclasses.dataclass(frozen=True)
class Simulated:
  """The result of simulating a candidate service with a trace.

  Attributes:
    candidate: The service.
    rate: Requests a second.
    service: Latencies and tokens of the clients.
    meets: Whether the service meets the targets and refuses no request.
  """

  candidate: Candidate
  rate: float
  service: ServedTrace
  meets: bool

  @property
  def chip_seconds_per_token(self) -> float:
    """Chip-seconds for each new token, idle time included."""
    return self.candidate.machine.chips * self.service.seconds / max(1, self.service.tokens)

  @property
  def chip_hours_per_million(self) -> float:
    """Chip-hours for a million new tokens, idle time included."""
    return self.chip_seconds_per_token * 1e6 / _HOUR


@dataclasses.dataclass(frozen=True)
class ServiceStudy:
  """Services simulated with equal requests.

  Attributes:
    request: The model; its lengths are the means of the requests.
    options: The requested simulation.
    requests: Number of requests at each rate.
    runs: Every service at every rate, by rate, then in the order of the slices.
  """

  request: PlanRequest
  options: ServiceOptions
  requests: int
  runs: tuple[Simulated, ...]

  @property
  def rates(self) -> tuple[float, ...]:
    """The rates, in ascending order."""
    return tuple(dict.fromkeys(run.rate for run in self.runs))

  def cheapest(self, rate: float) -> Simulated | None:
    """Return the service that meets the targets with the fewest chip-seconds per token.

    Of equally cheap services, return the one with less time between tokens. None: none meets them.
    """
    meeting = [run for run in self.runs if run.rate == rate and run.meets]
    # A service pays for its chips until its last token, idle time included. Services with equally
    # many chips serve the same requests in about the same time, so they cost about the same.
    return min(
      meeting, key=lambda run: (run.candidate.machine.chips, run.service.between.p95), default=None
    )


def study_service(
  request: PlanRequest,
  machines: Sequence[Machine],
  slots: int | None,
  options: ServiceOptions,
  say: Callable[[str], None] = lambda text: None,
  speculate: Speculation | None = None,
) -> ServiceStudy:
  """Simulate a service on each machine, at each rate.

  Args:
    request: The model, and the lengths of random requests.
    machines: The slices.
    slots: Slots of the scheduler; None: try each of SLOTS that fits.
    options: The requests, prices and targets.
    say: Takes a line of progress for each simulation.
    speculate: Drafts that steps check; the path of a draft model is the name of a preset.

  Raises:
    RequestError: A file can't be read, nothing fits, a request does not fit, or drafts have no
      acceptance.
    MeshError: None of the machines divides the model.
  """
  if speculate is not None and options.prices is not None:
    raise RequestError('a file of prices says which drafts its times are for: leave out speculate')
  if options.prices is None:
    _check_drafts(speculate, options)
  arrivals = _traces(request, options)
  (_, first), *_ = arrivals
  if options.prices is None:
    candidates = all_candidates(
      request,
      machines,
      SLOTS if slots is None else (slots,),
      first,
      options.host_us / 1e6,
      speculate,
    )
  else:
    if len(machines) != 1 or slots is not None:
      raise RequestError(
        'a file of prices is for one slice and its slots: give one --slice, and no --batch'
      )
    candidates = [priced_candidate(request, machines[0], options.prices, first)]
    _check_drafts(candidates[0].config.speculate, options)
  runs = []
  bounds = WaitingLimits(options.max_waiting_requests, options.max_waiting_tokens)
  for rate, trace in arrivals:
    for each in candidates:
      say(f'{each.machine}, {each.config.slots} slots, {rate:.4g} requests a second')
      service = simulate(
        each.model,
        each.config,
        each.prices,
        trace,
        bounds,
        each.block_bytes,
        each.shared,
        options.acceptances,
      )
      runs.append(Simulated(each, rate, service, _meets(service, options)))
  mean = request.replace(
    input_length=max(1, round(sum(len(a.tokens) for a in first) / len(first))),
    output_length=max(1, round(sum(a.limit for a in first) / len(first))),
  )
  return ServiceStudy(mean, options, len(first), tuple(runs))


def _check_drafts(speculate: Speculation | None, options: ServiceOptions) -> None:
  """Raise RequestError if drafts have no acceptance, or an acceptance has no drafts."""
  if speculate is not None:
    check_acceptance(speculate, options.acceptances)
  elif options.acceptance is not None:
    raise RequestError('acceptance is for drafts: give --speculate, such as ngram:8, too')


def _traces(request: PlanRequest, options: ServiceOptions) -> list[tuple[float, list[Arrival]]]:
  """Return each rate with its requests."""
  vocab_size = request.config.vocab_size
  if options.trace is not None:
    arrivals = read_trace(options.trace, vocab_size)
    rates = options.rates
    if not rates:
      return [(rate_of(arrivals), arrivals)]
    return [(rate, at_rate(arrivals, rate)) for rate in rates]
  trace = RandomTrace(
    options.requests,
    request.input_length,
    request.output_length,
    options.length_spread,
    options.shared_length,
  )
  return [(rate, trace.arrivals(rate, vocab_size)) for rate in options.rates]


def _meets(service: ServedTrace, options: ServiceOptions) -> bool:
  first, between = (
    limit is None or not latency.p95 * 1e3 > limit
    for limit, latency in ((options.ttft_ms, service.first), (options.tpot_ms, service.between))
  )
  return first and between and not service.refused
