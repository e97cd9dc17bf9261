"""Predicted times of the scheduler's programs, for the simulator."""

import dataclasses
import functools

from t5x_inference_ext.engine.scheduler_config import SchedulerConfig
from t5x_inference_ext.planner.costs import PassCost, cost
from t5x_inference_ext.planner.work import cache_bytes


class PlannedPrices:
  """Times of programs by the planner's model. See simulator.prices.Prices.

  A chunk of prompts, a decode step and a step that checks drafts are passes of the cost model. The
  steps of a draft model are added; drafts by n-grams take no time. Insertions and block copies
  take the time to read and write their keys and values in memory. Starting a group takes no time.
  The host's own time is an argument.

  Args:
    prefill: Cost of a chunk of any length, with as many rows as a group has.
    decode: Cost of a decode step of all slots, at any context.
    config: Sizes of the scheduler.
    host_seconds: The host's own work in a step of the scheduler.
    draft: Cost of a decode step of the draft model; None: there is none.
  """

  def __init__(
    self,
    prefill: PassCost,
    decode: PassCost,
    config: SchedulerConfig,
    host_seconds: float,
    draft: PassCost | None = None,
  ) -> None:
    self._prefill, self._decode, self._draft, self._config = prefill, decode, draft, config
    self._host = host_seconds
    case = decode.case
    # Slots on one shard, whose pages a decode step reads.
    self._rows = case.batch / case.size(case.sharding.attention_rows)
    self._pass = functools.cache(self._pass_seconds)

  @property
  def position_bytes(self) -> float:
    """Bytes of keys and values on a chip for one position of one prompt, in the prefill layout."""
    case = self._prefill.case
    rows = case.batch / case.size(case.sharding.attention_rows)
    return cache_bytes(case, 1) / rows

  def seconds(self, program: str, **sizes: int) -> float:
    """Return the seconds of a program; for a program of steps, of one step."""
    page = self._config.page_size
    if program == 'prefill_chunk':
      return self._pass('prefill', sizes['tokens'], sizes['tokens'] + sizes['read'])
    if program in ('decode_steps', 'speculative_steps'):
      # A shard reads shared pages once for all its rows.
      positions = max(1, round((sizes['read'] + sizes['read_shared']) * page / self._rows))
      if program == 'decode_steps':
        return self._pass('decode', 1, positions)
      draft = sizes['draft']
      drafted = draft * self._pass('draft', 1, positions) if self._draft is not None else 0.0
      return drafted + self._pass('verify', draft + 1, positions + draft)
    if program == 'insert':
      return self._copy_seconds(sizes['positions'])
    if program in ('start_prefill', 'save_blocks'):
      return self._copy_seconds(sizes['blocks'] * self._config.block_size)
    return self._host if program == 'host' else 0.0

  def _pass_seconds(self, phase: str, length: int, context: int) -> float:
    like = {'prefill': self._prefill, 'draft': self._draft}.get(phase) or self._decode
    phase = 'verify' if phase == 'verify' else like.case.phase
    case = dataclasses.replace(like.case, phase=phase, length=length, context=context)
    return cost(case, like.convention, like.efficiency).seconds

  def _copy_seconds(self, positions: int) -> float:
    rate = self._prefill.case.machine.chip.hbm_bandwidth * self._prefill.efficiency.memory
    return 2 * positions * self.position_bytes / rate
