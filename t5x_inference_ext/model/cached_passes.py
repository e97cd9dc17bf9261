"""The passes that run new tokens after those in a cache, in the decode layout.

They run one token per row, a token and its draft, or a chunk. See transformer.py.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.model.best_tokens import BestTokens, best_tokens
from t5x_inference_ext.model.cache import KeysValues, KVCache
from t5x_inference_ext.model.embedding import last_positions, local_logits, unembed, whole_rows
from t5x_inference_ext.model.finite import mark_broken_before
from t5x_inference_ext.model.forward import Finish, forward
from t5x_inference_ext.model.pages import AnyCache, append_tokens
from t5x_inference_ext.model.shardings import ShardedModel
from t5x_inference_ext.model.weights import Weights
from t5x_inference_ext.sharding.activations import ActivationSharding


@dataclasses.dataclass(frozen=True)
class CachedPasses(ShardedModel):
  """The passes of a model that start from a cache. See transformer.Model, which has all passes."""

  def decode_step(
    self, weights: Weights, cache: AnyCache, tokens: Int[Array, ' B']
  ) -> tuple[Float[Array, 'B V'], AnyCache]:
    """Run one token per row, in the decode layout.

    Args:
      weights: Weights on this model's mesh.
      cache: KVCache or PagedCache with room for one more position in each row.
      tokens: [B] int32. The next token of each row.

    Returns:
      Logits [B, V] float32, NaN in a row whose residual stream is not finite; and the cache with
      the token in it.
    """
    logits, cache = self.decode_locally(weights, cache, tokens)
    return self.whole_logits(logits), cache

  def decode_greedily(
    self, weights: Weights, cache: AnyCache, tokens: Int[Array, ' B']
  ) -> tuple[BestTokens, AnyCache]:
    """Run one token per row as decode_step does, without moving logits between devices.

    Returns:
      The most likely next token of each row, on every device; and the cache with the token in it.
    """
    logits, cache = self.decode_locally(weights, cache, tokens)
    return self.best_of(logits), cache

  def decode_locally(
    self, weights: Weights, cache: AnyCache, tokens: Int[Array, ' B']
  ) -> tuple[Float[Array, 'B v'], AnyCache]:
    """Run one token per row as decode_step does, and leave the logits where they are computed.

    Returns:
      Logits [B, v] float32, v the padded vocabulary, split by local_logits_axes; and the cache with
      the token in it.
    """
    rows = tokens.shape[0]
    spec = self.cache_spec(self.decode_sharding(rows), weights, cache)
    return jax.shard_map(
      self.decode_on_shard,
      mesh=self.mesh,
      in_specs=(self.weight_specs(weights), spec, P()),
      out_specs=(P(*self.local_logits_axes(rows)), spec),
      check_vma=False,
    )(weights, cache, tokens)

  def decode_on_shard(
    self, weights: Weights, cache: AnyCache, tokens: Int[Array, ' B']
  ) -> tuple[Float[Array, 'b v'], AnyCache]:
    """Run decode_locally on one shard, inside shard_map.

    Args:
      weights: This shard's part of the weights.
      cache: This shard's part of the cache.
      tokens: [B] int32. The next token of each row, on every shard.
    """
    rows = tokens.shape[0]
    sharding = self.decode_sharding(rows)

    def finish(
      weights: Weights, cache: AnyCache, x: jax.Array, kv: KeysValues
    ) -> tuple[jax.Array, AnyCache]:
      logits = local_logits(self, sharding, weights, x, (), rows)[:, 0]
      return logits, append_tokens(cache, *kv)

    return forward(self, sharding, finish, None, weights, cache, tokens)

  def whole_logits(self, logits: Float[Array, 'B v']) -> Float[Array, 'B V']:
    """Return the logits of decode_locally as decode_step does: each device has whole rows."""
    rows = logits.shape[0]  # len() takes no symbolic size, of an exported program
    return jax.shard_map(
      lambda x: whole_rows(self, x[:, None], rows)[:, 0],
      mesh=self.mesh,
      in_specs=P(*self.local_logits_axes(rows)),
      out_specs=P(self.sampling_axes(rows)),
      check_vma=False,
    )(logits)

  def best_of(self, logits: Float[Array, 'B v']) -> BestTokens:
    """Return each row's most likely token by the logits of decode_locally, on every device."""
    axes = self.local_logits_axes(len(logits))
    return jax.shard_map(
      lambda x: best_tokens(x, *axes),
      mesh=self.mesh,
      in_specs=P(*axes),
      out_specs=P(),
      check_vma=False,
    )(logits)

  def verify(
    self, weights: Weights, cache: AnyCache, tokens: Int[Array, 'B T'], counts: Int[Array, ' B']
  ) -> tuple[Float[Array, 'B T V'], AnyCache]:
    """Run each row's next token and draft, in the decode layout; return the logits after each.

    A caller rejects tokens by lowering `lengths` of the cache: no pass reads positions beyond.

    Args:
      weights: Weights on this model's mesh.
      cache: KVCache or PagedCache with room for the new tokens in each row.
      tokens: [B, T] int32, right-padded. The next token of each row, then its draft. In pages, T
        must be at most a page's size, also after padding for a layout that splits positions.
      counts: [B] int32. Number of valid tokens in each row. A row with 0 keeps its cache.

    Returns:
      Logits [B, T, V] float32 after each token, NaN from the first token on at which the row's
      residual stream is not finite; and the cache with the valid tokens in it.
    """
    rows, length = tokens.shape
    sharding = self.chunk_sharding(rows, length)

    def finish(
      weights: Weights, cache: AnyCache, x: jax.Array, kv: KeysValues, counts: jax.Array
    ) -> tuple[jax.Array, AnyCache]:
      positions = sharding.residual[1]
      x = mark_broken_before(x, positions)
      logits = unembed(self, sharding, weights, x, positions, rows)
      return logits, append_tokens(cache, *kv, counts)

    spec = self.cache_spec(sharding, weights, cache)
    logits, cache = self.on_shards(
      sharding,
      finish,
      weights,
      spec,
      inputs=(P(sharding.attention_rows),),
      outputs=(P(self.sampling_axes(rows)), spec),
    )(weights, cache, self.pad_tokens(tokens, self.decode_layout), counts)
    return logits[:, :length], cache

  def prefill_chunk(
    self,
    weights: Weights,
    cache: KVCache,
    tokens: Int[Array, 'B T'],
    counts: Int[Array, ' B'],
    read: int | None = None,
  ) -> tuple[Float[Array, 'B V'], KVCache]:
    """Run T more tokens per row after the cached ones, in the decode layout.

    The new tokens can be a chunk of a prompt, or a chat's next turn. Results do not depend on the
    sizes of chunks.

    Args:
      weights: Weights on this model's mesh.
      cache: KVCache with room for the new tokens in each row, and at least T positions.
      tokens: [B, T] int32, right-padded.
      counts: [B] int32. Number of valid tokens in each row. A row with 0 keeps its cache; its
        logits are meaningless.
      read: Number of cached positions per row that attention reads, from the first on. The caller
        must ensure that no row has more. None: all. Static.

    Returns:
      Logits [B, V] float32 after each row's last token, NaN in a row whose residual stream is not
      finite at one of these tokens; and the cache with the tokens in it.

    Raises:
      RequestError: T is larger than the cache.
    """
    rows, length = tokens.shape
    sharding = self.chunk_sharding(rows, length)
    tokens = self.pad_tokens(tokens, self.decode_layout)
    if tokens.shape[1] > cache.size:
      raise RequestError(
        f'{tokens.shape[1]} new tokens at once do not fit into a cache of {cache.size} positions: '
        'use shorter chunks, or a larger cache'
      )

    def finish(
      weights: Weights,
      cache: KVCache,
      x: jax.Array,
      kv: KeysValues,
      counts: jax.Array,
      cached_counts: jax.Array,
    ) -> tuple[jax.Array, KVCache]:
      x = last_positions(x, jnp.maximum(counts, 1), sharding)
      logits = unembed(self, sharding, weights, x, (), rows)[:, 0]
      return logits, append_tokens(cache, *kv, cached_counts)

    spec = self.cache_spec(sharding, weights, cache)
    # The counts are passed twice: with rows split as in the residual stream, and as in the cache.
    return self.on_shards(
      sharding,
      finish,
      weights,
      spec,
      inputs=(P(sharding.residual[0]), P(sharding.attention_rows)),
      outputs=(P(self.sampling_axes(rows)), spec),
      read=read,
    )(weights, cache, tokens, counts, counts)

  def on_shards(
    self,
    sharding: ActivationSharding,
    finish: Finish,
    weights: Weights,
    cache_spec: Any,
    *,
    inputs: tuple[P, ...],
    outputs: Any,
    read: int | None = None,
  ) -> Callable[..., Any]:
    """Wrap `forward` in shard_map; return a function of global (weights, cache, tokens, *inputs).

    Args:
      sharding: Sharding of the pass's activations.
      finish: See forward.
      weights: Weights, for their form: one spec for all layers if stacked, else one per layer.
      cache_spec: PartitionSpecs of the cache, or None without one.
      inputs: PartitionSpecs of the further arguments of `finish`.
      outputs: PartitionSpecs of the results of `finish`.
      read: See forward.
    """
    return jax.shard_map(
      functools.partial(forward, self, sharding, finish, read),
      mesh=self.mesh,
      in_specs=(self.weight_specs(weights), cache_spec, P(), *inputs),
      out_specs=outputs,
      check_vma=False,
    )
