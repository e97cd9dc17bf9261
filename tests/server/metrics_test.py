"""The metrics of a server, as Prometheus reads them."""

from t5x_inference_ext.engine.stats import DraftStats, SchedulerStats
from t5x_inference_ext.server.metrics import Load, Metrics

DRAFTED = 'vllm:spec_decode_num_draft_tokens_total{model_name="m"}'
ACCEPTED = 'vllm:spec_decode_num_accepted_tokens_total{model_name="m"}'


def _text(stats):
  return Metrics('m', lambda: Load(1, 4, 0, 3, 16, stats)).text().decode()


def test_drafts_are_counted_where_there_are_any():
  found = _text(SchedulerStats(drafts=DraftStats(row_steps=4, generated=6, drafted=5, accepted=2)))
  assert f'{DRAFTED} 5.0\n' in found and f'{ACCEPTED} 2.0\n' in found
  found = _text(SchedulerStats())
  assert 'vllm:num_preemptions_total' in found and 'spec_decode' not in found
