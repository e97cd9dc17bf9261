"""The passes of the model: prefill, prefill_chunk, decode_step, logits, log_probs.

Each is a function of weights and tokens, ready for jit. It runs `forward` on every shard of the
mesh (jax.shard_map): embed the tokens, run the layers (block.Layer), then call `finish`, which
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
from t5x_inference_ext.model.block import Layer, local_vectors
from t5x_inference_ext.model.cache import KeysValues, KVCache
from t5x_inference_ext.model.collectives import ops
from t5x_inference_ext.model.embedding import embed, last_positions, unembed
from t5x_inference_ext.model.log_probs import target_log_probs
from t5x_inference_ext.model.positions import RotaryAngles, rotary_angles
from t5x_inference_ext.model.shardings import ShardedModel
from t5x_inference_ext.model.weights import Weights
from t5x_inference_ext.sharding.activations import ActivationSharding
from t5x_inference_ext.sharding.layout import num_shards

# (weights, cache, x [b, t, e], (keys, values), *inputs) -> the outputs of the pass, on one shard.
Finish = Callable[..., Any]


def forward(
  model: ShardedModel,
  sharding: ActivationSharding,
  finish: Finish,
  weights: Weights,
  cache: KVCache | None,
  tokens: Int[Array, 'B T'] | Int[Array, ' B'],
  *inputs: Any,
) -> Any:
  """Run a pass on one shard.

  Args:
    model: Gives the config and dtypes.
    sharding: Sharding of the pass's activations.
    finish: Computes the outputs of the pass from the residual stream and the new tokens' keys and
      values.
    weights: This shard's part of the weights.
    cache: This shard's part of the KV cache that the tokens continue, or None if rows begin with
      the tokens.
    tokens: [B, T] int32. All tokens of the pass, on every shard. A decode step passes [B], which is
      widened here, because widening outside of the shards would be an extra operation.
    *inputs: Further per-shard arguments of `finish`.
  """
  if tokens.ndim == 1:
    tokens = tokens[:, None]
  if cache is None:
    start = jnp.zeros(tokens.shape[0] // ops.axis_size(sharding.attention_rows), jnp.int32)
  else:
    start = cache.positions
  positions = start[:, None] + jnp.arange(tokens.shape[1])[None, :]
  all_angles = rotary_angles(positions, model.config.d_head, model.config.rope_max_timescale)
  sin, cos = (ops.local_slice(a, sharding.attention_positions, 1) for a in all_angles)
  # Without the barrier every layer computes the angles again.
  angles = RotaryAngles(*jax.lax.optimization_barrier(((sin, cos), all_angles)))
  x = embed(weights.embedding.astype(model.dtype), tokens, sharding)
  layer = Layer(model.config, sharding, model.cache_dtype, angles, cache)
  layers = local_vectors(weights.layers, sharding.residual[2])
  cached = None if cache is None else cache.by_layer()
  kv: KeysValues
  if weights.stacked:
    x, kv = jax.lax.scan(layer, x, (layers, cached))
  else:
    by_layer = []
    for i, layer_weights in enumerate(layers):
      x, layer_kv = layer(x, (layer_weights, None if cached is None else cached[i]))
      by_layer.append(layer_kv)
    keys, values = zip(*by_layer)
    kv = keys, values
  return finish(weights, cache, x, kv, *inputs)


@dataclasses.dataclass(frozen=True)
class Model(ShardedModel):
  """A model's passes on one mesh. A Model holds no weights: it is hashable and cheap to make."""

  @property
  def prefilling(self) -> 'Model':
    """This model, with the prefill layout in both phases: its caches are in the prefill layout."""
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
      Logits [B, V] float32 after each row's last token, and the cache in the decode layout.

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
    self, weights: Weights, cache: KVCache, tokens: Int[Array, ' B']
  ) -> tuple[Float[Array, 'B V'], KVCache]:
    """Run one token per row, in the decode layout.

    Args:
      weights: Weights on this model's mesh.
      cache: KVCache with room for one more position in each row.
      tokens: [B] int32. The next token of each row.

    Returns:
      Logits [B, V] float32, and the cache with the token in it.
    """
    rows = tokens.shape[0]
    sharding = self.decode_sharding(rows)

    def finish(
      weights: Weights, cache: KVCache, x: jax.Array, kv: KeysValues
    ) -> tuple[jax.Array, KVCache]:
      logits = unembed(self, sharding, weights, x, (), rows)[:, 0]
      return logits, kv_cache.append(cache, *kv)

    spec = self.cache_spec(sharding, weights, cache)
    return self.on_shards(
      sharding, finish, weights, spec, inputs=(), outputs=(P(self.sampling_axes(rows)), spec)
    )(weights, cache, tokens)

  def prefill_chunk(
    self, weights: Weights, cache: KVCache, tokens: Int[Array, 'B T'], counts: Int[Array, ' B']
  ) -> tuple[Float[Array, 'B V'], KVCache]:
    """Run T more tokens per row after the cached ones, in the decode layout.

    The new tokens are a chunk of a prompt, or a chat's next turn. Results do not depend on the
    sizes of chunks.

    Args:
      weights: Weights on this model's mesh.
      cache: KVCache with room for the new tokens in each row, and at least T positions.
      tokens: [B, T] int32, right-padded.
      counts: [B] int32. Number of valid tokens in each row. A row with 0 keeps its cache; its
        logits are meaningless.

    Returns:
      Logits [B, V] float32 after each row's last token, and the cache with the tokens in it.

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
      return logits, kv_cache.append(cache, *kv, cached_counts)

    spec = self.cache_spec(sharding, weights, cache)
    # The counts are passed twice, with rows split as in the residual stream and as in the cache.
    return self.on_shards(
      sharding,
      finish,
      weights,
      spec,
      inputs=(P(sharding.residual[0]), P(sharding.attention_rows)),
      outputs=(P(self.sampling_axes(rows)), spec),
    )(weights, cache, tokens, counts, counts)

  def logits(self, weights: Weights, tokens: Int[Array, 'B T']) -> Float[Array, 'B T V']:
    """Return float32 logits [B, T, V] of the token after each position of model inputs [B, T]."""
    rows, length = tokens.shape
    sharding = self.prefill_sharding(rows, length)

    def finish(weights: Weights, cache: None, x: jax.Array, kv: KeysValues) -> jax.Array:
      del cache, kv
      return unembed(self, sharding, weights, x, sharding.residual[1], rows)

    return self.on_shards(
      sharding, finish, weights, None, inputs=(), outputs=P(self.sampling_axes(rows))
    )(weights, None, self.pad_tokens(tokens, sharding.layout))[:, :length]

  def log_probs(
    self, weights: Weights, tokens: Int[Array, 'B T'], targets: Int[Array, 'B T']
  ) -> Float[Array, 'B T']:
    """Return log p(target | inputs so far) at each position, [B, T] float32.

    Logits are computed for some positions at a time: the full [B, T, V] is never in memory.

    Args:
      weights: Weights on this model's mesh.
      tokens: [B, T] int32. Model inputs (BOS first).
      targets: [B, T] int32. Target of each position.
    """
    rows, length = tokens.shape
    sharding = self.prefill_sharding(rows, length)
    sampling, shape = self.sampling_axes(rows), self.mesh.shape
    # While logits are computed they are split over the vocabulary, afterwards over rows.
    shards = min(num_shards(self.prefill_layout.stored_hidden, shape), num_shards(sampling, shape))
    width = rows * self.config.vocab_size // shards
    position_axes = sharding.residual[1]

    def finish(
      weights: Weights, cache: None, x: jax.Array, kv: KeysValues, targets: jax.Array
    ) -> jax.Array:
      del cache, kv

      def logits(x: jax.Array) -> jax.Array:
        return unembed(self, sharding, weights, x, position_axes, rows)

      return target_log_probs(x, targets, logits, position_axes, width)

    tokens, targets = (self.pad_tokens(ids, sharding.layout) for ids in (tokens, targets))
    return self.on_shards(
      sharding, finish, weights, None, inputs=(P(sampling),), outputs=P(sampling)
    )(weights, None, tokens, targets)[:, :length]

  def on_shards(
    self,
    sharding: ActivationSharding,
    finish: Finish,
    weights: Weights,
    cache_spec: KVCache | None,
    *,
    inputs: tuple[P, ...],
    outputs: Any,
  ) -> Callable[..., Any]:
    """Return `forward` over all shards, as a function of global (weights, cache, tokens, *inputs).

    Args:
      sharding: Sharding of the pass's activations.
      finish: See forward.
      weights: Weights. If they are stacked, there is one spec for all layers, else one per layer.
      cache_spec: PartitionSpecs of the cache, or None without one.
      inputs: PartitionSpecs of the further arguments of `finish`.
      outputs: PartitionSpecs of the results of `finish`.
    """
    return jax.shard_map(
      functools.partial(forward, self, sharding, finish),
      mesh=self.mesh,
      in_specs=(self.weight_specs(weights), cache_spec, P(), *inputs),
      out_specs=outputs,
      check_vma=False,
    )
