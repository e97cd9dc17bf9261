"""Check golden tokens that the scheduler serves, with its pages, chunks and slots."""

import time
from typing import Any

import jax
import numpy as np

from t5x_inference_ext.checkpoints import Checkpoint
from t5x_inference_ext.engine.engine import Engine
from t5x_inference_ext.engine.request import Sample
from t5x_inference_ext.runs.selfcheck.golden import Goldens


def check_serving(
  checkpoint: Checkpoint,
  mesh: jax.sharding.Mesh,
  goldens: Goldens,
  *,
  dtype: str,
  cache: str,
  prefill_layout: str,
  decode_layout: str,
) -> dict[str, Any]:
  """Serve the golden prompts twice; return the results, JSON-ready.

  In float32 all tokens must be the golden ones. Other dtypes round differently, so the result for
  them is only the share of equal tokens.

  Args:
    checkpoint: The bundled model, with weights of a dtype that `goldens` has.
    mesh: The devices.
    goldens: Prompts and tokens.
    dtype: Dtype of activations.
    cache: Dtype of the KV cache.
    prefill_layout: Layout of prefill.
    decode_layout: Layout of decode steps.
  """
  wanted = goldens.tokens[checkpoint.weights]
  begin = time.perf_counter()
  engine = Engine.load(
    checkpoint,
    mesh=mesh,
    dtype=dtype,
    cache=cache,
    prefill_layout=prefill_layout,
    decode_layout=decode_layout,
  )
  loaded = time.perf_counter()
  exact = dtype == cache == 'float32'
  with jax.default_matmul_precision('highest' if exact else 'default'):
    _serve(engine, goldens.prompts, len(wanted[0]))
    compiled = time.perf_counter()
    samples = _serve(engine, goldens.prompts, len(wanted[0]))
  end = time.perf_counter()
  equal = np.equal([sample.tokens for sample in samples], wanted)
  return {
    'weights': checkpoint.weights,
    'dtype': dtype,
    'cache': cache,
    'prefill_layout': prefill_layout,
    'decode_layout': decode_layout,
    'golden': exact,
    'equal_share': float(np.mean(equal)),
    'different_rows': np.flatnonzero(~equal.all(axis=1)).tolist(),
    'load_seconds': loaded - begin,
    'compile_seconds': compiled - loaded - (end - compiled),
    'tokens_per_second': equal.size / (end - compiled),
  }


def _serve(engine: Engine, prompts: list[list[int]], limit: int) -> list[Sample]:
  options = dict(max_new_tokens=limit, eos_id=-1, share=False, page_reads=2)
  found = engine.complete(prompts, **options)
  return [samples[0] for samples in found]
