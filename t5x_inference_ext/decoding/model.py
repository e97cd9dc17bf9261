"""The model on a mesh: prefill, decode step and full-length logits as functions of weights, ready for jit."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec as P

from t5x_inference_ext.collectives import plain
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.decoding import cache as kv_cache
from t5x_inference_ext.decoding.cache import KVCache
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.layers.attention import Context
from t5x_inference_ext.layers.embedding import embed, unembed
from t5x_inference_ext.layers.norm import rms_norm
from t5x_inference_ext.layers.parallel_block import parallel_block
from t5x_inference_ext.layers.rotary import rotary_angles
from t5x_inference_ext.layers.sharding import BatchSharding
from t5x_inference_ext.layouts.arrangement import device_tensors
from t5x_inference_ext.layouts.layout import Layout, batch_axes
from t5x_inference_ext.weights import LayerWeights, Weights

DTYPES = ('float32', 'bfloat16')


def check_dtype(dtype: str) -> None:
  """Raises RequestError for a dtype that models don't compute in."""
  if dtype not in DTYPES:
    raise RequestError(f'dtype must be one of {", ".join(DTYPES)}, got {dtype!r}')


@dataclasses.dataclass(frozen=True)
class Model:
  """A model's functions on one mesh, with no weights in it: hashable, and cheap to make.

  Attributes:
    config: the shape of the model.
    mesh: axes x, y, z.
    layout: where tensors live on it.
    dtype: of activations and KV cache, 'float32' or 'bfloat16'. Norms, softmax and logits are float32 in either.

  Raises:
    RequestError: another dtype.
  """

  config: ModelConfig
  mesh: Mesh
  layout: Layout = Layout()
  dtype: str = 'bfloat16'

  def __post_init__(self):
    check_dtype(self.dtype)

  def prefill(self, weights: Weights, tokens: jax.Array, lengths: jax.Array, size: int) -> tuple[jax.Array, KVCache]:
    """Runs the prompts in one pass.

    Args:
      weights: on this model's mesh.
      tokens: [B, T] int32 model inputs (BOS first), each row filled from the left.
      lengths: [B] int32, at least 1: how many of a row's tokens count.
      size: S, the positions of the cache made; at least T.

    Returns:
      Logits [B, V] float32 after each row's last token, and the cache.

    Raises:
      MeshError: B does not divide over the mesh.
    """

    def run(batch, weights, tokens, lengths, local_lengths):
      x, (keys, values) = self._decoder(batch, weights, tokens, jnp.zeros_like(local_lengths), None)
      x = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)  # [B, 1, E_xyz]
      return self._logits(batch, weights, x)[:, 0], kv_cache.start(keys, values, local_lengths, size)

    batch = self._batch(tokens.shape[0])
    cache = self._cache_spec(weights, batch)
    return self._per_shard(run, batch, weights, (P(), P(), P(batch.axes)), (P(batch.axes), cache))(
        weights, tokens, lengths, lengths)

  def decode_step(self, weights: Weights, cache: KVCache, tokens: jax.Array) -> tuple[jax.Array, KVCache]:
    """Runs one token a row.

    Args:
      weights: on this model's mesh.
      cache: with room for one more position in each row.
      tokens: [B] int32.

    Returns:
      Logits [B, V] float32 and the cache with the token in it.
    """

    def run(batch, weights, cache, tokens):
      x, (keys, values) = self._decoder(batch, weights, tokens[:, None], cache.lengths, cache)
      return self._logits(batch, weights, x)[:, 0], kv_cache.append(cache, keys, values)

    batch = self._batch(tokens.shape[0])
    spec = self._cache_spec(weights, batch)
    return self._per_shard(run, batch, weights, (spec, P()), (P(batch.axes), spec))(weights, cache, tokens)

  def logits(self, weights: Weights, tokens: jax.Array) -> jax.Array:
    """tokens [B, T] model inputs -> [B, T, V] float32: what follows each position."""

    def run(batch, weights, tokens):
      local_rows = tokens.shape[0] // plain.axis_size(batch.axes)
      x, _ = self._decoder(batch, weights, tokens, jnp.zeros(local_rows, jnp.int32), None)
      return self._logits(batch, weights, x)

    batch = self._batch(tokens.shape[0])
    return self._per_shard(run, batch, weights, (P(),), P(batch.axes))(weights, tokens)

  def log_probs(self, weights: Weights, tokens: jax.Array, targets: jax.Array) -> jax.Array:
    """log p(target | inputs so far) at each position, [B, T] float32, of tokens and targets [B, T]."""

    def run(batch, weights, tokens, targets):
      x, _ = self._decoder(batch, weights, tokens, jnp.zeros(targets.shape[0], jnp.int32), None)
      logits = self._logits(batch, weights, x)
      return jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]

    batch = self._batch(tokens.shape[0])
    return self._per_shard(run, batch, weights, (P(), P(batch.axes)), P(batch.axes))(weights, tokens, targets)

  def weight_specs(self, weights: Weights) -> Weights:
    """The PartitionSpecs of a pytree of weights of this form (stacked or a tuple of layers, int8 or not)."""
    tensors = device_tensors(self.config, self.layout, dict(self.mesh.shape), weights.is_int8)

    def layer(lead):
      return LayerWeights(**{name: P(*lead, *t.spec) for name, t in tensors.items() if t.per_layer})

    layers = (layer(()),) * len(weights.layers) if isinstance(weights.layers, tuple) else layer((None,))
    return Weights(tensors['embedding'].spec, tensors['final_norm'].spec, layers)

  def _decoder(self, batch, weights, tokens, start, cache):
    """One shard's pass over tokens [B, T] that follow `start` [B/axes] positions: x [B, T, E_xyz], (keys, values)."""
    positions = start[:, None] + jnp.arange(tokens.shape[1])[None, :]
    angles = rotary_angles(positions, self.config.d_head, self.config.rope_max_timescale)
    x = embed(weights.embedding.astype(self.dtype), tokens, self.layout)

    def block(x, inputs):
      w, kv = inputs
      context = None if kv is None else Context(*kv, cache.lengths)
      return parallel_block(x, w, angles, context, self.config, batch)

    kv = None if cache is None else (cache.keys, cache.values)
    if not isinstance(weights.layers, tuple):
      return jax.lax.scan(block, x, (weights.layers, kv))
    new = []
    for i, w in enumerate(weights.layers):
      x, new_kv = block(x, (w, None if kv is None else (kv[0][i], kv[1][i])))
      new.append(new_kv)
    return x, tuple(zip(*new))

  def _logits(self, batch, weights, x):
    x = rms_norm(x, weights.final_norm, self.config.norm_epsilon, self.config.d_model)
    return unembed(weights.embedding.astype(self.dtype), x, self.config.vocab_size, self.config.d_model, batch)

  def _batch(self, rows: int) -> BatchSharding:
    return BatchSharding(self.layout, batch_axes(rows, self.mesh.shape))

  def _cache_spec(self, weights, batch):
    if isinstance(weights.layers, tuple):
      kv = (P(batch.axes),) * len(weights.layers)
    else:
      kv = P(None, batch.axes)
    return KVCache(kv, kv, P(batch.axes))

  def _per_shard(self, run, batch, weights, in_specs, out_specs):
    return jax.shard_map(
        functools.partial(run, batch), mesh=self.mesh, in_specs=(self.weight_specs(weights), *in_specs),
        out_specs=out_specs, check_vma=False)
