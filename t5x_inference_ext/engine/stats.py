"""Counters of a scheduler's work."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class PrefixStats:
  """Counters of a prefix cache.

  Attributes:
    queries: Prompts that were looked up.
    hits: Prompts with a cached prefix.
    query_tokens: Tokens of the prompts that were looked up.
    hit_tokens: Tokens of the cached prefixes that were found.
    bytes: Bytes of the cached prefixes on each device.
  """

  queries: int = 0
  hits: int = 0
  query_tokens: int = 0
  hit_tokens: int = 0
  bytes: int = 0


@dataclasses.dataclass(frozen=True)
class DraftStats:
  """Counters of drafts, all 0 without them.

  Attributes:
    row_steps: Sum over the decode steps of the number of rows that took part.
    generated: Tokens that these steps added to rows.
    drafted: Draft tokens that these steps checked.
    accepted: Draft tokens that were accepted.
  """

  row_steps: int = 0
  generated: int = 0
  drafted: int = 0
  accepted: int = 0

  def plus(self, other: 'DraftStats') -> 'DraftStats':
    """Return the sum of these counters and others."""
    return DraftStats(*map(sum, zip(dataclasses.astuple(self), dataclasses.astuple(other))))

  @property
  def tokens_per_step(self) -> float:
    """Tokens that a row got in a step, on average; 0 before any step."""
    return self.generated / self.row_steps if self.row_steps else 0.0


@dataclasses.dataclass(frozen=True)
class SchedulerStats:
  """Counters of a scheduler's work.

  Attributes:
    prefilled: Positions that prefill passes processed, padding included.
    prompt_tokens: Prompt tokens among the prefilled positions.
    decoded: Number of decode steps times number of slots.
    generated: Tokens that decode steps added to rows. A row's first token comes from its prefill
      and is not counted.
    preempted: Rows that were moved out of their slot for other rows, to be computed again.
    prefixes: Counters of the prefix cache.
    drafts: Counters of drafts.
  """

  prefilled: int = 0
  prompt_tokens: int = 0
  decoded: int = 0
  generated: int = 0
  preempted: int = 0
  prefixes: PrefixStats = PrefixStats()
  drafts: DraftStats = DraftStats()
