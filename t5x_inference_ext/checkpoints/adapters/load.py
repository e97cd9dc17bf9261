"""Load adapters onto a mesh beside a model's weights, sharded like what they change."""

from collections.abc import Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from t5x_inference_ext import params
from t5x_inference_ext.checkpoints.adapters.adapter import Adapter, Floats
from t5x_inference_ext.checkpoints.checkpoint import Checkpoint
from t5x_inference_ext.config import BlockPart
from t5x_inference_ext.model.adapters import SCALING
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.model.weights import LayerWeights, Weights
from t5x_inference_ext.sharding.adapter_packing import adapter_spec, is_adapter_matrix, pack_part
from t5x_inference_ext.sharding.columns import PackedPart, input_parts, output_parts
from t5x_inference_ext.sharding.layout import num_shards


def load_adapters(
  adapters: Sequence[Adapter], checkpoint: Checkpoint, model: Model, weights: Weights
) -> Weights:
  """Return the weights with adapters beside them. Adapter i has the number i + 1 in rows.

  Args:
    adapters: Adapters that were read for this checkpoint.
    checkpoint: The checkpoint that the weights were loaded from.
    model: The model, which decides mesh and layout.
    weights: The model's weights.
  """
  layers = [dict[str, dict[str, Any]]() for _ in range(model.config.num_layers)]
  if weights.stacked:
    layers = layers[:1]
  for part in model.config.block_parts:
    for name, values in _arrays(adapters, checkpoint, model, part).items():
      dtype = jnp.dtype(model.dtype) if is_adapter_matrix(name) else values.dtype
      spec = adapter_spec(name, model.prefill_layout)
      for i, layer in enumerate(layers):
        host = values if weights.stacked else values[i]
        put = _put(model, host.astype(dtype), P(*(None,) * weights.stacked, *spec))
        layer.setdefault(part.name, {})[name] = put

  def with_arrays(layer: LayerWeights, found: dict[str, dict[str, Any]]) -> LayerWeights:
    return {name: dataclasses.replace(w, adapters=found.get(name, {})) for name, w in layer.items()}

  changed: Any
  if isinstance(weights.layers, tuple):
    changed = tuple(map(with_arrays, weights.layers, layers))
  else:
    changed = with_arrays(weights.layers, layers[0])
  return dataclasses.replace(weights, layers=changed, soft_prompts=_prompts(adapters, model))


def _put(model: Model, values: np.ndarray, spec: P) -> jax.Array:
  sharding = NamedSharding(model.mesh, spec)
  return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


def _prompts(adapters: Sequence[Adapter], model: Model) -> jax.Array | None:
  """Return all soft prompts, one after the other, split and padded like the embedding."""
  prompts = [adapter.prompt for adapter in adapters if adapter.prompt is not None]
  if not prompts:
    return None
  table = np.concatenate(prompts)
  layout = model.prefill_layout
  shards = num_shards(layout.stored_hidden, model.mesh.shape)
  padded = np.pad(table, ((0, -len(table) % shards), (0, 0)))
  spec = layout.weight_spec((params.VOCAB_AXIS, params.EMBED_AXIS))
  return _put(model, padded.astype(jnp.dtype(model.dtype)), spec)


def _arrays(
  adapters: Sequence[Adapter], checkpoint: Checkpoint, model: Model, part: BlockPart
) -> dict[str, np.ndarray]:
  """Return a block part's packed arrays [L, ..], by name (sharding/adapter_packing.py)."""
  config = model.config
  shards = num_shards(model.prefill_layout.stored_hidden, model.mesh.shape)
  found: dict[str, np.ndarray] = {}
  inner, owners = [], []
  for columns in input_parts(config, part, shards):
    terms = _terms(adapters, columns, config.num_layers)
    if terms is not None:
      a, b, own = terms
      found[f'in_b/{columns.names[0]}'] = pack_part(b, columns, 2)
      inner.append(a)
      owners.append(own)
  if inner:
    found['in_a'] = np.concatenate(inner, axis=2)
    found['in_owners'] = np.concatenate(owners, axis=1)
  for rows in output_parts(config, part, shards):
    terms = _terms(adapters, rows, config.num_layers, outputs=True)
    if terms is not None:
      a, b, own = terms
      scale = params.output_scale_name(part)
      if scale in checkpoint.tensors:  # the product is multiplied by it after the sum
        b = (b / checkpoint.tensors[scale].read()[:, None, :]).astype(np.float32)
      found[f'out_a/{rows.names[0]}'] = pack_part(a, rows, 1)
      found[f'out_b/{rows.names[0]}'], found[f'out_owners/{rows.names[0]}'] = b, own
  names = (*('query', 'key', 'value') * part.attention, *('mlp_output',) * part.mlp)
  for name in names:
    if any(name in adapter.scaling for adapter in adapters):
      found[f'{SCALING}{name}'] = _factors(adapters, name, config.num_layers)
  return found


def _terms(
  adapters: Sequence[Adapter], part: PackedPart, layers: int, outputs: bool = False
) -> tuple[Floats, Floats, np.ndarray] | None:
  """Return a part's low-rank terms of all adapters, side by side: a [L, in, C], b [L, C, out].

  Also return the number of the adapter of each of the C ranks, [L, C] int32. Return None if no
  adapter has a term.

  Args:
    adapters: All adapters.
    part: The part. An input part's matrices share their inputs.
    layers: L.
    outputs: Whether the part consists of rows of an output matrix.
  """
  a: list[Floats] = []
  b: list[Floats] = []
  owners: list[int] = []
  total, offset = sum(part.sizes), 0
  for name, size in zip(part.names, part.sizes, strict=True):
    for number, adapter in enumerate(adapters, 1):
      term = adapter.low_rank.get(name)
      if term is not None:
        around = 0 if outputs else total - offset - size
        before = 0 if outputs else offset
        a.append(term.a)
        b.append(np.pad(term.b, ((0, 0), (0, 0), (before, around))))
        owners += [number] * term.rank
    offset += size
  if not owners:
    return None
  numbers = np.broadcast_to(np.asarray(owners, np.int32), (layers, len(owners)))
  return np.concatenate(a, axis=2), np.concatenate(b, axis=1), numbers


def _factors(adapters: Sequence[Adapter], name: str, layers: int) -> Floats:
  """Return the factors of columns by adapter, [L, 1 + adapters, columns].

  Row 0 is for no adapter: all ones.
  """
  known = {i: each.scaling[name] for i, each in enumerate(adapters, 1) if name in each.scaling}
  width = next(iter(known.values())).shape[1]
  out = np.ones((layers, 1 + len(adapters), width), np.float32)
  for number, values in known.items():
    out[:, number] = values
  return out
