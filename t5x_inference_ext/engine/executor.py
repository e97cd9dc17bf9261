"""Executors, which run a scheduler's programs: the boundary between host and devices.

Everything above an executor is host work. DeviceExecutor runs the programs of engine/programs.py;
simulator/executor.py has one that only counts the time that they would take.
"""

import time
from typing import Any, Protocol

import jax
import numpy as np

from t5x_inference_ext.engine import programs
from t5x_inference_ext.engine.open_drafter import Drafters, OpenDrafter
from t5x_inference_ext.engine.prefix_store import BlockCopies, blocks_for, bytes_per_block
from t5x_inference_ext.engine.prompts import prompt_room
from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.engine.scheduler_config import SchedulerConfig
from t5x_inference_ext.engine.slot_params import slot_row
from t5x_inference_ext.engine.slots import RowPages, SlotPages, StepsOutput
from t5x_inference_ext.engine.state import RowParams
from t5x_inference_ext.engine.token_choice import TokenMasks
from t5x_inference_ext.model.chunks import page_shards
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.model.weights import Weights


class Executor(Protocol):
  """Holds the prompts, slots and prefix store of a scheduler; runs the programs that change them.

  Methods start work and may return before it is done; work is done in the order of the calls.

  Attributes:
    shards: Number of shards that split the rows of the slots' cache.
    blocks: Number of blocks that the prefix store has room for.
    block_bytes: Bytes of one block on each device.
  """

  shards: int
  blocks: int
  block_bytes: int

  def start_prefill(self, copies: tuple[BlockCopies, BlockCopies] | None) -> None:
    """Save blocks of the prompts so far, reset the prompts for a new group, load cached blocks.

    See prefix_store.start_with_blocks for `copies`. It is None if there is no prefix store.
    """

  def prefill_chunk(
    self, tokens: np.ndarray, counts: np.ndarray, read: int, adapters: np.ndarray
  ) -> None:
    """Run the next tokens of the prompts. See prompts.prefill_chunk.

    Here and in the decode steps, `adapters` has the number of each row's adapter; 0: none.
    """

  def insert(
    self,
    place: int,
    slot: int,
    pages: RowPages,
    params: RowParams,
    tokens: np.ndarray,
    length: int,
    generated: int,
    masks: TokenMasks | None,
  ) -> StepsOutput:
    """Put the prompt at `place` into a slot, and choose its next token. See slots.insert."""

  def decode_steps(
    self,
    pages: SlotPages,
    alive: np.ndarray,
    steps: int,
    until_free: bool,
    read: int,
    read_shared: int,
    prices: np.ndarray | None,
    adapters: np.ndarray,
  ) -> StepsOutput:
    """Run decode steps of all slots. See slot_steps.decode_steps.

    With prices, steps may check drafts. See speculative_steps.speculative_steps.
    """

  def save_reply(self, slot: int, copies: BlockCopies) -> None:
    """Copy blocks of a slot's row to the prefix store. See reply_blocks.save_reply."""

  def fetch(self, output: StepsOutput) -> StepsOutput:
    """Wait for a program's output, and return it as numpy arrays."""

  def wait(self) -> None:
    """Wait until all work that was started is done."""

  def settle(self) -> None:
    """Wait like `wait`, but only if prefill must not run beside decode steps on this device."""

  def now(self) -> float:
    """Return the time in seconds, by which programs are timed."""


class DeviceExecutor:
  """Runs the programs on the devices of a model's mesh. See Executor.

  Args:
    model: Decides mesh and layouts.
    weights: Weights on that mesh.
    config: Sizes that the programs are compiled for.
    drafter: Drafter of config.speculate, if it is open already; None: it is opened here.

  Attributes:
    drafter: Makes drafts; None without config.speculate.
    draft_weights: Weights of the drafter; None if it has none.

  Raises:
    UserError: The draft model of the config can't be used.
  """

  def __init__(
    self,
    model: Model,
    weights: Weights,
    config: SchedulerConfig,
    drafter: OpenDrafter | None = None,
  ) -> None:
    self._model, self._weights, self._config = model, weights, config
    self.shards = page_shards(model, config.slots)
    # XLA:CPU runs collectives of many devices on few threads. If two programs run at the same time,
    # their collectives can block each other forever.
    self._one_at_a_time = model.mesh.size > 1 and model.mesh.devices.flat[0].platform == 'cpu'
    self.blocks = self.block_bytes = 0
    self._store: Any = None
    rows, size = config.prefill_rows, config.block_size
    if config.prefix_bytes:
      self.blocks = blocks_for(config.prefix_bytes, model, weights, rows, size)
      self.block_bytes = bytes_per_block(model, weights, rows, size)
    if self.blocks:
      self._store = programs.empty_store(model, weights, rows, self.blocks, size)
    room = prompt_room(model, rows, max(config.max_length, config.later_chunks[-1]))
    self._prompts = programs.empty_prefill(model, weights, rows, room)
    any_row = slot_row(
      SamplingParams(), model.config.vocab_size, seed=0, limit=1, top_width=config.top_log_probs
    )
    self.drafter, self.draft_weights = drafter or Drafters(model).open(config.speculate)
    self._slots = programs.empty_slots(
      model,
      weights,
      any_row,
      config=config,
      shards=self.shards,
      draft_weights=self.draft_weights,
      drafter=self.drafter,
    )

  def start_prefill(self, copies: tuple[BlockCopies, BlockCopies] | None) -> None:
    """Save blocks of the prompts so far, reset the prompts for a new group, load cached blocks."""
    if copies is None:
      self._prompts = programs.start_prefill(self._model, self._prompts, self._weights)
    else:
      self._prompts, self._store = programs.start_with_blocks(
        self._model, self._prompts, self._store, self._weights, *copies
      )

  def prefill_chunk(
    self, tokens: np.ndarray, counts: np.ndarray, read: int, adapters: np.ndarray
  ) -> None:
    """Run the next tokens of the prompts."""
    self._prompts = programs.prefill_chunk(
      self._model, self._prompts, self.weights_for(adapters), tokens, counts, read=read
    )

  def insert(
    self,
    place: int,
    slot: int,
    pages: RowPages,
    params: RowParams,
    tokens: np.ndarray,
    length: int,
    generated: int,
    masks: TokenMasks | None,
  ) -> StepsOutput:
    """Put a prompt into a slot, and choose its next token."""
    return self.on_slots(
      programs.insert,
      self._weights,
      self._prompts,
      np.int32(place),
      np.int32(slot),
      pages,
      params,
      tokens,
      np.int32(length),
      np.int32(generated),
      masks,
      self.draft_weights,
      drafter=self.drafter,
    )

  def decode_steps(
    self,
    pages: SlotPages,
    alive: np.ndarray,
    steps: int,
    until_free: bool,
    read: int,
    read_shared: int,
    prices: np.ndarray | None,
    adapters: np.ndarray,
  ) -> StepsOutput:
    """Run decode steps of all slots."""
    state = self.weights_for(adapters), pages, alive, np.int32(steps), np.bool_(until_free)
    sizes: dict[str, Any] = dict(most=self._config.decode_steps, read=read, read_shared=read_shared)
    if prices is None:
      return self.on_slots(programs.decode_steps, *state, **sizes)
    drafts = prices, self.draft_weights
    return self.on_slots(programs.speculative_steps, *state, *drafts, drafter=self.drafter, **sizes)

  def save_reply(self, slot: int, copies: BlockCopies) -> None:
    """Copy blocks of a slot's row to the prefix store."""
    self._store = programs.save_reply(
      self._model,
      self._store,
      self._weights,
      self._slots,
      np.int32(slot),
      copies,
      prompt_rows=self._config.prefill_rows,
    )
    self.settle()

  def on_slots(self, program: programs.Program, *arguments: Any, **sizes: Any) -> Any:
    """Run a program that returns the slots and an output; return the output.

    Args:
      program: Program of engine/programs.py, a function of model, slots and the other arguments.
      *arguments: Further arguments.
      **sizes: Static arguments.
    """
    self._slots, output = program(self._model, self._slots, *arguments, **sizes)
    return _on_its_way(output) if isinstance(output, tuple) else output  # logits stay

  def weights_for(self, adapters: np.ndarray) -> Weights:
    """Return the weights for rows with these adapters, if any adapter is loaded."""
    return self._weights.for_rows(adapters if self._weights.has_adapters else None)

  def fetch(self, output: Any) -> Any:
    """Wait for a program's output, and return it as numpy arrays."""
    return jax.device_get(output)

  def wait(self) -> None:
    """Wait until all work that was started is done."""
    jax.block_until_ready((self._prompts, self._slots, self._store))

  def settle(self) -> None:
    """Wait like `wait`, but only if prefill must not run beside decode steps on this device."""
    if self._one_at_a_time:
      self.wait()

  def now(self) -> float:
    """Return the machine's time in seconds."""
    return time.perf_counter()


def _on_its_way(output: Any) -> Any:
  """Start to copy an output to the host, so that a later read waits less; return the output."""
  for array in jax.tree.leaves(output):
    if isinstance(array, jax.Array):
      array.copy_to_host_async()
  return output
