"""The printed report of a choice: ranked pairs of layouts, parts of the time, why it is best."""

from collections.abc import Iterable, Sequence

from t5x_inference_ext.planner.choose import Choice
from t5x_inference_ext.planner.costs import PARTS, PassCost
from t5x_inference_ext.planner.request import Plan
from t5x_inference_ext.planner.text import table, wrap
from t5x_inference_ext.text_format import binary_bytes, seconds_text

ROWS = 12  # rows of a table; the JSON file has all of them


def plan_text(choice: Choice, rows: int = ROWS) -> str:
  """Return the report, about one screen long."""
  plan = choice.plan
  lines = [*_heading(plan), '', *_ranked(choice.ranked, rows), '', *_parts(plan), '']
  lines += wrap(why(choice))
  lines += wrap(unmeasured(choice))
  lines += wrap(paper_convention(choice))
  if choice.others:
    lines += ['', *wrap(_objective_text(choice)), *_others(choice.others[:rows])]
  return '\n'.join(lines)


def _heading(plan: Plan) -> list[str]:
  r, e, machine = plan.request, plan.decode.efficiency, plan.machine
  links = {
    'torus': 'links of its own axes for each collective, one axis after the other, with hops',
    'compiled': 'links of all its axes for each collective, with hops, at full rate',
    'paper': f'{machine.chip.network_bandwidth / 1e9:.0f} GB/s for every collective, no hops',
  }[r.convention]
  empty = plan.rows - r.batch
  padding = plan.prefill.case.padded - r.input_length if r.phase != 'decode' else 0
  texts = (
    f'model:   {r.config}',
    f'machine: {machine}, {machine.chips} chips; network: {r.convention} ({links}); '
    f'efficiency: matmul {e.matmul:g}, memory {e.memory:g}, network {e.network:g}',
    f'work:    {r.batch} rows'
    + (f' ({empty} more, empty, let the mesh split them)' if empty else '')
    + f', {r.input_length} tokens in'
    + (f' ({padding} more, empty, likewise)' if padding else '')
    + f', {r.output_length} out; {r.weights} weights, {r.cache} cache'
    + ('' if r.phase == 'both' else f'; {r.phase} alone, the other phase elsewhere'),
  )
  return [line for text in texts for line in wrap(text, ' ' * 9)]


def _ranked(ranked: Sequence[Plan], rows: int) -> list[str]:
  """Return the table of layout pairs, and a line with the number that fit."""
  header = ['prefill', 'decode', 'mesh', 'rows', 'total', 'prefill', 'MFU', 'limit']
  header += ['per step', 'MFU', 'limit', 'GiB']
  body = [
    (
      plan.prefill.case.layout_text,
      plan.decode.case.layout_text,
      plan.mesh_text,
      str(plan.rows),
      seconds_text(plan.seconds) if plan.fits else 'does not fit',
      *_phase_cells(plan, plan.prefill),
      *_phase_cells(plan, plan.decode),
      f'{plan.memory.needed / 2**30:.1f}',
    )
    for plan in ranked[:rows]
  ]
  fitting = sum(plan.fits for plan in ranked)
  available = ranked[0].memory.available / 2**30
  kind = 'pairs' if len(ranked[0].phases) > 1 else 'layouts'
  more = f' {len(ranked) - rows} more are in the JSON.' if len(ranked) > rows else ''
  return [
    *table([header, *body], left=4),
    f'{fitting} of {len(ranked)} {kind} fit into {available:.2f} GiB a chip, each on its best mesh.'
    + more,
  ]


def _phase_cells(plan: Plan, phase: PassCost) -> tuple[str, str, str]:
  return seconds_text(phase.seconds), f'{plan.mfu_of(phase):.0%}', phase.limit


def _parts(plan: Plan) -> list[str]:
  """Return the table of the parts of the time, and a line on memory."""
  phases = plan.prefill, plan.decode
  rows = [['', 'prefill', '', 'per step', '']]
  for part in PARTS:
    row = [part]
    for phase in phases:
      row += [seconds_text(phase.parts[part]), f'{phase.parts[part] / phase.seconds:.0%}']
    rows.append(row)
  rows.append(['all', *_spread(seconds_text(phase.seconds) for phase in phases)])
  if any(phase.hidden_seconds for phase in phases):
    hidden = (seconds_text(phase.hidden_seconds) for phase in phases)
    rows.append(['weights, hidden', *_spread(hidden)])
  costs = (f'{plan.cost_of(phase) * 1e3:.4g}' for phase in phases)
  rows.append(['chip-ms a token', *_spread(costs)])
  lines = table(rows)
  if len(plan.phases) > 1:
    total = f'{plan.chip_seconds_per_token * 1e3:.4g}'
    lines[-1] += f'   (a generated token, with its share of the prefill: {total})'
  m = plan.memory
  weights, cache, working, needed, available = (
    binary_bytes(round(n)) for n in (m.weights, m.cache, m.working, m.needed, m.available)
  )
  lines.append(
    f'memory a chip: weights {weights} + cache {cache} + temporaries about {working} = {needed} of '
    f'{available}'
  )
  return lines


def _spread(cells: Iterable[str]) -> list[str]:
  """Return the cells of a row without percentages: an empty cell follows each."""
  return [text for cell in cells for text in (cell, '')]


_LESS = {
  'matmuls': 'computes less in matmuls',
  'logits': 'computes less in logits',
  'attention': 'computes less in attention',
  'softmax': "moves fewer of attention's logits in memory",
  'elementwise': 'has less elementwise work',
  'weight load': 'loads fewer weights',
  'cache load': 'loads less of the cache',
  'activations moved': 'moves fewer activations',
  'weights moved': 'waits less for gathered weights',
  'launches': 'launches fewer kernels',
}


def why(choice: Choice, in_json: bool = False) -> str:
  """Return a sentence that compares the chosen plan with the next pair of layouts.

  Args:
    choice: The choice.
    in_json: Whether to use the older wording of the JSON file, which programs may read.
  """
  plan = choice.plan
  names = ' and '.join(f'{c.case.layout_text} for {c.case.phase}' for c in plan.phases)
  names += f' on {plan.mesh_text}'
  kind, verb = ('pair of layouts', 'take') if len(plan.phases) > 1 else ('layout', 'takes')
  rival = next((p for p in choice.ranked[1:] if p.fits), None)
  if rival is None:
    return f'{names}: no other {kind} fits.'
  behind = rival.seconds - plan.seconds
  theirs = f'{_layouts(rival)} on {rival.mesh_text}'
  takes = f'{names} {verb} {seconds_text(plan.seconds)} in all'
  if behind < 1e-3 * plan.seconds:
    more = 'as fast as' if behind < 1e-9 * plan.seconds else 'hardly faster than'
    return f'{takes}, {more} {theirs}; either will do.'
  phase, part, seconds = _largest_difference(plan, rival)
  saved, lost = seconds_text(seconds), seconds_text(seconds - behind)
  if in_json:
    difference = f', mostly as {saved} less go into {part} in {phase}'
    elsewhere = f' against {lost} more elsewhere'
  else:
    difference = f': {phase} {_LESS[part]} (-{saved})'
    elsewhere = f', other parts cost more (+{lost})'
  if seconds > 1.05 * behind:
    difference += elsewhere
  less = f'{seconds_text(behind)} less than the next {kind}, {theirs}'
  return f'{takes}, {less}{difference}.'


def _largest_difference(plan: Plan, rival: Plan) -> tuple[str, str, float]:
  """Return (phase, part, seconds) for the part in which the plan saves most time over a rival."""
  differences = [
    (ours.case.phase, part, plan.runs(ours) * (theirs.parts[part] - ours.parts[part]))
    for ours, theirs in zip(plan.phases, rival.phases)
    for part in PARTS
  ]
  return max(differences, key=lambda difference: difference[2])


def paper_convention(choice: Choice) -> str:
  """Return a sentence on the paper's convention; '' if it would choose the same plan."""
  plan, theirs = choice.plan, choice.paper_plan
  if theirs is None:
    return ''
  phase, part, saved = _largest_difference(plan, theirs)
  return (
    f"The paper's convention, {plan.machine.chip.network_bandwidth / 1e9:.0f} GB/s for every "
    f'collective and no hops, would choose {_layouts(theirs)} on {theirs.mesh_text}. With the '
    f'links of each mesh axis, that plan takes {seconds_text(theirs.seconds - plan.seconds)} more '
    f'than the first one above, mostly for {part} in {phase} ({seconds_text(saved)}).'
  )


def unmeasured(choice: Choice) -> str:
  """Return a sentence if nobody has published times of the plan's layouts; '' if somebody has."""

  def partly(plan: Plan) -> bool:
    return any(c.case.gathers_partly for c in plan.phases)

  if not partly(choice.plan):
    return ''
  text = 'Times of weights gathered over some mesh axes alone have not been published.'
  other = next((p for p in choice.ranked if p.fits and not partly(p)), None)
  if other is None:
    return text
  seconds = seconds_text(other.seconds)
  return f'{text} The fastest without: {_layouts(other)} on {other.mesh_text}, {seconds}.'


def _objective_text(choice: Choice) -> str:
  """Return a text that says why this machine and batch were chosen."""
  plan = choice.plan
  superlative = {
    'latency': f'the fastest, {seconds_text(plan.seconds)} in all,',
    'throughput': f'the one with most throughput, {plan.tokens_per_second:.1f} tokens/s,',
    'cost': f'the cheapest, {plan.chip_seconds_per_token * 1e3:.4g} chip-ms a token,',
  }[choice.objective]
  meeting = '' if choice.target is None else f' that take at most {choice.target * 1e3:g} ms'
  return (
    f'{plan.machine} with a batch of {plan.request.batch} is {superlative} of '
    f'{len(choice.others) + 1} slices and batches{meeting}. The next:'
  )


def _layouts(plan: Plan) -> str:
  """Return the names of the layouts of the phases that run here."""
  return ' and '.join(c.case.layout_text for c in plan.phases)


def _others(plans: Sequence[Plan]) -> list[str]:
  """Return a table of the other machines and batches."""
  header = ('slice', 'batch', 'layouts', 'total', 'per step', 'tokens/s', 'chip-ms a token')
  body = [
    (
      str(p.machine),
      str(p.request.batch),
      _layouts(p),
      seconds_text(p.seconds),
      seconds_text(p.decode.seconds),
      f'{p.tokens_per_second:.1f}',
      f'{p.chip_seconds_per_token * 1e3:.4g}',
    )
    for p in plans
  ]
  return table([header, *body], left=3, indent='  ')
