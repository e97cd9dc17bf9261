"""A conversation in turns. The prefix cache avoids prefilling earlier turns again.

chat = engine.chat(max_length=1024)
for token in chat.reply(turn, max_new_tokens=64):
...
"""

from collections.abc import Generator, Iterator, Sequence

from t5x_inference_ext.engine.inputs import check_at_least, check_seeds, check_tokens
from t5x_inference_ext.engine.request import Request
from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.engine.streams import Streams
from t5x_inference_ext.errors import RequestError


class Conversation:
  """The tokens of a conversation. Its keys and values are cached only in the prefix cache.

  A reply continues the whole conversation so far, as one prompt.

  Args:
    streams: Streams that serve the replies.
    vocab_size: V.
    max_length: Maximum number of tokens of the whole conversation.
    bos: First tokens of the conversation: BOS, or none.
    end_ids: Tokens that end a reply.
    adapter: Name of the adapter of all replies; None: the model itself.

  Raises:
    RequestError: A max_length below 1.

  Attributes:
    tokens: All tokens so far, turns and replies, without BOS.
  """

  def __init__(
    self,
    streams: Streams,
    *,
    vocab_size: int,
    max_length: int,
    bos: Sequence[int],
    end_ids: Sequence[int],
    adapter: str | None = None,
  ) -> None:
    check_at_least(1, max_length=max_length)
    self._streams, self._vocab_size = streams, vocab_size
    self._max_length, self._bos, self._end_ids = max_length, tuple(bos), tuple(end_ids)
    self._adapter = adapter
    self.tokens: list[int] = []
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

    Closing the iterator, or the next turn, ends the reply; tokens that the caller has not taken
    from the iterator are then not part of the conversation.

    Args:
      turn: Token ids. An empty turn continues the last reply.
      max_new_tokens: Maximum number of tokens of the reply.
      sampling: How tokens are chosen.
      seed: Seed of the sampling noise, 0 to 2**32 - 1.

    Raises:
      RequestError: More tokens than max_length has room for, or arguments that Engine.generate
        refuses. Raised before anything runs.
    """
    check_tokens('the turn', turn, self._vocab_size)
    check_at_least(1, max_new_tokens=max_new_tokens)
    check_seeds([seed])
    if len(self.tokens) + len(turn) + max_new_tokens > self._max_length:
      raise RequestError(
        f'{len(self.tokens)} tokens so far, {len(turn)} of this turn and {max_new_tokens} new ones '
        f'do not fit into max_length={self._max_length}: begin a new conversation, or one with '
        'a larger max_length'
      )
    if self._last is not None:
      self._last.close()
    tokens = [*self.tokens, *map(int, turn)]
    request = Request(
      (*self._bos, *tokens),
      (seed,),
      max_new_tokens,
      sampling,
      end_ids=self._end_ids,
      cache_reply=True,
      adapter=self._adapter,
    )
    stream = self._streams.open([request])
    self.tokens = tokens

    def reply() -> Generator[int, None, None]:
      with stream:
        for event in stream:
          for token in event.tokens:
            self.tokens.append(token)
            yield token
          if event.finish == 'error':
            raise RequestError(f'the reply ended: {event.error}')

    self._last = reply()
    return self._last
