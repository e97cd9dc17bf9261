"""The passes of the model: prefill, logits and log_probs; cached_passes.py has the others.

Each is a function of weights and tokens, ready for jit. It runs `forward.forward` on every shard of
the mesh (jax.shard_map): embed the tokens, run the layers (block.Layer), then call `finish`, which
differs between the passes.
"""

import dataclasses
from typing import Any

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from t5x_inference_ext.model import cache as kv_cache
from t5x_inference_ext.model.cache import KeysValues, KVCache
from t5x_inference_ext.model.cached_passes import CachedPasses
from t5x_inference_ext.model.embedding import last_positions, unembed
from t5x_inference_ext.model.finite import mark_broken_before
from t5x_inference_ext.model.log_probs import target_log_probs
from t5x_inference_ext.model.weights import Weights
from t5x_inference_ext.sharding.layout import num_shards


@dataclasses.dataclass(frozen=True)
class Model(CachedPasses):
  """The passes of a model on one mesh. It holds no weights, is hashable and is cheap to make."""

  @property
  def prefilling(self) -> 'Model':
    """A copy of this model that uses the prefill layout in both phases, also for its caches."""
    return dataclasses.replace(self, decode_layout=self.prefill_layout)

  def prefill(
    self, weights: Weights, tokens: Int[Array, 'B T'], lengths: Int[Array, ' B'], size: int
  ) -> tuple[Float[Array, 'B V'], KVCache]:
    """Run prompts in one pass, in the prefill layout.

    Args:
      weights: Weights on this model's mesh.
      tokens: [B, T] int32. Model inputs (BOS first), right-padded.
      lengths: [B] int32, at least 1. Number of valid tokens in each row.
      size: S, the positions of the new cache; at least T. For an int8 cache, rounded up to whole
        tiles.

    Returns:
      Logits [B, V] float32 after each row's last token, NaN in a row whose residual stream is not
      finite at one of its tokens; and the cache in the decode layout.

    Raises:
      MeshError: The decode layout cannot split B rows.
    """
    rows, length = tokens.shape
    sharding = self.prefill_sharding(rows, length)
    decode = self.decode_sharding(rows)

    def finish(
      weights: Weights, cache: None, x: jax.Array, kv: KeysValues, lengths: jax.Array
    ) -> tuple[jax.Array, KeysValues]:
      del cache
      x = last_positions(x, lengths, sharding)
      return unembed(self, sharding, weights, x, (), rows)[:, 0], kv

    kv_spec = self.kv_spec(sharding, weights)
    logits, kv = self.on_shards(
      sharding,
      finish,
      weights,
      None,
      inputs=(P(sharding.residual[0]),),
      outputs=(P(self.sampling_axes(rows)), (kv_spec, kv_spec)),
    )(weights, None, self.pad_tokens(tokens, sharding.layout), lengths)
    kv = self.reshard_kv(kv, length, sharding, decode)
    return logits, self.constrained(kv_cache.start(*kv, lengths, size), decode, weights)

  def logits(self, weights: Weights, tokens: Int[Array, 'B T']) -> Float[Array, 'B T V']:
    """Return float32 logits [B, T, V] of the token after each position of model inputs [B, T].

    A row's logits are NaN from the first position on where its residual stream is not finite.
    """
    rows, length = tokens.shape
    sharding = self.prefill_sharding(rows, length)

    def finish(weights: Weights, cache: None, x: jax.Array, kv: KeysValues) -> jax.Array:
      del cache, kv
      x = mark_broken_before(x, sharding.residual[1])
      return unembed(self, sharding, weights, x, sharding.residual[1], rows)

    return self.on_shards(
      sharding, finish, weights, None, inputs=(), outputs=P(self.sampling_axes(rows))
    )(weights, None, self.pad_tokens(tokens, sharding.layout))[:, :length]

  def log_probs(
    self, weights: Weights, tokens: Int[Array, 'B T'], targets: Int[Array, 'B T']
  ) -> Float[Array, 'B T']:
    """Return log p(target | inputs so far) at each position, [B, T] float32; NaN as in `logits`.

    Logits are computed for some positions at a time: the full [B, T, V] is never in memory.

    Args:
      weights: Weights on this model's mesh.
      tokens: [B, T] int32. Model inputs (BOS first).
      targets: [B, T] int32. Target of each position.
    """
    rows, length = tokens.shape
    sharding = self.prefill_sharding(rows, length)
    sampling, shape = self.sampling_axes(rows), self.mesh.shape
    # While logits are computed, they are split over the vocabulary; then they are moved to a split
    # over rows.
    shards = min(num_shards(self.prefill_layout.stored_hidden, shape), num_shards(sampling, shape))
    width = rows * self.config.vocab_size // shards
    position_axes = sharding.residual[1]

    def finish(
      weights: Weights, cache: None, x: jax.Array, kv: KeysValues, targets: jax.Array
    ) -> Any:
      del cache, kv

      def logits(x: jax.Array) -> jax.Array:
        return unembed(self, sharding, weights, x, position_axes, rows)

      x = mark_broken_before(x, position_axes)
      found = target_log_probs(x, targets, logits, position_axes, width)
      assert isinstance(found, jax.Array)  # RankedTokens are returned only with `top`
      return found

    tokens, targets = (self.pad_tokens(ids, sharding.layout) for ids in (tokens, targets))
    return self.on_shards(
      sharding, finish, weights, None, inputs=(P(sampling),), outputs=P(sampling)
    )(weights, None, tokens, targets)[:, :length]
