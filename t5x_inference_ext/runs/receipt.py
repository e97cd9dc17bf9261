"""Receipts: a record of everything that determines a request's tokens, to reproduce them.

A receipt is a JSON object. runs/receipt_file.py reads and checks a receipt's file, and
runs/replay.py runs its request again.

  format, version    RECEIPT_FORMAT and RECEIPT_VERSION
  request            tokens (BOS included), seeds, limit, end_ids, stop_texts, sampling; with a
                     grammar, its kind and source; with an adapter, its name and CRC-32
  weights            dtype of the matrices, and what the identity `sha256` covers
  engine             mesh, prefill_layout, decode_layout, dtype, cache
  versions           of this package, jax and jaxlib, of llguidance with a grammar, and the kind of
                     chip
  seconds, chips, chip_seconds    from the request's arrival to its end; other rows shared the chips
  samples            for each seed its tokens, score and finish_reason
"""

from collections.abc import Sequence
import dataclasses
import importlib.metadata
import math
from typing import Any

import jax
import jaxlib

from t5x_inference_ext import __version__
from t5x_inference_ext.engine.engine import Engine
from t5x_inference_ext.engine.request import Request, Sample
from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.sharding.mesh import mesh_text

RECEIPT_FORMAT = 't5x_inference_ext receipt'
RECEIPT_VERSION = 1
GRAMMAR_LIBRARY = 'llguidance'
# Fields of a request that affect its tokens. `text`, `top_log_probs` and `salt` do not.
TOLD = ('tokens', 'seeds', 'limit', 'end_ids', 'stop_texts', 'sampling', 'grammar', 'adapter')


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


def make_receipt(
  engine: Engine, request: Request, samples: Sequence[Sample], seconds: float
) -> dict[str, Any]:
  """Return the receipt of a request that has ended, JSON-ready.

  Args:
    engine: The engine that served it.
    request: The request, with its adapter's soft prompt.
    samples: Its samples, one for each seed.
    seconds: Time from the request's arrival to its end.
  """
  checkpoint, chips = engine.checkpoint, engine.model.mesh.size
  covers, sha256 = engine.weights_identity
  grammar, adapter, names = request.grammar, request.adapter, engine.adapters
  return {
    'format': RECEIPT_FORMAT,
    'version': RECEIPT_VERSION,
    'request': {
      'tokens': [*request.tokens[len(names.prompt(adapter)) :]],
      'seeds': [*request.seeds],
      'limit': request.limit,
      'end_ids': [*(checkpoint.end_ids if request.end_ids is None else request.end_ids)],
      'stop_texts': [*request.stop_texts],
      'sampling': _sampling(request.sampling),
      **({} if grammar is None else {'grammar': dataclasses.asdict(grammar)}),
      **({} if adapter is None else {'adapter': [adapter, names.checksums[adapter]]}),
    },
    'weights': {'dtype': checkpoint.weights, 'covers': covers, 'sha256': sha256},
    'engine': dataclasses.asdict(EngineSetting.of(engine)),
    'versions': versions(grammars=grammar is not None),
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


def versions(*, grammars: bool = False) -> dict[str, str]:
  """Return the versions that affect results, and the kind of chip.

  Args:
    grammars: Whether to include the version of llguidance, which must be installed then.
  """
  return {
    't5x_inference_ext': __version__,
    'jax': jax.__version__,
    'jaxlib': jaxlib.__version__,
    **({GRAMMAR_LIBRARY: importlib.metadata.version(GRAMMAR_LIBRARY)} if grammars else {}),
    'chip': jax.devices()[0].device_kind,
  }


def _sampling(params: SamplingParams) -> dict[str, Any]:
  """Return sampling parameters in the form of a prompts file's `sampling`."""
  return {
    **dataclasses.asdict(params),
    'stop': [[*sequence] for sequence in params.stop],
    'logit_bias': {
      str(token): bias if math.isfinite(bias) else '-Infinity' for token, bias in params.logit_bias
    },
  }
