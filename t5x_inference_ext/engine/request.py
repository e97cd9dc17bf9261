"""The engine's inputs and outputs: requests, their handles, events, finished samples."""

from collections.abc import Collection, Hashable, Sequence
import dataclasses
import enum
from typing import Literal, NamedTuple

from t5x_inference_ext.engine.grammars import GrammarMatcher
from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.text.grammar import Grammar

TopLogProbs = list[tuple[int, float]]

# Error texts of rows that fail: without a grammar, and with one.
NOT_FINITE = "the row's logits are not finite: the weights or the dtype can't represent it"

NO_TOKEN = (
  'every token that the grammar allows is forbidden, by logit_bias, min_new_tokens or as one that '
  'ends rows, or the logits are not finite'
)

# The reason why a sample has ended:
#   eos: it chose a token that ends rows.
#   stop: its tokens end in a stop sequence, its text holds a stop text, or its grammar is satisfied
#     and allows no further token.
#   length: it has as many new tokens as its limit.
#   cancelled: its request was cancelled.
#   error: no next token could be chosen; the event's `error` says why. Other rows go on.
FinishReason = Literal['eos', 'stop', 'length', 'cancelled', 'error']


@dataclasses.dataclass(frozen=True)
class Request:
  """A prompt to continue.

  Attributes:
    tokens: Model inputs: BOS if the model has one, then the prompt.
    seeds: One seed for each sample; the samples share the prompt's prefill.
    limit: Maximum number of new tokens of each sample.
    sampling: How tokens are chosen, and what ends a sample.
    end_ids: Token ids that end a sample; None: those of the scheduler's config.
    stop_texts: Texts that end a sample when its text contains one; the text is cut there. Needs a
      scheduler with a vocabulary.
    text: Whether events carry text. Needs a scheduler with a vocabulary.
    top_log_probs: How many of the most likely tokens are returned with each token.
    salt: Only requests with equal salts, and equal adapters, share cached prefixes. It names a
      tenant, or whatever else keys and values depend on besides the tokens.
    grammar: Grammar that the new text of each sample must satisfy; None: any text is allowed. Needs
      a scheduler with a vocabulary, and the extra [structured].
    cache_reply: Whether the prefix cache also keeps the new tokens, for a later prompt that begins
      with this prompt and its reply, such as the next turn of a chat.
    adapter: Name of a loaded adapter; None: the model itself. The scheduler puts the adapter's soft
      prompt, if it has one, in front of `tokens`.
  """

  tokens: tuple[int, ...]
  seeds: tuple[int, ...] = (0,)
  limit: int = 64
  sampling: SamplingParams = SamplingParams()
  end_ids: tuple[int, ...] | None = None
  stop_texts: tuple[str, ...] = ()
  text: bool = False
  top_log_probs: int = 0
  salt: Hashable = None
  grammar: Grammar | None = None
  cache_reply: bool = False
  adapter: str | None = None


class RequestState(enum.Enum):
  """The state of a request in a scheduler."""

  WAITING = 'waiting'
  PREFILLING = 'prefilling'
  DECODING = 'decoding'
  FINISHED = 'finished'


@dataclasses.dataclass(eq=False)
class Handle:
  """A request in a scheduler, as the caller sees it.

  Attributes:
    index: Number of the request, in the order of submission.
    request: The request.
    state: FINISHED once all of its samples have ended. Preempted samples are WAITING again.
    finish_reasons: Why each sample has ended; None while it has not.
    matchers: A grammar matcher for each sample, in its start state. Empty without a grammar, and in
      processes other than the one where the request was submitted.
  """

  index: int
  request: Request
  matchers: Sequence[GrammarMatcher] = ()
  state: RequestState = RequestState.WAITING
  finish_reasons: list[FinishReason | None] = dataclasses.field(init=False)

  def __post_init__(self) -> None:
    self.finish_reasons = [None] * len(self.request.seeds)


class Event(NamedTuple):
  """New tokens of one sample.

  Attributes:
    request: Index of the request, in the order of submission.
    sample: Index of the sample within its request.
    tokens: New token ids. The last event of a sample may have none.
    log_probs: Log-probability of each new token.
    top: For each new token the most likely tokens at its step, as pairs (id, log-probability);
      empty lists unless the request asked for them.
    finish: Why the sample has ended; None if it goes on.
    text: New text, if the request asked for text or has stop texts: whole characters, without the
      stop text that ended the sample.
    error: The reason for the finish 'error'.
  """

  request: int
  sample: int
  tokens: list[int]
  log_probs: list[float]
  top: list[TopLogProbs]
  finish: FinishReason | None = None
  text: str = ''
  error: str | None = None


class Completion(NamedTuple):
  """A finished row.

  Attributes:
    tokens: Generated ids. If the row ended with EOS, that is the last id.
    score: Sum of the tokens' log-probabilities.
    finish_reason: Why the row ended: 'eos', 'stop', 'length' or 'error'.
    text: The generated text, if the prompt was a text.
  """

  tokens: list[int]
  score: float
  finish_reason: FinishReason = 'length'
  text: str | None = None


def finish_reason(
  tokens: list[int], sampling: SamplingParams, end_ids: Collection[int], failed: bool
) -> FinishReason:
  """Return why a row of a static batch ended.

  Args:
    tokens: All tokens that the row generated.
    sampling: The row's sampling parameters.
    end_ids: Ids that end the row.
    failed: Whether no token could be chosen.
  """
  if failed:
    return 'error'
  if tokens and tokens[-1] in end_ids and len(tokens) > sampling.min_new_tokens:
    return 'eos'
  return 'length' if sampling.before_stop(tokens) == tokens else 'stop'


@dataclasses.dataclass
class Sample:
  """A finished sample of a request, with the log-probabilities of its tokens.

  Attributes:
    tokens: Generated ids, including EOS if the sample ended with it.
    log_probs: Log-probability of each token.
    top: For each token the most likely tokens at its step, as pairs (id, log-probability).
    text: The text, if the request asked for it.
    finish_reason: Why the sample has ended; None if it has not.
    error: The reason for the finish 'error'.
  """

  tokens: list[int] = dataclasses.field(default_factory=list)
  log_probs: list[float] = dataclasses.field(default_factory=list)
  top: list[TopLogProbs] = dataclasses.field(default_factory=list)
  text: str = ''
  finish_reason: FinishReason | None = None
  error: str | None = None

  @property
  def score(self) -> float:
    """Sum of the tokens' log-probabilities."""
    return sum(self.log_probs)


class SampleCollector:
  """Joins events into whole samples."""

  def __init__(self) -> None:
    self._samples: dict[int, list[Sample]] = {}

  def expect(self, request: int, samples: int) -> None:
    """Begin to collect the samples of a request."""
    self._samples[request] = [Sample() for _ in range(samples)]

  def add(self, event: Event) -> list[Sample] | None:
    """Add an event; return the request's samples once all of them have ended, else None."""
    samples = self._samples[event.request]
    sample = samples[event.sample]
    sample.tokens.extend(event.tokens)
    sample.log_probs.extend(event.log_probs)
    sample.top.extend(event.top)
    sample.text += event.text
    sample.finish_reason, sample.error = event.finish, event.error
    if any(each.finish_reason is None for each in samples):
      return None
    return self._samples.pop(event.request)
