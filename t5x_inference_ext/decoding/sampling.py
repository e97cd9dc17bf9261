"""Choosing the next token: greedy, temperature, top-k, top-p. A row's choice follows from its own logits and seed."""

import dataclasses

import jax
import jax.numpy as jnp

from t5x_inference_ext.errors import RequestError

SMALLEST = float(jnp.finfo(jnp.float32).tiny)  # below it float32 knows only 0


@dataclasses.dataclass(frozen=True)
class Sampler:
  """How to choose.

  Attributes:
    temperature: 0 is greedy; otherwise logits are divided by it.
    top_k: keep the k most likely tokens; 0 keeps all.
    top_p: of those kept by top_k, keep the fewest most likely whose probabilities (renormalised) reach p; 1 keeps all.

  Raises:
    RequestError: a value outside its range.
  """

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0

  def __post_init__(self):
    if not 0 <= self.temperature < float('inf'):
      raise RequestError(f'temperature must be 0 or more, got {self.temperature}')
    if self.top_k < 0:
      raise RequestError(f'top_k must be 0 (keep all) or more, got {self.top_k}')
    if not 0 < self.top_p <= 1:
      raise RequestError(f'top_p must be above 0 and at most 1, got {self.top_p}')

  def __call__(self, logits: jax.Array, seeds: jax.Array, positions: jax.Array) -> jax.Array:
    """logits [B, V] float32, seeds [B] uint32, positions [B] int32 (of the token chosen) -> tokens [B] int32.

    Ties go to the lowest id. The noise of a row comes from (seed, position) alone, so that neither the rest of the
    batch nor the layout can change it.
    """
    if self.temperature == 0:
      return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # From the largest, so that a temperature near 0 sends all others to -inf and none to infinity.
    logits = logits - jnp.max(logits, axis=-1, keepdims=True)
    logits = self._filter(logits / max(self.temperature, SMALLEST))
    noise = jax.vmap(lambda s, p: jax.random.gumbel(jax.random.fold_in(jax.random.key(s), p), logits.shape[-1:]))
    return jnp.argmax(logits + noise(seeds, positions), axis=-1).astype(jnp.int32)

  def _filter(self, logits):
    """-inf for the tokens that top_k and top_p drop."""
    vocabulary = logits.shape[-1]
    k = min(self.top_k or vocabulary, vocabulary)
    if k == vocabulary and self.top_p == 1:
      return logits
    top, ids = jax.lax.top_k(logits, k)  # [B, k], most likely first, ties in order of id
    if self.top_p < 1:
      probabilities = jax.nn.softmax(top, axis=-1)
      before = jnp.cumsum(probabilities, axis=-1) - probabilities
      top = jnp.where(before < self.top_p, top, -jnp.inf)
    rows = jnp.arange(logits.shape[0])[:, None]
    return jnp.full_like(logits, -jnp.inf).at[rows, ids].set(top)
