"""The passes of the model: prefill, prefill_chunk, decode_step, verify, logits, log_probs.

Each is a function of weights and tokens, ready for jit. It runs `forward.forward` on every shard of
the mesh (jax.shard_map): embed the tokens, run the layers (block.Layer), then call `finish`, which
differs between the passes.
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
from t5x_inference_ext.model import cache as kv_cache
from t5x_inference_ext.model.best_tokens import BestTokens
from t5x_inference_ext.model.cache import KeysValues, KVCache
from t5x_inference_ext.model.embedding import best_next_tokens, last_positions, unembed
from t5x_inference_ext.model.finite import mark_broken_before
from t5x_inference_ext.model.forward import Finish, forward
from t5x_inference_ext.model.log_probs import target_log_probs
from t5x_inference_ext.model.pages import AnyCache, append_tokens
from t5x_inference_ext.model.shardings import ShardedModel
from t5x_inference_ext.model.weights import Weights
from t5x_inference_ext.sharding.activations import ActivationSharding
from t5x_inference_ext.sharding.layout import num_shards


@dataclasses.dataclass(frozen=True)
class Model(ShardedModel):
  """The passes of a model on one mesh. It holds no weights, is hashable and is cheap to make."""

  @property
  def prefilling(self) -> 'Model':
    """A copy of this model that uses the prefill layout in both phases, and so for its caches."""
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
    kv = self.kv_to_decode(kv, length, sharding, decode)
    return logits, self.constrained(kv_cache.start(*kv, lengths, size), decode, weights)

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
    rows = tokens.shape[0]
    sharding = self.decode_sharding(rows)

    def head(weights: Weights, x: jax.Array) -> jax.Array:
      return unembed(self, sharding, weights, x, (), rows)[:, 0]

    return self._decode(weights, cache, tokens, head, P(self.sampling_axes(rows)))

  def decode_greedily(
    self, weights: Weights, cache: AnyCache, tokens: Int[Array, ' B']
  ) -> tuple[BestTokens, AnyCache]:
    """Run one token per row as decode_step does, without moving logits between devices.

    Returns:
      The most likely next token of each row, on every device; and the cache with the token in it.
    """
    rows = tokens.shape[0]
    sharding = self.decode_sharding(rows)

    def head(weights: Weights, x: jax.Array) -> BestTokens:
      return best_next_tokens(self, sharding, weights, x, rows)

    return self._decode(weights, cache, tokens, head, P())

  def _decode(
    self,
    weights: Weights,
    cache: AnyCache,
    tokens: jax.Array,
    head: Callable[[Weights, jax.Array], Any],
    head_spec: P,
  ) -> tuple[Any, AnyCache]:
    """Run a decode step; return head(weights, x [b, 1, e]) and the cache.

    Args:
      weights, cache, tokens: See decode_step.
      head: Function of a shard's weights and residual stream after the last layer.
      head_spec: Sharding of its results.
    """
    sharding = self.decode_sharding(tokens.shape[0])

    def finish(
      weights: Weights, cache: AnyCache, x: jax.Array, kv: KeysValues
    ) -> tuple[Any, AnyCache]:
      return head(weights, x), append_tokens(cache, *kv)

    spec = self.cache_spec(sharding, weights, cache)
    return self.on_shards(sharding, finish, weights, spec, inputs=(), outputs=(head_spec, spec))(
      weights, cache, tokens
    )

  def verify(
    self, weights: Weights, cache: AnyCache, tokens: Int[Array, 'B T'], counts: Int[Array, ' B']
  ) -> tuple[Float[Array, 'B T V'], AnyCache]:
    """Run each row's next token and its draft, in the decode layout; return logits at all of them.

    A caller rejects tokens by lowering `lengths` of the cache: positions beyond are never read.

    Args:
      weights: Weights on this model's mesh.
      cache: KVCache or PagedCache with room for the new tokens in each row.
      tokens: [B, T] int32, right-padded. The next token of each row, then its draft. T is at most
        the size of a page, rounded up for the mesh if the layout splits positions.
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
      read: Number of cached positions per row that attention reads, from the first on; no row has
        more. None: all. Static.

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
      assert isinstance(found, jax.Array)  # RankedTokens only where more tokens are asked for
      return found

    tokens, targets = (self.pad_tokens(ids, sharding.layout) for ids in (tokens, targets))
    return self.on_shards(
      sharding, finish, weights, None, inputs=(P(sampling),), outputs=P(sampling)
    )(weights, None, tokens, targets)[:, :length]

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
