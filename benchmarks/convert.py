"""Time and peak memory of converting a large T5X checkpoint, beside copying and decompressing it.

    python -m benchmarks.convert --gigabytes=8 --directory=SCRATCH

Run from the root of a checkout. Makes a checkpoint of T5X's own format with random normal values in
float32, in chunks as T5X would cut them (at most 64 MiB, gzip level 1), and times, each with a cold
page cache for the source:

  copy        cp of the compressed source, and a sync of the copy
  decompress  reading all chunk files and decompressing them with zlib on all cores, keeping nothing
  convert     python -m t5x_inference_ext.convert_checkpoint to int8, in a process of its own, with
              start-up, reading back from the disk and renaming

The benchmark needs about 2.2 times --gigabytes of disk. It removes all files that it made, except
the checkpoint in --source, which it makes if it is missing. Processor seconds are those of all
threads: on a machine with other users, they tell more than wall time.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
import zlib

import msgpack
import numpy as np
import tensorstore as ts

from t5x_inference_ext.checkpoints.conversion import t5x_output
from t5x_inference_ext.checkpoints.readers import legacy
from t5x_inference_ext.config import ModelConfig

CORES = len(os.sched_getaffinity(0))
COMPRESSOR = {'id': 'gzip', 'level': 1}


def model(gigabytes: float) -> ModelConfig:
  """Return a PaLM-style model whose float32 parameters take about this much."""
  layer = ModelConfig(
    num_layers=1, d_model=2048, d_ff=8192, num_heads=8, d_head=256, vocab_size=32128
  )
  per_layer = dataclasses.replace(layer, num_layers=2).num_params - layer.num_params
  layers = max(1, round((gigabytes * 1e9 / 4 - layer.num_params + per_layer) / per_layer))
  return dataclasses.replace(layer, num_layers=layers)


def leaves(c: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Return the shapes of flaxformer's scanned tree, by name."""
  g = c.d_ff // c.num_heads
  return {
    'decoder/token_embedder/embedding': (c.vocab_size, c.d_model),
    'decoder/decoder_norm/scale': (c.d_model,),
    'decoder/decoder/layer_norm/scale': (c.d_model, c.num_layers),
    'decoder/decoder/q_wi_fused/kernel': (c.d_model, c.num_layers, c.num_heads, c.d_head + 2 * g),
    'decoder/decoder/kv_fused/kernel': (c.d_model, c.num_layers, 1, 2 * c.d_head),
    'decoder/decoder/o_wo_fused/kernel': (c.num_heads, c.num_layers, c.d_head + g, c.d_model),
  }


def make(path: pathlib.Path, config: ModelConfig) -> None:
  """Write the checkpoint."""
  path.mkdir(parents=True)
  target, jobs = {}, []
  context = ts.Context(
    {'cache_pool': {'total_bytes_limit': 0}, 'data_copy_concurrency': {'limit': CORES}}
  )
  for name, shape in leaves(config).items():
    directory = f'target.{name.replace("/", ".")}'
    chunks = t5x_output.t5x_chunk_shape(shape, t5x_output.CHUNK_BYTES // 4)
    metadata = {'shape': list(shape), 'chunks': list(chunks), 'compressor': COMPRESSOR}
    store = ts.open(
      {
        'driver': 'zarr',
        'kvstore': {'driver': 'file', 'path': f'{path}/{directory}/'},
        'metadata': metadata,
        'dtype': 'float32',
      },
      create=True,
      context=context,
    ).result()
    *keys, last = name.split('/')
    node = target
    for key in keys:
      node = node.setdefault(key, {})
    node[last] = {
      'driver': 'zarr',
      'dtype': 'float32',
      'kvstore': {'driver': 'file', 'path': f'{directory}/'},
      'metadata': metadata,
    }
    for place in np.ndindex(*(n // c for n, c in zip(shape, chunks))):
      jobs.append((store, tuple(slice(p * c, (p + 1) * c) for p, c in zip(place, chunks))))

  def write(job):
    number, (store, index) = job
    shape = [s.stop - s.start for s in index]
    values = np.random.default_rng(number).standard_normal(shape, np.float32)
    values *= np.float32(0.02)
    store[index].write(values).result()

  with concurrent.futures.ThreadPoolExecutor(CORES) as pool:
    list(pool.map(write, enumerate(jobs)))
  index = {
    'version': 3,
    'optimizer': {'target': target, 'state': {'step': legacy.pack_array(np.int32(1000))}},
  }
  (path / 'checkpoint').write_bytes(msgpack.packb(index, use_bin_type=True))


def chunk_files(path: pathlib.Path) -> list[pathlib.Path]:
  return [
    f
    for f in path.rglob('*')
    if f.is_file() and not f.name.startswith('.') and f.name != 'checkpoint'
  ]


def forget(path: pathlib.Path) -> None:
  """Write a directory's files to the disk, and drop them from the page cache."""
  for file in path.rglob('*'):
    if file.is_file():
      with open(file, 'rb') as f:
        os.fsync(f.fileno())
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy(source: pathlib.Path, target: pathlib.Path) -> tuple[float, float]:
  """Copy a directory; return seconds, and processor seconds."""
  forget(source)
  start, before = time.perf_counter(), os.times()
  subprocess.run(['cp', '-r', str(source), str(target)], check=True)
  subprocess.run(['sync', '-f', str(target)], check=True)
  seconds, after = time.perf_counter() - start, os.times()
  shutil.rmtree(target)
  return seconds, sum(after[2:4]) - sum(before[2:4])


def decompress(source: pathlib.Path) -> tuple[float, float]:
  """Decompress all chunk files; return seconds, and processor seconds."""
  forget(source)
  start, before = time.perf_counter(), time.process_time()
  with concurrent.futures.ThreadPoolExecutor(CORES) as pool:
    sizes = pool.map(lambda f: len(zlib.decompress(f.read_bytes(), 31)), chunk_files(source))
    sum(sizes)
  return time.perf_counter() - start, time.process_time() - before


def convert(
  source: pathlib.Path, target: pathlib.Path, workers: int, weights: str = 'int8'
) -> tuple[tuple[float, float], int]:
  """Convert; return (seconds, processor seconds), and the process's peak resident bytes."""
  forget(source)
  command = [
    sys.executable,
    '-m',
    't5x_inference_ext.convert_checkpoint',
    f'--input={source}',
    f'--output={target}',
    f'--weights={weights}',
    f'--workers={workers}',
  ]
  start = time.perf_counter()
  process = subprocess.Popen(command, env={**os.environ, 'PYTHONPATH': os.getcwd()})
  _, status, usage = os.wait4(process.pid, 0)
  seconds = time.perf_counter() - start
  process.returncode = os.waitstatus_to_exitcode(status)
  if process.returncode:
    raise SystemExit(process.returncode)
  return (seconds, usage.ru_utime + usage.ru_stime), usage.ru_maxrss * 1024


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--gigabytes', type=float, default=8.2, help='of float32 parameters')
  parser.add_argument(
    '--directory', default=None, help='where to work; by default the temporary directory'
  )
  parser.add_argument(
    '--source', default=None, help='the checkpoint, made where it is not there, and kept'
  )
  parser.add_argument('--workers', type=int, default=CORES, help='threads of the conversion')
  arguments = parser.parse_args()
  free = shutil.disk_usage(arguments.directory or tempfile.gettempdir()).free
  if free < arguments.gigabytes * 2.3e9:
    raise SystemExit(
      f'error: {free / 1e9:.1f} GB are free, {arguments.gigabytes * 2.3:.1f} GB needed'
    )
  config = model(arguments.gigabytes)
  with tempfile.TemporaryDirectory(dir=arguments.directory) as scratch:
    scratch = pathlib.Path(scratch)
    source = pathlib.Path(arguments.source) if arguments.source else scratch / 'source'
    start = time.perf_counter()
    nbytes = 4 * sum(int(np.prod(shape)) for shape in leaves(config).values())
    if not source.exists():
      make(source, config)
    stored = sum(f.stat().st_size for f in chunk_files(source))
    print(
      f'{config}\n{nbytes / 1e9:.2f} GB of float32, {stored / 1e9:.2f} GB compressed, in '
      f'{len(chunk_files(source))} chunks, made in {time.perf_counter() - start:.0f} s; {CORES} '
      'cores',
      flush=True,
    )
    rows = {
      'copy and sync': copy(source, scratch / 'copy'),
      'decompress on all cores': decompress(source),
    }
    rows['convert to int8'], peak = convert(source, scratch / 'out', arguments.workers)
    for name, (taken, processor) in rows.items():
      print(
        f'{name:26}{taken:8.1f} s {nbytes / taken / 1e6:8.1f} MB/s of float32 {processor:8.1f} '
        'processor s'
      )
    ratio = (
      max(rows['copy and sync'][0], rows['decompress on all cores'][0]) / rows['convert to int8'][0]
    )
    print(f'convert: {ratio:.2f} of the slower of the other two; peak RSS {peak / 1e9:.2f} GB')
    print(
      json.dumps(
        {'bytes': nbytes, 'seconds, processor seconds': rows, 'peak_rss': peak, 'ratio': ratio}
      )
    )


if __name__ == '__main__':
  main()
