"""Predicted times of the scheduler's programs, for the simulator."""

import dataclasses
import functools

from t5x_inference_ext.engine.scheduler_config import SchedulerConfig
from t5x_inference_ext.planner.costs import PassCost, cost
from t5x_inference_ext.planner.work import cache_bytes


class PlannedPrices:
  """Times of programs by the planner's model. See simulator.prices.Prices.

  A chunk of prompts and a decode step are passes of the cost model. Insertions and block copies
  take the time to read and write their keys and values in memory. Starting a group takes no time.
  The host's own time is an argument.

  Args:
    prefill: Cost of a chunk of any length, with as many rows as a group has.
    decode: Cost of a decode step of all slots, at any context.
    config: Sizes of the scheduler.
    host_seconds: The host's own work in a step of the scheduler.
  """

  def __init__(
    self, prefill: PassCost, decode: PassCost, config: SchedulerConfig, host_seconds: float
  ) -> None:
    self._prefill, self._decode, self._config = prefill, decode, config
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
    """Return the seconds that a program takes; `decode_steps` counts one step of it."""
    page = self._config.page_size
    if program == 'prefill_chunk':
      return self._pass('prefill', sizes['tokens'], sizes['tokens'] + sizes['read'])
    if program == 'decode_steps':
      # A shard reads shared pages once for all its rows.
      positions = (sizes['read'] + sizes['read_shared']) * page / self._rows
      return self._pass('decode', 1, max(1, round(positions)))
    if program == 'insert':
      return self._copy_seconds(sizes['positions'])
    if program in ('start_prefill', 'save_blocks'):
      return self._copy_seconds(sizes['blocks'] * self._config.block_size)
    return self._host if program == 'host' else 0.0

  def _pass_seconds(self, phase: str, length: int, context: int) -> float:
    like = self._prefill if phase == 'prefill' else self._decode
    case = dataclasses.replace(like.case, length=length, context=context)
    return cost(case, like.convention, like.efficiency).seconds

  def _copy_seconds(self, positions: int) -> float:
    rate = self._prefill.case.machine.chip.hbm_bandwidth * self._prefill.efficiency.memory
    return 2 * positions * self.position_bytes / rate
