"""The figures: latency against cost, bytes of layouts against batch, context by attention layout, time in its parts.

matplotlib is in the extra `plots`, and imported only when a figure is drawn.
"""

from collections.abc import Iterator, Sequence
import contextlib
import os
from typing import Any

from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.planner import tables
from t5x_inference_ext.planner.costs import PARTS
from t5x_inference_ext.planner.machine import Machine, Mesh
from t5x_inference_ext.planner.request import Plan
from t5x_inference_ext.planner.sweep import Point
from t5x_inference_ext.text_files import check_plots

FIGURE_FORMATS = ('.svg', '.png')
_COLOURS = ('#1f77b4', '#d62728', '#2ca02c', '#9467bd', '#ff7f0e', '#8c564b', '#7f7f7f')


def pareto(path: str, points: Sequence[Point]) -> None:
  """Figure 1: a panel for each phase; latency of a pass against cost, the front as a line with its batches."""
  with _figure(path, 11, 4.5) as figure:
    for i, (phase, unit) in enumerate((('decode', 'a step'), ('prefill', 'all prompts')), 1):
      axes = _axes(
        figure, 1, 2, i, f'{phase}: {unit} (ms)', 'cost (chip-ms a token)', 'log', 'log', phase
      )
      kinds = dict.fromkeys(p.request.weights for p in points)
      for n, (colour, weights) in enumerate(zip(_COLOURS, kinds)):
        some = [p for p in points if p.phase == phase and p.request.weights == weights]
        best = [p for p in some if p.on_front]
        axes.scatter(*_milliseconds(some), s=6, color=colour, alpha=0.3, linewidths=0)
        axes.plot(
          *_milliseconds(best), color=colour, marker='o', markersize=3, label=f'{weights} weights'
        )
        named = set()  # each slice where the front first comes to it
        for p in best:
          if p.cost.case.machine.chips not in named:
            axes.annotate(
              f'{p.cost.case.machine.chips} chips, B {p.request.batch}',
              (p.seconds * 1e3, p.chip_seconds_per_token * 1e3),
              fontsize=6,
              color=colour,
              xytext=(3, 3) if n else (-3, -4),
              ha='left' if n else 'right',
              va='bottom' if n else 'top',
              textcoords='offset points',
            )
          named.add(p.cost.case.machine.chips)
      axes.margins(x=0.12)
      axes.legend(fontsize=8)


def _milliseconds(points: Sequence[Point]) -> tuple[list[float], list[float]]:
  return [p.seconds * 1e3 for p in points], [p.chip_seconds_per_token * 1e3 for p in points]


def communication(
  path: str, config=tables.FIGURE_3_MODEL, mesh: Mesh = tables.FIGURE_3_MESH
) -> None:
  """Figure 3: GB that a chip sends in one feedforward layer against tokens, and where the least changes."""
  step = mesh[0] * mesh[1] * mesh[2]
  tokens = [step * 2**i for i in range(max(1, (2**21 // step).bit_length()))]
  with _figure(path, 6, 4.5) as figure:
    axes = _axes(
      figure,
      1,
      1,
      1,
      'tokens in a pass',
      'GB sent by a chip in a layer',
      'log',
      'log',
      f'E {config.d_model}, F {config.d_ff}, mesh {"x".join(map(str, mesh))}, bfloat16',
    )
    for colour, name in zip(_COLOURS, tables.FIGURE_3_LAYOUTS):
      axes.plot(
        tokens,
        [tables.feedforward_bytes(config, mesh, name, n) / 1e9 for n in tokens],
        color=colour,
        label=name,
      )
    for at, _, _ in tables.switch_points(config, mesh):
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


def contexts(path: str, config, machine: Machine, mesh: Mesh, share: float = 0.3) -> None:
  """Table 1: the longest context against batch, by attention layout."""
  batches = [2**i for i in range(2, 11)]
  with _figure(path, 6, 4.5) as figure:
    axes = _axes(
      figure,
      1,
      1,
      1,
      'batch',
      'longest context (positions)',
      'log',
      'log',
      f'{machine}, {share:.0%} of memory for a bfloat16 cache',
    )
    rows = (
      tables.table_1(config)
      if config.num_kv_heads == 1
      else [
        tables.ContextRow(f'{config.num_kv_heads} key heads {how}', config, f'ws_2d/{layout}')
        for how, layout in (('by heads', 'heads'), ('by batch', 'batch'))
      ]
    )
    for colour, row in zip(_COLOURS, rows):
      lengths = [
        tables.longest_context(row.config, machine, mesh, row.layout, b, share) for b in batches
      ]
      axes.plot(batches, lengths, color=colour, marker='o', markersize=3, label=row.name)
    axes.legend(fontsize=8)


def time_parts(path: str, plans: Sequence[Plan]) -> None:
  """Where the time of each pair of layouts goes: a bar for each, of prefill and of a decode step."""
  with _figure(path, 11, 0.35 * len(plans) + 1.8) as figure:
    for i, phase in enumerate(('prefill', 'decode'), 1):
      axes = _axes(
        figure,
        1,
        2,
        i,
        'seconds',
        '',
        'linear',
        'linear',
        phase if phase == 'prefill' else 'a decode step',
      )
      costs = [getattr(plan, phase) for plan in plans]
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
    axes.legend(fontsize=7)


def check_path(path: str) -> None:
  """Raises RequestError for a file that can't be written, or whose format is not drawn."""
  if os.path.splitext(path)[1] not in FIGURE_FORMATS:
    raise RequestError(f'figures are written as {" or ".join(FIGURE_FORMATS)}, not {path}')


@contextlib.contextmanager
def _figure(path: str, width: float, height: float) -> Iterator[Any]:
  """A figure, which is written when it is done: the same bytes from the same numbers."""
  check_plots()
  check_path(path)
  import matplotlib  # pylint: disable=g-import-not-at-top
  from matplotlib.figure import Figure  # pylint: disable=g-import-not-at-top

  with matplotlib.rc_context({'svg.hashsalt': 't5x_inference_ext', 'svg.fonttype': 'none'}):
    figure = Figure((width, height), layout='constrained')
    yield figure
    try:
      figure.savefig(
        path, dpi=120, metadata={'Date': None} if path.endswith('.svg') else {'Software': None}
      )
    except OSError as e:
      raise RequestError(f"can't write {path}: {e.strerror}") from e


def _axes(
  figure,
  rows: int,
  columns: int,
  index: int,
  x: str,
  y: str,
  x_scale: str,
  y_scale: str,
  title: str,
):
  axes = figure.add_subplot(rows, columns, index)
  axes.set(xlabel=x, ylabel=y, xscale=x_scale, yscale=y_scale)
  axes.set_title(title, fontsize=9)
  axes.grid(alpha=0.3, linewidth=0.5)
  return axes
