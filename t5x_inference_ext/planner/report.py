"""A choice for people: the ranked table of layout pairs, where the time goes, and why this one, in a sentence."""

from collections.abc import Iterable, Sequence
import textwrap

from t5x_inference_ext.planner import search
from t5x_inference_ext.planner.choose import Choice
from t5x_inference_ext.planner.costs import PARTS, PassCost
from t5x_inference_ext.planner.request import Plan
from t5x_inference_ext.sharding.explain_text import bytes_text

ROWS = 12  # of the table; JSON has all


def plan_text(choice: Choice, rows: int = ROWS) -> str:
  """The report, one screen."""
  plan = choice.plan
  lines = [*_heading(plan), '', *_table(choice.ranked, rows), '', *_parts(plan), '']
  lines += _wrap(why(choice))
  difference = conventions_differ(plan)
  if difference:
    lines += _wrap(difference)
  if choice.others:
    lines += ['', *_wrap(chosen(choice)), *_others(choice.others[:rows])]
  return '\n'.join(lines)


def _heading(plan: Plan) -> Iterable[str]:
  r, e = plan.request, plan.decode.efficiency
  yield from _wrap(f'model:   {r.config}', '         ')
  links = {
    'torus': 'links of its own axes for each collective, with hops',
    'paper': f'{plan.machine.chip.network_bandwidth / 1e9:.0f} GB/s for every collective, no hops',
  }[r.convention]
  yield from _wrap(
    f'machine: {plan.machine}, {plan.machine.chips} chips; network: {r.convention} ({links}); '
    f'efficiency: matmul {e.matmul:g}, memory {e.memory:g}, network {e.network:g}',
    '         ',
  )
  empty = (
    f' ({plan.rows - r.batch} more, empty, let the mesh split them)' if plan.rows > r.batch else ''
  )
  yield from _wrap(
    f'work:    {r.batch} rows{empty}, {r.input_length} tokens in, {r.output_length} out; '
    f'{r.weights} weights, {r.cache} cache'
    + ('' if r.phase == 'both' else f'; {r.phase} alone, the other phase elsewhere'),
    '         ',
  )


def _table(ranked: Sequence[Plan], rows: int) -> Iterable[str]:
  header = (
    'prefill',
    'decode',
    'mesh',
    'rows',
    'total',
    'prefill',
    'MFU',
    'limit',
    'per step',
    'MFU',
    'limit',
    'GiB',
  )
  body = []
  for plan in ranked[:rows]:
    p, d = plan.prefill, plan.decode
    body.append(
      (
        *plan.layouts,
        plan.mesh_text,
        str(plan.rows),
        time_text(plan.seconds) if plan.fits else 'does not fit',
        time_text(p.seconds),
        f'{plan.mfu_of(p):.0%}',
        p.limit,
        time_text(d.seconds),
        f'{plan.mfu_of(d):.0%}',
        d.limit,
        f'{plan.memory.needed / 2**30:.1f}',
      )
    )
  widths = [max(map(len, column)) for column in zip(header, *body)]
  for row in (header, *body):
    yield '  '.join(
      cell.ljust(w) if i < 4 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))
    )
  fit = sum(plan.fits for plan in ranked)
  available = ranked[0].memory.available / 2**30
  kind = 'pairs' if len(ranked[0].phases) > 1 else 'layouts'
  more = f' {len(ranked) - rows} more are in the JSON.' if len(ranked) > rows else ''
  yield f'{fit} of {len(ranked)} {kind} fit into {available:.2f} GiB a chip, each on its best mesh.{more}'


def _parts(plan: Plan) -> Iterable[str]:
  yield f'{"":20}{"prefill":>12}{"":6}{"per step":>12}'
  for part in PARTS:
    p, d = plan.prefill.parts[part], plan.decode.parts[part]
    yield f'{part:20}{time_text(p):>12}{p / plan.prefill.seconds:6.0%}{time_text(d):>12}{d / plan.decode.seconds:6.0%}'
  yield f'{"all":20}{time_text(plan.prefill.seconds):>12}{"":6}{time_text(plan.decode.seconds):>12}'
  hidden = plan.prefill.hidden_seconds, plan.decode.hidden_seconds
  if any(hidden):
    yield f'{"weights, hidden":20}{time_text(hidden[0]):>12}{"":6}{time_text(hidden[1]):>12}'
  cost = [plan.cost_of(phase) * 1e3 for phase in (plan.prefill, plan.decode)]
  both = (
    f'   (a token made, with its share of the prefill: {plan.chip_seconds_per_token * 1e3:.4g})'
  )
  yield (
    f'{"chip-ms a token":20}{cost[0]:12.4g}{"":6}{cost[1]:12.4g}' + both * (len(plan.phases) > 1)
  )
  m = plan.memory
  shown = [
    bytes_text(round(count)) for count in (m.weights, m.cache, m.working, m.needed, m.available)
  ]
  yield 'memory a chip: weights {} + cache {} + temporaries about {} = {} of {}'.format(*shown)


def why(choice: Choice) -> str:
  """Why the first pair is the first, in one sentence."""
  plan = choice.plan
  names = (
    ' and '.join(f'{c.case.layout} for {c.case.phase}' for c in plan.phases)
    + f' on {plan.mesh_text}'
  )
  kind, verb = ('pair of layouts', 'take') if len(plan.phases) > 1 else ('layout', 'takes')
  rivals = [p for p in choice.ranked[1:] if p.fits]
  if not rivals:
    return f'{names}: no other {kind} fits.'
  rival = rivals[0]
  behind = rival.seconds - plan.seconds
  if behind < 1e-3 * plan.seconds:
    more = 'as fast as' if behind < 1e-9 * plan.seconds else 'hardly faster than'
    return (
      f'{names} {verb} {time_text(plan.seconds)} in all, {more} {_layouts(rival)} on {rival.mesh_text}; '
      'either will do.'
    )
  part, saved = _largest_difference(plan, rival)
  lost = f' against {time_text(saved - behind)} more elsewhere' if saved > 1.05 * behind else ''
  return (
    f'{names} {verb} {time_text(plan.seconds)} in all, {time_text(behind)} less than the next {kind}, '
    f'{_layouts(rival)} on {rival.mesh_text}, mostly as {time_text(saved)} less go into {part}{lost}.'
  )


def chosen(choice: Choice) -> str:
  """Why this machine and batch, of those that were considered, in one sentence."""
  plan = choice.plan
  said = {
    'latency': f'the fastest, {time_text(plan.seconds)} in all,',
    'throughput': f'that which makes most, {plan.tokens_per_second:.1f} tokens/s,',
    'cost': f'the cheapest, {plan.chip_seconds_per_token * 1e3:.4g} chip-ms a token,',
  }[choice.objective]
  meeting = '' if choice.target is None else f' that take at most {choice.target * 1e3:g} ms'
  return (
    f'{plan.machine} with a batch of {plan.request.batch} is {said} of {len(choice.others) + 1} slices and '
    f'batches{meeting}. The next:'
  )


def _layouts(plan: Plan) -> str:
  """Of the phases that run here."""
  return ' and '.join(str(c.case.layout) for c in plan.phases)


def _largest_difference(plan: Plan, rival: Plan) -> tuple[str, float]:
  differences = {
    f'{part} in {ours.case.phase}': plan.runs(ours) * (theirs.parts[part] - ours.parts[part])
    for ours, theirs in zip(plan.phases, rival.phases)
    for part in PARTS
  }
  return max(differences.items(), key=lambda item: item[1])


def conventions_differ(plan: Plan) -> str:
  """What the paper's bandwidth would choose instead, and why; '' where it chooses the same."""
  if plan.request.convention == 'paper' or plan.machine.chips == 1:
    return ''
  request = plan.request.replace(convention='paper', efficiency=None)
  theirs = next((p for p in search.best(search.plans(request, plan.machine)) if p.fits), None)
  if theirs is None or (_layouts(theirs), theirs.mesh) == (_layouts(plan), plan.mesh):
    return ''
  ours = Plan(plan.request, *(_again(c, plan) for c in (theirs.prefill, theirs.decode)))
  bandwidth = f'{plan.machine.chip.network_bandwidth / 1e9:.0f} GB/s'
  slower = ours.seconds - plan.seconds
  part, saved = _largest_difference(plan, ours)
  return (
    f"The paper's convention, {bandwidth} for every collective whatever axes it uses and no hops, would take "
    f'{_layouts(theirs)} on {theirs.mesh_text}; with the links that each axis has, that takes '
    f'{time_text(slower)} more, mostly {part} ({time_text(saved)}).'
  )


def _again(c: PassCost, plan: Plan) -> PassCost:
  return search.cost(c.case, plan.request.convention, plan.request.efficiency)


def _others(plans: Sequence[Plan]) -> Iterable[str]:
  for p in plans:
    yield (
      f'  {str(p.machine):12} batch {p.request.batch:5}  {_layouts(p):32} {time_text(p.seconds):>10} '
      f'in all, {time_text(p.decode.seconds):>9} a step, {p.tokens_per_second:9.1f} tokens/s, '
      f'{p.chip_seconds_per_token * 1e3:9.4g} chip-ms a token'
    )


def time_text(seconds: float) -> str:
  """0.0123 -> '12.30 ms'."""
  if seconds == 0:
    return '0'
  if seconds >= 1:
    return f'{seconds:.3f} s' if seconds < 100 else f'{seconds:.1f} s'
  return f'{seconds * 1e3:.2f} ms' if seconds >= 1e-4 else f'{seconds * 1e6:.1f} us'


def _wrap(line: str, indent: str = '') -> list[str]:
  return textwrap.wrap(
    line, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
  )
