"""Figures: latency and cost, bytes of layouts, longest contexts, parts of the time."""

from collections.abc import Sequence
import math
from typing import Any

from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.planner import figure_data
from t5x_inference_ext.planner.costs import PARTS
from t5x_inference_ext.planner.drawing import (
  COLOURS,
  PublishedPoint,
  add_axes,
  draw_published,
  figure_file,
)
from t5x_inference_ext.planner.gin_text import preset_name
from t5x_inference_ext.planner.machine import Machine, Mesh
from t5x_inference_ext.planner.request import Plan, PlanRequest
from t5x_inference_ext.planner.sweep import Point

_MAX_TOKENS = 2**21
_LABELS_APART = 0.25  # decades between labels of one line
_ADDED = 'parts of the time are added: only gathering of weights overlaps'


def pareto(
  path: str, points: Sequence[Point], published: Sequence[PublishedPoint] = (), label: str = ''
) -> None:
  """Draw latency against cost, in a panel for each phase, with each front as a line (Figure 1).

  A line is a model with one dtype of weights: a colour for each model, dashed for the second dtype.

  Args:
    path: File of the figure.
    points: Points of one sweep, or of several with different models.
    published: Points to draw beside them, in milliseconds and chip-milliseconds a token.
    label: Who published them.
  """
  chips = '/'.join(dict.fromkeys(p.cost.case.machine.chip.name for p in points))
  models = list(dict.fromkeys(_model_text(p.request.config) for p in points))
  dtypes = list(dict.fromkeys(p.request.weights for p in points))
  request = points[0].request
  about = (
    f'{", ".join(models)}: {_lengths_text(request)}, {chips}, {request.cache} cache\na point: the '
    'fastest mesh and layout of n chips for B rows run together (label: n chips, B); a line: '
    f'what nothing beats in both\n{_ADDED}'
  )
  with figure_file(path, 11, 6 if len(models) > 1 else 4.5, about) as figure:
    for i, (phase, unit) in enumerate((('decode', 'a step'), ('prefill', 'all prompts')), 1):
      axes = add_axes(figure, (1, 2, i), f'{phase}: {unit} (ms)', 'cost (chip-ms a token)', 'log')
      draw_published(axes, published, phase, label)
      for colour, model in zip(COLOURS, models):
        for style, weights in zip(('-', '--'), dtypes):
          some = [
            p
            for p in points
            if (p.phase, p.request.weights) == (phase, weights)
            and _model_text(p.request.config) == model
          ]
          best = [p for p in some if p.on_front]
          if not best:
            continue
          if len(models) == 1:
            axes.scatter(*_milliseconds(some), s=6, color=colour, alpha=0.3, linewidths=0)
          axes.plot(
            *_milliseconds(best),
            style,
            color=colour,
            marker='o',
            markersize=3,
            label=f'{model}, {weights} weights',
          )
          _name_slices(axes, best, colour, above=style == '--')
      axes.margins(x=0.15, y=0.08)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc='outside lower center', ncols=4)


def _name_slices(axes: Any, best: Sequence[Point], colour: str, above: bool) -> None:
  """Label points of a Pareto front with the number of chips and the batch, if there is room.

  The first points of slices are labelled, from the fastest on, and the last point.
  """
  first_of_slice = {p.cost.case.machine.chips: p for p in reversed(best)}
  placed: list[tuple[float, float]] = []
  for p in (*best[-1:], *sorted(first_of_slice.values(), key=lambda p: p.seconds)):
    place = math.log10(p.seconds), math.log10(p.chip_seconds_per_token)
    if any(math.dist(place, other) < _LABELS_APART for other in placed):
      continue
    placed.append(place)
    axes.annotate(
      f'{p.cost.case.machine.chips} chips, {p.request.batch}',
      (p.seconds * 1e3, p.chip_seconds_per_token * 1e3),
      fontsize=6,
      color=colour,
      xytext=(3, 3) if above else (-3, -4),
      ha='left' if above else 'right',
      va='bottom' if above else 'top',
      textcoords='offset points',
    )


def _milliseconds(points: Sequence[Point]) -> tuple[list[float], list[float]]:
  """Return the latencies, and the costs per token, in milliseconds."""
  return [p.seconds * 1e3 for p in points], [p.chip_seconds_per_token * 1e3 for p in points]


def communication(path: str, config: ModelConfig, mesh: Mesh) -> None:
  """Draw the GB that a chip sends in one feedforward layer, by layout and tokens (Figure 3)."""
  step = math.prod(mesh)
  tokens = [step * 2**i for i in range(max(1, (_MAX_TOKENS // step).bit_length()))]
  about = (
    f'{_model_text(config)}, {math.prod(mesh)} chips as {"x".join(map(str, mesh))}, bfloat16 '
    'activations and weights\none layer without attention; at a dotted line, another layout begins '
    'to send least'
  )
  with figure_file(path, 6, 4.5, about) as figure:
    axes = add_axes(figure, (1, 1, 1), 'tokens in a pass', 'GB sent by a chip in a layer', 'log')
    # Later lines are thinner, so that layouts with equal lines stay visible.
    for n, (colour, name) in enumerate(zip(COLOURS, figure_data.FEEDFORWARD_LAYOUTS)):
      sent = [figure_data.feedforward_bytes(config, mesh, name, t) / 1e9 for t in tokens]
      axes.plot(tokens, sent, color=colour, label=name, linewidth=3 - 0.7 * n)
    for at, _, _ in figure_data.switch_points(config, mesh):
      axes.axvline(at, color='grey', linewidth=0.6, linestyle=':')
      axes.annotate(
        f'{at:,.0f}',
        (at, 1),
        xycoords=('data', 'axes fraction'),
        fontsize=7,
        rotation=90,
        ha='right',
        va='top',
      )
    axes.legend(fontsize=8)


def contexts(
  path: str,
  config: ModelConfig,
  machine: Machine,
  mesh: Mesh,
  published: Sequence[PublishedPoint] = (),
  label: str = '',
) -> None:
  """Draw the longest context against the batch, for each split of attention (Table 1).

  Args:
    path: File of the figure.
    config: The model.
    machine: The chips.
    mesh: (X, Y, Z) over all chips.
    published: Points to draw beside, in rows and positions.
    label: Who published them.
  """
  batches = [2**i for i in range(2, 11)]
  about = (
    f'{_model_text(config)}, {machine} as {"x".join(map(str, mesh))}, '
    f'{figure_data.CACHE_SHARE:.0%} of memory for a bfloat16 cache\n'
    'steps: a larger batch that fills no further mesh axis puts more rows on each chip'
  )
  with figure_file(path, 6, 4.5, about) as figure:
    axes = add_axes(figure, (1, 1, 1), 'batch (rows)', 'longest context (positions)', 'log')
    for colour, row in zip(COLOURS, figure_data.context_rows(config)):
      lengths = [
        figure_data.longest_context(row.config, machine, mesh, row.layout, b) for b in batches
      ]
      axes.plot(batches, lengths, color=colour, marker='o', markersize=3, label=row.name)
    draw_published(axes, published, '', label)
    axes.legend(fontsize=8)


def time_parts(path: str, plans: Sequence[Plan]) -> None:
  """Draw the parts of the time of a prefill and of a decode step, with a bar for each plan."""
  request = plans[0].request
  about = (
    f'{_work_text(request)}, {plans[0].machine}, batch {request.batch}, {request.weights} weights, '
    f'{request.cache} cache\nthe fastest pairs of layouts (prefill, decode) on their best meshes; '
    f'{_ADDED}'
  )
  with figure_file(path, 11, 0.35 * len(plans) + 2, about) as figure:
    for i, phase in enumerate(('prefill', 'decode'), 1):
      title = phase if phase == 'prefill' else 'a decode step'
      axes = add_axes(figure, (1, 2, i), 'seconds', '', 'linear', title)
      costs = [plan.prefill if phase == 'prefill' else plan.decode for plan in plans]
      names = [
        f'{" and ".join(plan.layouts)}\n{plan.mesh_text}, {plan.rows} rows' for plan in plans
      ]
      left = [0.0] * len(plans)
      for colour, part in zip(COLOURS, PARTS):
        values = [c.parts[part] for c in costs]
        axes.barh(range(len(plans)), values, left=left, color=colour, label=part)
        left = [a + b for a, b in zip(left, values)]
      axes.set_yticks(range(len(plans)), names if i == 1 else [''] * len(plans), fontsize=6)
      axes.invert_yaxis()
    # The legend goes beside the bars, not over them.
    axes.legend(fontsize=7, loc='center left', bbox_to_anchor=(1, 0.5))


def service_latencies(path: str, about: str, runs: Sequence[Any]) -> None:
  """Draw latencies of simulated services against the rate of requests.

  Args:
    path: File of the figure.
    about: Model and requests, in words.
    runs: service.Simulated of all services and rates.
  """
  services = dict.fromkeys((str(r.candidate.machine), r.candidate.config.slots) for r in runs)
  with figure_file(path, 11, 4.5, about) as figure:
    for i, (name, latency) in enumerate(
      (('to the first token', 'first'), ('between tokens, mean of a request', 'between')), 1
    ):
      axes = add_axes(figure, (1, 2, i), 'requests a second', f'{name} (ms)', 'log')
      for n, (machine, slots) in enumerate(services):
        some = [
          r
          for r in runs
          if (str(r.candidate.machine), r.candidate.config.slots) == (machine, slots)
        ]
        rates, colour = [r.rate for r in some], COLOURS[n % len(COLOURS)]
        for quantile, style in (('p95', '-'), ('p50', ':')):
          values = [getattr(getattr(r.service, latency), quantile) * 1e3 for r in some]
          label = f'{machine}, {slots} slots: {quantile}'
          axes.plot(
            rates, values, style, color=colour, marker='o', markersize=3, linewidth=1, label=label
          )
      if i == 2:
        axes.legend(fontsize=6, loc='center left', bbox_to_anchor=(1, 0.5))


def _model_text(config: ModelConfig) -> str:
  return preset_name(config) or f'd_model {config.d_model}, d_ff {config.d_ff}'


def _lengths_text(request: PlanRequest) -> str:
  return f'{request.input_length} tokens in, {request.output_length} out'


def _work_text(request: PlanRequest) -> str:
  return f'{_model_text(request.config)}, {_lengths_text(request)}'
