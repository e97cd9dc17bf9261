"""Slot refill in T5X: the examples of a batch wait in a queue for decode slots.

T5X compiles one function, its step for a batch. Here that step runs on the host, with concrete
arrays, and calls the package's own compiled programs. The batch size is the number of waiting
examples; Refill.slots is the number of rows decoded together.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

from absl import logging
import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from t5x_inference_ext.checkpoints import Checkpoint
from t5x_inference_ext.checkpoints.adapters.adapter import Adapter
from t5x_inference_ext.checkpoints.adapters.load import load_adapters
from t5x_inference_ext.engine import scheduler_config
from t5x_inference_ext.engine.adapters import AdapterNames, read_adapters
from t5x_inference_ext.engine.executor import DeviceExecutor
from t5x_inference_ext.engine.open_drafter import Drafters
from t5x_inference_ext.engine.request import Request
from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.engine.scheduler import Scheduler
from t5x_inference_ext.engine.serve import serve
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.options import is_whole
from t5x_inference_ext.speculation import parse_speculation
from t5x_inference_ext.t5x.decode_options import DecodeOptions
from t5x_inference_ext.t5x.module import weights_from_params
from t5x_inference_ext.t5x.types import Array, Batch, Params, Predictions

_ADAPTER = 'adapter'  # name of the adapter of all predictions


@dataclasses.dataclass(frozen=True)
class Refill:
  """Options of slot refill in T5X.

  Attributes:
    slots: Number of rows decoded together, rounded up to a number that the mesh can split.
    sampling: How tokens are chosen; None: as the options of the model's decode_fn say.
    max_new_tokens: Maximum number of new tokens of each prediction. None: max_decode_steps of the
      model's decode_fn. If that is None too, prompt and prediction may fill the sequence, as in
      T5X.
    chunk: Maximum number of positions of a prompt in one prefill pass; after cached positions up to
      an eighth more.
    budget: Maximum number of prompt tokens prefilled between two decode steps.
    speculate: Drafts that steps check, such as 'ngram:8'; None: none.
    adapter: Path of an adapter of all predictions (docs/adapters.md); None: the model itself.

  Raises:
    RequestError: A number is not whole, or less than 1, or `speculate` names no drafts.
  """

  slots: int = 32
  sampling: SamplingParams | None = None
  max_new_tokens: int | None = None
  chunk: int = 256
  budget: int = 2048
  speculate: str | None = None
  adapter: str | None = None

  def __post_init__(self) -> None:
    for name in ('slots', 'max_new_tokens', 'chunk', 'budget'):
      value = getattr(self, name)
      if name == 'max_new_tokens' and value is None:
        continue
      if not is_whole(value) or value < 1:
        raise RequestError(f'Refill.{name} must be a whole number, 1 or more, got {value!r}')
    if self.speculate is not None:
      parse_speculation(self.speculate)

  def with_defaults(self, options: DecodeOptions) -> 'Refill':
    """Return a copy in which options of a decode_fn replace None."""
    sampling, limit = self.sampling, self.max_new_tokens
    return dataclasses.replace(
      self,
      sampling=sampling or SamplingParams(options.temperature, options.top_k, options.top_p),
      max_new_tokens=options.max_new_tokens if limit is None else limit,
    )


class Predictor:
  """Predicts batches with one scheduler.

  It makes a new scheduler for a batch with longer sequences or other parameters. All of its
  schedulers use one copy of a draft model's weights.

  Args:
    model: Decides mesh and layouts.
    refill: Options; `sampling` must not be None.
    eos_id: Token that ends a prediction.
    bos_id: Token in front of each prompt, where T5X's batches always have 0; None: none.
    checkpoint: The checkpoint that T5X restores; needed by an adapter.

  Raises:
    RequestError: There is an adapter, but no checkpoint.
    CheckpointError: The adapter does not fit the checkpoint.
  """

  def __init__(
    self,
    model: Model,
    refill: Refill,
    eos_id: int,
    bos_id: int | None,
    checkpoint: Checkpoint | None = None,
  ) -> None:
    self._model, self._refill, self._eos_id, self._bos_id = model, refill, eos_id, bos_id
    self._drafters = Drafters(model)
    self._checkpoint, self._adapters = checkpoint, dict[str, Adapter]()
    if refill.adapter is not None:
      if checkpoint is None:
        raise RequestError(
          'Refill.adapter needs the checkpoint of its model: bind InferenceModel.checkpoint'
        )
      self._adapters = read_adapters({_ADAPTER: refill.adapter}, checkpoint)
    self._names = AdapterNames.of(self._adapters, model.config.vocab_size)
    self._scheduler: Scheduler | None = None
    self._params: Params | None = None  # the parameters that the scheduler was made with

  def __call__(
    self,
    params: Params,
    batch: Batch,
    rng: jax.Array | None,
    num_decodes: int,
    return_all_decodes: bool,
  ) -> Predictions:
    """Return T5X's predictions and scores of a batch.

    Scores are sums of log-probabilities under the model's own distribution, as in T5X with
    rescale_log_probs = False.

    Args:
      params: The parameters.
      batch: See ShardedDecoder.predict_batch_with_aux.
      rng: Random key of the samples; None: fixed seeds.
      num_decodes: Number of samples of each prompt.
      return_all_decodes: Whether to return all samples of a prompt, or only the best one.

    Returns:
      Tokens [B, L] int32 and {'scores': [B] float32}. All samples are [B, num_decodes, L] and
      [B, num_decodes], from the worst to the best.
    """
    inputs = np.asarray(batch['decoder_input_tokens'])
    lengths = np.maximum(np.sum(np.asarray(batch['decoder_causal_attention']) != 0, axis=1), 1)
    rows, length = inputs.shape
    seeds = _seeds(rng, rows * num_decodes).reshape(rows, num_decodes)
    requests = [self._request(*row, length) for row in zip(inputs, lengths, seeds)]
    tokens = np.zeros((rows, num_decodes, length), np.int32)
    scores = np.zeros((rows, num_decodes), np.float32)
    done = np.zeros((rows, num_decodes), np.int32)
    for event in serve(self._slots(params, requests, length), requests):
      at = event.request, event.sample
      tokens[at][done[at] : done[at] + len(event.tokens)] = event.tokens
      done[at] += len(event.tokens)
      scores[at] += sum(event.log_probs)
      if event.error:
        logging.warning('Prediction of example %d of the batch ended: %s', at[0], event.error)
    order = np.argsort(scores, axis=1, kind='stable')  # the best is last
    tokens = np.take_along_axis(tokens, order[:, :, None], 1)
    scores = np.take_along_axis(scores, order, 1)
    if return_all_decodes:
      return tokens, {'scores': scores}
    return tokens[:, -1], {'scores': scores[:, -1]}

  def _request(self, inputs: np.ndarray, count: int, seeds: np.ndarray, length: int) -> Request:
    """Return the request of one example.

    Args:
      inputs: [L] int32. BOS and the prompt, then 0.
      count: Number of tokens of BOS and the prompt.
      seeds: [num_decodes] uint32. Seed of each sample.
      length: L.

    Raises:
      RequestError: There is neither a prompt nor BOS.
    """
    limit = length - (count - 1)  # BOS is not part of the sequence
    if self._refill.max_new_tokens is not None:
      limit = min(limit, self._refill.max_new_tokens)
    sampling = self._refill.sampling
    assert sampling is not None
    bos = () if self._bos_id is None else (self._bos_id,)
    tokens = (*bos, *inputs[1:count].tolist())
    if not tokens:
      raise RequestError('an example has an empty prompt, and this model has no BOS to start from')
    adapter = _ADAPTER if self._adapters else None
    seeds_of_row, limit = tuple(seeds.tolist()), int(max(limit, 1))
    return Request(tokens, seeds_of_row, limit, sampling, adapter=adapter)

  def _slots(self, params: Params, requests: Sequence[Request], length: int) -> Scheduler:
    """Return a scheduler for sequences of `length` tokens: the previous one if it is suitable."""
    refill = self._refill
    config = scheduler_config.config_for(
      self._model,
      requests,
      slots=refill.slots,
      end_ids=(self._eos_id,),
      max_length=length + 1 + len(self._names.prompt(_ADAPTER)),
      prefill_chunk=refill.chunk,
      prefill_budget=refill.budget,
      decode_steps=scheduler_config.BATCH_DECODE_STEPS,
      speculate=refill.speculate,
    )
    known = self._params is params and self._scheduler is not None
    if self._scheduler is None or not known or not self._scheduler.config.covers(config):
      model, weights = self._model, weights_from_params(params)
      if self._checkpoint is not None and self._adapters:
        adapters = [*self._adapters.values()]
        weights = load_adapters(adapters, self._checkpoint, model, weights)
      runs = DeviceExecutor(model, weights, config, self._drafters.open(config.speculate))
      self._scheduler = Scheduler(model, weights, config, executor=runs, adapters=self._names)
      self._params = params
    return self._scheduler


class HostStep:
  """T5X's step for a batch, which runs on the host instead of being compiled as a whole.

  Args:
    step: (params, batch, rng, indices, flax_mutables) -> (indices, results).
    mesh: Mesh of the devices. Results are replicated on it, as those of a compiled step.
  """

  def __init__(self, step: Callable[..., tuple[Any, Any]], mesh: Mesh) -> None:
    self._step, self._mesh = step, mesh

  def __call__(
    self, params: Params, batch: Batch, rng: jax.Array, indices: Array, flax_mutables: Any
  ) -> tuple[jax.Array, Any]:
    """Return the indices and the results of a batch.

    Examples that pad the last batch have index -1 and are not predicted. Their results are zeros,
    which T5X drops.
    """
    places = np.asarray(indices)
    real = places >= 0
    batch = {name: np.asarray(value)[real] for name, value in batch.items()}
    _, results = self._step(params, batch, rng, places[real], flax_mutables)

    def whole(x: Array) -> jax.Array:
      x = np.asarray(x)
      padded = np.zeros((len(places), *x.shape[1:]), x.dtype)
      padded[real] = x
      return jax.device_put(padded, NamedSharding(self._mesh, P()))

    return jax.device_put(places, NamedSharding(self._mesh, P())), jax.tree.map(whole, results)


def _seeds(rng: jax.Array | None, count: int) -> np.ndarray:
  """Derive `count` distinct seeds [count] uint32 from a key."""
  if rng is None:
    return np.arange(count, dtype=np.uint32)
  words = np.asarray(rng if rng.dtype == np.uint32 else jax.random.key_data(rng)).ravel().tolist()
  return np.random.SeedSequence(words).generate_state(count)
