"""Figures: latency and cost, bytes of layouts, longest contexts, parts of the time.

matplotlib is in the extra `plots`, and is only imported to draw a figure.
"""

from collections.abc import Iterator, Sequence
import contextlib
import math
import os
from typing import Any, NamedTuple

from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.planner import figure_data
from t5x_inference_ext.planner.costs import PARTS
from t5x_inference_ext.planner.gin_text import preset_name
from t5x_inference_ext.planner.machine import Machine, Mesh
from t5x_inference_ext.planner.request import Plan, PlanRequest
from t5x_inference_ext.planner.sweep import Point
from t5x_inference_ext.text_files import check_plots

FIGURE_FORMATS = ('.svg', '.png')
_COLOURS = (
  '#1f77b4', '#d62728', '#2ca02c', '#9467bd', '#ff7f0e', '#8c564b', '#7f7f7f', '#17becf', '#bcbd22',
  '#e377c2',
)  # fmt: skip
_MAX_TOKENS = 2**21
_ADDED = 'parts of the time are added: only gathering of weights overlaps'


class PublishedPoint(NamedTuple):
  """A point that somebody published, drawn beside the predicted ones.

  Attributes:
    panel: Phase whose panel shows the point; '' in a figure of one panel.
    name: What it is.
    x: Position along the x axis, in the axis' unit.
    y: Position along the y axis, in the axis' unit.
  """

  panel: str
  name: str
  x: float
  y: float


def _draw_published(axes: Any, published: Sequence[PublishedPoint], panel: str, label: str) -> None:
  """Draw published points as stars with their names, and one entry of the legend."""
  some = [p for p in published if p.panel == panel]
  if some:
    places = [p.x for p in some], [p.y for p in some]
    axes.plot(*places, '*', color='black', markersize=8, linestyle='none', label=label, zorder=5)
  for p in some:
    axes.annotate(
      p.name, (p.x, p.y), fontsize=6, xytext=(5, 5), textcoords='offset points', zorder=5
    )


def pareto(
  path: str, points: Sequence[Point], published: Sequence[PublishedPoint] = (), label: str = ''
) -> None:
  """Draw latency against cost, in a panel for each phase, with the front as a line (Figure 1).

  Args:
    path: File of the figure.
    points: Points of a sweep.
    published: Points to draw beside them, in milliseconds and chip-milliseconds a token.
    label: Who published them.
  """
  chips = '/'.join(dict.fromkeys(p.cost.case.machine.chip.name for p in points))
  about = (
    f'{_work_text(points[0].request)}, {chips}, {points[0].request.cache} cache\n'
    'a point: the fastest mesh and layout of a slice and a batch (rows run together); a line: what '
    f'nothing beats in both\n{_ADDED}'
  )
  with _figure(path, 11, 4.5, about) as figure:
    for i, (phase, unit) in enumerate((('decode', 'a step'), ('prefill', 'all prompts')), 1):
      axes = _axes(figure, (1, 2, i), f'{phase}: {unit} (ms)', 'cost (chip-ms a token)', 'log')
      dtypes = dict.fromkeys(p.request.weights for p in points)
      for n, (colour, weights) in enumerate(zip(_COLOURS, dtypes)):
        some = [p for p in points if p.phase == phase and p.request.weights == weights]
        best = [p for p in some if p.on_front]
        axes.scatter(*_milliseconds(some), s=6, color=colour, alpha=0.3, linewidths=0)
        axes.plot(
          *_milliseconds(best), color=colour, marker='o', markersize=3, label=f'{weights} weights'
        )
        _name_slices(axes, best, colour, above=n > 0)
      _draw_published(axes, published, phase, label)
      axes.margins(x=0.12)
      axes.legend(fontsize=8)


def _name_slices(axes: Any, best: Sequence[Point], colour: str, above: bool) -> None:
  """Label each slice's first point on the Pareto front with its number of chips and batch."""
  first_of_slice = {p.cost.case.machine.chips: p for p in reversed(best)}
  for chips, p in first_of_slice.items():
    axes.annotate(
      f'{chips} chips, batch {p.request.batch}',
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
  with _figure(path, 6, 4.5, about) as figure:
    axes = _axes(figure, (1, 1, 1), 'tokens in a pass', 'GB sent by a chip in a layer', 'log')
    # Later lines are thinner, so that layouts with equal lines stay visible.
    for n, (colour, name) in enumerate(zip(_COLOURS, figure_data.FEEDFORWARD_LAYOUTS)):
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
  with _figure(path, 6, 4.5, about) as figure:
    axes = _axes(figure, (1, 1, 1), 'batch (rows)', 'longest context (positions)', 'log')
    for colour, row in zip(_COLOURS, figure_data.context_rows(config)):
      lengths = [
        figure_data.longest_context(row.config, machine, mesh, row.layout, b) for b in batches
      ]
      axes.plot(batches, lengths, color=colour, marker='o', markersize=3, label=row.name)
    _draw_published(axes, published, '', label)
    axes.legend(fontsize=8)


def time_parts(path: str, plans: Sequence[Plan]) -> None:
  """Draw the parts of the time of a prefill and of a decode step, with a bar for each plan."""
  request = plans[0].request
  about = (
    f'{_work_text(request)}, {plans[0].machine}, batch {request.batch}, {request.weights} weights, '
    f'{request.cache} cache\nthe fastest pairs of layouts (prefill, decode) on their best meshes; '
    f'{_ADDED}'
  )
  with _figure(path, 11, 0.35 * len(plans) + 2, about) as figure:
    for i, phase in enumerate(('prefill', 'decode'), 1):
      title = phase if phase == 'prefill' else 'a decode step'
      axes = _axes(figure, (1, 2, i), 'seconds', '', 'linear', title)
      costs = [plan.prefill if phase == 'prefill' else plan.decode for plan in plans]
      names = [
        f'{" and ".join(plan.layouts)}\n{plan.mesh_text}, {plan.rows} rows' for plan in plans
      ]
      left = [0.0] * len(plans)
      for colour, part in zip(_COLOURS, PARTS):
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
  with _figure(path, 11, 4.5, about) as figure:
    for i, (name, latency) in enumerate(
      (('to the first token', 'first'), ('between tokens, mean of a request', 'between')), 1
    ):
      axes = _axes(figure, (1, 2, i), 'requests a second', f'{name} (ms)', 'log')
      for n, (machine, slots) in enumerate(services):
        some = [
          r
          for r in runs
          if (str(r.candidate.machine), r.candidate.config.slots) == (machine, slots)
        ]
        rates, colour = [r.rate for r in some], _COLOURS[n % len(_COLOURS)]
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


def _work_text(request: PlanRequest) -> str:
  lengths = f'{request.input_length} tokens in, {request.output_length} out'
  return f'{_model_text(request.config)}, {lengths}'


def check_path(path: str) -> None:
  """Raise RequestError for a file format that figures can't be written in."""
  if os.path.splitext(path)[1] not in FIGURE_FORMATS:
    raise RequestError(f'figures are written as {" or ".join(FIGURE_FORMATS)}, not {path}')


@contextlib.contextmanager
def _figure(path: str, width: float, height: float, title: str) -> Iterator[Any]:
  """Context manager: yield a figure, and write it on exit. Equal numbers give equal files."""
  check_plots()
  check_path(path)
  import matplotlib
  from matplotlib.figure import Figure

  with matplotlib.rc_context({'svg.hashsalt': 't5x_inference_ext', 'svg.fonttype': 'none'}):
    figure = Figure((width, height), layout='constrained')
    figure.suptitle(title, fontsize=9)
    yield figure
    try:
      figure.savefig(
        path, dpi=120, metadata={'Date': None} if path.endswith('.svg') else {'Software': None}
      )
    except OSError as e:
      raise RequestError(f"can't write {path}: {e.strerror}") from e


def _axes(
  figure: Any, place: tuple[int, int, int], x: str, y: str, scale: str, title: str = ''
) -> Any:
  """Return new axes of a figure.

  Args:
    figure: The figure.
    place: (rows, columns, index from 1) of the grid of axes, as in Figure.add_subplot.
    x: Label of the x axis.
    y: Label of the y axis.
    scale: Scale of both axes, 'log' or 'linear'.
    title: Title of the axes.
  """
  axes = figure.add_subplot(*place)
  axes.set(xlabel=x, ylabel=y, xscale=scale, yscale=scale)
  axes.set_title(title, fontsize=9)
  axes.grid(alpha=0.3, linewidth=0.5)
  return axes
