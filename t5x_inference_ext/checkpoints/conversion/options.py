"""How a conversion is asked for, and what it reports."""

import dataclasses
import re

from t5x_inference_ext.checkpoints.checkpoint import Checkpoint
from t5x_inference_ext.checkpoints.conversion.rounding_error import RoundingError
from t5x_inference_ext.checkpoints.conversion.slices import SLICE_BYTES
from t5x_inference_ext.errors import UserError

HOLD_BYTES = 512 * 2**20
SCALE_SEARCHES = ('absmax', 'mse')
_UNITS = {'': 1, 'kB': 10**3, 'MB': 10**6, 'GB': 10**9, 'KiB': 2**10, 'MiB': 2**20, 'GiB': 2**30}


def parse_size(name: str, size: int | str) -> int:
  """Bytes, given as such or with a unit, 512MiB. Raises UserError."""
  found = re.fullmatch(r'(\d+) *([kMGKi]*B)?', str(size))
  if found is None or (found[2] or '') not in _UNITS:
    raise UserError(f'{name} must be a number of bytes, as 536870912, 512MiB or 1GB, got {size!r}')
  return int(found[1]) * _UNITS[found[2] or '']


@dataclasses.dataclass(frozen=True)
class ConvertOptions:
  """How to convert.

  Attributes:
    format: of the output, one of outputs.FORMATS.
    weights: of format 'serving', 'int8' or 'bfloat16'.
    scale_search: 'absmax', max|w| / 127, or 'mse', the multiple of it with the least squared error.
    embedding: what the embedding becomes: 'bfloat16' (float32 in T5X's formats).
    workers: threads; None is one a core.
    hold_bytes: how much of the source to hold for a second look; sizes may have a unit, '512MiB'.
    slice_bytes: how much of the source is a unit of progress, unless a column of its chunks is more.
    num_shards, shard_id: this process does the slices shard_id, shard_id + num_shards, ...
  """

  format: str = 'serving'
  weights: str = 'int8'
  scale_search: str = 'absmax'
  embedding: str = 'bfloat16'
  workers: int | None = None
  hold_bytes: int | str = HOLD_BYTES
  slice_bytes: int | str = SLICE_BYTES
  num_shards: int = 1
  shard_id: int = 0

  def __post_init__(self):
    if self.scale_search not in SCALE_SEARCHES:
      raise UserError(
        f'scale_search must be one of {", ".join(SCALE_SEARCHES)}, got {self.scale_search!r}'
      )
    if self.embedding != 'bfloat16':
      raise UserError(
        f"embedding={self.embedding!r} can't be served: the program reads its rows and multiplies by it "
        'without scales; it stays bfloat16'
      )
    if self.num_shards < 1:
      raise UserError(f'num_shards must be at least 1, got {self.num_shards}')
    if not 0 <= self.shard_id < self.num_shards:
      raise UserError(
        f'shard_id must be 0 to num_shards - 1 = {self.num_shards - 1}, got {self.shard_id}'
      )
    for name in ('hold_bytes', 'slice_bytes'):
      object.__setattr__(self, name, parse_size(name, getattr(self, name)))
    if self.workers is not None and self.workers < 1:
      raise UserError(f'workers must be at least 1, got {self.workers}')


@dataclasses.dataclass(frozen=True)
class Report:
  """What a conversion did.

  Attributes:
    source: the checkpoint read.
    output: the directory written.
    weights: what it holds.
    finished: whether it is there; False where other shards still have work.
    errors: of each float tensor; empty where this run only found what an earlier one finished.
    source_bytes: of the source's parameters, uncompressed.
    output_bytes: on disk, everything.
    layer_bytes: on disk, matrices and their scales.
    layer_float32_bytes: what the matrices would take as float32.
  """

  source: Checkpoint
  output: str
  weights: str
  finished: bool
  errors: dict[str, RoundingError]
  source_bytes: int
  output_bytes: int
  layer_bytes: int
  layer_float32_bytes: int
