"""T5X's predictions through decode slots: a batch of the task is the queue, and finished rows make room for the next.

T5X partitions one function, its step for a batch. Here that step runs on the host, with concrete arrays: the model then
drives its own compiled functions, and the batch size is how many examples wait, not how many are decoded together.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from t5x_inference_ext.engine import scheduler_config
from t5x_inference_ext.engine.request import Request
from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.engine.scheduler import Scheduler
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.t5x.module import weights_from_params


@dataclasses.dataclass(frozen=True)
class Refill:
  """How predictions are made on the host.

  Attributes:
    slots: rows decoded together, rounded up to what the mesh takes.
    sampler: how tokens are chosen, in the place of T5X's decode_fn.
    max_new_tokens: the limit of each, or None: prompt and prediction fill the whole sequence, as T5X has it.
    chunk: positions of a prompt that one pass takes.
    budget: prompt tokens between decode steps while rows wait.
  """

  slots: int = 32
  sampling: SamplingParams = SamplingParams()
  max_new_tokens: int | None = None
  chunk: int = 256
  budget: int = 2048

  def __post_init__(self):
    for name in ('slots', 'chunk', 'budget'):
      if getattr(self, name) < 1:
        raise RequestError(f'Refill.{name} must be at least 1, got {getattr(self, name)}')
    if self.max_new_tokens is not None and self.max_new_tokens < 1:
      raise RequestError(f'Refill.max_new_tokens must be at least 1, got {self.max_new_tokens}')


def is_concrete(*trees: Any) -> bool:
  """Whether these are arrays, not what jax traces functions with."""
  return not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(trees))


class Predictor:
  """Predicts batches, with one set of slots and one shared beginning for all of them: the first batch's. Batches of longer
  sequences have new ones made.

  Args:
    model: decides mesh and layouts.
    refill: the options.
    eos_id: ends a prediction.
    inputs_length: of the task's inputs, where they are trimmed to it; None: of the whole sequence.
  """

  def __init__(self, model: Model, refill: Refill, eos_id: int, inputs_length: int | None):
    self._model, self._refill, self._eos, self._inputs = model, refill, eos_id, inputs_length
    self._scheduler, self._made_for = None, None

  def __call__(
    self,
    params: Any,
    batch: Mapping[str, Any],
    rng: jax.Array | None,
    num_decodes: int,
    return_all_decodes: bool,
  ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """As T5X's predict_batch_with_aux: tokens [B, L] and scores [B], or [B, num_decodes, L] and [B, num_decodes].

    Scores are sums of log-probabilities under the model's own distribution (T5X's rescale_log_probs = False).
    """
    inputs = np.asarray(batch['decoder_input_tokens'])
    lengths = np.maximum(np.sum(np.asarray(batch['decoder_causal_attention']) != 0, axis=1), 1)
    rows, length = inputs.shape
    seeds = _seeds(rng, rows * num_decodes).reshape(rows, num_decodes)
    requests = [self._request(*row, length) for row in zip(inputs, lengths, seeds)]
    tokens = np.zeros((rows, num_decodes, length), np.int32)
    scores = np.zeros((rows, num_decodes), np.float32)
    done = np.zeros((rows, num_decodes), np.int32)
    for event in self._slots(params, requests, length).run(requests):
      at = event.request, event.sample
      tokens[at][done[at] : done[at] + len(event.tokens)] = event.tokens
      done[at] += len(event.tokens)
      scores[at] += sum(event.log_probs)
    order = np.argsort(scores, axis=1, kind='stable')  # the best is last
    tokens, scores = (
      np.take_along_axis(tokens, order[:, :, None], 1),
      np.take_along_axis(scores, order, 1),
    )
    return (
      (tokens, {'scores': scores})
      if return_all_decodes
      else (tokens[:, -1], {'scores': scores[:, -1]})
    )

  def _request(self, inputs, count, seeds, length) -> Request:
    limit = length - (count - 1)  # BOS is not of the sequence
    if self._refill.max_new_tokens is not None:
      limit = min(limit, self._refill.max_new_tokens)
    return Request(
      tuple(inputs[:count].tolist()),
      tuple(seeds.tolist()),
      int(max(limit, 1)),
      self._refill.sampling,
    )

  def _slots(self, params, requests, length) -> Scheduler:
    if self._made_for is None or self._made_for[0] is not params or self._made_for[1] < length:
      refill = self._refill
      prompt = length if self._inputs is None else self._inputs + 1
      weights = weights_from_params(params)
      config, shared = scheduler_config.config_for(
        self._model,
        requests,
        slots=refill.slots,
        eos_id=self._eos,
        prompt_size=prompt,
        cache_size=length + 1,
        prefill_chunk=refill.chunk,
        prefill_budget=refill.budget,
      )
      self._scheduler, self._made_for = (
        Scheduler(self._model, weights, config, shared),
        (params, length),
      )
    return self._scheduler


class HostStep:
  """T5X's step for a batch, run as it is: not compiled as a whole.

  Args:
    step: (params, batch, rng, indices, flax_mutables) -> (indices, results).
    mesh: where results go, whole on every device, as T5X takes them from a compiled step.
  """

  def __init__(self, step: Callable, mesh: Mesh):
    self._step, self._mesh = step, mesh

  def __call__(self, params, batch, rng, indices, flax_mutables):
    """Examples that pad the last batch, with index -1, are not predicted: their results are zeros, which T5X drops."""
    places = np.asarray(indices)
    real = places >= 0
    batch = {name: np.asarray(value)[real] for name, value in batch.items()}
    _, results = self._step(params, batch, rng, places[real], flax_mutables)

    def whole(x):
      x = np.asarray(x)
      padded = np.zeros((len(places), *x.shape[1:]), x.dtype)
      padded[real] = x
      return jax.device_put(padded, NamedSharding(self._mesh, P()))

    return jax.device_put(places, NamedSharding(self._mesh, P())), jax.tree.map(whole, results)


def _seeds(rng, count: int) -> np.ndarray:
  """Seeds [count] uint32 of a key, different for each."""
  if rng is None:
    return np.arange(count, dtype=np.uint32)
  words = np.asarray(rng if rng.dtype == np.uint32 else jax.random.key_data(rng)).ravel().tolist()
  return np.random.SeedSequence(words).generate_state(count)
