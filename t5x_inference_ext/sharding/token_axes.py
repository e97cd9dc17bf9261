"""The mesh axes that can split tokens, and the dimensions of activations that axes can split."""

from collections.abc import Iterable, Mapping
import itertools
import math

from t5x_inference_ext.sharding.layout import Axes, Layout, num_shards

# Most tokens for which devices along the hidden axes keep the same residual stream.
_MAX_WHOLE_TOKENS = 256


def token_axes(layout: Layout, batch: int, mesh: Mapping[str, int]) -> tuple[Axes, Axes]:
  """Divide the gathered axes into (axes that split rows, axes that split positions)."""
  rows = most_devices(_subsets(layout.gathered_axes), batch, mesh)
  return rows, tuple(a for a in layout.gathered_axes if a not in rows)


def token_dim(local_tokens: tuple[int, int], axes: Axes, mesh: Mapping[str, int]) -> int:
  """Return the first dimension of [rows, positions, features] that `axes` divide evenly."""
  for dim, count in enumerate(local_tokens):
    if count % num_shards(axes, mesh) == 0:
      return dim
  return 2


def residual_dim(
  layout: Layout, local_tokens: tuple[int, int], mesh: Mapping[str, int]
) -> int | None:
  """Return the dimension of the residual stream that the hidden axes split, or None for few tokens.

  None: output products are all-reduced, and devices along the hidden axes keep the same stream. So
  it is where tokens do not divide over these axes. Features would have to be split instead: as many
  bytes would move in more collectives, a reduce-scatter and a gather, and norms would sum over
  these axes, too. So it is also where XLA:TPU would lower the reduce-scatter to an all-reduce.

  Args:
    layout: The layout.
    local_tokens: Rows and positions on a device after weights are gathered.
    mesh: Axis name -> size.
  """
  dim = token_dim(local_tokens, layout.hidden_axes, mesh)
  tokens = math.prod(local_tokens)
  # A program exported for any number of rows has no number of tokens: it is made for many.
  few = isinstance(tokens, int) and tokens <= _MAX_WHOLE_TOKENS
  if layout.gathered_axes or not few:
    return dim
  return None if dim == 2 or _sums_by_all_reduce(layout.hidden_axes, mesh) else dim


def _sums_by_all_reduce(axes: Axes, mesh: Mapping[str, int]) -> bool:
  """Return whether XLA:TPU lowers a reduce-scatter over these axes to an all-reduce and a slice.

  XLA:TPU does so for two axes with all devices of the mesh, more than 4 (measured on v4 and v5e).
  """
  devices = num_shards(axes, mesh)
  return sum(mesh[a] > 1 for a in axes) == 2 and devices == math.prod(mesh.values()) > 4


def row_axes(embed: Axes, hidden: Axes) -> list[Axes]:
  """Return the sets of axes that may split rows in attention.

  Hidden axes are taken fastest first, so that the axes left over hold consecutive heads.
  """
  found = []
  for first in range(len(hidden) + 1):
    if embed:
      found.append(embed + hidden[first:])
    found.append(hidden[first:])
  return found


def most_devices(candidates: Iterable[Axes], batch: int, mesh: Mapping[str, int]) -> Axes:
  """Return the candidate with the most devices, among those whose devices divide the batch.

  Among equals, a candidate with x is preferred: other axes can also split heads, but x would be
  idle, because products are partial sums over x.
  """
  return max(
    (axes for axes in candidates if batch % num_shards(axes, mesh) == 0),
    key=lambda axes: (num_shards(axes, mesh), 'x' in axes),
  )


def _subsets(axes: Axes) -> list[Axes]:
  """Return all subsets of some axes, the largest first."""
  return [s for n in range(len(axes), -1, -1) for s in itertools.combinations(axes, n)]
