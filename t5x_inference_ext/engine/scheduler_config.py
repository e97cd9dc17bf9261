"""The sizes that a scheduler's programs are compiled for, and how they follow from requests."""

from collections.abc import Sequence
import dataclasses
import itertools
import math
from typing import Any

from t5x_inference_ext.engine import chunk_sizes
from t5x_inference_ext.engine.inputs import check_at_least
from t5x_inference_ext.engine.request import Request
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.speculation import Speculation, parse_speculation

LENGTH_MULTIPLE = 32  # lengths and pages are whole tiles of an int8 cache
FIRST_READ = 512  # fewest cached positions that a chunk reads, if it reads any
# Decode steps in one call where nobody waits for single tokens: input files, batches of T5X.
BATCH_DECODE_STEPS = 16
PREFIX_BYTES = 2**28  # bytes per device for cached prefixes


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
  """The sizes that a scheduler's programs are compiled for.

  Attributes:
    slots: B, rows decoded together. The mesh must be able to split them (Model.padded_batch).
    max_length: Maximum number of tokens of a row: BOS, prompt and new tokens, not counting the last
      new one.
    page_size: S, positions of a page of the cache. A multiple of 32, the tile of an int8 cache.
    pages: Pages of the cache on each shard that splits rows; None: enough for `max_length` in every
      slot. With fewer, rows are preempted and recomputed when all pages are in use.
    page_reads: Maximum number of decode programs that differ in the number of pages they read.
    shared_pages: Maximum number of pages with prefixes that several rows share; each is read once
      for all rows.
    prefix_bytes: Bytes per device for the prefix cache. If no block fits, there is no prefix cache.
    block_size: P, positions of a block of the prefix cache. A multiple of 32 that divides
      page_size.
    end_ids: Tokens that end a row, at most 4, unless its request says otherwise.
    prefill_chunk: Maximum number of positions of each prompt in one prefill pass; after cached
      positions up to an eighth more. See chunk_sizes.py.
    prefill_rows: R, prompts that are prefilled together.
    prefill_budget: Maximum number of positions prefilled between two decode steps.
    decode_steps: Decode steps in one call of the compiled loop, when no request waits. With 1, the
      host starts each step before it reads the tokens of the previous step.
    top_log_probs: Maximum number of most likely tokens per position that a request can ask for.
    speculate: Drafts that steps check, so that a row may get several tokens in one; None: none.

  Raises:
    RequestError: A number that is too small, or sizes that do not fit each other.
  """

  slots: int
  max_length: int
  page_size: int = 128
  pages: int | None = None
  page_reads: int = 4
  shared_pages: int = 0
  prefix_bytes: int = 0
  block_size: int = 32
  end_ids: tuple[int, ...] = (1,)
  prefill_chunk: int = 256
  prefill_rows: int = 1
  prefill_budget: int = 2048
  decode_steps: int = 1
  top_log_probs: int = 0
  speculate: Speculation | None = None

  def __post_init__(self) -> None:
    check_at_least(
      1,
      **{
        name: getattr(self, name)
        for name in (
          'slots',
          'max_length',
          'prefill_chunk',
          'prefill_rows',
          'prefill_budget',
          'decode_steps',
          'page_reads',
        )
      },
    )
    for name in ('shared_pages', 'prefix_bytes', 'top_log_probs'):
      check_at_least(0, **{name: getattr(self, name)})
    for name in ('page_size', 'block_size'):
      check_at_least(LENGTH_MULTIPLE, **{name: getattr(self, name)})
      if getattr(self, name) % LENGTH_MULTIPLE:
        raise RequestError(
          f'{name} must be a multiple of {LENGTH_MULTIPLE}, got {getattr(self, name)}'
        )
    if self.page_size % self.block_size:
      raise RequestError(f'block_size={self.block_size} must divide page_size={self.page_size}')
    if self.pages is not None and self.pages <= self.pages_of_row:
      raise RequestError(
        f'a cache of {self.pages} pages is too small for one row of max_length={self.max_length}: '
        f'{self.pages_of_row + 1} pages of {self.page_size} positions are needed'
      )

  @property
  def most_tokens(self) -> int:
    """Maximum number of tokens that a row can get in one call of the compiled loop."""
    return self.decode_steps + (0 if self.speculate is None else self.speculate.most)

  @property
  def pages_of_row(self) -> int:
    """M, the number of pages of a row of max_length tokens."""
    return -(-self.max_length // self.page_size)

  @property
  def block_copies(self) -> int:
    """Maximum number of block copies in one call: all blocks of one group of prompts."""
    return max(1, self.prefill_rows * (self.max_length // self.block_size))

  def pages_of_shard(self, shards: int) -> int:
    """Return the number of pages of each shard, including page 0, which belongs to no row."""
    if self.pages is not None:
      return self.pages
    return self.slots // shards * self.pages_of_row + 1

  def reads_of_pages(self, shards: int) -> list[int]:
    """Return the number of pages of each shard that each decode program reads, ascending."""
    pages = self.pages_of_shard(shards)
    sizes = (1 + (self.slots // shards << i) for i in range(self.page_reads - 1))
    return [*itertools.takewhile(lambda size: size < pages, sizes), pages]

  @property
  def shared_reads(self) -> list[int]:
    """Number of shared pages that each decode program reads, ascending."""
    return [0, self.shared_pages] if self.shared_pages else [0]

  def step_reads(self, shards: int) -> list[tuple[int, int]]:
    """Return the pairs (pages, shared pages) that decode programs read, in ascending order.

    To compile one program less, steps that read shared pages never read the fewest pages.
    """
    first, *more = self.reads_of_pages(shards)
    return [
      *((first, shared) for shared in (self.shared_reads[:1] if more else self.shared_reads)),
      *itertools.product(more, self.shared_reads),
    ]

  def logits_reads(self, shards: int) -> list[tuple[int, int]]:
    """Return the pairs (pages, shared pages) that decode programs with grammars read.

    To compile fewer programs, they read every second number of `reads_of_pages`, and always all
    shared pages.
    """
    return [(read, self.shared_reads[-1]) for read in self.reads_of_pages(shards)[::-2][::-1]]

  @property
  def first_chunks(self) -> list[int]:
    """Sizes of chunks with nothing cached before them, in ascending order."""
    return chunk_sizes.first_chunks(min(self.prefill_chunk, _power_of_two(self.max_length)))

  @property
  def later_chunks(self) -> list[int]:
    """Sizes of chunks after cached positions, in ascending order."""
    return chunk_sizes.later_chunks(self.first_chunks[-1], _power_of_two(self.max_length))

  @property
  def chunk_programs(self) -> list[tuple[int, int]]:
    """Pairs (size, cached positions that it reads) of all chunk programs."""
    first, *reads = self.prefill_reads
    return [
      *((size, first) for size in self.first_chunks),
      *itertools.product(self.later_chunks, reads),
    ]

  @property
  def prefill_reads(self) -> list[int]:
    """Numbers of cached positions that chunk programs read, in ascending order; at most three."""
    # A power of two near the geometric mean of FIRST_READ and max_length.
    middle = 1 << math.isqrt(FIRST_READ * max(FIRST_READ, self.max_length)).bit_length() - 1
    first, later = self.first_chunks[-1], self.later_chunks[-1]
    if middle > first:  # up to the end of a whole chunk, so that no chunk before it reads all
      middle = first + math.ceil((middle - first) / later) * later
      middle = math.ceil(middle / LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    return [0, *([middle] if middle < self.max_length else []), self.max_length]

  def programs_text(self, shards: int, *, grammars: bool = False) -> str:
    """Return one line with every program that requests can need, and its sizes.

    Args:
      shards: Number of shards that split the rows of the cache.
      grammars: Whether requests may have grammars.
    """

    def numbers(values: Sequence[int]) -> str:
      return ', '.join(map(str, values))

    first, later, reads = self.first_chunks, self.later_chunks, self.prefill_reads[1:]
    pages, shared = self.reads_of_pages(shards), self.shared_reads
    # insert, and start_prefill, or start_with_blocks and save_reply
    others = 3 if self.prefix_bytes else 2
    steps = len(self.step_reads(shards))
    if grammars:  # decode_logits or verify_drafts, and choose_masked, or make and choose_drafted
      steps += len(self.logits_reads(shards))
      others += 1 if self.speculate is None else 2
    count = len(self.chunk_programs) + steps + others
    return (
      f'{count}: first chunks of {numbers(first)} tokens, chunks of {numbers(later)} after up to '
      f'{numbers(reads)} positions, decode steps over {numbers(pages)} pages and {numbers(shared)} '
      f'shared ones ({steps}), {others} others'
    )

  def covers(self, other: 'SchedulerConfig') -> bool:
    """Return whether a scheduler with this config can serve every request that `other` could."""
    sizes = 'slots', 'max_length', 'pages', 'shared_pages', 'prefix_bytes', 'top_log_probs'
    return (
      self.slots >= other.slots
      and self.max_length >= other.max_length
      and self.top_log_probs >= other.top_log_probs
      and self.pages == other.pages
      and self.prefix_bytes >= other.prefix_bytes
      and self
      == dataclasses.replace(
        other, page_size=self.page_size, **{name: getattr(self, name) for name in sizes}
      )
    )


def config_for(
  model: Model,
  requests: Sequence[Request],
  *,
  slots: int = 32,
  max_length: int | None = None,
  share: bool = True,
  speculate: str | None = None,
  **options: Any,
) -> SchedulerConfig:
  """Return a config that fits the requests.

  Args:
    model: Decides which numbers of rows the mesh can split.
    requests: All requests, or some of them if `max_length` is large enough for the rest.
    slots: Maximum number of rows decoded together. Lowered to the number of samples unless
      `max_length` is given; rounded up for the mesh.
    max_length: Least number of positions of a row: BOS, prompt and new tokens except the last.
    share: Whether to keep a prefix cache.
    speculate: Kind and length of drafts, such as 'ngram:8'; None: none.
    **options: Other fields of SchedulerConfig.

  Raises:
    RequestError: An option out of its range.
  """
  check_at_least(1, slots=slots)
  vocab_size = model.config.vocab_size
  wanted = max((r.top_log_probs for r in requests), default=0)
  top = max(options.pop('top_log_probs', 0), wanted)
  if not 0 <= top <= vocab_size:
    raise RequestError(
      f'top_log_probs must be 0 to {vocab_size}, the size of the vocabulary, got {top}'
    )
  needed = max((len(r.tokens) + r.limit - 1 for r in requests), default=1)
  length = _rounded(max(needed, max_length or 0))
  samples = sum(len(r.seeds) for r in requests)
  few = min(slots, _power_of_two(max(1, samples)))
  rows = model.padded_batch(slots if max_length is not None else few)
  page_size = options.pop('page_size', min(128, length))
  pages_of_row = -(-length // page_size)
  if share:
    options = {'prefix_bytes': PREFIX_BYTES, 'shared_pages': min(4 * pages_of_row, 32), **options}
  return SchedulerConfig(
    slots=rows,
    max_length=length,
    page_size=page_size,
    top_log_probs=top,
    speculate=None if speculate is None else parse_speculation(speculate),
    **{'prefill_rows': model.prefilling.padded_batch(1), **options},
  )


def _power_of_two(least: int) -> int:
  return 1 << (least - 1).bit_length()


def _rounded(size: int) -> int:
  """Round a length up, so that similar runs share compilations and pages are whole tiles."""
  multiple = max(LENGTH_MULTIPLE, _power_of_two(size) // 8)
  return -(-size // multiple) * multiple
