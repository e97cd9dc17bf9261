"""The error for requests without a plan: how far off the nearest plan is, and what would help."""

from collections.abc import Callable, Sequence

from t5x_inference_ext.errors import MeshError, UserError
from t5x_inference_ext.planner import search
from t5x_inference_ext.planner.machine import Machine, Mesh, known_machines
from t5x_inference_ext.planner.request import Plan, PlanRequest, pair_memories, tightest_phase
from t5x_inference_ext.text_format import gib, seconds_text


class NothingFits(UserError):
  """No plan fits into memory, or none is fast enough.

  The message says how far off the nearest plan is, and which changes would help.
  """


def nothing_meets(target: float, fastest: Plan) -> NothingFits:
  """Return the error for a target, in seconds, that even the fastest plan misses."""
  passes = ', '.join(
    f'{fastest.runs(phase)} {phase.case.phase} of {seconds_text(phase.seconds)}'
    for phase in fastest.phases
  )
  return NothingFits(
    f'nothing meets {target * 1e3:g} ms: the fastest is {fastest.machine} with '
    f'{seconds_text(fastest.seconds)} for a batch of {fastest.request.batch} ({passes}), '
    f'{fastest.seconds / target:.2f} times the target: allow more time, or ask for a smaller '
    'batch, shorter prompts, fewer tokens or another chip'
  )


def nothing_fits(
  request: PlanRequest, machines: Sequence[Machine], refusal: MeshError | None
) -> NothingFits:
  """Return the error for a request that fits on none of the machines.

  Args:
    request: The model and its work, with the smallest batch.
    machines: Machines to choose from.
    refusal: The first MeshError of a machine whose chips do not divide the model, or None.
  """
  found = {}  # the plan with the least memory on each machine
  for machine in machines:
    try:
      found[machine] = search.least_memory(request, machine)
    except MeshError as e:
      refusal = refusal or e
  if not found:
    return NothingFits(str(refusal))
  nearest = min(found, key=lambda machine: found[machine][0] - machine.chip.usable_bytes)
  _, prefill, decode = found[nearest]
  memories = pair_memories(request, prefill, decode)
  tightest = tightest_phase(request, memories)
  m = memories[tightest]
  changes = (
    _other_dtype(request, machines, 'weights', {'int8': 'int8 weights', 'int4': 'int4 weights'}),
    _other_dtype(request, machines, 'cache', {'int8': 'an int8 cache'}),
    _most(request, nearest, prefill.mesh, 'batch', 'a batch of {}'),
    _most(request, nearest, prefill.mesh, 'input_length', 'prompts of {} tokens'),
    _larger_slice(request, machines),
  )
  return NothingFits(
    f'nothing fits: with the least memory ({prefill.layout_text} and {decode.layout_text} on '
    f'{prefill.mesh_text}) each chip of {nearest} needs {gib(m.needed)} GiB in {tightest} (weights '
    f'{gib(m.weights)}, cache {gib(m.cache)}, '
    f'temporaries about {gib(m.working)}) and has {gib(m.available)}: '
    f'{gib(m.needed - m.available)} too many; what would fit: '
    f'{"; ".join(filter(None, changes)) or "no single change"}'
  )


def _fits(request: PlanRequest, machine: Machine) -> bool:
  """Return whether a plan fits on a machine; False if its chips do not divide the model."""
  try:
    return search.fits(request, machine)
  except MeshError:
    return False


def _other_dtype(
  request: PlanRequest, machines: Sequence[Machine], field: str, words: dict[str, str]
) -> str:
  """Return the words of the first dtype after the request's with which the request fits, or ''.

  Args:
    request: The request.
    machines: The machines.
    field: 'weights' or 'cache'.
    words: Dtype -> words for the message, widest first.
  """
  dtypes, asked = list(words), getattr(request, field).partition(',')[0]
  for dtype in dtypes[dtypes.index(asked) + 1 :] if asked in dtypes else dtypes:
    smaller = request.replace(**{field: dtype})
    if any(_fits(smaller, machine) for machine in machines):
      return words[dtype]
  return ''


def _most(request: PlanRequest, machine: Machine, mesh: Mesh, field: str, words: str) -> str:
  """Return `words` with the largest value of `field` that fits; '' if not even 1 fits.

  Args:
    request: The request.
    machine: The machine.
    mesh: The mesh to try first: the one on which the whole request comes nearest to fitting.
    field: The field.
    words: Text with a place for the number.
  """

  def fits(value: int) -> bool:
    smaller = request.replace(**{field: value})
    return _fits(smaller.replace(mesh=mesh), machine) or _fits(smaller, machine)

  most = largest_that(fits, getattr(request, field))
  return words.format(most) if most else ''


def largest_that(fits: Callable[[int], bool], limit: int) -> int:
  """Return the largest number below `limit` that fits, or 0; `fits` must be monotonic.

  The search first doubles a lower bound, then bisects: the answer is often far below the limit, and
  small requests are fastest to check.
  """
  high = 1
  while high < limit and fits(high):
    high *= 2
  low, high = high // 2, min(high, limit)  # low fits, or is 0; high does not fit
  while high - low > 1:
    middle = (low + high) // 2
    if fits(middle):
      low = middle
    else:
      high = middle
  return low


def _larger_slice(request: PlanRequest, machines: Sequence[Machine]) -> str:
  """Return the name of the smallest larger slice of these chips that fits, or '' if none does."""
  kinds = dict.fromkeys(machine.chip.name for machine in machines)
  most = max(machine.chips for machine in machines)
  known = (Machine.parse(name) for kind in kinds for name in known_machines(kind))
  anywhere = request.replace(mesh=None)
  larger = sorted((m for m in known if m.chips > most), key=lambda m: m.chips)
  divide = [machine for machine in larger if _divides(anywhere, machine)]
  if not divide or not _fits(anywhere, divide[-1]):  # if the largest slice can't hold it, none can
    return ''
  return next(str(machine) for machine in divide if _fits(anywhere, machine))


def _divides(request: PlanRequest, machine: Machine) -> bool:
  """Return whether the chips of a machine divide the model."""
  try:
    return bool(search.meshes(request, machine))
  except MeshError:
    return False
