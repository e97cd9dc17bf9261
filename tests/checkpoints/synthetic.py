"""Small random checkpoints in every form that T5X writes, made without T5X."""

import json
import pathlib
import zlib

import msgpack
import numpy as np
import tensorstore as ts

from t5x_inference_ext import params
from t5x_inference_ext.config import ModelConfig

CONFIG = ModelConfig(num_layers=2, d_model=8, d_ff=24, num_heads=3, d_head=4, vocab_size=12)
Leaves = dict[str, np.ndarray]


def contents(path: pathlib.Path) -> dict[str, bytes]:
  """The files below a directory, by relative path."""
  return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob('*') if p.is_file()}


def canonical(config: ModelConfig = CONFIG, seed: int = 0) -> Leaves:
  """Random float32 values for every canonical tensor."""
  rng = np.random.default_rng(seed)
  return {
    name: rng.standard_normal(p.shape).astype(np.float32)
    * (0.1 if p.kind in ('norm', 'bias') else 1)
    for name, p in params.parameters(config).items()
  }


def told(config: ModelConfig, **changes) -> dict:
  """Conventions of a DecoderLayer of this model, as arguments of open_checkpoint."""
  names = ('norm_scale', 'norm_epsilon', 'mlp', 'positions', 'rope_max_timescale')
  return {**{name: getattr(config, name) for name in names}, 'rescale_logits': True, **changes}


def fused(tensors: Leaves, config: ModelConfig = CONFIG) -> Leaves:
  """The scanned tree of these tensors, head by head as ParallelFusedDecoderLayer fuses them."""
  c = config
  g = c.d_ff // c.num_heads
  inputs = [tensors[name] for name in c.mlp_inputs]
  q_wi = np.zeros((c.d_model, c.num_layers, c.num_heads, c.d_head + len(inputs) * g), np.float32)
  o_wo = np.zeros((c.num_heads, c.num_layers, c.d_head + g, c.d_model), np.float32)
  kv = np.zeros((c.d_model, c.num_layers, c.num_kv_heads, 2 * c.d_head), np.float32)
  for layer in range(c.num_layers):
    for head in range(c.num_kv_heads):
      columns = slice(head * c.d_head, (head + 1) * c.d_head)
      kv[:, layer, head] = np.concatenate(
        [tensors[name][layer][:, columns] for name in ('key', 'value')], axis=1
      )
    for head in range(c.num_heads):
      query, mlp = slice(head * c.d_head, (head + 1) * c.d_head), slice(head * g, (head + 1) * g)
      q_wi[:, layer, head] = np.concatenate(
        [tensors['query'][layer][:, query], *(x[layer][:, mlp] for x in inputs)], axis=1
      )
      o_wo[head, layer] = np.concatenate(
        [tensors['attention_output'][layer][query], tensors['mlp_output'][layer][mlp]], axis=0
      )
  kernels = {'q_wi_fused': q_wi, 'kv_fused': kv, 'o_wo_fused': o_wo}
  return {
    **_norms(tensors, layer_norm='layer_norm'),
    **{f'decoder/decoder/{module}/kernel': kernel for module, kernel in kernels.items()},
  }


def separate(
  tensors: Leaves, config: ModelConfig, *, split: bool = False, attention: str = '', mlp: str = ''
) -> Leaves:
  """The scanned tree of these tensors as DecoderLayer stores them, serial or parallel.

  Args:
    tensors: canonical.
    config: their model.
    split: heads in an axis of their own.
    attention, mlp: what is fused: 'kv' or 'qkv'; 'wi'.
  """
  c = config
  kernels = {
    'self_attention/out': tensors['attention_output'].reshape(
      c.num_layers, *((c.num_heads, c.d_head) if split else (-1,)), c.d_model
    ),
    'mlp/wo': tensors['mlp_output'],
  }
  heads = {'query': c.num_heads, 'key': c.num_kv_heads, 'value': c.num_kv_heads}
  by_head = {
    name: tensors[name].reshape(c.num_layers, c.d_model, count, c.d_head)
    for name, count in heads.items()
  }
  together = {'': (), 'kv': ('key', 'value'), 'qkv': ('query', 'key', 'value')}[attention]
  if together:
    kernels[f'self_attention/{attention}_fused'] = np.stack([by_head[name] for name in together], 2)
  for name in heads:
    if name not in together:  # flaxformer's multiquery keys have no axis of heads to split
      merged = not split or heads[name] == 1
      kernels[f'self_attention/{name}'] = tensors[name] if merged else by_head[name]
  inputs = [tensors[name] for name in c.mlp_inputs]
  if mlp:
    kernels['mlp/wi_fused'] = np.stack(inputs, 2)
  else:
    kernels.update(
      {f'mlp/wi_{i}' if len(inputs) > 1 else 'mlp/wi': x for i, x in enumerate(inputs)}
    )
  if c.block == 'serial':
    norms = _norms(
      tensors, attention_norm='pre_self_attention_layer_norm', mlp_norm='pre_mlp_layer_norm'
    )
  else:
    norms = _norms(tensors, layer_norm='layer_norm')
  return {
    **norms,
    **{f'decoder/decoder/{module}/kernel': np.moveaxis(x, 0, 1) for module, x in kernels.items()},
  }


def _norms(tensors: Leaves, **modules: str) -> Leaves:
  """The embedding and the norms; `modules` are those of a layer."""
  leaves = {'decoder/token_embedder/embedding': tensors['embedding']}
  for suffix, leaf in (('', 'scale'), ('_bias', 'bias')):
    if f'final_norm{suffix}' in tensors:
      leaves[f'decoder/decoder_norm/{leaf}'] = tensors[f'final_norm{suffix}']
      leaves.update(
        {
          f'decoder/decoder/{module}/{leaf}': tensors[f'{name}{suffix}'].T
          for name, module in modules.items()
        }
      )
  return leaves


def quantized(leaves: Leaves) -> Leaves:
  """A scanned tree with each kernel as qkernel and qscale: a weight is qkernel / qscale (AQT)."""
  out = {}
  for name, values in leaves.items():
    if not name.endswith('kernel'):
      out[name] = values
      continue
    axes = (0, 2) if 'o_wo' in name or ('/out/' in name and values.ndim == 4) else (0,)
    scale = np.abs(values).max(axes, keepdims=True) / np.float32(127)
    out[name.replace('kernel', 'qkernel')] = np.rint(values / scale).astype(np.int8)
    out[name.replace('kernel', 'qscale')] = 1 / scale
  return out


def per_layer(leaves: Leaves) -> Leaves:
  """A scanned tree as one with a subtree a layer."""
  out = {}
  for name, values in leaves.items():
    if name.startswith('decoder/decoder/'):
      for i in range(values.shape[1]):
        out[name.replace('decoder/decoder/', f'decoder/layers_{i}/')] = np.ascontiguousarray(
          values.take(i, 1)
        )
    else:
      out[name] = values
  return out


def layers_first(leaves: Leaves) -> Leaves:
  """A scanned tree with the layer axis in front: flaxformer's scan_axis=0."""
  return {
    name: np.moveaxis(values, 1, 0) if name.startswith('decoder/decoder/') else values
    for name, values in leaves.items()
  }


def pack_array(values: np.ndarray) -> msgpack.ExtType:
  """An array as flax.serialization writes it."""
  values = np.asarray(values)
  return msgpack.ExtType(
    1, msgpack.packb((values.shape, values.dtype.name, values.tobytes()), use_bin_type=True)
  )


def nest(flat: dict) -> dict:
  tree = {}
  for name, value in flat.items():
    *keys, last = name.split('/')
    node = tree
    for key in keys:
      node = node.setdefault(key, {})
    node[last] = value
  return tree


def write_legacy(
  path: pathlib.Path,
  leaves: Leaves,
  *,
  prefix: str = 'optimizer/',
  inline: bool = False,
  state: bool = False,
  chunks: int | None = None,
  step: int = 7,
) -> pathlib.Path:
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
    index.update(
      {f'{prefix}state/param_states/{n}/v': pack_array(np.zeros(3, np.float32)) for n in leaves}
    )
  for name, values in leaves.items():
    if inline:
      index[f'{prefix}target/{name}'] = pack_array(values)
      continue
    directory = f'target.{name.replace("/", ".")}'
    metadata = {
      'shape': list(values.shape),
      'chunks': [min(n, chunks or n) for n in values.shape],
      'compressor': {'id': 'gzip', 'level': 1},
    }
    index[f'{prefix}target/{name}'] = {
      'driver': 'zarr',
      'dtype': values.dtype.name,
      'kvstore': {'driver': 'file', 'path': f'{directory}/'},
      'metadata': metadata,
    }
    write_array({'driver': 'file', 'path': f'{path}/{directory}/'}, 'zarr', metadata, values)
  (path / 'checkpoint').write_bytes(msgpack.packb(nest({'version': 3, **index}), use_bin_type=True))
  return path


def write_orbax(
  path: pathlib.Path,
  leaves: Leaves,
  *,
  ocdbt: bool = True,
  zarr3: bool = False,
  prefix: str = '',
  step: int = 7,
) -> pathlib.Path:
  """A checkpoint as Orbax lays it out: arrays in one OCDBT store or in directories."""
  state = path / 'state'
  state.mkdir(parents=True)
  arrays = {f'{prefix}target/{name}': values for name, values in leaves.items()}
  arrays[f'{prefix}state/step'] = np.array(step, np.int32)
  tree = {}
  for name, values in arrays.items():
    keys = name.split('/')
    tree[str(tuple(keys))] = {
      'key_metadata': [{'key': key, 'key_type': 2} for key in keys],
      'value_metadata': {'value_type': 'jax.Array', 'skip_deserialize': False},
    }
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
    'value_metadata': {'value_type': 'Dict', 'skip_deserialize': True},
  }
  (state / '_METADATA').write_text(
    json.dumps(
      {
        'tree_metadata': tree,
        'use_ocdbt': ocdbt,
        'use_zarr3': zarr3,
        'store_array_data_equal_to_fill_value': True,
      }
    )
  )
  return path


def write_array(kvstore: dict, driver: str, metadata: dict, values: np.ndarray) -> None:
  spec = {
    'driver': driver,
    'kvstore': kvstore,
    'metadata': metadata,
    'dtype': values.dtype.name,
    'store_data_equal_to_fill_value': True,
  }
  ts.open(spec, create=True).result().write(values).result()


def rewrite_header(directory, change) -> None:
  """Change serving_config.json by a function of its content, with a checksum that fits again."""
  path = pathlib.Path(directory) / 'serving_config.json'
  header = json.loads(path.read_text())
  change(header)
  header.pop('crc32', None)
  # Of the file with zeros in the checksum's place.
  blank = json.dumps({**header, 'crc32': '0' * 8}).encode()
  path.write_text(json.dumps({**header, 'crc32': f'{zlib.crc32(blank):08x}'}))
