"""The report of simulated services, as text and as JSON."""

import dataclasses
import json
import math
from typing import Any

from t5x_inference_ext.planner.gin_text import preset_name
from t5x_inference_ext.planner.service import ServiceStudy, Simulated
from t5x_inference_ext.planner.text import table, wrap


def requests_text(study: ServiceStudy) -> str:
  """Return a description of model and requests, the first line of reports and figures."""
  request, options = study.request, study.options
  config = request.config
  model = preset_name(config) or f'a model of {config.num_params / 1e9:.3g}e9 parameters'
  source = f'{study.requests} requests'
  if options.trace is not None:
    source += f' of {options.trace}'
  lengths = f'{request.input_length} tokens in, {request.output_length} out on average'
  text = f'{model}, {source}, {lengths}'
  drafts = study.runs[0].candidate.config.speculate
  if drafts is not None:
    text += f', drafts {drafts} right with probability {options.acceptance}'
  if options.prices is not None:
    return f'{text}, times of {options.prices}'
  return f'{text}, {request.weights} weights, {request.cache} cache, predicted times'


def study_text(study: ServiceStudy) -> str:
  """Return the report: each service at each rate, and the cheapest that meets the targets."""
  lines = wrap(requests_text(study))
  price = study.options.chip_hour
  header = [
    'slice',
    'slots',
    'a second',
    'TTFT p50',
    'p95',
    'p99',
    'TPOT p50',
    'p95',
    'p99',
    'gap p99',
    'tokens/s',
    'chip-h/M' if price is None else 'cost/M',
    'refused',
  ]
  rows = [
    [
      str(run.candidate.machine),
      str(run.candidate.config.slots),
      f'{run.rate:.4g}',
      *(_ms(x) for x in run.service.first),
      *(_ms(x) for x in run.service.between),
      _ms(run.service.gaps.p99),
      f'{run.service.tokens_per_second:.1f}',
      f'{run.chip_hours_per_million * (1 if price is None else price):.4g}',
      str(run.service.refused),
    ]
    for run in study.runs
  ]
  lines += ['', *table([header, *rows]), '']
  lines += wrap(
    "ms. TTFT: from the arrival to the first token; TPOT: mean time between a request's tokens; "
    'gap: single times between tokens; '
    + ('chip-h/M: chip-hours' if price is None else 'cost/M: what chips cost')
    + ' for a million new tokens, idle time included.'
  )
  for candidate in dict.fromkeys(run.candidate for run in study.runs):
    name = f'{candidate.machine}, {candidate.config.slots} slots'
    lines += wrap(f'{name}: {candidate.text}', '  ')
  hits, moved = (
    max(run.service.hit_share for run in study.runs),
    max(run.service.preempted for run in study.runs),
  )
  if hits or moved:
    lines += wrap(
      f'up to {hits:.0%} of the prompts came from the prefix cache, and up to {moved} rows were '
      'preempted'
    )
  for run in study.runs:
    if (drafts := run.service.drafts).row_steps and run.candidate.config.speculate is not None:
      lines += wrap(
        f'{run.candidate.machine}, {run.candidate.config.slots} slots, {run.rate:.4g} a second: '
        f'{drafts.tokens_per_step:.2f} tokens a step of a row, {drafts.accepted} of '
        f'{drafts.drafted} draft tokens accepted',
        '  ',
      )
  return '\n'.join([*lines, '', *_choices(study)])


def _choices(study: ServiceStudy) -> list[str]:
  """Return, for each rate, a sentence that names the cheapest service."""
  limits = [
    f'{value:g} ms {what}'
    for value, what in (
      (study.options.ttft_ms, 'to the first token'),
      (study.options.tpot_ms, 'between tokens'),
    )
    if value is not None
  ]
  target = f' within {" and ".join(limits)} for 95% of the requests' if limits else ''
  lines = []
  for rate in study.rates:
    best = study.cheapest(rate)
    if best is None:
      nearest = min(
        (run for run in study.runs if run.rate == rate),
        key=lambda run: (run.service.refused, run.service.first.p95),
      )
      lines += wrap(
        f'{rate:.4g} requests a second: no service serves all requests{target}; the fastest to the '
        f'first token is '
        f'{_name(nearest)}',
        '  ',
      )
    else:
      lines += wrap(f'{rate:.4g} requests a second: the cheapest{target} is {_name(best)}', '  ')
  return lines


def _name(run: Simulated) -> str:
  return (
    f'{run.candidate.machine} with {run.candidate.config.slots} slots, p95 '
    f'{_ms(run.service.first.p95)} ms to the first token and {_ms(run.service.between.p95)} ms '
    f'between tokens, {run.chip_hours_per_million:.4g} chip-hours a million tokens'
  )


def _ms(seconds: float) -> str:
  """Return seconds as milliseconds with at least three digits; '-' for NaN."""
  ms = seconds * 1e3
  if math.isnan(ms):
    return '-'
  return f'{ms:.0f}' if ms >= 100 else f'{ms:.3g}'


def study_json(study: ServiceStudy) -> str:
  """Return every number of a study as the text of a JSON file. Times are in seconds."""
  return (
    json.dumps(
      {
        'model': study.request.config.to_dict(),
        'requests': study.requests,
        'input_length': study.request.input_length,
        'output_length': study.request.output_length,
        'weights': study.request.weights,
        'cache': study.request.cache,
        'options': dataclasses.asdict(study.options),
        'runs': [_run_dict(run) for run in study.runs],
        'cheapest': {
          f'{rate:.6g}': None if best is None else _run_dict(best)
          for rate in study.rates
          for best in [study.cheapest(rate)]
        },
      },
      indent=2,
    )
    + '\n'
  )


def _run_dict(run: Simulated) -> dict[str, Any]:
  candidate, service = run.candidate, run.service
  return {
    'slice': str(candidate.machine),
    'chips': candidate.machine.chips,
    'slots': candidate.config.slots,
    'mesh': 'x'.join(map(str, candidate.model.mesh.shape.values())),
    'prefill_layout': str(candidate.model.prefill_layout),
    'decode_layout': str(candidate.model.decode_layout),
    'memory': candidate.memory,
    'rate': run.rate,
    'meets': run.meets,
    'first_token': _quantiles(service.first),
    'between_tokens': _quantiles(service.between),
    'gaps': _quantiles(service.gaps),
    'tokens': service.tokens,
    'seconds': service.seconds,
    'tokens_per_second': service.tokens_per_second,
    'chip_seconds_per_token': run.chip_seconds_per_token,
    'refused': service.refused,
    'preempted': service.preempted,
    'prefix_hit_share': service.hit_share,
    'drafts': None if candidate.config.speculate is None else dataclasses.asdict(service.drafts),
  }


def _quantiles(values: Any) -> dict[str, float | None]:
  return {name: None if math.isnan(value) else value for name, value in values._asdict().items()}
