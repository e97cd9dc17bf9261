"""Estimated time of one product by weights of each dtype, as compiled for a TPU: a table, no TPU.

  python -m benchmarks.weight_products [--slice=v4:2x2x1] [--rows=64] [--shape=18432x4608]

Each chip multiplies its own activations [rows, in] in bfloat16 by its own matrix [in, out], in
bfloat16, int8 and int4. The time is precompile's serial estimate; the bound is that of reading the
matrix once. The last column says which float arrays as large as the matrix the program writes: none
means that int8 and int4 are converted inside the product. Needs libtpu.
"""

import argparse
import math
import os

os.environ['JAX_PLATFORMS'] = 'cpu'  # before jax is imported: nothing is computed here

import jax  # noqa: E402
from jax.sharding import Mesh, NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402
import numpy as np  # noqa: E402

from t5x_inference_ext import hardware  # noqa: E402
from t5x_inference_ext.precompile.estimate import estimate  # noqa: E402
from t5x_inference_ext.precompile.hlo_parser import parse_hlo  # noqa: E402
from t5x_inference_ext.precompile.loops import executed  # noqa: E402
from t5x_inference_ext.precompile.slices import topology_devices  # noqa: E402
from t5x_inference_ext.quantization import int8  # noqa: E402
from t5x_inference_ext.quantization.formats import stored_size  # noqa: E402
from t5x_inference_ext.sharding.torus import TpuSlice, parse_slice  # noqa: E402


def compiled_text(slice_: TpuSlice, rows: int, shape: tuple[int, int], dtype: str) -> str:
  """Return the compiled program of one product on each chip of a slice."""
  mesh = Mesh(np.asarray(topology_devices(slice_)), ('chips',))
  split = NamedSharding(mesh, P('chips'))

  def product(x: jax.Array, w: jax.Array) -> jax.Array:
    return int8.matmul(x[0], w[0])[None]

  specs = P('chips'), P('chips')
  each = jax.jit(jax.shard_map(product, mesh=mesh, in_specs=specs, out_specs=P('chips')))
  arguments = (
    jax.ShapeDtypeStruct((slice_.chips, rows, shape[0]), 'bfloat16', sharding=split),
    jax.ShapeDtypeStruct((slice_.chips, *shape), dtype, sharding=split),
  )
  return each.lower(*arguments).compile().as_text() or ''


def float_copies(text: str, elements: int) -> list[str]:
  """Return the float arrays in HBM, written by an instruction, as large as the matrix."""
  runs, _ = executed(parse_hlo(text))
  return [
    str(made)
    for run in runs
    for made in run.instruction.shapes
    if run.instruction.opcode != 'parameter'
    and made.dtype in ('bf16', 'f32')
    and made.elements >= elements
    and not made.on_chip
  ]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--slice', default='v4:2x2x1')
  parser.add_argument('--rows', type=int, default=64)
  parser.add_argument('--shape', default='18432x4608', help='INxOUT')
  options = parser.parse_args()
  slice_, shape = parse_slice(options.slice), tuple(map(int, options.shape.split('x')))
  chip = hardware.chip(slice_.kind)
  print(f'[{options.rows}, {shape[0]}] x [{shape[0]}, {shape[1]}] on a chip of {slice_}')
  print(f'{"weights":10}{"us":>8}{"read, us":>10}  float copies')
  for dtype in ('bfloat16', 'int8', 'int4'):
    text = compiled_text(slice_, options.rows, shape, dtype)
    seconds = estimate(text, slice_, {'chips': slice_.chips}, range(slice_.chips)).serial_seconds
    read = stored_size(math.prod(shape), dtype) / chip.hbm_bandwidth
    copies = float_copies(text, math.prod(shape)) if dtype != 'bfloat16' else []
    print(f'{dtype:10}{seconds * 1e6:8.1f}{read * 1e6:10.1f}  {", ".join(copies) or "none"}')


if __name__ == '__main__':
  main()
