"""Converting a directory of safetensors beside copying it, in one run, and its peak memory.

    python -m benchmarks.convert_public --gigabytes=4 --directory=SCRATCH

Run from the root of a checkout. Makes a Llama-shaped model of random bfloat16 values, in files of
about 1 GB with an index, and times, each with a cold page cache for the source:

  copy        cp of the source, and a sync of the copy
  convert     python -m t5x_inference_ext.convert_checkpoint to bfloat16 and to int8, each in a
              process of its own, with start-up, reading back from the disk and renaming

The benchmark needs about 2.2 times --gigabytes of disk, and removes all files that it made.
"""

import argparse
import json
import pathlib
import shutil
import tempfile

import ml_dtypes
import numpy as np

from benchmarks import convert as t5x_convert

FILE_BYTES = 10**9
D_MODEL, D_FF, HEADS, KV_HEADS, VOCABULARY = 2048, 5632, 32, 4, 32000
POOL = 2**25  # number of random values from which tensors are cut


def layer(i: int) -> dict[str, tuple[int, ...]]:
  """Return the shapes of a layer's tensors, by name."""
  kv = D_MODEL // HEADS * KV_HEADS
  matrices = {
    'self_attn.q_proj': (D_MODEL, D_MODEL),
    'self_attn.k_proj': (kv, D_MODEL),
    'self_attn.v_proj': (kv, D_MODEL),
    'self_attn.o_proj': (D_MODEL, D_MODEL),
    'mlp.gate_proj': (D_FF, D_MODEL),
    'mlp.up_proj': (D_FF, D_MODEL),
    'mlp.down_proj': (D_MODEL, D_FF),
  }
  norms = dict.fromkeys(('input_layernorm', 'post_attention_layernorm'), (D_MODEL,))
  return {f'model.layers.{i}.{name}.weight': s for name, s in {**matrices, **norms}.items()}


def shapes(gigabytes: float) -> tuple[int, dict[str, tuple[int, ...]]]:
  """Return a number of layers, and the shapes of all tensors, which take about `gigabytes`."""
  outside = {
    'model.embed_tokens.weight': (VOCABULARY, D_MODEL),
    'lm_head.weight': (VOCABULARY, D_MODEL),
    'model.norm.weight': (D_MODEL,),
  }
  layers = max(1, round((gigabytes * 1e9 - nbytes(outside)) / nbytes(layer(0))))
  tensors = dict(outside)
  for i in range(layers):
    tensors |= layer(i)
  return layers, tensors


def nbytes(tensors: dict[str, tuple[int, ...]]) -> int:
  """Return the bytes of tensors in bfloat16."""
  return 2 * sum(int(np.prod(shape)) for shape in tensors.values())


def make(path: pathlib.Path, layers: int, tensors: dict[str, tuple[int, ...]]) -> None:
  """Write config.json, the files and their index."""
  path.mkdir(parents=True)
  config = {
    'model_type': 'llama',
    'hidden_size': D_MODEL,
    'intermediate_size': D_FF,
    'num_attention_heads': HEADS,
    'num_key_value_heads': KV_HEADS,
    'num_hidden_layers': layers,
    'vocab_size': VOCABULARY,
    'rms_norm_eps': 1e-5,
    'rope_theta': 1e4,
    'hidden_act': 'silu',
    'tie_word_embeddings': False,
    'bos_token_id': 1,
    'eos_token_id': 2,
  }
  (path / 'config.json').write_text(json.dumps(config))
  files: list[dict[str, tuple[int, ...]]] = [{}]
  for name, shape in tensors.items():
    if nbytes(files[-1]) + nbytes({name: shape}) > FILE_BYTES and files[-1]:
      files.append({})
    files[-1][name] = shape
  rng = np.random.default_rng(0)
  pool = (0.02 * rng.standard_normal(POOL, np.float32)).astype(ml_dtypes.bfloat16)
  index = {}
  for number, held in enumerate(files, 1):
    file = f'model-{number:05}-of-{len(files):05}.safetensors'
    header, position = {}, 0
    for name, shape in held.items():
      end = position + nbytes({name: shape})
      header[name] = {'dtype': 'BF16', 'shape': shape, 'data_offsets': [position, end]}
      position, index[name] = end, file
    data = json.dumps(header).encode()
    with open(path / file, 'wb') as f:
      f.write(len(data).to_bytes(8, 'little') + data)
      for shape in held.values():
        left = int(np.prod(shape))
        while left:
          begin = int(rng.integers(POOL))
          piece = pool[begin : begin + left]
          f.write(piece.tobytes())
          left -= len(piece)
  (path / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': index}))


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--gigabytes', type=float, default=4.0, help='of bfloat16 parameters')
  parser.add_argument(
    '--directory', default=None, help='where to work; by default the temporary directory'
  )
  parser.add_argument('--workers', type=int, default=t5x_convert.CORES, help='threads')
  arguments = parser.parse_args()
  free = shutil.disk_usage(arguments.directory or tempfile.gettempdir()).free
  if free < arguments.gigabytes * 2.3e9:
    raise SystemExit(
      f'error: {free / 1e9:.1f} GB are free, {arguments.gigabytes * 2.3:.1f} GB needed'
    )
  layers, tensors = shapes(arguments.gigabytes)
  size = nbytes(tensors)
  with tempfile.TemporaryDirectory(dir=arguments.directory) as scratch:
    source, target = pathlib.Path(scratch) / 'source', pathlib.Path(scratch) / 'out'
    make(source, layers, tensors)
    print(
      f'{layers} layers, {size / 1e9:.2f} GB of bfloat16; {t5x_convert.CORES} cores', flush=True
    )
    rows = {'copy and sync': (*t5x_convert.copy(source, target), None)}
    for weights in ('bfloat16', 'int8'):
      taken, peak = t5x_convert.convert(source, target, arguments.workers, weights)
      rows[f'convert to {weights}'] = *taken, peak
      shutil.rmtree(target)
  copied = rows['copy and sync'][0]
  print('| | seconds | MB/s of bfloat16 | of the speed of cp | processor seconds | peak memory |')
  print('|---|---|---|---|---|---|')
  for name, (taken, processor, peak) in rows.items():
    memory = '' if peak is None else f'{peak / 1e9:.2f} GB'
    print(
      f'| {name} | {taken:.1f} | {size / taken / 1e6:.0f} | {copied / taken:.2f} '
      f'| {processor:.1f} | {memory} |'
    )


if __name__ == '__main__':
  main()
