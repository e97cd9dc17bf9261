"""A decode step whose rows choose among LoRA, compiled for a TPU slice, beside one without. No TPU.

    python -m benchmarks.adapters_compile --model=palm_8b --slice=v4:2x2x1 --rows=32

The adapters are LoRA of --rank on queries and values, --adapters of them; each row may have any.
Both programs are compiled twice with few layers, and the time of all layers extrapolated from the
two serial estimates of `python -m t5x_inference_ext.precompile`: everything in sequence, nothing
overlapped. Needs libtpu.
"""

import argparse
import dataclasses
import os

os.environ['JAX_PLATFORMS'] = 'cpu'  # before jax is imported: nothing is computed here

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.sharding import NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

from t5x_inference_ext.compiler_options import compiler_options  # noqa: E402
from t5x_inference_ext.config import preset  # noqa: E402
from t5x_inference_ext.precompile import slices  # noqa: E402
from t5x_inference_ext.precompile.analysis import extrapolated  # noqa: E402
from t5x_inference_ext.precompile.case import CompileCase  # noqa: E402
from t5x_inference_ext.precompile.estimate import Estimate, estimate  # noqa: E402
from t5x_inference_ext.precompile.program import abstract_decode_cache, abstract_weights  # noqa: E402
from t5x_inference_ext.sharding.adapter_packing import adapter_spec, is_adapter_matrix  # noqa: E402
from t5x_inference_ext.sharding.columns import input_parts  # noqa: E402
from t5x_inference_ext.sharding.layout import Layout, num_shards  # noqa: E402
from t5x_inference_ext.sharding.torus import parse_slice  # noqa: E402

FEW_LAYERS = 2, 4
CHANGED = {'query', 'value'}


def lora_shapes(model, part, ranks: int) -> dict[str, tuple[int, ...]]:
  """Return the shapes of a layer's adapter arrays by name, as checkpoints.adapters.load packs them.

  Args:
    model: The model.
    part: The block part.
    ranks: Ranks of all adapters of one matrix.
  """
  config, found, total = model.config, {}, 0
  shards = num_shards(model.prefill_layout.stored_hidden, model.mesh.shape)
  for columns in input_parts(config, part, shards):
    own = ranks * len(CHANGED & set(columns.names))
    if own:
      found[f'in_b/{columns.names[0]}'] = own, shards * columns.width
      total += own
  return {**found, 'in_a': (config.d_model, total), 'in_owners': (total,)} if total else {}


def with_lora(weights, model, ranks: int, rows: int):
  """Return the shapes of unrolled weights with adapters, for rows that may have one each."""

  def struct(name: str, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    sharding = NamedSharding(model.mesh, adapter_spec(name, model.prefill_layout))
    dtype = jnp.dtype(model.dtype) if is_adapter_matrix(name) else jnp.int32
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  def of_layer(layer):
    parts = {}
    for part in model.config.block_parts:
      shapes = lora_shapes(model, part, ranks)
      arrays = {name: struct(name, shape) for name, shape in shapes.items()}
      parts[part.name] = dataclasses.replace(layer[part.name], adapters=arrays)
    return parts

  numbers = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=NamedSharding(model.mesh, P()))
  layers = tuple(map(of_layer, weights.layers))
  return dataclasses.replace(weights, layers=layers, adapter_rows=numbers)


def step(case: CompileCase, slice_, ranks: int) -> Estimate:
  """Return the estimate of a decode step; `ranks` is 0 without adapters."""
  mesh = slices.slice_mesh(slice_, case.config, None)
  model = case.model(mesh)
  weights = abstract_weights(model, case.weights, stacked=False)
  cache = abstract_decode_cache(model, weights, case.batch, case.context)
  whole = NamedSharding(mesh, P())
  tokens = jax.ShapeDtypeStruct((case.batch,), jnp.int32, sharding=whole)
  if ranks:
    weights = with_lora(weights, model, ranks, case.batch)

  def decode(weights, cache, tokens):
    best, cache = model.decode_greedily(weights, cache, tokens)
    return best.ids, cache

  lowered = jax.jit(decode, donate_argnames='cache').lower(weights, cache, tokens)
  compiled = lowered.compile(compiler_options=compiler_options(mesh.devices.flat[0]))
  return estimate(compiled.as_text(), slice_, mesh.shape)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--model', default='palm_8b')
  parser.add_argument('--weights', default='int8')
  parser.add_argument('--slice', default='v4:2x2x1')
  parser.add_argument('--layout', default='ws_2d/batch')
  parser.add_argument('--rows', type=int, default=32)
  parser.add_argument('--context', type=int, default=2048)
  parser.add_argument('--adapters', type=int, default=8)
  parser.add_argument('--rank', type=int, default=8)
  args = parser.parse_args()
  slice_, config = parse_slice(args.slice), preset(args.model)
  slices.check_slice(slice_)

  def seconds(layers: int, ranks: int) -> float:
    few = dataclasses.replace(config, num_layers=layers)
    layout = Layout.parse(args.layout)
    case = CompileCase(
      few, args.weights, 'decode', args.rows, args.context, layout, scan_layers=False
    )
    return step(case, slice_, ranks).serial_seconds

  times = []
  for ranks in 0, args.adapters * args.rank:
    few = [seconds(layers, ranks) for layers in FEW_LAYERS]
    whole = extrapolated(*few, FEW_LAYERS, config.num_layers)
    times.append(whole)
    a_layer = (few[1] - few[0]) / (FEW_LAYERS[1] - FEW_LAYERS[0])
    count = args.adapters if ranks else 0
    print(
      f'{args.model} {args.weights} {args.slice} {args.layout}, {args.rows} rows of '
      f'{args.context}, {count} LoRA of rank {args.rank}: {whole * 1e3:.2f} ms, '
      f'{a_layer * 1e6:.1f} us a layer',
      flush=True,
    )
  print(f'{times[1] / times[0]:.3f} of the time without')


if __name__ == '__main__':
  main()
