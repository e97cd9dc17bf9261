"""Options and report of a conversion."""

from collections.abc import Iterator
import dataclasses
import re

from t5x_inference_ext.checkpoints.checkpoint import Checkpoint
from t5x_inference_ext.checkpoints.conversion.rounding_error import RoundingError
from t5x_inference_ext.checkpoints.workers import worker_count
from t5x_inference_ext.errors import UserError
from t5x_inference_ext.options import check_options, option
from t5x_inference_ext.text_format import decimal_bytes

OUTPUT_FORMATS = ('serving', 't5x_int8', 't5x_float')
# Headings of --help.
COMMON, MEMORY, SHARDS = 'Common', 'Memory and progress', 'Several processes'
_UNITS = {'': 1, 'kB': 10**3, 'MB': 10**6, 'GB': 10**9, 'KiB': 2**10, 'MiB': 2**20, 'GiB': 2**30}


def parse_size(name: str, size: int | str) -> int:
  """Parse a number of bytes, given as a number or with a unit (512MiB); may raise UserError."""
  found = re.fullmatch(r'(\d+) *([kMGKi]*B)?', str(size))
  if found is None or (found[2] or '') not in _UNITS:
    raise UserError(
      f'{name} must be a number of bytes, e.g. 536870912, 512MiB or 1GB, got {size!r}'
    )
  return int(found[1]) * _UNITS[found[2] or '']


@dataclasses.dataclass(frozen=True)
class ConvertOptions:
  """Options of a conversion. The fields' help texts explain them.

  Attributes:
    weights: Dtype of the matrices in a serving checkpoint, 'int8', 'int4' or 'bfloat16'. Ignored
      for T5X's formats, which have their own.
  """

  weights: str = 'int8'
  format: str = option(
    'serving',
    help="Format to write: a serving checkpoint, or T5X's legacy format (int8 or float32 "
    'matrices).',
    group=COMMON,
    choices=OUTPUT_FORMATS,
  )
  bits: str | None = option(
    None,
    help='Other bits for some matrices, e.g. mlp_output:8 with --weights=int4; and tables to '
    'quantize, embedding:8 and, of a model with an untied head, head:8. Matrices that share a '
    'scale, as both outputs of a parallel block, have equal bits.',
    group=COMMON,
  )
  scale_search: str | None = option(
    None,
    help='Scale of an int8 or int4 channel. absmax: max|w| / 127, or / 7. mse: a part of that, '
    'with the least squared error; it takes about 20 times the arithmetic. By default mse for '
    'int4, absmax for int8.',
    group=COMMON,
    choices=('absmax', 'mse'),
  )
  workers: int | None = option(
    None,
    help='Number of threads; one per core by default. For a source in a bucket, more are faster.',
    group=MEMORY,
  )
  hold_bytes: int | str = option(
    '512MiB',
    help='Bytes of the source to keep in memory until scales are known. The rest is read again.',
    group=MEMORY,
  )
  slice_bytes: int | str = option(
    '256MiB',
    help='Approximate bytes of the source between two records of progress. Chunks are not divided.',
    group=MEMORY,
  )
  num_shards: int = option(1, help='Number of processes that divide the work.', group=SHARDS)
  shard_id: int = option(0, help='Index of this process among them, from 0.', group=SHARDS)

  def __post_init__(self) -> None:
    check_options(self)
    if self.bits and self.format != 'serving':
      raise UserError(
        f"bits={self.bits} is for serving checkpoints: T5X's formats have matrices of one dtype"
      )
    if self.num_shards < 1:
      raise UserError(f'num_shards must be at least 1, got {self.num_shards}')
    if not 0 <= self.shard_id < self.num_shards:
      raise UserError(
        f'shard_id must be 0 to num_shards - 1 = {self.num_shards - 1}, got {self.shard_id}'
      )
    worker_count(self.workers)
    assert self.held_size >= 0 <= self.slice_size  # raises UserError for an invalid size

  @property
  def search(self) -> str:
    """Option scale_search, or its default for the weights."""
    by_default = 'mse' if self.format == 'serving' and self.weights == 'int4' else 'absmax'
    return self.scale_search or by_default

  @property
  def held_size(self) -> int:
    """Option hold_bytes as a number of bytes."""
    return parse_size('hold_bytes', self.hold_bytes)

  @property
  def slice_size(self) -> int:
    """Option slice_bytes as a number of bytes."""
    return parse_size('slice_bytes', self.slice_bytes)


@dataclasses.dataclass(frozen=True)
class Report:
  """The result of a conversion.

  Attributes:
    source: The checkpoint read.
    output: The directory written.
    weights: Dtype of the matrices in the output.
    finished: Whether the output is complete; False if other shards still have work.
    errors: Rounding errors of each float tensor. Empty if an earlier run had finished the output.
    source_bytes: Bytes of the source's parameters, uncompressed.
    output_bytes: Bytes of the whole output on disk.
    layer_bytes: Bytes on disk of the layers' matrices and their scales.
    layer_float32_bytes: Bytes that the layers' matrices would take as float32.
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

  def summary(self, seconds: float) -> Iterator[str]:
    """Yield lines with the rounding errors, the sizes and the path of the output."""
    if not self.errors:
      return
    yield (
      f'{"tensor":20}{"max error":>12}{"rms error":>12}   of max|w| and rms w, after rounding to '
      f'{self.weights}'
    )
    for name, error in self.errors.items():
      yield f'{name:20}{error.worst:12.3%}{error.relative:12.3%}'
    worst = max(self.errors, key=lambda name: self.errors[name].relative)
    yield f'worst tensor: {worst}, {self.errors[worst].relative:.3%} rms'
    yield (
      f'parameters: {decimal_bytes(self.source_bytes)} before ({self.source.weights}), '
      f'{decimal_bytes(self.output_bytes)} on disk after: '
      f'{self.output_bytes / self.source_bytes:.3f} of it'
    )
    yield (
      f'layer weights: {decimal_bytes(self.layer_bytes)} on disk, '
      f'{self.layer_bytes / self.layer_float32_bytes:.3f} of '
      f'{decimal_bytes(self.layer_float32_bytes)} as float32'
    )
    yield f'wrote and verified {self.output} in {seconds:.1f} s'
