"""Small random checkpoints in every form that T5X writes, made with numpy, msgpack and tensorstore alone."""

import json
import pathlib

import msgpack
import numpy as np
import tensorstore as ts

from t5x_inference_ext import parameters
from t5x_inference_ext.config import ModelConfig

CONFIG = ModelConfig(num_layers=2, d_model=8, d_ff=24, num_heads=3, d_head=4, vocab_size=12)
Leaves = dict[str, np.ndarray]


def canonical(config: ModelConfig = CONFIG, seed: int = 0) -> Leaves:
  """Random float32 values for every canonical tensor."""
  rng = np.random.default_rng(seed)
  return {name: rng.standard_normal(p.shape).astype(np.float32) * (.1 if p.kind == 'norm' else 1)
          for name, p in parameters.parameters(config).items()}


def fused(tensors: Leaves, config: ModelConfig = CONFIG) -> Leaves:
  """The scanned tree of these tensors, head by head as flaxformer fuses them."""
  c = config
  g = c.d_ff // c.num_heads
  q_wi = np.zeros((c.d_model, c.num_layers, c.num_heads, c.d_head + 2 * g), np.float32)
  o_wo = np.zeros((c.num_heads, c.num_layers, c.d_head + g, c.d_model), np.float32)
  kv = np.zeros((c.d_model, c.num_layers, 1, 2 * c.d_head), np.float32)
  for layer in range(c.num_layers):
    kv[:, layer, 0] = np.concatenate([tensors['key'][layer], tensors['value'][layer]], axis=1)
    for head in range(c.num_heads):
      query, mlp = slice(head * c.d_head, (head + 1) * c.d_head), slice(head * g, (head + 1) * g)
      q_wi[:, layer, head] = np.concatenate(
          [tensors['query'][layer][:, query], tensors['gate'][layer][:, mlp], tensors['linear'][layer][:, mlp]], axis=1)
      o_wo[head, layer] = np.concatenate(
          [tensors['attention_output'][layer][query], tensors['mlp_output'][layer][mlp]], axis=0)
  return {
      'decoder/token_embedder/embedding': tensors['embedding'],
      'decoder/decoder_norm/scale': tensors['final_norm'],
      'decoder/decoder/layer_norm/scale': tensors['layer_norm'].T,
      'decoder/decoder/q_wi_fused/kernel': q_wi,
      'decoder/decoder/kv_fused/kernel': kv,
      'decoder/decoder/o_wo_fused/kernel': o_wo,
  }


def quantized(leaves: Leaves) -> Leaves:
  """A scanned tree with each kernel as qkernel and qscale."""
  out = {}
  for name, values in leaves.items():
    if not name.endswith('kernel'):
      out[name] = values
      continue
    axes = (0, 2) if 'o_wo' in name else (0,)
    scale = np.abs(values).max(axes, keepdims=True) / np.float32(127)
    out[name.replace('kernel', 'qkernel')] = np.rint(values / scale).astype(np.int8)
    out[name.replace('kernel', 'qscale')] = scale
  return out


def per_layer(leaves: Leaves) -> Leaves:
  """A scanned tree as one with a subtree a layer."""
  out = {}
  for name, values in leaves.items():
    if name.startswith('decoder/decoder/'):
      for i in range(values.shape[1]):
        out[name.replace('decoder/decoder/', f'decoder/layers_{i}/')] = np.ascontiguousarray(values.take(i, 1))
    else:
      out[name] = values
  return out


def pack_array(values: np.ndarray) -> msgpack.ExtType:
  """An array as flax.serialization writes it."""
  values = np.asarray(values)
  return msgpack.ExtType(1, msgpack.packb((values.shape, values.dtype.name, values.tobytes()), use_bin_type=True))


def nest(flat: dict) -> dict:
  tree = {}
  for name, value in flat.items():
    *keys, last = name.split('/')
    node = tree
    for key in keys:
      node = node.setdefault(key, {})
    node[last] = value
  return tree


def write_legacy(path: pathlib.Path, leaves: Leaves, *, prefix: str = 'optimizer/', inline: bool = False,
                 state: bool = False, chunks: int | None = None, step: int = 7) -> pathlib.Path:
  """A checkpoint of T5X's own format.

  Args:
    path: the directory to make.
    leaves: by their place under target.
    prefix: of target and state in the index.
    inline: puts the arrays into the index.
    state: adds Adafactor-like optimizer state.
    chunks: the longest side of a chunk.
    step: the training step.
  """
  path.mkdir(parents=True)
  index = {f'{prefix}state/step': pack_array(np.int32(step))}
  if state:
    index.update({f'{prefix}state/param_states/{n}/v': pack_array(np.zeros(3, np.float32)) for n in leaves})
  for name, values in leaves.items():
    if inline:
      index[f'{prefix}target/{name}'] = pack_array(values)
      continue
    directory = f'target.{name.replace("/", ".")}'
    metadata = {'shape': list(values.shape), 'chunks': [min(n, chunks or n) for n in values.shape],
                'compressor': {'id': 'gzip', 'level': 1}}
    index[f'{prefix}target/{name}'] = {
        'driver': 'zarr', 'dtype': values.dtype.name, 'kvstore': {'driver': 'file', 'path': f'{directory}/'},
        'metadata': metadata}
    write_array({'driver': 'file', 'path': f'{path}/{directory}/'}, 'zarr', metadata, values)
  (path / 'checkpoint').write_bytes(msgpack.packb(nest({'version': 3, **index}), use_bin_type=True))
  return path


def write_orbax(path: pathlib.Path, leaves: Leaves, *, ocdbt: bool = True, zarr3: bool = False, prefix: str = '',
                step: int = 7) -> pathlib.Path:
  """A checkpoint as Orbax lays it out: state/_METADATA and arrays, in one OCDBT store or in directories."""
  state = path / 'state'
  state.mkdir(parents=True)
  arrays = {f'{prefix}target/{name}': values for name, values in leaves.items()}
  arrays[f'{prefix}state/step'] = np.array(step, np.int32)
  tree = {}
  for name, values in arrays.items():
    keys = name.split('/')
    tree[str(tuple(keys))] = {'key_metadata': [{'key': key, 'key_type': 2} for key in keys],
                              'value_metadata': {'value_type': 'jax.Array', 'skip_deserialize': False}}
    key = '.'.join(keys) + '/'
    if ocdbt:
      kvstore = {'driver': 'ocdbt', 'base': {'driver': 'file', 'path': f'{state}/'}, 'path': key}
    else:
      kvstore = {'driver': 'file', 'path': f'{state}/{key}'}
    if zarr3:
      grid = {'name': 'regular', 'configuration': {'chunk_shape': list(values.shape)}}
      metadata = {'shape': list(values.shape), 'chunk_grid': grid}
    else:
      metadata = {'shape': list(values.shape), 'chunks': list(values.shape)}
    write_array(kvstore, 'zarr3' if zarr3 else 'zarr', metadata, values)
  tree[str((f'{prefix}flax_mutables',))] = {
      'key_metadata': [{'key': 'flax_mutables', 'key_type': 2}],
      'value_metadata': {'value_type': 'Dict', 'skip_deserialize': True}}
  (state / '_METADATA').write_text(json.dumps(
      {'tree_metadata': tree, 'use_ocdbt': ocdbt, 'use_zarr3': zarr3, 'store_array_data_equal_to_fill_value': True}))
  return path


def write_array(kvstore: dict, driver: str, metadata: dict, values: np.ndarray) -> None:
  spec = {'driver': driver, 'kvstore': kvstore, 'metadata': metadata, 'dtype': values.dtype.name,
          'store_data_equal_to_fill_value': True}
  ts.open(spec, create=True).result().write(values).result()
