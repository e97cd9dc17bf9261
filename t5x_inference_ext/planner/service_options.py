"""Options of the plan command that simulate a service."""

import dataclasses
import math

from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.options import check_options, option

_SERVICE = 'Service'


@dataclasses.dataclass(frozen=True)
class ServiceOptions:
  """A service to simulate: its requests, its prices, what it must keep to.

  Raises:
    RequestError: A value is out of its range.
  """

  trace: str | None = option(
    None,
    help='Log of requests, one JSON object a line with arrival (seconds), input_length and '
    'output_length: simulate a service that gets them, instead of a plan. --batch is then the '
    'number of slots.',
    group=_SERVICE,
  )
  rate: str | None = option(
    None,
    help='Requests a second, several with commas: simulate a service that gets them at random '
    'times, with --input_length and --output_length tokens in the mean; or that gets those of '
    '--trace faster or slower.',
    group=_SERVICE,
  )
  requests: int = option(
    500, help='Requests at each --rate, without --trace.', group=_SERVICE, least=1
  )
  length_spread: float = option(
    0.5,
    help='Standard deviation of the lengths at --rate, as a share of their means; 0: all equal.',
    group=_SERVICE,
  )
  shared_length: int = option(
    0, help='Tokens that all prompts at --rate begin with.', group=_SERVICE, least=0
  )
  ttft_ms: float | None = option(
    None,
    help='Milliseconds to the first token that 95% of the requests must not exceed. The cheapest '
    'service that meets this and --tpot_ms is chosen.',
    group=_SERVICE,
  )
  tpot_ms: float | None = option(
    None,
    help='Milliseconds between tokens, in the mean of a request, that 95% of the requests must not '
    'exceed.',
    group=_SERVICE,
  )
  prices: str | None = option(
    None,
    help='JSON file with measured or compiled times of the programs and the sizes of the '
    'scheduler, in place of predicted times. Needs one --slice.',
    group=_SERVICE,
  )
  host_us: float = option(
    500.0,
    help="The host's own work in a turn of the scheduler, in microseconds, where the times are "
    'predicted.',
    group=_SERVICE,
  )
  max_waiting_requests: int = option(
    256, help='As of serve: most requests that wait. More are refused.', group=_SERVICE, least=1
  )
  max_waiting_tokens: int = option(
    1_000_000, help='As of serve: most tokens of prompts that wait.', group=_SERVICE, least=1
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
    if self.asked:
      assert self.rates is not None  # raises for rates that are none
    else:
      given = [
        field.name
        for field in dataclasses.fields(self)
        if getattr(self, field.name) != field.default
      ]
      if given:
        raise RequestError(f'{given[0]} is for a simulated service: give its trace or its rate')

  @property
  def asked(self) -> bool:
    """Whether a service is simulated."""
    return self.trace is not None or self.rate is not None

  @property
  def rates(self) -> tuple[float, ...]:
    """The rates in requests a second; none: that of the trace.

    Raises:
      RequestError: They are no numbers above 0.
    """
    if self.rate is None:
      return ()
    try:
      found = tuple(float(part) for part in str(self.rate).split(','))
    except ValueError:
      found = (0.0,)
    if not all(0 < rate < math.inf for rate in found):
      raise RequestError(f'rate must be numbers above 0, with commas, got {self.rate!r}')
    return tuple(sorted(set(found)))
