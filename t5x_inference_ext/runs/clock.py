"""Clock: time spent in the engine, without compilation, and counters of a run."""

from collections.abc import Iterator
import contextlib
import dataclasses
import time
from typing import Any

import jax

from t5x_inference_ext.engine.stats import DraftStats

COMPILE_EVENTS = '/jax/core/compile/'


@dataclasses.dataclass
class Clock:
  """A stopwatch and counters. Calls of the engine go inside `with clock.running():`.

  Attributes:
    rows: Rows served.
    tokens: Useful tokens: generated (EOS included) or scored, without padding.
    seconds: Seconds in the engine, without compilation.
    compile_seconds: Seconds of tracing and compilation.
    drafts: Counters of drafts.
  """

  rows: int = 0
  tokens: int = 0
  seconds: float = 0.0
  compile_seconds: float = 0.0
  drafts: DraftStats = DraftStats()

  @property
  def tokens_per_second(self) -> float:
    """Useful tokens per second, not counting compilation; 0 before anything ran."""
    return self.tokens / self.seconds if self.seconds else 0.0

  def to_dict(self) -> dict[str, Any]:
    """Return the counters, JSON-ready; those of drafts only if there were any steps with them."""
    found = {**dataclasses.asdict(self), 'tokens_per_second': self.tokens_per_second}
    drafts = found.pop('drafts')
    if self.drafts.row_steps:
      found['drafts'] = {**drafts, 'tokens_per_step': self.drafts.tokens_per_step}
    return found

  def add(self, rows: int, tokens: int) -> None:
    """Count rows and useful tokens."""
    self.rows += rows
    self.tokens += tokens

  @contextlib.contextmanager
  def running(self) -> Iterator[None]:
    """Context manager: add the time of the block."""
    start, compiled = time.perf_counter(), 0.0

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
      nonlocal compiled
      if event.startswith(COMPILE_EVENTS):
        compiled += duration_secs

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
      yield
    finally:
      jax.monitoring.unregister_event_duration_listener(listen)
      self.compile_seconds += compiled
      self.seconds += max(0.0, time.perf_counter() - start - compiled)
