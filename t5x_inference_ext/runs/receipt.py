"""The receipt of a request: records everything that determines its tokens, to reproduce them.

A receipt is a JSON object. runs/receipt_file.py reads and checks a receipt's file, and
runs/replay.py runs its request again.

  format, version    RECEIPT_FORMAT and RECEIPT_VERSION
  request            tokens (BOS included), seeds, limit, end_ids, stop_texts, sampling
  weights            dtype of the matrices, and what the identity `sha256` covers
  engine             mesh, prefill_layout, decode_layout, dtype, cache
  versions           of this package, jax and jaxlib, and the kind of chip
  seconds, chips, chip_seconds    from the request's arrival to its end; other rows shared the chips
  samples            for each seed its tokens, score and finish_reason
"""

from collections.abc import Sequence
import dataclasses
import math
from typing import Any

import jax
import jaxlib

from t5x_inference_ext import __version__
from t5x_inference_ext.engine.engine import Engine
from t5x_inference_ext.engine.request import Request, Sample
from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.sharding.mesh import mesh_text

RECEIPT_FORMAT = 't5x_inference_ext receipt'
RECEIPT_VERSION = 1
# Fields of a request that affect its tokens, so receipts record them; then fields that don't.
TOLD = ('tokens', 'seeds', 'limit', 'end_ids', 'stop_texts', 'sampling')
_WITHOUT_EFFECT = ('text', 'top_log_probs', 'salt')


@dataclasses.dataclass(frozen=True)
class EngineSetting:
  """Settings of an engine that affect results; names as in the infer command."""

  mesh: str
  prefill_layout: str
  decode_layout: str
  dtype: str
  cache: str

  @classmethod
  def of(cls, engine: Engine) -> 'EngineSetting':
    """Return the settings of an engine."""
    model = engine.model
    layouts = str(model.prefill_layout), str(model.decode_layout)
    return cls(mesh_text(model.mesh), *layouts, model.dtype, model.cache_dtype)


def check_told(request: Request) -> None:
  """Raise RequestError if a request has an option that a receipt can't record."""
  for field in dataclasses.fields(request):
    known = field.name in (*TOLD, *_WITHOUT_EFFECT)
    if not known and getattr(request, field.name) != field.default:
      raise RequestError(f'a request with {field.name} gets no receipt: it could not be replayed')


def make_receipt(
  engine: Engine, request: Request, samples: Sequence[Sample], seconds: float
) -> dict[str, Any]:
  """Return the receipt of a request that has ended, JSON-ready.

  Args:
    engine: The engine that served it.
    request: The request.
    samples: Its samples, one for each seed.
    seconds: Time from the request's arrival to its end.

  Raises:
    RequestError: The request has an option that a receipt can't record.
  """
  check_told(request)
  checkpoint, chips = engine.checkpoint, engine.model.mesh.size
  covers, sha256 = engine.weights_identity
  return {
    'format': RECEIPT_FORMAT,
    'version': RECEIPT_VERSION,
    'request': {
      'tokens': [*request.tokens],
      'seeds': [*request.seeds],
      'limit': request.limit,
      'end_ids': [*(checkpoint.end_ids if request.end_ids is None else request.end_ids)],
      'stop_texts': [*request.stop_texts],
      'sampling': _sampling(request.sampling),
    },
    'weights': {'dtype': checkpoint.weights, 'covers': covers, 'sha256': sha256},
    'engine': dataclasses.asdict(EngineSetting.of(engine)),
    'versions': versions(),
    'seconds': seconds,
    'chips': chips,
    'chip_seconds': seconds * chips,
    'samples': [
      {
        'tokens': sample.tokens,
        'score': sample.score if math.isfinite(sample.score) else None,
        'finish_reason': sample.finish_reason,
      }
      for sample in samples
    ],
  }


def versions() -> dict[str, str]:
  """Return the versions and the kind of chip, which affect what programs compute."""
  return {
    't5x_inference_ext': __version__,
    'jax': jax.__version__,
    'jaxlib': jaxlib.__version__,
    'chip': jax.devices()[0].device_kind,
  }


def _sampling(params: SamplingParams) -> dict[str, Any]:
  """Return sampling parameters in the form of rows of prompts files."""
  return {
    **dataclasses.asdict(params),
    'stop': [[*sequence] for sequence in params.stop],
    'logit_bias': {
      str(token): bias if math.isfinite(bias) else '-Infinity' for token, bias in params.logit_bias
    },
  }
