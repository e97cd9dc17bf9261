"""A conversation: turns on one cache, each of which prefills its own new tokens alone."""

from collections.abc import Generator, Iterator, Sequence

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from t5x_inference_ext.engine import programs
from t5x_inference_ext.engine.inputs import check_at_least, check_seeds, check_tokens
from t5x_inference_ext.engine.sampling import SamplingParams, stack_params
from t5x_inference_ext.engine.scheduler_config import SMALLEST_CHUNK
from t5x_inference_ext.engine.state import RowParams
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.model.weights import Weights
from t5x_inference_ext.sharding.activations import padded_length

REPLY_STEPS = 16


class Conversation:
  """What was said so far, token for token, and its cache.

    chat = engine.chat(max_length=2048)
    for token in chat.reply(first_turn, max_new_tokens=64):
      ...
    for token in chat.reply(second_turn, max_new_tokens=64):   # prefills the second turn alone

  A reply is what the whole conversation so far, as one prompt, would be continued with.

  Args:
    model, weights: of an Engine.
    max_length: tokens of the whole conversation, at most.
    bos_id: begins it.
    eos_id: ends a reply; -1 never does.
    chunk: positions of a turn that one pass takes.

  Raises:
    RequestError: a max_length or chunk below 1.

  Attributes:
    tokens: all so far, turns and replies, without BOS.
    prefilled: positions that prefill passes took so far, padding included.
  """

  def __init__(
    self,
    model: Model,
    weights: Weights,
    *,
    max_length: int,
    bos_id: int,
    eos_id: int,
    chunk: int = 256,
  ):
    check_at_least(1, max_length=max_length, chunk=chunk)
    self._model, self._weights, self._eos, self._bos = model, weights, eos_id, bos_id
    self._rows = model.padded_batch(1)  # as few as the mesh takes; the first is the conversation
    self._chunk = min(chunk, 1 << max_length.bit_length())
    self._max_length = max_length
    self.tokens: list[int] = []
    self.prefilled = 0
    # The cache stays where decode steps have it, and turns run there too: nothing moves between them.
    room = padded_length(
      model.decode_layout, model.mesh.shape, self._rows, max_length + self._chunk
    )
    self._cache = programs.empty_cache(model, weights, self._rows, room)
    self._cached = 0  # positions of it that hold BOS and `tokens`
    self._last: Generator | None = None  # reply: while it is being made, it has the cache

  def reply(
    self,
    turn: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: SamplingParams = SamplingParams(),
    seed: int = 0,
  ) -> Iterator[int]:
    """Adds a turn and yields the reply, token by token, as it is made.

    What is not taken of it is not part of the conversation: closing the iterator ends the reply there, and so does the
    next turn.

    Args:
      turn: token ids; empty goes on from where the last reply ended.
      max_new_tokens, sampler, seed: as Engine.generate's.

    Raises:
      RequestError: more tokens than max_length has room for, or what generate refuses; before anything runs.
    """
    check_tokens('the turn', turn, self._model.config.vocab_size)
    check_at_least(1, max_new_tokens=max_new_tokens)
    check_seeds([seed])
    stack_params([sampling], self._model.config.vocab_size)  # checks ids
    if len(self.tokens) + len(turn) + max_new_tokens > self._max_length:
      raise RequestError(
        f'{len(self.tokens)} tokens so far, {len(turn)} of this turn and {max_new_tokens} new ones do not fit into '
        f'max_length={self._max_length}: begin another conversation, or one of more tokens'
      )
    if self._last is not None:
      self._last.close()
    # Of a reply that was not taken to its end the cache may hold more; of a turn without tokens the last one is run again.
    self._cached = min(self._cached, len(self.tokens) + 1)
    self.tokens += map(int, turn)
    self._last = self._reply(max_new_tokens, sampling, seed)
    return self._last

  def _reply(self, max_new_tokens, sampling, seed):
    logits = self._prefill()
    count = self._rows
    rows = RowParams(
      stack_params([sampling] * count, self._model.config.vocab_size),
      np.full(count, seed, np.uint32),
      np.full(count, max_new_tokens, np.int32),
      self._eos,
    )
    prompts = np.zeros((count, self._max_length + 1 if sampling.penalizes else 1), np.int32)
    if sampling.penalizes:
      prompts[:, 1 : len(self.tokens) + 1] = self.tokens
    lengths = np.full(count, len(self.tokens) + 1, np.int32)
    slots, first = programs.begin_reply(
      self._model, self._cache, logits, *self._put(rows, prompts, lengths)
    )
    first = jax.device_get(first)
    new, ended, told = [int(first.tokens[0])], False, None
    try:
      while True:
        for token in new:
          self.tokens.append(token)
          yield token
        if ended:
          return
        slots, told = programs.decode_steps(
          self._model,
          slots,
          self._weights,
          *self._put(np.int32(REPLY_STEPS), np.asarray(False)),
          most=REPLY_STEPS,
        )
        told = jax.device_get(told)
        self._cached += int(told.counts[0])
        new, ended = told.chosen.tokens[: told.counts[0], 0].tolist(), bool(told.ended[0])
    finally:
      self._cache = slots.cache

  def _prefill(self):
    """Brings the cache up to the last token; the logits after it."""
    everything = [self._bos, *self.tokens]
    self._cached = min(self._cached, len(everything) - 1)
    logits = None
    while self._cached < len(everything):
      some = everything[self._cached : self._cached + self._chunk]
      size = min(self._chunk, max(SMALLEST_CHUNK, 1 << (len(some) - 1).bit_length()))
      tokens, counts = np.zeros((self._rows, size), np.int32), np.zeros(self._rows, np.int32)
      tokens[0, : len(some)], counts[0] = some, len(some)
      logits, self._cache = programs.prefill_turn(
        self._model, self._cache, self._weights, *self._put(np.int32(self._cached), tokens, counts)
      )
      self._cached += len(some)
      self.prefilled += size
    return logits

  def _put(self, *arrays):
    return jax.device_put(arrays, NamedSharding(self._model.mesh, P()))
