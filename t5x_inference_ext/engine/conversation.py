"""A conversation: turns on one cache, each of which prefills only its own new tokens."""

from collections.abc import Generator, Iterator, Sequence

import jax
import numpy as np

from t5x_inference_ext.engine import programs
from t5x_inference_ext.engine.inputs import check_at_least, check_seeds, check_tokens
from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.engine.sampling_arrays import end_id_array, stack_params
from t5x_inference_ext.engine.scheduler_config import SMALLEST_CHUNK
from t5x_inference_ext.engine.state import RowParams
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.model.weights import Weights
from t5x_inference_ext.sharding.activations import padded_length

REPLY_STEPS = 16  # decode steps between reads of a reply's tokens on the host


class Conversation:
  """All tokens of a conversation so far, and their cache.

    chat = engine.chat(max_length=2048)
    for token in chat.reply(first_turn, max_new_tokens=64):
      ...
    for token in chat.reply(second_turn, max_new_tokens=64):  # prefills only the second turn
      ...

  A reply is the continuation of the whole conversation so far, taken as one prompt.

  Args:
    model: Model of an Engine.
    weights: Weights of an Engine.
    max_length: Most tokens of the whole conversation.
    bos_id: First token of the conversation.
    eos_id: Token that ends a reply; -1 never does.
    chunk: Most positions of a turn in one prefill pass.

  Raises:
    RequestError: A max_length or chunk below 1.

  Attributes:
    tokens: All tokens so far, turns and replies, without BOS.
    prefilled: Positions that prefill passes took so far, padding included.
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
  ) -> None:
    check_at_least(1, max_length=max_length, chunk=chunk)
    self._model, self._weights, self._eos, self._bos = model, weights, eos_id, bos_id
    # The mesh needs at least this many rows. Row 0 is the conversation, the others are unused.
    self._rows = model.padded_batch(1)
    self._chunk = min(chunk, 1 << max_length.bit_length())
    self._max_length = max_length
    self.tokens: list[int] = []
    self.prefilled = 0
    # Turns are prefilled in the decode layout, the layout of the cache, so that no cache is moved.
    mesh = model.mesh.shape
    room = padded_length(model.decode_layout, mesh, self._rows, max_length + self._chunk)
    self._cache = programs.empty_cache(model, weights, self._rows, room)
    self._cached = 0  # positions of the cache that hold BOS and `tokens`
    self._last: Generator[int, None, None] | None = None  # the unfinished reply

  def reply(
    self,
    turn: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: SamplingParams = SamplingParams(),
    seed: int = 0,
  ) -> Iterator[int]:
    """Add a turn, and yield the tokens of the reply as they are made.

    Tokens that the caller has not taken from the iterator are not part of the conversation: closing
    the iterator, or the next turn, ends the reply.

    Args:
      turn: Token ids. An empty turn goes on from where the last reply ended.
      max_new_tokens: Most tokens of the reply.
      sampling: How tokens are chosen.
      seed: Seed of the sampling noise, 0 to 2**32 - 1.

    Raises:
      RequestError: More tokens than max_length has room for, or arguments that Engine.generate
        refuses. Raised before anything runs.
    """
    vocab_size = self._model.config.vocab_size
    check_tokens('the turn', turn, vocab_size)
    check_at_least(1, max_new_tokens=max_new_tokens)
    check_seeds([seed])
    stack_params([sampling], vocab_size)  # checks the ids of stop sequences and biases
    if len(self.tokens) + len(turn) + max_new_tokens > self._max_length:
      raise RequestError(
        f'{len(self.tokens)} tokens so far, {len(turn)} of this turn and {max_new_tokens} new ones '
        f'do not fit into max_length={self._max_length}: begin a new conversation, or one with '
        'a larger max_length'
      )
    if self._last is not None:
      self._last.close()
    # The cache may hold tokens of the last reply that the caller did not take. After an empty turn
    # the last token is run again, for its logits.
    self._cached = min(self._cached, len(self.tokens) + 1)
    self.tokens += map(int, turn)
    self._last = self._reply(max_new_tokens, sampling, seed)
    return self._last

  def _reply(
    self, max_new_tokens: int, sampling: SamplingParams, seed: int
  ) -> Generator[int, None, None]:
    logits = self._prefill()
    count = self._rows
    rows = RowParams(
      stack_params([sampling] * count, self._model.config.vocab_size),
      np.full(count, seed, np.uint32),
      np.full(count, max_new_tokens, np.int32),
      end_id_array(self._eos, count),
      np.zeros(count, np.int32),
    )
    # Only penalties read the conversation's tokens.
    prompts = np.zeros((count, self._max_length + 1 if sampling.penalizes else 1), np.int32)
    if sampling.penalizes:
      prompts[:, 1 : len(self.tokens) + 1] = self.tokens
    lengths = np.full(count, len(self.tokens) + 1, np.int32)
    slots, first = programs.begin_reply(
      self._model, self._cache, logits, *programs.put(self._model, rows, prompts, lengths)
    )
    new, ended = [int(jax.device_get(first).tokens[0])], False
    try:
      while True:
        for token in new:
          self.tokens.append(token)
          yield token
        if ended:
          return
        slots, output = programs.decode_steps(
          self._model,
          slots,
          self._weights,
          *programs.put(self._model, np.int32(REPLY_STEPS), np.asarray(False)),
          most=REPLY_STEPS,
        )
        output = jax.device_get(output)
        made = int(output.counts[0])
        self._cached += made
        new, ended = output.chosen.tokens[:made, 0].tolist(), bool(output.ended[0])
    finally:
      self._cache = slots.cache

  def _prefill(self) -> jax.Array:
    """Prefill all tokens that are not in the cache; return the last logits, [B, V] float32."""
    tokens = [self._bos, *self.tokens]
    self._cached = min(self._cached, len(tokens) - 1)
    while self._cached < len(tokens):
      chunk = tokens[self._cached : self._cached + self._chunk]
      size = min(self._chunk, max(SMALLEST_CHUNK, 1 << (len(chunk) - 1).bit_length()))
      inputs, counts = np.zeros((self._rows, size), np.int32), np.zeros(self._rows, np.int32)
      inputs[0, : len(chunk)], counts[0] = chunk, len(chunk)
      logits, self._cache = programs.prefill_turn(
        self._model,
        self._cache,
        self._weights,
        *programs.put(self._model, np.int32(self._cached), inputs, counts),
      )
      self._cached += len(chunk)
      self.prefilled += size
    return logits
