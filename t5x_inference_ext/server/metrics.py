"""Prometheus metrics, with vLLM's names so that its dashboards work. All names are defined here."""

from collections.abc import Callable, Iterator
import dataclasses
from typing import Any

import prometheus_client
from prometheus_client import core

from t5x_inference_ext.engine.stats import SchedulerStats
from t5x_inference_ext.server.rates import MeasuredRate

_FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75)
_SECONDS = (*_FAST, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 320, 640)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
# Histogram -> its name, help text and buckets.
_HISTOGRAMS = {
  'first_token': ('vllm:time_to_first_token_seconds', 'Arrival to first token.', _SECONDS),
  'between_tokens': ('vllm:inter_token_latency_seconds', 'Between tokens of a sample.', _SECONDS),
  'latency': ('vllm:e2e_request_latency_seconds', 'Arrival to last token.', _SECONDS),
  'queue': ('vllm:request_queue_time_seconds', 'Arrival to the start of its prefill.', _SECONDS),
  'prefill': ('vllm:request_prefill_time_seconds', 'Start of prefill to first token.', _SECONDS),
  'decode': ('vllm:request_decode_time_seconds', 'First token to last token.', _SECONDS),
  'prompt': ('vllm:request_prompt_tokens', 'Tokens of prompts.', _TOKENS),
  'generation': ('vllm:request_generation_tokens', 'New tokens of samples.', _TOKENS),
}


@dataclasses.dataclass(frozen=True)
class Load:
  """The load of the engine at this moment.

  Attributes:
    slots_used: Slots with a row.
    slots: All slots.
    waiting: Prompts that wait for a slot.
    pages_used: Number of pages in use, without the shared ones.
    pages: All pages of the cache.
    stats: Counters of the scheduler's work.
  """

  slots_used: int
  slots: int
  waiting: int
  pages_used: int
  pages: int
  stats: SchedulerStats


class Metrics:
  """The metrics of one server.

  Args:
    model: Name of the model.
    load: Function that returns the engine's load; called at each scrape.

  Attributes:
    rate: Measured rate of new tokens, in tokens/s.
    first_token_seconds: Mean time to the first token of the last requests; None before any.
  """

  def __init__(self, model: str, load: Callable[[], Load]) -> None:
    self._model, self._load = model, load
    self._registry = prometheus_client.CollectorRegistry()
    label: dict[str, Any] = {'labelnames': ('model_name',), 'registry': self._registry}
    self._histograms = {
      name: prometheus_client.Histogram(full, text, buckets=buckets, **label).labels(model)
      for name, (full, text, buckets) in _HISTOGRAMS.items()
    }
    self._prompt_tokens = prometheus_client.Counter(
      'vllm:prompt_tokens', 'Tokens of prompts that were served.', **label
    ).labels(model)
    self._generation_tokens = prometheus_client.Counter(
      'vllm:generation_tokens', 'New tokens.', **label
    ).labels(model)
    self._finished = prometheus_client.Counter(
      'vllm:request_success',
      'Samples that have ended.',
      labelnames=('model_name', 'finished_reason'),
      registry=self._registry,
    )
    for reason in ('stop', 'length', 'abort', 'error'):
      self._finished.labels(model, reason)
    self._registry.register(_Engine(model, load))
    self.rate = MeasuredRate()
    self.first_token_seconds: float | None = None

  def observe(self, name: str, value: float) -> None:
    """Add a value to a histogram; `name` is a key of _HISTOGRAMS."""
    self._histograms[name].observe(value)

  def began(self, prompt_tokens: int, queue: float, prefill: float) -> None:
    """Count a prompt at its first token, which took `queue` and `prefill` seconds."""
    self._prompt_tokens.inc(prompt_tokens)
    self.observe('prompt', prompt_tokens)
    self.observe('queue', queue)
    self.observe('prefill', prefill)
    seconds = queue + prefill
    self.observe('first_token', seconds)
    before = self.first_token_seconds
    self.first_token_seconds = seconds if before is None else 0.8 * before + 0.2 * seconds

  def made(self, tokens: int) -> None:
    """Count new tokens."""
    self._generation_tokens.inc(tokens)
    self.rate.add(tokens)

  def ended(self, reason: str) -> None:
    """Count a sample that has ended: 'stop', 'length', 'abort' or 'error'."""
    self._finished.labels(self._model, reason).inc()

  def text(self) -> bytes:
    """Return all metrics in Prometheus' text format."""
    return prometheus_client.generate_latest(self._registry)


class _Engine:
  """Prometheus collector of the engine's own counters, read at each scrape."""

  def __init__(self, model: str, load: Callable[[], Load]) -> None:
    self._model, self._load = model, load

  def collect(self) -> Iterator[core.Metric]:
    """Yield the metrics."""
    load = self._load()
    stats = load.stats
    gauges = {
      'vllm:num_requests_running': ('Samples in slots.', load.slots_used),
      'vllm:num_requests_waiting': ('Prompts that wait for a slot.', load.waiting),
      'vllm:kv_cache_usage_perc': (
        'Share of the pages of the cache in use, 0 to 1.',
        load.pages_used / max(load.pages, 1),
      ),
    }
    counters = {
      'vllm:prefix_cache_queries': ('Prompt tokens looked up.', stats.prefixes.query_tokens),
      'vllm:prefix_cache_hits': ('Prompt tokens found.', stats.prefixes.hit_tokens),
      'vllm:num_preemptions': ('Samples that left their slot for others.', stats.preempted),
    }
    if stats.drafts.row_steps:
      drafted, accepted = stats.drafts.drafted, stats.drafts.accepted
      counters |= {
        'vllm:spec_decode_num_draft_tokens': ('Tokens of drafts that were checked.', drafted),
        'vllm:spec_decode_num_accepted_tokens': ('Tokens of drafts that were right.', accepted),
      }
    for name, (text, value) in gauges.items():
      gauge = core.GaugeMetricFamily(name, text, labels=('model_name',))
      gauge.add_metric((self._model,), value)
      yield gauge
    for name, (text, value) in counters.items():
      counter = core.CounterMetricFamily(name, text, labels=('model_name',))
      counter.add_metric((self._model,), value)
      yield counter
