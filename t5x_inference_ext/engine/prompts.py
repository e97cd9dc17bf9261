"""Prompts that are being prefilled, in the prefill layout, on the devices.

engine/programs.py compiles the functions, and engine/prefilling.py calls them.
"""

import dataclasses

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from t5x_inference_ext.model.cache import KVCache
from t5x_inference_ext.model.chunks import constrain_cache, empty_cache
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.model.weights import Weights
from t5x_inference_ext.sharding import activations


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrefillState:
  """R prompts that are being prefilled, in the prefill layout.

  Attributes:
    cache: Keys and values of the prompts' tokens so far.
    logits: [R, V] float32. Logits after each prompt's last token so far.
    broken: [R] bool. Whether one of the prompt's tokens so far gave values that are not finite.
  """

  cache: KVCache
  logits: jax.Array
  broken: jax.Array


def prompt_room(model: Model, rows: int, length: int) -> int:
  """Return the number of cache positions for a chunk of `length`, padded for the prefill layout."""
  return activations.padded_length(model.prefill_layout, model.mesh.shape, rows, length)


def empty_prefill(model: Model, weights: Weights, rows: int, size: int) -> PrefillState:
  """Return a prefill state without prompts.

  Args:
    model: Decides mesh and layouts.
    weights: Weights, for their shapes and shardings.
    rows: R, prompts that are prefilled together.
    size: Cache positions of each prompt.
  """
  logits = jnp.zeros((rows, model.config.vocab_size), jnp.float32)
  cache = empty_cache(model.prefilling, weights, rows, size)
  return _prefill_state(model, cache, logits, jnp.zeros(rows, bool))


def _prefill_state(
  model: Model, cache: KVCache, logits: jax.Array, broken: jax.Array
) -> PrefillState:
  # Logits get the same sharding in every call: a different one would recompile their consumer.
  spec = P(model.sampling_axes(len(logits)))
  logits = lax.with_sharding_constraint(logits, NamedSharding(model.mesh, spec))
  whole = NamedSharding(model.mesh, P())
  return PrefillState(cache, logits, lax.with_sharding_constraint(broken, whole))


def start_prefill(model: Model, prompts: PrefillState, weights: Weights) -> PrefillState:
  """Reset the state for new prompts."""
  cache = dataclasses.replace(prompts.cache, lengths=jnp.zeros_like(prompts.cache.lengths))
  cache = constrain_cache(model.prefilling, cache, weights)
  return _prefill_state(model, cache, prompts.logits, jnp.zeros_like(prompts.broken))


def prefill_chunk(
  model: Model,
  prompts: PrefillState,
  weights: Weights,
  tokens: jax.Array,
  counts: jax.Array,
  read: int | None = None,
) -> PrefillState:
  """Run the next tokens of the prompts.

  Args:
    model: Decides mesh and layouts.
    prompts: State of the prompts.
    weights: Weights on the mesh.
    tokens: [R, T] int32. The next tokens of each prompt, right-padded.
    counts: [R] int32. Number of valid tokens in each row of `tokens`; 0 leaves a prompt as it is.
    read: Number of cached positions that attention reads, from the first on. The caller must ensure
      that no prompt has more. None: all.
  """
  logits, cache = model.prefilling.prefill_chunk(weights, prompts.cache, tokens, counts, read=read)
  logits = jnp.where(counts[:, None] > 0, logits, prompts.logits)
  # Values that are not finite were replaced in the cache, so later chunks look sound. The mark
  # stays, so that the row ends with an error.
  broken = prompts.broken | jnp.any(jnp.isnan(logits), axis=1)
  logits = jnp.where(broken[:, None], jnp.nan, logits)
  return _prefill_state(model, cache, logits, broken)
