"""The objects that all routes of a server share: driver, limits, metrics, log and state."""

import time
from typing import Any

from t5x_inference_ext import __version__
from t5x_inference_ext.engine.scheduler import Scheduler
from t5x_inference_ext.errors import name_list
from t5x_inference_ext.server.access import Hosts, Keys, read_keys
from t5x_inference_ext.server.admission_queue import WaitingBounds
from t5x_inference_ext.server.api_errors import ApiError, unavailable
from t5x_inference_ext.server.driver import Driver
from t5x_inference_ext.server.metrics import Load, Metrics
from t5x_inference_ext.server.options import ServerOptions
from t5x_inference_ext.server.receipts import MakeReceipt
from t5x_inference_ext.server.request_log import RequestLog
from t5x_inference_ext.server.token_text import TokenTexts
from t5x_inference_ext.server.translation import Translator
from t5x_inference_ext.sharding.mesh import mesh_text

DRAIN_RETRY = 10  # Retry-After of a draining server, in seconds


class Service:
  """The objects that all routes of one server share.

  Args:
    driver: The engine's thread.
    translator: Converts request bodies to engine requests.
    name: Name of the model in requests.
    weights: Dtype of the matrices: 'int8', 'float32', ...
    options: The server's options.
    log: The log of requests.
    make_receipt: Makes receipts.

  Attributes:
    draining: Whether the server refuses new work because it is shutting down.
    answers: The HTTP requests that are being answered.
    began: Time when the server began, in seconds since 1970.
  """

  def __init__(
    self,
    driver: Driver,
    translator: Translator,
    name: str,
    weights: str,
    options: ServerOptions,
    log: RequestLog,
    make_receipt: MakeReceipt,
  ) -> None:
    self.driver, self.translator, self.options = driver, translator, options
    self.name, self.weights = name, weights
    self.log, self.make_receipt = log, make_receipt
    self.bounds = WaitingBounds(options.max_waiting_requests, options.max_waiting_tokens)
    self.metrics = Metrics(name, self.load)
    self.texts = TokenTexts(translator.vocabulary)
    self.keys, self.hosts = Keys(read_keys(options)), Hosts(options)
    self.draining = False
    self.answers: set[Any] = set()
    self._started, self.began = time.monotonic(), int(time.time())

  @property
  def scheduler(self) -> Scheduler:
    """The scheduler."""
    return self.driver.scheduler

  @property
  def models(self) -> tuple[str, ...]:
    """Names that requests can choose: the model's own, then those of adapters."""
    return self.name, *self.translator.adapters.prompts

  def check_open(self) -> None:
    """Raise ApiError if the server accepts no new work."""
    if self.draining:
      raise unavailable('the server is shutting down: try another one', 'draining', DRAIN_RETRY)
    if self.driver.error is not None:
      raise unavailable(f'the engine has stopped: {self.driver.error}', 'engine_dead')

  def check_model(self, name: str | None) -> None:
    """Raise ApiError if a request asks for another model. Adapters are asked for as models."""
    if name is not None and name not in self.models:
      known = name_list(map(repr, self.models), len(self.models))
      raise ApiError(
        404,
        f'there is no model {name[:60]!r}: this server has {known}',
        param='model',
        code='model_not_found',
      )

  def load(self) -> Load:
    """Return the engine's current load."""
    scheduler = self.scheduler
    used, pages = scheduler.pages
    slots = scheduler.rows
    busy = sum(row is not None for row in slots)
    return Load(busy, len(slots), self.bounds.waiting, used, pages, scheduler.stats)

  def status(self) -> dict[str, Any]:
    """Return the engine's state for the status page, JSON-ready."""
    load, model = self.load(), self.scheduler.model
    dead = self.driver.error is not None
    return {
      'state': 'dead' if dead else 'draining' if self.draining else 'ready',
      'error': self.driver.error,
      'model': self.name,
      'version': __version__,
      'uptime_seconds': time.monotonic() - self._started,
      'slots': {'used': load.slots_used, 'total': load.slots},
      'waiting': load.waiting,
      'tokens_per_second': self.metrics.rate.per_second,
      'time_to_first_token_seconds': self.metrics.first_token_seconds,
      'prefixes': {'queries': load.stats.prefixes.queries, 'hits': load.stats.prefixes.hits},
      'pages': {'used': load.pages_used, 'total': load.pages},
      'mesh': mesh_text(model.mesh),
      'layouts': {'prefill': str(model.prefill_layout), 'decode': str(model.decode_layout)},
      'dtype': model.dtype,
      'weights': self.weights,
      'cache': model.cache_dtype,
      'max_length': self.translator.max_length,
      'max_logprobs': self.scheduler.config.top_log_probs,
      'chat': self.translator.settings.chat is not None,
    }
