"""Shardings of a model's weights, activations and KV cache on its mesh, in each phase."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.model.cache import KeysValues, KVCache
from t5x_inference_ext.model.cache_reshard import reshard_local
from t5x_inference_ext.model.kernel_attention import check_attention
from t5x_inference_ext.model.pages import PagedCache, SharedPages
from t5x_inference_ext.model.weights import LayerWeights, Weights, build_weights
from t5x_inference_ext.quantization.kv import KV
from t5x_inference_ext.sharding import activations
from t5x_inference_ext.sharding.activations import ActivationSharding
from t5x_inference_ext.sharding.adapter_packing import adapter_spec
from t5x_inference_ext.sharding.cache_moves import cache_moves
from t5x_inference_ext.sharding.layout import Axes, Layout, check_pair
from t5x_inference_ext.sharding.packing import packed_tensors

COMPUTE_DTYPES = ('float32', 'bfloat16')
CACHE_DTYPES = (*COMPUTE_DTYPES, 'int8')


def check_dtype(dtype: str) -> None:
  """Raise RequestError unless models can compute in `dtype`."""
  if dtype not in COMPUTE_DTYPES:
    raise RequestError(f'dtype must be one of {", ".join(COMPUTE_DTYPES)}, got {dtype!r}')


def check_cache(cache: str | None) -> None:
  """Raise RequestError unless a KV cache can have the dtype `cache` (None: that of activations)."""
  if cache not in (None, *CACHE_DTYPES):
    raise RequestError(f'cache must be one of {", ".join(CACHE_DTYPES)}, got {cache!r}')


@dataclasses.dataclass(frozen=True)
class ShardedModel:
  """A model's shape, dtypes, mesh and layouts, and the shardings derived from these.

  Attributes:
    config: Shape of the model.
    mesh: Mesh with axes x, y, z.
    prefill_layout: Layout of prefill and of passes over whole sequences (logits, log_probs).
    decode_layout: Layout of decode steps, and of the KV cache between them.
    dtype: Dtype of activations, 'float32' or 'bfloat16'. Norms, softmax and logits are always
      float32.
    cache: Dtype of the KV cache: 'float32', 'bfloat16', 'int8' (with a scale for each position and
      head), or None for `dtype`. Passes without a cache also round keys and values to this dtype.
    attention: How attention reads the cache: 'xla', in plain JAX; or 'kernel', by a Pallas kernel
      that reads filled positions only (model.kernel_attention).

  Raises:
    RequestError: The dtype or cache is unknown, or the kernel does not run this model.
    MeshError: The two layouts cannot share one set of weights.
  """

  config: ModelConfig
  mesh: Mesh
  prefill_layout: Layout = Layout()
  decode_layout: Layout = Layout()
  dtype: str = 'bfloat16'
  cache: str | None = None
  attention: str = 'xla'

  def __post_init__(self) -> None:
    check_dtype(self.dtype)
    check_cache(self.cache)
    check_attention(self.attention, self.config, self.mesh)
    check_pair(self.prefill_layout, self.decode_layout)

  @property
  def cache_dtype(self) -> str:
    """Dtype of the KV cache: a float dtype or 'int8'."""
    return self.cache or self.dtype

  def prefill_sharding(self, rows: int, length: int) -> ActivationSharding:
    """Return the sharding of a prefill's activations. `length` is padded if the layout needs it."""
    return self._sharding(self.prefill_layout, rows, length, cached=False)

  def chunk_sharding(self, rows: int, length: int) -> ActivationSharding:
    """Return the sharding of a chunk's activations, in the decode layout.

    A chunk is `length` new positions for each cached row. The cache has the sharding that
    cache_sharding returns.
    """
    return self._sharding(self.decode_layout, rows, length, cached=True)

  def decode_sharding(self, rows: int) -> ActivationSharding:
    """Return the sharding of a decode step's activations.

    Raises:
      MeshError: The layout cannot split this many rows.
    """
    return activations.shard_activations(self.decode_layout, self.config, self.mesh.shape, rows, 1)

  def cache_sharding(self, rows: int) -> ActivationSharding:
    """Return the sharding of a cache of this many rows in the decode layout.

    Unlike decode_sharding, this accepts numbers of rows that a decode step cannot split, because a
    prefill may have them.
    """
    return self.chunk_sharding(rows, 1)

  def _sharding(self, layout: Layout, rows: int, length: int, cached: bool) -> ActivationSharding:
    shape = self.mesh.shape
    length = activations.padded_length(layout, shape, rows, length)
    return activations.shard_activations(layout, self.config, shape, rows, length, cached)

  def pad_tokens(self, tokens: Int[Array, 'B T'], layout: Layout) -> Int[Array, 'B padded']:
    """Pad tokens on the right if the layout needs it. No token attends to the padding."""
    rows, length = tokens.shape
    padded = activations.padded_length(layout, self.mesh.shape, rows, length)
    return jnp.pad(tokens, ((0, 0), (0, padded - length)))

  def sampling_axes(self, rows: int) -> Axes:
    """Return the mesh axes that split the rows of logits [rows, V]."""
    return activations.sampling_axes(self.prefill_layout, rows, self.mesh.shape)

  def local_logits_axes(self, rows: int) -> tuple[Axes, Axes]:
    """Return the mesh axes that split the rows, and the vocabulary, of logits as computed."""
    layout, axes = self.prefill_layout, self.sampling_axes(rows)
    return tuple(a for a in layout.stored_embed if a in axes), layout.stored_hidden

  def padded_batch(self, rows: int) -> int:
    """Round a number of rows up so that decode splits them over all mesh axes it can use."""
    return activations.padded_batch(self.decode_layout, rows, self.mesh.shape)

  def weight_specs(self, weights: Weights) -> Weights:
    """Return PartitionSpecs for weights in the form of `weights` (stacked or not, with scales?)."""
    tensors = packed_tensors(self.config, self.prefill_layout, self.mesh.shape, weights.scaled)

    def spec(name: str, layers: slice | int | None) -> P:
      return P(*(None,) * isinstance(layers, slice), *tensors[name].spec)

    specs = build_weights(tensors, self.config.num_layers, weights.stacked, spec)
    return self._with_adapter_specs(specs, weights)

  def _with_adapter_specs(self, specs: Weights, weights: Weights) -> Weights:
    """Add the specs of adapters, as far as `weights` has them."""
    lead = (None,) * weights.stacked

    def of_layer(spec: LayerWeights, layer: LayerWeights) -> LayerWeights:
      found = {}
      for part, w in layer.items():
        adapters: Any = {n: P(*lead, *adapter_spec(n, self.prefill_layout)) for n in w.adapters}
        found[part] = dataclasses.replace(spec[part], adapters=adapters)
      return found

    layers: Any
    if isinstance(weights.layers, tuple) and isinstance(specs.layers, tuple):
      layers = tuple(map(of_layer, specs.layers, weights.layers))
    else:
      assert isinstance(weights.layers, dict) and isinstance(specs.layers, dict)
      layers = of_layer(specs.layers, weights.layers)
    table: Any = specs.embedding
    replicated: Any = P()
    return dataclasses.replace(
      specs,
      layers=layers,
      soft_prompts=None if weights.soft_prompts is None else table,
      adapter_rows=None if weights.adapter_rows is None else replicated,
    )

  def kv_spec(self, sharding: ActivationSharding, weights: Weights) -> Any:
    """Return PartitionSpecs of keys (or values): one if layers are stacked, else one per layer."""
    return P(None, *sharding.cache) if weights.stacked else (sharding.cache,) * len(weights.layers)

  def cache_spec(self, sharding: ActivationSharding, weights: Weights, cache: Any = None) -> Any:
    """Return PartitionSpecs of a KVCache or PagedCache, including a PagedCache's shared pages.

    One spec stands for all arrays of a layer's keys: for int8, both units and scales. If `cache` is
    None, return specs for a KVCache. Pages are split like rows.
    """
    kv = self.kv_spec(sharding, weights)
    rows: Any = P(sharding.attention_rows)
    if not isinstance(cache, PagedCache):
      return KVCache(kv, kv, rows)
    shared = None
    if cache.shared is not None:
      # Shared pages have no row dimension, so each device has all of them: [K, NS, S, Q].
      part: Any = P(sharding.cache[1], None, *sharding.cache[2:])
      part = P(None, *part) if weights.stacked else (part,) * len(weights.layers)
      whole: Any = P()
      shared = SharedPages(part, part, rows, whole)
    return PagedCache(kv, kv, rows, rows, rows, rows, shared, cache.read, cache.read_shared)

  def constrained(self, cache: Any, sharding: ActivationSharding, weights: Weights) -> Any:
    """Return the cache, a KVCache or PagedCache, constrained to `sharding`."""

    def constrain(spec: P, x: KV) -> KV:  # x: a layer's keys, or values
      return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))

    return jax.tree.map(constrain, self.cache_spec(sharding, weights, cache), cache)

  def reshard_kv(
    self, kv: KeysValues, length: int, held: ActivationSharding, wanted: ActivationSharding
  ) -> KeysValues:
    """Bring keys and values from one sharding to another, and drop positions from `length` on.

    Args:
      kv: Pytree of arrays [.., B, K, T, Q] in the cache sharding of `held`.
      length: Positions to keep.
      held: Sharding of the pass that made them, such as a prefill.
      wanted: Sharding of the passes that follow, such as decode steps.
    """
    moves = cache_moves(held, wanted, self.mesh.shape)

    def reshard(x: jax.Array) -> jax.Array:
      lead = (None,) * (x.ndim - 4)
      return jax.shard_map(
        lambda x: reshard_local(x[..., :length, :], moves),
        mesh=self.mesh,
        in_specs=P(*lead, *held.cache),
        out_specs=P(*lead, *wanted.cache),
        check_vma=False,
      )(x)

    return jax.tree.map(reshard, kv)
