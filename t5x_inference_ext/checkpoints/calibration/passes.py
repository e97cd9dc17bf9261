"""The compiled functions of a calibration: embed tokens, run one layer, round one matrix."""

from collections.abc import Callable
import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.model.attention_rules import TokenPositions, pass_rules
from t5x_inference_ext.model.embedding import embed
from t5x_inference_ext.model.positions import pass_angles
from t5x_inference_ext.model.recorded_layer import Hessians, RecordedLayer
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.model.vectors import local_vectors
from t5x_inference_ext.model.weights import LayerWeights, Weights
from t5x_inference_ext.quantization import gptq
from t5x_inference_ext.sharding.mesh import make_mesh


def one_device_model(config: ModelConfig) -> Model:
  """Return the model on one device, in float32."""
  return Model(config, make_mesh((1, 1, 1)), dtype='float32')


def _on_one_device(model: Model, function: Callable[..., Any]) -> Callable[..., Any]:
  """Give a function the names of the mesh's axes, as the layers' collectives need them."""
  return jax.shard_map(function, mesh=model.mesh, in_specs=P(), out_specs=P(), check_vma=False)


def _exact_products() -> contextlib.AbstractContextManager[Any]:
  """Context manager: float32 products are float32 on every device. TPUs round to bfloat16."""
  return jax.default_matmul_precision('highest')


@functools.partial(jax.jit, static_argnums=0)
def embed_tokens(
  model: Model, weights: Weights, tokens: Int[Array, 'B T']
) -> Float[Array, 'B T E']:
  """Return the residual stream before the first layer."""
  sharding = model.prefill_sharding(*tokens.shape)

  def on_device(weights: Weights, tokens: jax.Array) -> jax.Array:
    with _exact_products():
      return embed(weights, tokens, None, model, sharding)

  return _on_one_device(model, on_device)(weights, tokens)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def run_layer(
  model: Model,
  local: bool,
  recorded: tuple[str, ...],
  weights: LayerWeights,
  relative_bias: Float[Array, 'H buckets'] | None,
  x: Float[Array, 'B T E'],
  counted: Bool[Array, 'B T'],
) -> tuple[Float[Array, 'B T E'] | None, Hessians]:
  """Run one layer over whole rows.

  Args:
    model: The model on one device.
    local: Whether the layer is local.
    recorded: Names of the products whose Hessians are computed. If there are any, nothing after
      them is computed.
    weights: The layer's weights.
    relative_bias: T5's bias of attention by distance, if the model has one.
    x: The residual stream before the layer.
    counted: The tokens that count in Hessians.

  Returns:
    The residual stream after the layer, or None; and the Hessians.
  """
  config, sharding = model.config, model.prefill_sharding(*x.shape[:2])

  def on_device(
    weights: LayerWeights, bias: jax.Array | None, x: jax.Array, counted: jax.Array
  ) -> tuple[jax.Array | None, Hessians]:
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    places = TokenPositions(positions, positions)
    layer = RecordedLayer(
      config,
      sharding,
      model.cache_dtype,
      pass_angles(positions, config, sharding.attention_positions),
      None,
      rules=pass_rules(config, sharding, bias, places),
      counted=counted,
    )
    with _exact_products():
      (x,), _ = layer((x,), (local_vectors(weights, config, sharding), None, local))
    found = {name: layer.hessians[name] for name in recorded}
    return None if found else x, found

  return _on_one_device(model, on_device)(weights, relative_bias, x, counted)


@functools.partial(jax.jit, static_argnums=2)
def quantize_matrix(
  w: gptq.Matrix, hessian: gptq.Square, dtype: np.dtype, damping: Float[Array, '']
) -> tuple[gptq.Matrix, gptq.Channels]:
  """Return the units and scales of gptq.quantize. Its errors are not computed."""
  return gptq.quantize(w, hessian, dtype, damping)[:2]


def add_hessians(total: dict[str, np.ndarray], hessians: Hessians) -> None:
  """Add the Hessians of some rows to those of the rows before them, in float64."""
  for name, found in hessians.items():
    values = np.asarray(found)
    if name in total:
      total[name] += values
    else:
      total[name] = values.astype(np.float64)
