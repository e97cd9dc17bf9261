"""Drawing of the planner's figures: a file with its title, axes, and points that others published.

matplotlib is in the extra `plots`, and is only imported to draw a figure.
"""

from collections.abc import Iterator, Sequence
import contextlib
import os
from typing import Any, NamedTuple

from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.text_files import check_plots

FIGURE_FORMATS = ('.svg', '.png')
COLOURS = (
  '#1f77b4', '#d62728', '#2ca02c', '#9467bd', '#ff7f0e', '#8c564b', '#7f7f7f', '#17becf', '#bcbd22',
  '#e377c2',
)  # fmt: skip


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


def draw_published(axes: Any, published: Sequence[PublishedPoint], panel: str, label: str) -> None:
  """Draw published points as stars with their names, and one entry of the legend."""
  some = [p for p in published if p.panel == panel]
  if some:
    places = [p.x for p in some], [p.y for p in some]
    axes.plot(*places, '*', color='black', markersize=8, linestyle='none', label=label, zorder=5)
  for p in some:
    axes.annotate(
      p.name, (p.x, p.y), fontsize=6, xytext=(5, 5), textcoords='offset points', zorder=5
    )


def check_path(path: str) -> None:
  """Raise RequestError for a file format that figures can't be written in."""
  if os.path.splitext(path)[1] not in FIGURE_FORMATS:
    raise RequestError(f'figures are written as {" or ".join(FIGURE_FORMATS)}, not {path}')


@contextlib.contextmanager
def figure_file(path: str, width: float, height: float, title: str) -> Iterator[Any]:
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


def add_axes(
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
