"""Choosing the next token: greedy, temperature, top-k, top-p, penalties. A row's choice follows from its own logits, seed
and options alone.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from t5x_inference_ext._moved import renamed
from t5x_inference_ext.engine import selection
from t5x_inference_ext.engine.inputs import is_whole
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.options import check_options, option

SMALLEST = float(jnp.finfo(jnp.float32).tiny)  # below it float32 knows only 0
LARGEST = float(jnp.finfo(jnp.float32).max)  # above it only infinity
MOST_TOKENS = 2**31 - 1  # that an int32 counts
# Rows that keep at most so many tokens are drawn from candidates, found without a look at the others.
MAX_CANDIDATES = 256


@dataclasses.dataclass(frozen=True)
class SamplingParams:
  """How a row chooses its tokens, and what ends it beside EOS and its limit.

  Attributes:
    temperature: 0 is greedy; otherwise logits are divided by it.
    top_k: keep the k most likely tokens; 0 keeps all.
    top_p: of those kept by top_k, keep the fewest most likely whose probabilities (renormalised) reach p; 1 keeps all.
    repetition_penalty: logits of tokens that are in the prompt or were generated are divided by it where positive and
      multiplied where negative; 1 changes none.
    frequency_penalty: is subtracted from a token's logit once for each time that it was generated.
    presence_penalty: is subtracted from the logit of every token that was generated.
    logit_bias: pairs of a token id and what is added to its logit, -inf to forbid it, or a mapping of the one to the other.
    min_new_tokens: EOS can't be chosen, and stop sequences do not count, before so many tokens.
    stop: sequences of token ids: a row ends when what it generated ends in one. Its tokens keep the sequence, as they do
      EOS.

  Penalties and bias come before the temperature. They change greedy choices too.

  Raises:
    RequestError: a value outside its range.
  """

  temperature: float = option(0.0, help='0 takes the most likely token.')
  top_k: int = option(0, help='Sample among the k most likely tokens; 0: all.')
  top_p: float = option(
    1.0, help='Sample among the fewest most likely tokens whose probabilities reach this; 1: all.'
  )
  repetition_penalty: float = option(
    1.0,
    help='Divide positive logits of tokens in the prompt or the output by this, and multiply '
    'negative ones.',
  )
  frequency_penalty: float = option(
    0.0, help="Subtract this from a token's logit once for each time it was generated."
  )
  presence_penalty: float = option(
    0.0, help='Subtract this from the logit of every token that was generated.'
  )
  logit_bias: tuple[tuple[int, float], ...] = option(
    (), help='Numbers added to logits: {"TOKEN ID": NUMBER, ...}; -Infinity forbids a token.'
  )
  min_new_tokens: int = option(
    0, help='Choose no EOS, and count no stop sequence, before so many tokens.'
  )
  stop: tuple[tuple[int, ...], ...] = ()

  def __post_init__(self):
    check_options(self)
    if isinstance(self.logit_bias, Mapping):
      object.__setattr__(self, 'logit_bias', tuple(self.logit_bias.items()))
    for name in ('logit_bias', 'stop'):  # hashable, also as read from JSON
      value = getattr(self, name)
      if not all(isinstance(item, (Sequence, np.ndarray)) for item in value):
        raise RequestError(
          f'{name} must be a sequence of sequences, such as [[5, 6]], got {value!r}'
        )
      object.__setattr__(self, name, tuple(map(tuple, value)))
    if not 0 <= self.temperature <= LARGEST:
      most = f' and at most {LARGEST:.1e}' if self.temperature > LARGEST else ''
      raise RequestError(f'temperature must be 0 or more{most}, got {self.temperature}')
    for name, least in (('top_k', '0 (keep all)'), ('min_new_tokens', '0')):
      if not is_whole(getattr(self, name)) or getattr(self, name) < 0:
        raise RequestError(
          f'{name} must be {least} or more, and a whole number, got {getattr(self, name)!r}'
        )
    if not 0 < self.top_p <= 1:
      raise RequestError(f'top_p must be above 0 and at most 1, got {self.top_p}')
    if not SMALLEST <= self.repetition_penalty <= LARGEST:
      raise RequestError(
        f'repetition_penalty must be above 0 and a float32, got {self.repetition_penalty}'
      )
    for name in ('frequency_penalty', 'presence_penalty'):
      if not -LARGEST <= getattr(self, name) <= LARGEST:
        raise RequestError(f'{name} must be a number and a float32, got {getattr(self, name)}')
    pair = next(
      (p for p in self.logit_bias if len(p) != 2 or not _is_id(p[0]) or not _is_bias(p[1])), None
    )
    if pair is not None:
      raise RequestError(
        'logit_bias must be pairs of a token id and a number (-Infinity forbids a token, and 1e9 makes it '
        f'the choice), got {pair}'
      )
    if not all(_is_id(token) for sequence in self.stop for token in sequence):
      raise RequestError(f'stop must be sequences of token ids, got {self.stop}')
    if not all(self.stop):
      raise RequestError('stop holds an empty sequence: it would end every row at once')

  @property
  def penalizes(self) -> bool:
    return (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) != (1, 0, 0)

  def before_stop(self, tokens: list[int]) -> list[int]:
    """A row's tokens without the stop sequence that they end in, the longest if several match."""
    ends = [len(s) for s in self.stop if tuple(tokens[-len(s) :]) == s]
    return (
      tokens[: len(tokens) - max(ends, default=0)] if len(tokens) >= self.min_new_tokens else tokens
    )

  def __call__(self, logits: jax.Array, seeds: jax.Array, positions: jax.Array) -> jax.Array:
    """logits [B, V] float32, seeds [B] uint32, positions [B] int32 (of the token chosen) -> tokens [B] int32.

    Ties go to the lowest id. What depends on a row's earlier tokens is not in it: see engine.state.
    """
    return sample(logits, stack_params([self] * logits.shape[0], logits.shape[1]), seeds, positions)


def _is_id(value) -> bool:
  return is_whole(value) and value >= 0


def _is_bias(value) -> bool:
  return -LARGEST <= value <= LARGEST or value == -float('inf')


class SamplingFeatures(NamedTuple):
  """What a compiled choice has to be able to do, for all of its rows together.

  Attributes:
    sampled: a row has a temperature.
    candidates: tokens that the rows with a temperature keep by top_k, at most, rounded up to a power of two; 0: more than
      MAX_CANDIDATES.
    limited: a row keeps less than all.
    both: a row has top_k and top_p.
    penalties, least, stop: a row has such options.
  """

  sampled: bool = False
  candidates: int = 0
  limited: bool = False
  both: bool = False
  penalties: bool = False
  least: bool = False
  stop: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingArrays:
  """The samplers of B rows, as arrays.

  Attributes:
    temperature, top_p, repetition_penalty, frequency_penalty, presence_penalty: [B] float32.
    top_k: [B] int32; V where all are kept.
    min_new_tokens: [B] int32.
    bias_ids, bias: [B, N] int32 and float32; unused ids are V.
    stop: [B, N, M] int32, sequences from the right; ANY before their start, NEVER in unused ones.
    plan: what they need, static.
  """

  temperature: jax.Array
  top_k: jax.Array
  top_p: jax.Array
  repetition_penalty: jax.Array
  frequency_penalty: jax.Array
  presence_penalty: jax.Array
  min_new_tokens: jax.Array
  bias_ids: jax.Array
  bias: jax.Array
  stop: jax.Array
  plan: SamplingFeatures = dataclasses.field(metadata=dict(static=True))


ANY, NEVER, NOTHING = (
  -1,
  -2,
  -3,
)  # in stop sequences, and in what is compared with them: no token ids


def stack_params(
  rows: Sequence[SamplingParams], vocabulary: int, like: Sequence[SamplingParams] = ()
) -> SamplingArrays:
  """Rows' samplers as numpy arrays.

  Args:
    rows: one a row.
    vocabulary: V.
    like: others that the arrays' widths and the plan should do for too: so that batches share a compilation.

  Raises:
    RequestError: a logit_bias or stop sequence of ids outside the vocabulary.
  """
  every = {*rows, *like}
  for sampling in every:
    wrong = [
      i
      for i in (*(i for i, _ in sampling.logit_bias), *sum(sampling.stop, ()))
      if not 0 <= i < vocabulary
    ]
    if wrong:
      raise RequestError(
        f'logit_bias or stop holds token {wrong[0]}, outside the vocabulary of {vocabulary}'
      )
  keep = lambda s: min(s.top_k or vocabulary, vocabulary)
  sampled = [s for s in every if s.temperature > 0]
  most = max(map(keep, sampled), default=1)
  plan = SamplingFeatures(
    sampled=bool(sampled),
    candidates=min(vocabulary, 1 << (most - 1).bit_length()) if most <= MAX_CANDIDATES else 0,
    limited=any(keep(s) < vocabulary or s.top_p < 1 for s in sampled),
    both=any(keep(s) < vocabulary and s.top_p < 1 for s in sampled),
    penalties=any(s.penalizes for s in every),
    least=any(s.min_new_tokens for s in every),
    stop=any(s.stop for s in every),
  )
  biases = max(len(s.logit_bias) for s in every)
  stops = max(len(s.stop) for s in every)
  longest = max((len(q) for s in every for q in s.stop), default=0)
  stop = np.full((len(rows), stops, longest), NEVER, np.int32)
  bias_ids, bias = (
    np.full((len(rows), biases), vocabulary, np.int32),
    np.zeros((len(rows), biases), np.float32),
  )
  for i, sampling in enumerate(rows):
    for j, (token, value) in enumerate(sampling.logit_bias):
      bias_ids[i, j], bias[i, j] = token, value
    for j, sequence in enumerate(sampling.stop):
      stop[i, j] = [ANY] * (longest - len(sequence)) + list(sequence)
  field = lambda name: np.asarray([getattr(s, name) for s in rows], np.float32)
  least = np.asarray([min(s.min_new_tokens, MOST_TOKENS) for s in rows], np.int32)
  return SamplingArrays(
    field('temperature'),
    np.asarray([keep(s) for s in rows], np.int32),
    field('top_p'),
    field('repetition_penalty'),
    field('frequency_penalty'),
    field('presence_penalty'),
    least,
    bias_ids,
    bias,
    stop,
    plan,
  )


def sample(
  logits: jax.Array, rows: SamplingArrays, seeds: jax.Array, positions: jax.Array
) -> jax.Array:
  """Tokens [B] int32 of logits [B, V] float32, biased; penalties are not applied here (penalize)."""
  if rows.bias.shape[1]:
    logits = logits.at[jnp.arange(len(logits))[:, None], rows.bias_ids].add(rows.bias, mode='drop')
  if not rows.plan.sampled:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  vocabulary = logits.shape[1]
  seeds, positions = jnp.asarray(seeds), jnp.asarray(positions)
  hot = jnp.asarray(rows.temperature > 0)[:, None]
  # From the largest, so that a temperature near 0 sends all others to -inf and none to infinity.
  scale = jnp.where(hot, jnp.maximum(jnp.asarray(rows.temperature), SMALLEST)[:, None], 1)
  logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / scale
  top_k, top_p = jnp.asarray(rows.top_k), jnp.asarray(rows.top_p)
  if rows.plan.candidates:
    logits, ids = selection.most_likely(logits, rows.plan.candidates)
    noise = jnp.where(hot, selection.gumbel(seeds, positions, ids, vocabulary), 0)
    return selection.draw_from_few(logits, ids, noise, top_k, top_p)
  noise = jnp.where(hot, selection.gumbel_of_all(seeds, positions, vocabulary), 0)
  if not rows.plan.limited:
    return jnp.argmax(logits + noise, axis=-1).astype(jnp.int32)
  return selection.draw_from_all(logits, noise, top_k, top_p, rows.plan.both)


def penalize(
  logits: jax.Array, rows: SamplingArrays, in_prompt: jax.Array, made: jax.Array
) -> jax.Array:
  """Logits [B, V] with the penalties of what is in the prompt, [B, V] bool, and was generated, [B, V] int32 times."""
  repetition, frequency, presence = (
    jnp.asarray(x)[:, None]
    for x in (rows.repetition_penalty, rows.frequency_penalty, rows.presence_penalty)
  )
  repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
  logits = jnp.where(in_prompt | (made > 0), repeated, logits)
  return logits - frequency * made - jnp.where(made > 0, presence, 0)


__getattr__ = renamed(__name__, {'Sampler': 'SamplingParams'})
