"""A decode step whose rows choose among LoRA, compiled for a TPU slice, beside one without. No TPU.

    python -m benchmarks.adapters_compile --model=palm_8b --slice=v4:2x2x1 --rows=32

The adapters are LoRA of --rank on queries and values, --adapters of them; each row may have any.
Both programs are compiled twice with few layers, and the time of all layers extrapolated from the
two serial estimates of `python -m t5x_inference_ext.precompile`: everything in sequence, nothing
overlapped. Needs libtpu.
"""

import dataclasses
import functools

# few_layers comes first: it keeps jax, which reads its settings when it is imported, on the CPU.
from benchmarks.few_layers import Times, all_layers, case_parser  # isort: split

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from t5x_inference_ext.compiler_options import compiler_options
from t5x_inference_ext.config import ModelConfig, preset
from t5x_inference_ext.precompile import slices
from t5x_inference_ext.precompile.case import CompileCase
from t5x_inference_ext.precompile.estimate import estimate
from t5x_inference_ext.precompile.program import abstract_decode_cache, abstract_weights
from t5x_inference_ext.sharding.adapter_packing import adapter_spec, is_adapter_matrix
from t5x_inference_ext.sharding.columns import input_parts
from t5x_inference_ext.sharding.layout import Layout, num_shards
from t5x_inference_ext.sharding.torus import parse_slice

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


def step(case: CompileCase, slice_, ranks: int) -> Times:
  """Return the times of a decode step; `ranks` is 0 without adapters."""
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
  return Times.of(estimate(compiled.as_text(), slice_, mesh.shape))


def main() -> None:
  parser = case_parser(__doc__, 'palm_8b', 'v4:2x2x1')
  parser.add_argument('--rows', type=int, default=32)
  parser.add_argument('--context', type=int, default=2048)
  parser.add_argument('--adapters', type=int, default=8)
  parser.add_argument('--rank', type=int, default=8)
  args = parser.parse_args()
  slice_, config = parse_slice(args.slice), preset(args.model)
  slices.check_slice(slice_)

  def times_of(few: ModelConfig, *, ranks: int) -> Times:
    layout = Layout.parse(args.layout)
    case = CompileCase(
      few, args.weights, 'decode', args.rows, args.context, layout, scan_layers=False
    )
    return step(case, slice_, ranks)

  times = []
  for ranks in 0, args.adapters * args.rank:
    whole = all_layers(config, functools.partial(times_of, ranks=ranks)).serial
    times.append(whole)
    count = args.adapters if ranks else 0
    print(
      f'{args.model} {args.weights} {args.slice} {args.layout}, {args.rows} rows of '
      f'{args.context}, {count} LoRA of rank {args.rank}: {whole * 1e3:.2f} ms',
      flush=True,
    )
  print(f'{times[1] / times[0]:.3f} of the time without')


if __name__ == '__main__':
  main()
