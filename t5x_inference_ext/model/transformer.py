"""The model on a mesh: prefill, decode step and full-length logits as functions of weights, ready for jit."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.engine.scoring import target_log_probs
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.model import cache as kv_cache
from t5x_inference_ext.model.block import Layer, Positions, local_vectors
from t5x_inference_ext.model.cache import KVCache
from t5x_inference_ext.model.collectives import ops
from t5x_inference_ext.model.embedding import embed, last_positions, unembed
from t5x_inference_ext.model.norm import norm
from t5x_inference_ext.model.positions import rotary_angles
from t5x_inference_ext.model.weights import Weights, build_weights
from t5x_inference_ext.sharding import activations
from t5x_inference_ext.sharding.activations import ActivationSharding
from t5x_inference_ext.sharding.layout import Axes, Layout, check_pair, num_shards
from t5x_inference_ext.sharding.packing import packed_tensors

COMPUTE_DTYPES = ('float32', 'bfloat16')
CACHE_DTYPES = (*COMPUTE_DTYPES, 'int8')


def check_dtype(dtype: str) -> None:
  """Raises RequestError for a dtype that models don't compute in."""
  if dtype not in COMPUTE_DTYPES:
    raise RequestError(f'dtype must be one of {", ".join(COMPUTE_DTYPES)}, got {dtype!r}')


def check_cache(cache: str | None) -> None:
  """Raises RequestError for what a KV cache can't hold; None is the dtype of activations."""
  if cache not in (None, *CACHE_DTYPES):
    raise RequestError(f'cache must be one of {", ".join(CACHE_DTYPES)}, got {cache!r}')


@dataclasses.dataclass(frozen=True)
class Model:
  """A model's functions on one mesh, with no weights in it: hashable, and cheap to make.

  Attributes:
    config: the shape of the model.
    mesh: axes x, y, z.
    prefill_layout: of prefill and of whole sequences (logits, log_probs).
    decode_layout: of decode steps, and of the KV cache between them.
    dtype: of activations, 'float32' or 'bfloat16'. Norms, softmax and logits are float32 in either.
    cache: what the KV cache holds: 'float32', 'bfloat16', 'int8' with a scale for each position and head, or None:
      `dtype`. Passes without a cache see keys and values as one would hold them, too.

  Raises:
    RequestError: another dtype, or cache.
    MeshError: two layouts that can't share weights.
  """

  config: ModelConfig
  mesh: Mesh
  prefill_layout: Layout = Layout()
  decode_layout: Layout = Layout()
  dtype: str = 'bfloat16'
  cache: str | None = None

  def __post_init__(self):
    check_dtype(self.dtype)
    check_cache(self.cache)
    check_pair(self.prefill_layout, self.decode_layout)

  @property
  def cache_dtype(self) -> str:
    """What the KV cache holds: a float's dtype, or 'int8'."""
    return self.cache or self.dtype

  @property
  def prefilling(self) -> 'Model':
    """The same with the prefill layout in both phases: its caches lie, and grow, as prefill has them."""
    return dataclasses.replace(self, decode_layout=self.prefill_layout)

  def prefill(
    self, weights: Weights, tokens: jax.Array, lengths: jax.Array, size: int
  ) -> tuple[jax.Array, KVCache]:
    """Runs the prompts in one pass, in the prefill layout.

    Args:
      weights: on this model's mesh.
      tokens: [B, T] int32 model inputs (BOS first), each row filled from the left.
      lengths: [B] int32, at least 1: how many of a row's tokens count.
      size: S, the positions of the cache made; at least T. An int8 cache has them rounded up to whole tiles.

    Returns:
      Logits [B, V] float32 after each row's last token, and the cache, split as decode takes it.

    Raises:
      MeshError: B rows that the decode layout can't split.
    """
    rows, length = tokens.shape
    sharding = self.prefill_sharding(rows, length)
    decode = self.decode_sharding(rows)

    def run(weights, tokens, lengths):
      start = jnp.zeros(rows // ops.axis_size(sharding.attention_rows), jnp.int32)
      x, kv = self._decoder(sharding, weights, tokens, start, None)
      x = last_positions(x, lengths, sharding)
      return self._logits(sharding, weights, x, (), rows)[:, 0], kv

    kv_spec = self._kv_spec(sharding, weights)
    logits, kv = self._per_shard(
      run, weights, (P(), P(sharding.residual[0])), (P(self._sampling(rows)), (kv_spec, kv_spec))
    )(weights, self._pad(tokens, sharding.layout), lengths)
    keys, values = self._to_decode(kv, length, sharding, decode)
    return logits, self.constrained(kv_cache.start(keys, values, lengths, size), decode, weights)

  def decode_step(
    self, weights: Weights, cache: KVCache, tokens: jax.Array
  ) -> tuple[jax.Array, KVCache]:
    """Runs one token a row, in the decode layout.

    Args:
      weights: on this model's mesh.
      cache: with room for one more position in each row.
      tokens: [B] int32.

    Returns:
      Logits [B, V] float32 and the cache with the token in it.
    """
    rows = tokens.shape[0]
    sharding = self.decode_sharding(rows)

    def run(weights, cache, tokens):
      x, (keys, values) = self._decoder(sharding, weights, tokens[:, None], cache.positions, cache)
      return self._logits(sharding, weights, x, (), rows)[:, 0], kv_cache.append(
        cache, keys, values
      )

    spec = self.cache_spec(sharding, weights, cache)
    return self._per_shard(run, weights, (spec, P()), (P(self._sampling(rows)), spec))(
      weights, cache, tokens
    )

  def prefill_chunk(
    self, weights: Weights, cache: KVCache, tokens: jax.Array, counts: jax.Array
  ) -> tuple[jax.Array, KVCache]:
    """Runs T more tokens a row on what is cached, in the decode layout: a chunk of a prompt, a conversation's next turn.

    Args:
      weights: on this model's mesh.
      cache: with room for the new tokens in each row, and at least T positions.
      tokens: [B, T] int32, each row filled from the left.
      counts: [B] int32: how many of a row's tokens count. A row with 0 stays as it is; its logits mean nothing.

    Returns:
      Logits [B, V] float32 after each row's last token, and the cache with the tokens in it. Chunks of any size give the
      same.

    Raises:
      RequestError: T above the cache's size.
    """
    rows, length = tokens.shape
    sharding = self.chunk_sharding(rows, length)
    tokens = self._pad(tokens, self.decode_layout)
    if tokens.shape[1] > cache.size:
      raise RequestError(
        f'{tokens.shape[1]} new tokens at once do not fit into a cache of {cache.size} positions: use '
        'shorter chunks, or a larger cache'
      )

    def run(weights, cache, tokens, counts, cached_counts):
      x, (keys, values) = self._decoder(sharding, weights, tokens, cache.positions, cache)
      x = last_positions(x, jnp.maximum(counts, 1), sharding)
      return self._logits(sharding, weights, x, (), rows)[:, 0], kv_cache.append(
        cache, keys, values, cached_counts
      )

    spec = self.cache_spec(sharding, weights, cache)
    in_specs = (spec, P(), P(sharding.residual[0]), P(sharding.attention_rows))
    return self._per_shard(run, weights, in_specs, (P(self._sampling(rows)), spec))(
      weights, cache, tokens, counts, counts
    )

  def logits(self, weights: Weights, tokens: jax.Array) -> jax.Array:
    """tokens [B, T] model inputs -> [B, T, V] float32: what follows each position."""
    rows, length = tokens.shape
    sharding = self.prefill_sharding(rows, length)

    run = lambda weights, tokens: self._logits(
      sharding, weights, self._whole(sharding, weights, tokens), sharding.residual[1], rows
    )
    return self._per_shard(run, weights, (P(),), P(self._sampling(rows)))(
      weights, self._pad(tokens, sharding.layout)
    )[:, :length]

  def log_probs(self, weights: Weights, tokens: jax.Array, targets: jax.Array) -> jax.Array:
    """log p(target | inputs so far) at each position, [B, T] float32, of tokens and targets [B, T].

    Logits are made for some positions at a time: never [B, T, V] of a large vocabulary.
    """
    rows, length = tokens.shape
    sharding = self.prefill_sharding(rows, length)
    sampling, shape = P(self._sampling(rows)), self.mesh.shape
    # While they are made logits are split over the vocabulary, then over rows.
    split = (
      num_shards(self.prefill_layout.stored_hidden, shape),
      num_shards(self._sampling(rows), shape),
    )
    width = rows * self.config.vocab_size // min(split)

    def run(weights, tokens, targets):
      x = self._whole(sharding, weights, tokens)
      logits = lambda x: self._logits(sharding, weights, x, sharding.residual[1], rows)
      return target_log_probs(x, targets, logits, sharding.residual[1], width)

    return self._per_shard(run, weights, (P(), sampling), sampling)(
      weights, self._pad(tokens, sharding.layout), self._pad(targets, sharding.layout)
    )[:, :length]

  def prefill_sharding(self, rows: int, length: int) -> ActivationSharding:
    """Where the activations of a prefill of so many rows and positions live."""
    shape = self.mesh.shape
    length = activations.padded_length(self.prefill_layout, shape, rows, length)
    return activations.shard_activations(self.prefill_layout, self.config, shape, rows, length)

  def chunk_sharding(self, rows: int, length: int) -> ActivationSharding:
    """Where those of so many more positions of cached rows live. The cache lies as decode_sharding has it."""
    shape = self.mesh.shape
    length = activations.padded_length(self.decode_layout, shape, rows, length)
    return activations.shard_activations(
      self.decode_layout, self.config, shape, rows, length, cached=True
    )

  def decode_sharding(self, rows: int) -> ActivationSharding:
    """Where those of a decode step live. Raises MeshError for rows that the layout can't split."""
    return activations.shard_activations(self.decode_layout, self.config, self.mesh.shape, rows, 1)

  def padded_batch(self, rows: int) -> int:
    """The smallest batch of at least `rows` that keeps this mesh as busy as so many rows can."""
    return activations.padded_batch(self.decode_layout, rows, self.mesh.shape)

  def weight_specs(self, weights: Weights) -> Weights:
    """The PartitionSpecs of a pytree of weights of this form (stacked or a tuple of layers, int8 or not)."""
    tensors = packed_tensors(self.config, self.prefill_layout, self.mesh.shape, weights.is_int8)
    spec = lambda name, layers: P(*(None,) * isinstance(layers, slice), *tensors[name].spec)
    return build_weights(tensors, self.config.num_layers, weights.stacked, spec)

  def cache_spec(
    self, sharding: ActivationSharding, weights: Weights, cache: KVCache | None = None
  ) -> KVCache:
    """The PartitionSpecs of a KV cache, one for all arrays of a layer's keys; of one that shares positions, if `cache` does."""
    kv, rows = self._kv_spec(sharding, weights), P(sharding.attention_rows)
    if cache is None or cache.shared is None:
      return KVCache(kv, kv, rows)
    shared = P(*sharding.cache[1:])  # whole on every device that splits rows
    shared = P(None, *shared) if weights.stacked else (shared,) * len(weights.layers)
    return KVCache(kv, kv, rows, kv_cache.Shared(shared, shared, rows))

  def constrained(self, cache: KVCache, sharding: ActivationSharding, weights: Weights) -> KVCache:
    """The cache, lying as the placement has it."""
    specs = self.cache_spec(sharding, weights, cache)
    return jax.tree.map(
      lambda spec, x: jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec)),
      specs,
      cache,
    )

  def _decoder(self, sharding: ActivationSharding, weights, tokens, start, cache):
    """One shard's pass over all tokens [B, T] that follow `start` [B'] positions: x [B, T, E], (keys, values)."""
    positions = start[:, None] + jnp.arange(tokens.shape[1])[None, :]
    keys = rotary_angles(positions, self.config.d_head, self.config.rope_max_timescale)
    queries = tuple(ops.local_slice(a, sharding.attention_positions, 1) for a in keys)
    queries, keys = jax.lax.optimization_barrier(
      (queries, keys)
    )  # or they are computed anew in every layer
    layer = Layer(self.config, sharding, self.cache_dtype)
    x = embed(weights.embedding.astype(self.dtype), tokens, sharding)

    def block(x, inputs):
      w, kv = inputs
      context = None if kv is None else kv_cache.context(cache, kv)
      return layer(x, w, Positions(queries, keys), context)

    layers = local_vectors(weights.layers, sharding.residual[2])
    kv = None if cache is None else kv_cache.layers(cache)
    if weights.stacked:
      return jax.lax.scan(block, x, (layers, kv))
    new = []
    for i, w in enumerate(layers):
      x, new_kv = block(x, (w, None if kv is None else kv[i]))
      new.append(new_kv)
    return x, tuple(zip(*new))

  def _whole(self, sharding, weights, tokens):
    """A pass over whole sequences [B, T]: x [B, T, E]."""
    start = jnp.zeros(tokens.shape[0] // ops.axis_size(sharding.attention_rows), jnp.int32)
    return self._decoder(sharding, weights, tokens, start, None)[0]

  def _logits(self, sharding, weights, x, positions: Axes, rows: int):
    axes = sharding.residual[2]
    scale, bias = (
      None if v is None else ops.local_slice(v, axes, 0)
      for v in (weights.final_norm, weights.final_norm_bias)
    )
    x = norm(x, scale, bias, self.config, axes)
    return unembed(
      weights.embedding.astype(self.dtype),
      x,
      self.config.vocab_size,
      self.config.d_model,
      sharding,
      positions,
      self._sampling(rows),
    )

  def _sampling(self, rows: int) -> Axes:
    return activations.sampling_axes(self.prefill_layout, rows, self.mesh.shape)

  def _pad(self, tokens, layout):
    rows, length = tokens.shape
    padded = activations.padded_length(layout, self.mesh.shape, rows, length)
    return jnp.pad(tokens, ((0, 0), (0, padded - length)))

  def _to_decode(self, kv, length: int, prefill: ActivationSharding, decode: ActivationSharding):
    """A prefill's keys and values [.., B, T, K, Q], split by the one placement, without padding, by the other."""
    held, wanted = prefill.heads.cached(), decode.heads.cached()

    move = lambda x: self._constrain_kv(
      kv_cache.with_heads(x[..., :length, :, :], held, wanted), decode
    )
    return jax.tree.map(move, kv)

  def _constrain_kv(self, x: jax.Array, sharding: ActivationSharding) -> jax.Array:
    spec = P(*(None,) * (x.ndim - 4), *sharding.cache)
    return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))

  def _kv_spec(self, sharding: ActivationSharding, weights: Weights):
    return P(None, *sharding.cache) if weights.stacked else (sharding.cache,) * len(weights.layers)

  def _per_shard(self, run, weights, in_specs, out_specs):
    return jax.shard_map(
      run,
      mesh=self.mesh,
      in_specs=(self.weight_specs(weights), *in_specs),
      out_specs=out_specs,
      check_vma=False,
    )
