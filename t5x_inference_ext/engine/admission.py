"""Checks whether a scheduler can serve a request, before it is queued."""

from collections.abc import Sequence
import dataclasses
from typing import NamedTuple

from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.engine.grammars import GrammarMatcher
from t5x_inference_ext.engine.inputs import check_at_least, check_positions, room
from t5x_inference_ext.engine.request import Request
from t5x_inference_ext.engine.scheduler_config import SchedulerConfig
from t5x_inference_ext.engine.slot_params import slot_row
from t5x_inference_ext.engine.slot_table import SlotTable
from t5x_inference_ext.errors import RequestError, printable
from t5x_inference_ext.text.grammar import Grammar
from t5x_inference_ext.text.vocabulary import Vocabulary


class CheckedRequest(NamedTuple):
  """A request that a scheduler can serve.

  Attributes:
    request: The request.
    matchers: One grammar matcher for each sample; empty if the request has no grammar.
  """

  request: Request
  matchers: Sequence[GrammarMatcher]


def admitted(
  request: Request,
  config: SchedulerConfig,
  table: SlotTable,
  model: ModelConfig,
  vocabulary: Vocabulary | None,
) -> Request:
  """Validate a request; return it with `limit` reduced to what the model's positions allow.

  Only learned position embeddings limit the positions.

  Args:
    request: The request.
    config: Sizes of the scheduler.
    table: Slot table of the scheduler, which gives the size of the cache.
    model: The model.
    vocabulary: Vocabulary of the scheduler, or None.

  Raises:
    RequestError: The scheduler's programs can't serve the request.
  """
  length, limit = len(request.tokens), request.limit
  check_positions('the prompt', length, model)
  check_at_least(1, max_new_tokens=limit)
  check_at_least(0, top_log_probs=request.top_log_probs)
  if not request.tokens or not request.seeds:
    raise RequestError(
      f'a request needs at least 1 token and 1 seed, got {length} and {len(request.seeds)}'
    )
  if length + limit - 1 > config.max_length:
    raise RequestError(
      f'{length} tokens, BOS included, and {limit} new ones do not fit into '
      f'max_length={config.max_length}: shorten the prompt, ask for fewer, or raise max_length'
    )
  if not table.fits(length + limit):
    raise RequestError(
      f'{length} tokens, BOS included, and {limit} new ones do not fit into a cache of '
      f'{table.pool.pages - 1} pages of {config.page_size} positions: raise `pages`'
    )
  slot_row(  # only for its checks of the other fields
    request.sampling,
    model.vocab_size,
    seed=0,
    limit=limit,
    end_ids=config.end_ids if request.end_ids is None else request.end_ids,
    top=request.top_log_probs,
    top_width=config.top_log_probs,
  )
  if not isinstance(request.grammar, Grammar | None):
    raise RequestError(f'grammar must be a Grammar, got {printable(request.grammar, 80)}')
  if (request.text or request.stop_texts) and vocabulary is None:
    raise RequestError('text and stop texts need a vocabulary, and this engine has none')
  return dataclasses.replace(request, limit=room(limit, length, model))
