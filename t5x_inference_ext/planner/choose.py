"""One plan for a request: on a given machine, or on the machine that suits the objective; and why there is none."""

from collections.abc import Callable, Sequence
import dataclasses

from t5x_inference_ext.errors import MeshError, UserError
from t5x_inference_ext.planner import search
from t5x_inference_ext.planner.machine import Machine, known_machines
from t5x_inference_ext.planner.request import OBJECTIVES, Plan, PlanRequest

_Say = Callable[[str], None]
# Where no batch is asked for: what is tried, as far as it fits.
BATCHES = tuple(2**i for i in range(11))


class NothingFits(UserError):
  """No plan fits, or none is fast enough: the message says how far off, and what would do."""


@dataclasses.dataclass(frozen=True)
class Choice:
  """What was chosen.

  Attributes:
    plan: the best.
    ranked: of its machine and batch, the best plan of each pair of layouts, in order; those that do not fit come last.
    others: the best plans of the other machines and batches that were considered and would do, the best first.
    objective: by which.
    target: seconds, that they all meet; None: none was set.
  """

  plan: Plan
  ranked: tuple[Plan, ...]
  others: tuple[Plan, ...]
  objective: str
  target: float | None


def choose(
  request: PlanRequest,
  machines: Sequence[Machine],
  objective: str = 'latency',
  *,
  batches: Sequence[int] = (),
  target: float | None = None,
  say: _Say = lambda text: None,
) -> Choice:
  """The best plan.

  With one machine and one batch all objectives mean the least time. Of several machines or batches 'latency' takes the
  fastest, 'throughput' that which makes most tokens a second, 'cost' the fewest chip-seconds a token. A target makes it
  the cheapest of those that meet it, whatever the objective.

  Args:
    request: what is asked.
    machines: to choose from.
    objective: one of OBJECTIVES.
    batches: to choose from; empty: that of the request.
    target: seconds, from the prompts to the last token.
    say: hears what is being looked at.

  Raises:
    NothingFits: nothing does, or nothing meets the target.
    MeshError: none of the machines divides the model.
    UserError: an unknown objective.
  """
  if objective not in OBJECTIVES:
    raise UserError(f'objective must be one of {", ".join(OBJECTIVES)}, got {objective!r}')
  candidates, refusal = [], None
  for machine in machines:
    for batch in batches or (request.batch,):
      asked = request.replace(batch=batch)
      try:
        found = search.best(search.plans(asked, machine))
      except MeshError as e:
        refusal = refusal or e
        break
      if found[0].fits:
        say(f'{machine}, batch {batch}: {found[0].seconds:.3g} s')
        candidates.append(tuple(found))
      else:  # more rows will not fit either
        say(f'{machine}, batch {batch}: does not fit')
        break
  if not candidates:
    if refusal and len(machines) == 1:
      raise refusal
    raise NothingFits(
      _advice(request.replace(batch=min(batches, default=request.batch)), machines, refusal)
    )
  meeting = [found for found in candidates if target is None or found[0].seconds <= target]
  if not meeting:
    fastest = min((found[0] for found in candidates), key=lambda p: p.seconds)
    passes = ', '.join(
      f'{fastest.runs(phase)} {phase.case.phase} of {_ms(phase.seconds)}'
      for phase in fastest.phases
    )
    raise NothingFits(
      f'nothing meets {target * 1e3:g} ms: the fastest is {fastest.machine} with {_ms(fastest.seconds)} for a batch '
      f'of {fastest.request.batch} ({passes}), {fastest.seconds / target:.2f} times the target: allow more time, or '
      'ask for a smaller batch, shorter prompts, fewer tokens or another chip'
    )
  keys = {
    'latency': lambda p: p.seconds,
    'throughput': lambda p: -p.tokens_per_second,
    'cost': lambda p: p.chip_seconds_per_token,
  }
  by = 'cost' if target is not None else objective
  ordered = sorted(meeting, key=lambda found: keys[by](found[0]))
  return Choice(ordered[0][0], ordered[0], tuple(found[0] for found in ordered[1:]), by, target)


def _advice(request: PlanRequest, machines: Sequence[Machine], refusal: MeshError | None) -> str:
  """How far off the nearest is, and what would do."""
  least = None
  for machine in machines:
    try:
      found = search.best(search.plans(request, machine))[0]
    except MeshError:
      continue
    if (
      least is None
      or found.memory.needed - found.memory.available < least.memory.needed - least.memory.available
    ):
      least = found
  if least is None:
    return str(refusal)
  m = least.memory
  over = ('prefill', 'decode')[least.memories.index(m)]
  nearest = least.machine
  text = (
    f'nothing fits: with the least memory ({" and ".join(least.layouts)} on {least.mesh_text}) each chip of '
    f'{least.machine} needs {_gib(m.needed)} GiB in {over} (weights {_gib(m.weights)}, cache {_gib(m.cache)}, '
    f'temporaries about {_gib(m.working)}) and has {_gib(m.available)}: {_gib(m.needed - m.available)} too many'
  )
  changes = [
    change
    for change in (
      _smaller_weights(request, machines),
      _smaller_cache(request, machines),
      _less(request, nearest, 'batch', 'a batch of {}'),
      _less(request, nearest, 'input_length', 'prompts of {} tokens'),
      _larger_slice(request, machines),
    )
    if change
  ]
  return f'{text}; what would fit: {"; ".join(changes) or "no change of one thing"}'


def fits(request: PlanRequest, machine: Machine) -> bool:
  """Whether any plan does."""
  try:
    return search.best(search.plans(request, machine))[0].fits
  except MeshError:
    return False


def _smaller_weights(request: PlanRequest, machines: Sequence[Machine]) -> str:
  smaller = request.replace(weights='int8')
  return (
    'int8 weights' if request.weights != 'int8' and any(fits(smaller, m) for m in machines) else ''
  )


def _smaller_cache(request: PlanRequest, machines: Sequence[Machine]) -> str:
  smaller = request.replace(cache='int8')
  return (
    'an int8 cache' if request.cache != 'int8' and any(fits(smaller, m) for m in machines) else ''
  )


def _less(request: PlanRequest, machine: Machine, field: str, words: str) -> str:
  """The most of a number that fits."""
  low, high = 0, getattr(request, field)  # low fits, or is none; high does not
  middle = 1
  while high - low > 1:
    if fits(request.replace(**{field: middle}), machine):
      low = middle
    elif middle == 1:
      break
    else:
      high = middle
    # Doubled while that stays below: what fits is often much less than what was asked.
    middle = 2 * low if high == getattr(request, field) and 2 * low < high else (low + high) // 2
  return words.format(low) if low else ''


def _larger_slice(request: PlanRequest, machines: Sequence[Machine]) -> str:
  kinds = dict.fromkeys(m.chip.name for m in machines)
  most = max(m.chips for m in machines)
  for machine in sorted(
    (Machine.parse(text) for kind in kinds for text in known_machines(kind)), key=lambda m: m.chips
  ):
    if machine.chips > most and fits(request.replace(mesh=None), machine):
      return f'{machine}'
  return ''


def _gib(count: float) -> str:
  return f'{count / 2**30:.2f}'


def _ms(seconds: float) -> str:
  return f'{seconds * 1e3:.4g} ms'
