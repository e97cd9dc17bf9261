"""Bytes that compiled programs move, against predicted traffic and the paper's formulas.

Nothing is run. Programs are float32: the CPU compiler widens bfloat16 collectives. A program's and
a prediction's bytes are compared by kind of collective, since weights that are split over two
dimensions are gathered in two steps, of the same sum.
"""

import collections
import dataclasses
import functools
import json
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import pytest

from t5x_inference_ext.config import BlockPart, ModelConfig
from t5x_inference_ext.model.block import Layer, mlp
from t5x_inference_ext.model.cache import KVCache
from t5x_inference_ext.model.norm import norm
from t5x_inference_ext.model.positions import pass_angles
from t5x_inference_ext.model.projections import projections
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.model.vectors import local_vectors
from t5x_inference_ext.model.weights import Weights, layer_weights
from t5x_inference_ext.quantization.formats import weight_format
from t5x_inference_ext.sharding import traffic
from t5x_inference_ext.sharding.activations import ActivationSharding, shard_activations
from t5x_inference_ext.sharding.collective import Collective
from t5x_inference_ext.sharding.columns import column_widths
from t5x_inference_ext.sharding.layout import FEEDFORWARD, Layout
from t5x_inference_ext.sharding.mesh import AXES, make_mesh, parse_mesh
from t5x_inference_ext.sharding.packing import packed_tensors
from tests import hlo, memory

CACHE = 24  # positions


def model(**fields) -> ModelConfig:
  return ModelConfig(
    **{**dict(num_layers=1, d_model=64, d_ff=192, num_heads=8, d_head=6, vocab_size=101), **fields}
  )


MODELS = {
  'multiquery': model(),
  # Three heads are padded to the shards, and 2 Q columns of keys and values too.
  'padded': model(num_heads=3),
  'multihead': model(num_kv_heads=8, block='serial', mlp='gelu', norm='layer'),
  'grouped': model(num_heads=12, num_kv_heads=2, block='serial'),
  'cut': model(num_heads=6, d_head=256),
  'learned': model(
    num_kv_heads=8,
    block='serial',
    positions='learned',
    num_positions=30,
    embedding_norm=True,
    norm='layer',
    tied_head=False,
    head_bias=True,
  ),
  'rules': model(
    num_kv_heads=2,
    positions='relative',
    attention_soft_cap=5.0,
    logit_soft_cap=5.0,
    layer_pattern=('local',),
    window=3,
  ),
  # Features that move something, and biases, which move nothing.
  'two norms': model(
    parallel_norms=2, norm='layer', qkv_bias=True, attention_output_bias=True, mlp_bias=True
  ),
  'norms after': model(
    num_heads=12, num_kv_heads=2, block='serial', norm_position='after', qk_norm='rms_all'
  ),
  'norms around': model(
    num_heads=6, num_kv_heads=6, block='serial', norm_position='both', qk_norm='layer_all'
  ),
}


def mesh_sizes(text: str) -> dict[str, int]:
  return dict(zip(AXES, parse_mesh(text)))


def by_kind(moves: list[Collective]) -> dict[str, float]:
  """Bytes moved by the HLO's kinds."""
  totals = collections.defaultdict(float)
  for move in moves:
    totals[move.kind.replace('_', '-')] += move.moved
  return dict(totals)


def compiled(per_shard, mesh, arguments, in_specs, out_specs) -> list[hlo.Collective]:
  """Collectives of a compiled shard_map, whose inputs come sharded as in_specs says."""
  program = memory.quick_jit(
    jax.shard_map(per_shard, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
  )
  return hlo.collectives(program.lower(*_placed(arguments, in_specs, mesh)).compile().as_text())


def _placed(arguments, specs, mesh):
  return jax.tree.map(
    lambda a, spec: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec)),
    arguments,
    specs,
  )


def _layer_weights(config: ModelConfig, placed: ActivationSharding, mesh, int8: bool):
  """Shapes and specs of a layer."""
  layout = placed.layout
  scaled = weight_format('int8' if int8 else 'float32').scaled
  tensors = {
    n: t for n, t in packed_tensors(config, layout, mesh.shape, scaled).items() if t.per_layer
  }

  def dtype(t):
    return jnp.int8 if int8 and t.kind == 'matrix' else jnp.float32

  shapes = layer_weights({n: jax.ShapeDtypeStruct(t.shape, dtype(t)) for n, t in tensors.items()})
  return shapes, layer_weights({n: t.spec for n, t in tensors.items()})


def _cached(
  config: ModelConfig, placed: ActivationSharding, mesh, *lead: int
) -> jax.ShapeDtypeStruct:
  """[*lead, K, S, Q] of a cache, copies and padding of heads included."""
  heads = placed.heads.kv_heads * math.prod(mesh.shape[a] for a in placed.cache[1] or ())
  return jax.ShapeDtypeStruct((*lead, heads, CACHE, config.d_head), jnp.float32)


def layer_collectives(
  config: ModelConfig, placed: ActivationSharding, mesh, batch: int, length: int, int8: bool
):
  """Those of one layer; a single token per row attends to a cache."""
  weights, weight_specs = _layer_weights(config, placed, mesh, int8)
  x = jax.ShapeDtypeStruct((batch, length, config.d_model), jnp.float32)
  kv = _cached(config, placed, mesh, batch)
  lengths = jax.ShapeDtypeStruct((batch,), jnp.int32)
  decode = length == 1

  def run(x, w, keys, values, lengths):
    start = lengths if decode else jnp.zeros_like(lengths)
    positions = start[:, None] + jnp.arange(length)[None, :]
    angles = pass_angles(positions, config, placed.attention_positions)
    cache = KVCache(keys, values, lengths) if decode else None
    layer = Layer(config, placed, 'float32', angles, cache)
    inputs = local_vectors(w, config, placed), cache and cache.by_layer(), False
    (x,), kv = layer((x,), inputs)
    return x, kv

  specs = (P(*placed.residual), weight_specs, placed.cache, placed.cache, P(placed.attention_rows))
  return compiled(
    run,
    mesh,
    (x, weights, kv, kv, lengths),
    specs,
    (P(*placed.residual), (placed.cache, placed.cache)),
  )


def feedforward_collectives(config: ModelConfig, layout: Layout, mesh, batch: int, length: int):
  """Those of a serial block's MLP; its norm's all-reduce is the only one."""
  placed = shard_activations(layout, config, mesh.shape, batch, length)
  weights, specs = _layer_weights(config, placed, mesh, False)
  part = BlockPart('mlp', attention=False, mlp=True)
  x = jax.ShapeDtypeStruct((batch, length, config.d_model), jnp.float32)

  def run(x, w):
    w = local_vectors({'mlp': w}, config, placed)['mlp']
    project = projections(placed, part)
    y = norm(x, w.norm, w.norm_bias, config, placed.residual[2])
    columns = project.inputs(y, w, column_widths(config, part, placed.heads.stored.shards))
    return x + project.outputs(
      [mlp(columns, {}, config, placed, placed.reduce_scatter_dim(part) is not None)], w
    )

  return compiled(
    run, mesh, (x, weights['mlp']), (P(*placed.residual), specs['mlp']), P(*placed.residual)
  )


# The paper's appendix A.2: elements by kind of collective, of an MLP of two matrices.

FEEDFORWARD_MODEL = model(block='serial', mlp='gelu', d_model=128, d_ff=640)
FEEDFORWARD_TOKENS = (64, 2)


def paper_bytes(feedforward: str, mesh: dict[str, int], tokens: int, e: int, f: int, width: int):
  """[(kind, bytes, K)], as the paper writes them."""
  x, y, z = (mesh[a] for a in AXES)
  n = x * y * z
  if feedforward == 'ws_1d':
    elements = [('all-gather', tokens * e, n), ('reduce-scatter', tokens * e, n)]
  elif feedforward == 'ws_2d':
    elements = [
      (kind, count, k)
      for kind in ('all-gather', 'reduce-scatter')
      for count, k in ((tokens * e / x, y * z), (tokens * f / (y * z), x))
    ]
  else:
    gathered = {'wg_x': x, 'wg_xy': x * y, 'wg_xyz': n}[feedforward]
    elements = [('all-gather', e * f * gathered / n, gathered)] * 2
    elements += [
      (kind, tokens * e / gathered, n // gathered) for kind in ('all-gather', 'reduce-scatter')
    ]
  return [(kind, count * width, k) for kind, count, k in elements]


def feedforward_report(mesh_text: str) -> dict[str, list[tuple[str, int, float]]]:
  """Feedforward layout -> (kind, K, bytes moved) of each collective compiled."""
  mesh = make_mesh(parse_mesh(mesh_text))
  return {
    name: [
      (c.kind, c.shards, c.moved)
      for c in feedforward_collectives(FEEDFORWARD_MODEL, Layout(name), mesh, *FEEDFORWARD_TOKENS)
    ]
    for name in FEEDFORWARD
  }


# model, layout, batch, length of whole layers on 4x4x4.
LARGE_LAYERS = (('padded', 'ws_2d/batch', 64, 1), ('grouped', 'wg_xyz/batch', 16, 4))


def large_report() -> dict:
  """What a process with 64 devices compiles: of the feedforward layouts and of LARGE_LAYERS."""
  mesh = make_mesh((4, 4, 4))
  layers = []
  for name, layout, batch, length in LARGE_LAYERS:
    placed = shard_activations(Layout.parse(layout), MODELS[name], mesh.shape, batch, length)
    layers.append(hlo.moved(layer_collectives(MODELS[name], placed, mesh, batch, length, False)))
  return dict(feedforward=feedforward_report('4x4x4'), layers=layers)


@pytest.fixture(scope='module')
def large(repository) -> dict:
  """large_report of a process of its own: this one has 8 devices."""
  code = (
    'import json; from tests.sharding import traffic_test; '
    'print(json.dumps(traffic_test.large_report()))'
  )
  environment = {
    **os.environ,
    'XLA_FLAGS': '--xla_force_host_platform_device_count=64',
    'JAX_PLATFORMS': 'cpu',
  }
  result = subprocess.run(
    [sys.executable, '-c', code],
    capture_output=True,
    text=True,
    cwd=repository,
    env=environment,
    check=False,
  )
  assert result.returncode == 0, result.stderr
  return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope='module')
def feedforward_programs(large) -> dict[str, dict[str, list]]:
  return {'2x2x2': feedforward_report('2x2x2'), '4x4x4': large['feedforward']}


@pytest.mark.parametrize('mesh', ['2x2x2', '4x4x4'])
@pytest.mark.parametrize('feedforward', FEEDFORWARD)
def test_a_feedforward_program_moves_the_papers_formulas(feedforward_programs, feedforward, mesh):
  c, sizes = FEEDFORWARD_MODEL, mesh_sizes(mesh)
  tokens = math.prod(FEEDFORWARD_TOKENS)
  found = feedforward_programs[mesh][feedforward]
  formulas = paper_bytes(feedforward, sizes, tokens, c.d_model, c.d_ff, 4)
  expected, program = collections.defaultdict(float), collections.defaultdict(float)
  for kind, count, k in formulas:
    if k > 1:
      expected[kind] += count * (k - 1) / k
  for kind, _, moved in found:
    program[kind] += moved
  # The rows divide over all devices, so that d_model is split over x alone, in ws_2d alone.
  norm = (
    2 * 4 * tokens // (sizes['y'] * sizes['z']) * (1 - 1 / sizes['x'])
    if feedforward == 'ws_2d'
    else 0
  )
  assert program.pop('all-reduce', 0) == pytest.approx(norm, rel=0.01)
  assert dict(program) == pytest.approx(dict(expected), rel=0.01)
  if feedforward == 'ws_1d':  # over all three axes, which is done in two steps
    for kind in ('all-gather', 'reduce-scatter'):
      steps = [k for found_kind, k, _ in found if found_kind == kind]
      assert len(steps) == 2 and math.prod(steps) == math.prod(sizes.values())
  elif feedforward == 'ws_2d':  # collective by collective
    one_by_one = sorted((kind, k, moved) for kind, k, moved in found if kind != 'all-reduce')
    for (kind, k, moved), (wanted_kind, bytes_, wanted_k) in zip(
      one_by_one, sorted(formulas, key=lambda f: (f[0], f[2])), strict=True
    ):
      assert (kind, k) == (wanted_kind, wanted_k)
      assert moved == pytest.approx(bytes_ * (k - 1) / k, rel=0.01)
  predicted = traffic.feedforward_collectives(c, Layout(feedforward), sizes, tokens, 4, 4)
  assert by_kind(predicted) == pytest.approx(dict(expected), rel=1e-9)


# Whole layers.

LAYERS = [
  # model, layout, mesh, batch, length, int8
  *[
    (name, f'{feedforward}/batch', '2x2x2', 8, length, False)
    for name, length in (('multiquery', 1), ('multihead', 8))
    for feedforward in FEEDFORWARD
  ],
  *[
    ('padded', f'{feedforward}/heads', '2x2x2', 8, 8, False)
    for feedforward in ('ws_1d', 'ws_2d', 'wg_x', 'wg_xy')
  ],
  *[
    ('grouped', f'{feedforward}/batch', '2x2x2', 8, 8, True)
    for feedforward in ('ws_2d', 'wg_x', 'wg_xyz')
  ],
  ('multiquery', 'ws_2d/batch', '2x2x2', 8, 8, False),
  ('multiquery', 'wg_xyz/batch', '2x2x2', 8, 8, False),
  ('multihead', 'ws_2d/heads', '2x2x2', 8, 1, False),
  # Rows that fill some axes, or none; x is then reduced into heads, positions, or not at all.
  *[
    (name, 'ws_2d/batch', '2x2x2', batch, length, False)
    for name in ('padded', 'grouped')
    for batch, length in ((4, 1), (2, 8), (1, 8), (1, 1), (2, 3))
  ],
  ('grouped', 'ws_1d/batch', '2x2x2', 4, 8, False),
  ('grouped', 'wg_x/batch', '2x2x2', 4, 8, False),
  ('grouped', 'wg_xy/batch', '2x2x2', 2, 8, True),
  ('padded', 'wg_xy/heads', '2x2x2', 1, 8, True),
  ('padded', 'wg_xyz/batch', '2x2x2', 4, 8, True),
  ('multihead', 'wg_xyz/batch', '2x2x2', 1, 8, False),
  ('grouped', 'ws_2d/heads', '4x2x1', 3, 8, False),
  ('multihead', 'ws_2d/heads', '8x1x1', 1, 8, False),
  ('multiquery', 'ws_2d/batch', '8x1x1', 2, 8, True),
  ('multiquery', 'ws_2d/batch', '1x2x4', 4, 1, True),
  ('padded', 'wg_xy/batch', '1x2x4', 8, 4, False),
  # Heads cut between shards: into rows, positions, or whole on every device.
  *[
    ('cut', layout, '2x2x2', batch, length, int8)
    for layout, batch, length, int8 in (
      ('ws_2d/batch', 8, 1, False),
      ('ws_2d/batch', 1, 8, False),
      ('ws_2d/batch', 1, 1, True),
      ('ws_2d/heads', 2, 8, True),
      ('ws_2d/heads', 2, 3, False),
      ('wg_x/heads', 2, 8, False),
      ('wg_xy/batch', 4, 8, True),
    )
  ],
  *[
    (name, layout, '2x2x2', batch, length, int8)
    for name, layout, batch, length, int8 in (
      ('two norms', 'ws_2d/batch', 8, 1, False),
      ('two norms', 'ws_2d/heads', 8, 8, False),
      ('two norms', 'wg_xy/batch', 4, 8, True),
      ('norms after', 'ws_2d/batch', 1, 8, False),
      ('norms after', 'ws_2d/heads', 8, 8, False),
      ('norms around', 'ws_2d/heads', 8, 1, False),
      ('norms around', 'wg_x/heads', 8, 8, False),
    )
  ],
]


def collective_counts(moves: list[Collective]) -> collections.Counter:
  """Instructions by the HLO's kinds.

  Of a gather or reduce-scatter over all of three axes there are two (model/collectives/ops.py).
  """
  counts = collections.Counter()
  for move in moves:
    in_two = move.kind in ('all_gather', 'reduce_scatter') and len(move.axes) == 3
    counts[move.kind.replace('_', '-')] += 1 + in_two
  return counts


@pytest.mark.parametrize('name, layout, mesh, batch, length, int8', LAYERS)
def test_a_layer_moves_what_its_layout_predicts(name, layout, mesh, batch, length, int8):
  config, devices = MODELS[name], make_mesh(parse_mesh(mesh))
  placed = shard_activations(Layout.parse(layout), config, devices.shape, batch, length)
  moves = traffic.layer_collectives(
    config, placed, devices.shape, batch, length, 4, 1 if int8 else 4
  )
  found = layer_collectives(config, placed, devices, batch, length, int8)
  assert hlo.moved(found) == pytest.approx(by_kind(moves), rel=1e-9)
  if not placed.layout.gathered_axes:
    # One by one too: neither does the compiler merge any. (Weights are gathered over two dimensions
    # in two steps.)
    assert collections.Counter(c.kind for c in found) == collective_counts(moves)


@pytest.mark.parametrize('index', range(len(LARGE_LAYERS)))
def test_a_layer_on_64_devices_moves_what_its_layout_predicts(large, index):
  name, layout, batch, length = LARGE_LAYERS[index]
  config, sizes = MODELS[name], mesh_sizes('4x4x4')
  placed = shard_activations(Layout.parse(layout), config, sizes, batch, length)
  moves = traffic.layer_collectives(config, placed, sizes, batch, length, 4, 4)
  assert large['layers'][index] == pytest.approx(by_kind(moves), rel=1e-9)


# Whole passes.

PASSES = [
  # phase, model, prefill layout, decode layout, mesh, batch, length
  ('decode', 'multiquery', 'ws_2d/batch', 'ws_2d/batch', '2x2x2', 8, 1),
  ('decode', 'multihead', 'wg_xyz/batch', 'ws_2d/batch', '2x2x2', 2, 1),
  ('decode', 'grouped', 'ws_1d/heads', 'ws_1d/heads', '2x2x2', 1, 1),
  ('decode', 'grouped', 'ws_2d/batch', 'wg_xy/batch', '2x2x2', 4, 1),
  # The cache stays where it is between these layouts: nothing else moves.
  ('prefill', 'multihead', 'ws_2d/batch', 'ws_2d/batch', '2x2x2', 8, 8),
  ('prefill', 'padded', 'wg_x/batch', 'ws_2d/batch', '2x2x2', 1, 8),
  ('logits', 'multiquery', 'ws_2d/batch', 'ws_2d/batch', '2x2x2', 8, 8),
  ('logits', 'multihead', 'wg_xy/heads', 'ws_2d/heads', '2x2x2', 2, 8),
  ('logits', 'grouped', 'wg_xyz/batch', 'ws_2d/batch', '2x2x2', 4, 8),
  ('logits', 'multiquery', 'wg_xyz/batch', 'ws_2d/batch', '1x4x2', 8, 8),
  # A norm after the embedding, learned positions, an untied head; rules of attention move nothing.
  ('decode', 'learned', 'ws_2d/batch', 'ws_2d/batch', '2x2x2', 4, 1),
  ('logits', 'learned', 'wg_xy/heads', 'ws_2d/heads', '2x2x2', 2, 8),
  ('decode', 'rules', 'ws_2d/heads', 'ws_2d/heads', '2x2x2', 1, 1),
  ('greedy', 'multiquery', 'ws_2d/batch', 'ws_2d/batch', '2x2x2', 8, 1),
  ('greedy', 'multihead', 'wg_xy/heads', 'ws_2d/heads', '2x2x2', 2, 1),
  ('greedy', 'multiquery', 'ws_1d/batch', 'ws_1d/batch', '1x4x2', 8, 1),
  ('prefill', 'rules', 'ws_2d/batch', 'ws_2d/batch', '2x2x2', 8, 8),
]


@pytest.mark.parametrize('phase, name, prefill, decode, mesh, batch, length', PASSES)
def test_a_pass_moves_its_layers_its_lookup_and_its_logits(
  phase, name, prefill, decode, mesh, batch, length
):
  config, devices = dataclasses.replace(MODELS[name], num_layers=3), make_mesh(parse_mesh(mesh))
  program = Model(config, devices, Layout.parse(prefill), Layout.parse(decode), 'float32')
  placed = (
    program.decode_sharding(batch)
    if phase in ('decode', 'greedy')
    else program.prefill_sharding(batch, length)
  )
  weights = _stacked_weights(config, placed.layout, devices)

  def ints(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)

  rows = P(placed.rows)
  if phase in ('decode', 'greedy'):
    kv = _cached(config, placed, devices, config.num_layers, batch)
    function = program.decode_step if phase == 'decode' else program.decode_greedily
    arguments = weights, KVCache(kv, kv, ints(batch)), ints(batch)
    specs = (program.weight_specs(weights), program.cache_spec(placed, weights), P())
  elif phase == 'prefill':
    function, arguments = (
      functools.partial(program.prefill, size=CACHE),
      (weights, ints(batch, length), ints(batch)),
    )
    specs = (program.weight_specs(weights), P(), rows)
  else:
    function, arguments = program.logits, (weights, ints(batch, length))
    specs = (program.weight_specs(weights), P())
  found = hlo.collectives(
    memory.quick_jit(function).lower(*_placed(arguments, specs, devices)).compile().as_text()
  )
  of_pass = config, placed, devices.shape, batch, length
  moves = [
    *traffic.embedding_collectives(*of_pass, 4),
    *config.num_layers * traffic.layer_collectives(*of_pass, 4, 4),
    *traffic.logits_collectives(
      *of_pass, program.prefill_layout, 4, last=phase != 'logits', greedy=phase == 'greedy'
    ),
  ]
  # Logits of all positions also gather a flag of each row and shard: whether it is broken.
  rel = 1e-4 if phase == 'logits' else 1e-9
  assert hlo.moved(found) == pytest.approx(by_kind(moves), rel=rel)


def _stacked_weights(config: ModelConfig, layout: Layout, mesh) -> Weights:
  tensors = packed_tensors(config, layout, mesh.shape, ())

  def shape(t):
    return jax.ShapeDtypeStruct((*(config.num_layers,) * t.per_layer, *t.shape), jnp.float32)

  return Weights(
    layers=layer_weights({n: shape(t) for n, t in tensors.items() if t.per_layer}),
    **{n: shape(t) for n, t in tensors.items() if not t.per_layer},
  )


# The paper's figures.

# Figure 3: tokens -> GB of ws_2d, wg_x, wg_xy, wg_xyz, with (K-1)/K taken as 1.
FIGURE_3 = {
  2048: (0.0671, 0.3020, 1.0821, 4.2950),
  16384: (0.5369, 0.5369, 1.1409, 4.2950),
  65536: (2.147, 1.342, 1.342, 4.2950),
  262144: (8.590, 4.563, 2.147, 4.2950),
  1048576: (34.36, 17.45, 5.369, 4.2950),
}
FIGURE_3_LAYOUTS = ('ws_2d', 'wg_x', 'wg_xy', 'wg_xyz')
FIGURE_3_MODEL = model(d_model=16384, d_ff=65536, block='serial', mlp='gelu')


def figure_3_bytes(feedforward: str, tokens: int) -> int:
  return sum(
    m.bytes
    for m in traffic.feedforward_collectives(
      FIGURE_3_MODEL, Layout(feedforward), mesh_sizes('4x4x4'), tokens, 2, 2
    )
  )


@pytest.mark.parametrize('tokens', FIGURE_3)
def test_figure_3(tokens):
  for feedforward, gigabytes in zip(FIGURE_3_LAYOUTS, FIGURE_3[tokens], strict=True):
    assert figure_3_bytes(feedforward, tokens) / 1e9 == pytest.approx(gigabytes, rel=5e-4)


@pytest.mark.parametrize(
  'before, after, tokens',
  [('ws_2d', 'wg_x', 16384), ('wg_x', 'wg_xy', 65536), ('wg_xy', 'wg_xyz', 786432)],
)
def test_figure_3_changes_layout_where_the_paper_does(before, after, tokens):
  assert figure_3_bytes(before, tokens) == figure_3_bytes(after, tokens)
  step = 64  # tokens that divide over all chips
  for layouts, at in (((before, after), tokens - step), ((after, before), tokens + step)):
    cheapest = sorted(FIGURE_3_LAYOUTS, key=lambda name: figure_3_bytes(name, at))  # pylint: disable=cell-var-from-loop
    assert tuple(cheapest[:2]) == layouts


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('feedforward', FEEDFORWARD)
def test_one_device_moves_nothing(name, feedforward):
  sizes, config = mesh_sizes('1x1x1'), MODELS[name]
  of_pass = config, shard_activations(Layout(feedforward), config, sizes, 2, 3), sizes, 2, 3
  assert traffic.layer_collectives(*of_pass) == traffic.embedding_collectives(*of_pass) == []
  assert traffic.logits_collectives(*of_pass, Layout(feedforward)) == []


def test_tokens_that_do_not_divide_are_refused():
  with pytest.raises(
    ValueError, match='wg_xy/batch splits tokens over 16 devices, and 24 do not divide'
  ):
    traffic.feedforward_collectives(FIGURE_3_MODEL, Layout('wg_xy'), mesh_sizes('4x4x4'), 24)
