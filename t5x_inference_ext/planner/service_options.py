"""Options of the plan command that simulate a service."""

import dataclasses
import math

from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.options import check_options, option
from t5x_inference_ext.speculation import parse_acceptance

_SERVICE = 'Service'


@dataclasses.dataclass(frozen=True)
class ServiceOptions:
  """A service to simulate: its requests, the times of its programs, its latency targets.

  Raises:
    RequestError: A value is out of its range.
  """

  trace: str | None = option(
    None,
    help='Log of requests, one JSON object a line with arrival (seconds), input_length and '
    'output_length: simulate a service with these requests, instead of a plan. --batch is then the '
    'number of slots.',
    group=_SERVICE,
  )
  rate: str | None = option(
    None,
    help='Requests a second, several with commas: simulate a service with requests at random times '
    'and --input_length and --output_length tokens on average; with --trace, its requests at this '
    'rate.',
    group=_SERVICE,
  )
  requests: int = option(
    500, help='Requests at each --rate, without --trace.', group=_SERVICE, least=1
  )
  length_spread: float = option(
    0.5,
    help='Standard deviation of the lengths at --rate, divided by their mean; 0: all equal.',
    group=_SERVICE,
  )
  shared_length: int = option(
    0,
    help='Length of a common prefix of all prompts at --rate, in tokens.',
    group=_SERVICE,
    least=0,
  )
  ttft_ms: float | None = option(
    None,
    help='Target: for 95% of the requests, at most this many milliseconds to the first token. The '
    'cheapest service that meets this and --tpot_ms is chosen.',
    group=_SERVICE,
  )
  tpot_ms: float | None = option(
    None,
    help='Target: for 95% of the requests, at most this mean number of milliseconds between '
    'tokens.',
    group=_SERVICE,
  )
  prices: str | None = option(
    None,
    help='JSON file with measured or compiled times of the programs, and sizes of the scheduler; '
    'used in place of predicted times. Needs one --slice.',
    group=_SERVICE,
  )
  acceptance: str | None = option(
    None,
    help='With --speculate: probability that a draft token is right, given that those before it '
    'are; with commas, of the first token, the second and so on, and the last for all others. A '
    'trace does not show it: python -m benchmarks.speculation measures it.',
    group=_SERVICE,
  )
  host_us: float = option(
    500.0,
    help="The host's own work in a step of the scheduler, in microseconds, with predicted times.",
    group=_SERVICE,
  )
  max_waiting_requests: int = option(
    256,
    help='Maximum number of waiting requests, as for serve. More are refused.',
    group=_SERVICE,
    least=1,
  )
  max_waiting_tokens: int = option(
    1_000_000,
    help='Maximum number of tokens of waiting prompts, as for serve.',
    group=_SERVICE,
    least=1,
  )
  chip_hour: float | None = option(
    None, help='Price of a chip for an hour, in any currency.', group=_SERVICE
  )

  def __post_init__(self) -> None:
    check_options(self)
    for name in ('length_spread', 'ttft_ms', 'tpot_ms', 'host_us', 'chip_hour'):
      value = getattr(self, name)
      least = math.ulp(0.0) if name in ('ttft_ms', 'tpot_ms') else 0.0
      if value is None:
        continue
      if not least <= value < math.inf:
        bound = 'above 0' if least else '0 or more'
        raise RequestError(f'{name} must be {bound} and finite, got {value!r}')
    if self.is_enabled:
      assert self.rates is not None  # raises for invalid rates
      assert self.acceptances is not None
    else:
      given = [
        field.name
        for field in dataclasses.fields(self)
        if getattr(self, field.name) != field.default
      ]
      if given:
        raise RequestError(f'{given[0]} is for a simulated service: give --trace or --rate too')

  @property
  def is_enabled(self) -> bool:
    """Whether a service is simulated."""
    return self.trace is not None or self.rate is not None

  @property
  def acceptances(self) -> tuple[float, ...]:
    """The probabilities that draft tokens are right; empty: not given.

    Raises:
      RequestError: A probability is not a number from 0 to 1.
    """
    return () if self.acceptance is None else parse_acceptance(self.acceptance)

  @property
  def rates(self) -> tuple[float, ...]:
    """The rates in requests per second; empty: the trace's own rate.

    Raises:
      RequestError: A rate is not a number above 0.
    """
    if self.rate is None:
      return ()
    try:
      found = tuple(float(part) for part in str(self.rate).split(','))
    except ValueError:
      found = (0.0,)
    if not all(0 < rate < math.inf for rate in found):
      raise RequestError(f'rate must be numbers above 0, separated by commas, got {self.rate!r}')
    return tuple(sorted(set(found)))
