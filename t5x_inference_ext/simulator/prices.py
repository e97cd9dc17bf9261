"""Prices: the seconds of each of a scheduler's programs, from a measured or compiled table.

A program is named as in engine/programs.py, and its sizes as Scheduler.warm_up names them. A file
of prices is JSON:

    {"scheduler": {"slots": 8, "max_length": 256, ...},
     "mesh": "1x1x1", "layouts": ["ws_2d/batch", "ws_2d/batch"], "shared": false,
     "programs": [{"program": "decode_steps", "read": 17, "read_shared": 0, "seconds": 0.004}, ...]}

`scheduler` has the fields of SchedulerConfig for which the programs were compiled. With drafts
(`"speculate": "ngram:8"`), a row for speculative_steps has the time of one step that checks `draft`
tokens of each row, and makes them; decode_steps is then a step that checks none. `shared` says
whether the devices are the host's own cores, and so idle while the host works.
"""

from collections.abc import Iterable, Mapping
import dataclasses
import functools
import json
import math
from typing import Any, NamedTuple, Protocol

from t5x_inference_ext.engine.scheduler_config import SchedulerConfig
from t5x_inference_ext.errors import MeshError, RequestError
from t5x_inference_ext.sharding.layout import Layout
from t5x_inference_ext.sharding.mesh import MeshShape, parse_mesh
from t5x_inference_ext.speculation import parse_speculation
from t5x_inference_ext.text_files import parse_json

# Program -> names of its sizes. Some entries are not programs of the devices: `host` is the host's
# own work in a step of the scheduler, `start` its work to start a program. `wake` is what the first
# step takes longer after the service waited for a request.
PROGRAMS: dict[str, tuple[str, ...]] = {
  'prefill_chunk': ('tokens', 'read'),
  'decode_steps': ('read', 'read_shared'),
  'speculative_steps': ('draft', 'read', 'read_shared'),
  'insert': ('positions',),
  'start_prefill': ('blocks',),
  'save_blocks': ('blocks',),
  'host': (),
  'start': (),
  'wake': (),
}
_ZERO_IF_MISSING = ('wake',)
# Sizes that are not static in a program. Between the rows of a table, time is linear in them.
_COUNTED = ('positions', 'blocks')


class Prices(Protocol):
  """Interface: the time of each program."""

  def seconds(self, program: str, **sizes: int) -> float:
    """Return the seconds of a program of PROGRAMS; for a program of steps, of one step."""


class NoTime:
  """Prices of programs that take no time."""

  def seconds(self, program: str, **sizes: int) -> float:
    """Return 0."""
    del program, sizes
    return 0.0


class PricedProgram(NamedTuple):
  """A row of a table of prices.

  Attributes:
    program: One of PROGRAMS.
    sizes: Its sizes, by name.
    seconds: Its time.
  """

  program: str
  sizes: Mapping[str, int]
  seconds: float


class PriceTable:
  """Prices from a table.

  For sizes that are in no row, the next larger static size applies. In the sizes of _COUNTED, time
  is interpolated between the nearest rows, and extrapolated beyond them.

  Args:
    rows: The table.
    name: Its name, for messages.
  """

  def __init__(self, rows: Iterable[PricedProgram], name: str = 'prices') -> None:
    self._name = name
    self._rows: dict[str, list[tuple[tuple[int, ...], float]]] = {}
    for row in rows:
      sizes = tuple(row.sizes[size] for size in PROGRAMS[row.program])
      self._rows.setdefault(row.program, []).append((sizes, row.seconds))
    for found in self._rows.values():
      found.sort()
    self._seconds = functools.cache(self._look_up)

  def seconds(self, program: str, **sizes: int) -> float:
    """Return the seconds of a program; for a program of steps, of one step.

    Raises:
      RequestError: The table has no row for it.
    """
    return self._seconds(program, tuple(sizes[size] for size in PROGRAMS[program]))

  def _look_up(self, program: str, sizes: tuple[int, ...]) -> float:
    rows = self._rows.get(program, [])
    if rows and PROGRAMS[program] and PROGRAMS[program][0] in _COUNTED:
      return _on_line([(each[0], seconds) for each, seconds in rows], sizes[0])
    fitting = [s for each, s in rows if all(have >= ask for have, ask in zip(each, sizes))]
    if not fitting:
      if program in _ZERO_IF_MISSING:
        return 0.0
      wanted = ', '.join(f'{name}={size}' for name, size in zip(PROGRAMS[program], sizes))
      raise RequestError(
        f'{self._name} has no row for {program}({wanted}) or larger sizes: add one'
      )
    return fitting[0]


def _on_line(points: list[tuple[int, float]], at: int) -> float:
  """Interpolate points linearly at `at`, or extrapolate; the result is at least 0."""
  if len(points) == 1:
    return points[0][1]
  after = next((i for i, (x, _) in enumerate(points) if x >= at), len(points) - 1)
  (x0, y0), (x1, y1) = points[max(1, after) - 1 : max(1, after) + 1]
  return max(0.0, y0 + (y1 - y0) * (at - x0) / (x1 - x0))


@dataclasses.dataclass(frozen=True)
class PricedService:
  """A file of prices: a table, and the sizes and layouts that it is for.

  Attributes:
    config: Sizes of the scheduler.
    mesh: (X, Y, Z).
    layouts: (prefill layout, decode layout).
    programs: The table.
    shared: Whether the devices are the host's own cores.
  """

  config: SchedulerConfig
  mesh: MeshShape
  layouts: tuple[Layout, Layout]
  programs: tuple[PricedProgram, ...]
  shared: bool = False

  @classmethod
  def read(cls, path: str) -> 'PricedService':
    """Read a file of prices.

    Raises:
      RequestError: The file can't be read, or is not a valid file of prices. The message names the
        place.
    """
    try:
      with open(path, encoding='utf-8') as file:
        data = parse_json(file.read())
    except OSError as e:
      raise RequestError(f"can't read {path}: {e.strerror}") from e
    except ValueError as e:
      raise RequestError(f'{path} is {e}') from e
    try:
      scheduler = dict(data['scheduler'])
      scheduler['end_ids'] = tuple(scheduler.get('end_ids', ()))
      if scheduler.get('speculate') is not None:
        scheduler['speculate'] = parse_speculation(str(scheduler['speculate']))
      prefill, decode = map(Layout.parse, data['layouts'])
      rows = tuple(_row(row) for row in data['programs'])
      shared = data.get('shared', False)
      if not isinstance(shared, bool):
        raise ValueError(f'shared must be true or false, got {shared!r}')
      config, mesh = SchedulerConfig(**scheduler), parse_mesh(data['mesh'])
      return cls(config, mesh, (prefill, decode), rows, shared)
    except (KeyError, TypeError, ValueError, AttributeError) as e:
      what = f'no {e}' if isinstance(e, KeyError) else str(e)
      raise RequestError(f'{path} is not a file of prices (docs/planner.md): {what}') from e
    except (RequestError, MeshError) as e:
      raise RequestError(f'{path}: {e}') from e

  def text(self) -> str:
    """Return the text of a file of prices."""
    drafts = self.config.speculate
    scheduler = dataclasses.asdict(self.config)
    return (
      json.dumps(
        {
          'scheduler': {**scheduler, 'speculate': None if drafts is None else str(drafts)},
          'mesh': 'x'.join(map(str, self.mesh)),
          'layouts': [str(layout) for layout in self.layouts],
          'shared': self.shared,
          'programs': [
            {'program': row.program, **row.sizes, 'seconds': row.seconds} for row in self.programs
          ],
        },
        indent=1,
      )
      + '\n'
    )


def _row(row: dict[str, Any]) -> PricedProgram:
  program, seconds = row['program'], row['seconds']
  if program not in PROGRAMS:
    raise ValueError(f'no program is called {program!r}: there are {", ".join(PROGRAMS)}')
  if isinstance(seconds, bool) or not 0 <= seconds < math.inf:
    raise ValueError(f'{program} takes {seconds!r} seconds')
  sizes = {name: row[name] for name in PROGRAMS[program]}
  if not all(isinstance(size, int) and size >= 0 for size in sizes.values()):
    raise ValueError(f'{program} has sizes that are not whole numbers: {sizes}')
  return PricedProgram(program, sizes, float(seconds))
