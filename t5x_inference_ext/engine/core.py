"""An engine's scheduler, kept with its programs, caches and draft model from call to call."""

from collections.abc import Sequence
import threading
from typing import Any

from t5x_inference_ext.engine import scheduler_config
from t5x_inference_ext.engine.adapters import NO_ADAPTERS, AdapterNames
from t5x_inference_ext.engine.executor import DeviceExecutor
from t5x_inference_ext.engine.open_drafter import Drafters
from t5x_inference_ext.engine.request import Request
from t5x_inference_ext.engine.scheduler import Scheduler
from t5x_inference_ext.engine.scheduler_config import SchedulerConfig
from t5x_inference_ext.engine.streams import Streams
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.model.weights import Weights
from t5x_inference_ext.text.vocabulary import Vocabulary


class Core:
  """Makes a scheduler on first use, and replaces it only if it can't serve the next requests.

  All schedulers use one copy of a draft model's weights.

  Args:
    model: Decides mesh and layouts.
    weights: Weights on that mesh.
    vocabulary: Vocabulary of the model, or None.
    adapters: Names of the adapters beside the weights.
  """

  def __init__(
    self,
    model: Model,
    weights: Weights,
    vocabulary: Vocabulary | None,
    adapters: AdapterNames = NO_ADAPTERS,
  ) -> None:
    self._model, self._weights, self._vocabulary = model, weights, vocabulary
    self._drafters = Drafters(model)
    self._adapters = adapters
    self._lock = threading.Lock()
    self._streams: Streams | None = None

  def streams(self, requests: Sequence[Request] = (), **options: Any) -> Streams:
    """Return the streams of a scheduler that can serve `requests`; options as for `config_for`.

    A replaced scheduler still finishes its requests.

    Raises:
      UserError: An option out of its range, an adapter that is not loaded, or a draft model that
        can't be used.
    """
    requests = [self._adapters.prompted(request) for request in requests]
    config = scheduler_config.config_for(self._model, requests, **options)
    with self._lock:
      if self._streams is None or not self._streams.scheduler.config.covers(config):
        self._streams = Streams(self._scheduler(config))
      return self._streams

  def _scheduler(self, config: SchedulerConfig) -> Scheduler:
    model, weights = self._model, self._weights
    runs = DeviceExecutor(model, weights, config, self._drafters.open(config.speculate))
    return Scheduler(
      model, weights, config, vocabulary=self._vocabulary, executor=runs, adapters=self._adapters
    )
