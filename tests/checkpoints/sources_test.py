"""Every form of T5X checkpoint gives the same canonical tensors."""

import pathlib

import ml_dtypes
import msgpack
import numpy as np
import pytest
import tensorstore as ts

from t5x_inference_ext import params
from t5x_inference_ext.checkpoints import open_checkpoint
from t5x_inference_ext.config import PRESETS, ModelConfig
from tests.checkpoints import synthetic

EXPECTED = synthetic.canonical()
SCANNED = synthetic.fused(EXPECTED)


def check(checkpoint, expected=EXPECTED, config=synthetic.CONFIG):
  """All canonical tensors, and nothing else, with these values."""
  assert checkpoint.config == config
  shapes = {name: p.shape for name, p in params.parameters(config).items()}
  if checkpoint.weights == 'int8':
    shapes.update({name: p.shape for name, p in params.scales(config).items()})
  assert {name: t.shape for name, t in checkpoint.tensors.items()} == shapes
  for name, values in expected.items():
    read = checkpoint.tensors[name].read()
    assert read.dtype == checkpoint.tensors[name].dtype
    np.testing.assert_array_equal(read, values, strict=True, err_msg=name)


WRITERS = {
  'legacy': lambda path, leaves: synthetic.write_legacy(path, leaves),
  'legacy with optimizer state': lambda path, leaves: synthetic.write_legacy(
    path, leaves, state=True
  ),
  'legacy without the optimizer prefix': lambda path, leaves: synthetic.write_legacy(
    path, leaves, prefix=''
  ),
  'legacy, arrays in the index': lambda path, leaves: synthetic.write_legacy(
    path, leaves, inline=True
  ),
  'legacy, many chunks': lambda path, leaves: synthetic.write_legacy(path, leaves, chunks=3),
  'orbax': lambda path, leaves: synthetic.write_orbax(path, leaves),
  'orbax, zarr 3': lambda path, leaves: synthetic.write_orbax(path, leaves, zarr3=True),
  'orbax without OCDBT': lambda path, leaves: synthetic.write_orbax(path, leaves, ocdbt=False),
  'orbax without OCDBT, zarr 3': lambda path, leaves: synthetic.write_orbax(
    path, leaves, ocdbt=False, zarr3=True
  ),
  'orbax with the optimizer prefix': lambda path, leaves: synthetic.write_orbax(
    path, leaves, prefix='optimizer/'
  ),
}


@pytest.mark.parametrize('layers', ['scanned', 'per layer'])
@pytest.mark.parametrize('form', WRITERS)
def test_float_checkpoints(tmp_path, form, layers):
  leaves = SCANNED if layers == 'scanned' else synthetic.per_layer(SCANNED)
  checkpoint = open_checkpoint(WRITERS[form](tmp_path / 'any name', leaves))
  check(checkpoint)
  assert checkpoint.weights == 'float32'
  assert checkpoint.format == form[:6].rstrip(',').replace('legacy', 't5x').strip()
  assert checkpoint.step == 7


@pytest.mark.parametrize('layers', ['scanned', 'per layer'])
@pytest.mark.parametrize(
  'form', ['legacy', 'legacy, arrays in the index', 'orbax', 'orbax, zarr 3']
)
@pytest.mark.parametrize('widened', [None, np.float32, ml_dtypes.bfloat16])
def test_quantized_checkpoints(tmp_path, form, layers, widened):
  """value = qkernel / qscale, also where T5X's writer has widened the int8 kernels."""
  leaves = synthetic.quantized(SCANNED)
  kernels = {
    n.replace('qkernel', 'kernel'): v * (1 / leaves[n.replace('qkernel', 'qscale')])
    for n, v in leaves.items()
    if n.endswith('qkernel')
  }
  if widened is not None:
    leaves = {n: v.astype(widened) if n.endswith('qkernel') else v for n, v in leaves.items()}
  if layers == 'per layer':
    leaves = synthetic.per_layer(leaves)
  checkpoint = open_checkpoint(WRITERS[form](tmp_path / 'c', leaves))
  assert checkpoint.weights == 'int8'
  check(checkpoint, {n: EXPECTED[n] for n in ('embedding', 'final_norm', 'layer_norm')})
  # The product's canonical tensors, by the float path, are the products of the canonical tensors.
  product = open_checkpoint(synthetic.write_legacy(tmp_path / 'product', {**SCANNED, **kernels}))
  for name, p in params.parameters(synthetic.CONFIG).items():
    if p.kind == 'matrix':
      values, scale = checkpoint.tensors[name].read(), checkpoint.tensors[p.scale].read()
      assert values.dtype == np.int8 and scale.dtype == np.float32
      np.testing.assert_array_equal(
        values * scale[:, None, :], product.tensors[name].read(), err_msg=name
      )


def test_bfloat16_checkpoint_has_float32_norms(tmp_path):
  leaves = {n: v.astype(ml_dtypes.bfloat16) for n, v in SCANNED.items()}
  checkpoint = open_checkpoint(synthetic.write_legacy(tmp_path / 'c', leaves))
  assert checkpoint.weights == 'bfloat16'
  rounded = {n: v.astype(ml_dtypes.bfloat16) for n, v in EXPECTED.items()}
  rounded.update({n: rounded[n].astype(np.float32) for n in ('final_norm', 'layer_norm')})
  check(checkpoint, rounded)


def test_slices_equal_slices_of_the_whole(tmp_path):
  checkpoint = open_checkpoint(
    synthetic.write_legacy(tmp_path / 'c', synthetic.per_layer(SCANNED), chunks=3)
  )
  for name, values in EXPECTED.items():
    index = tuple(slice(1, n - 1) if n > 2 else slice(1, 2) for n in values.shape)
    np.testing.assert_array_equal(checkpoint.tensors[name].read(index), values[index], err_msg=name)


@pytest.mark.parametrize(
  'spelling', [str, lambda p: f'{p}/', lambda p: p / 'checkpoint', lambda p: p]
)
def test_spellings_of_a_path(palm_tiny, spelling):
  assert open_checkpoint(spelling(palm_tiny)).path == str(palm_tiny)


def test_the_index_may_name_another_place(tmp_path):
  """Moved checkpoints, and those written to a bucket: only the directory's own name counts."""
  path = synthetic.write_legacy(tmp_path / 'c', SCANNED)
  tree = msgpack.unpackb((path / 'checkpoint').read_bytes(), raw=False)
  changed = 0
  for module in (
    tree['optimizer']['target']['decoder']['decoder'],
    tree['optimizer']['target']['decoder'],
  ):
    for leaf in (v for m in module.values() for v in m.values() if 'kvstore' in v):
      changed += 1
      leaf['kvstore'] = {
        'driver': 'gcs',
        'bucket': 'b',
        'path': 'gone/checkpoint_7/' + leaf['kvstore']['path'],
      }
  assert changed == len(SCANNED)
  (path / 'checkpoint').write_bytes(msgpack.packb(tree))
  check(open_checkpoint(path))


def test_arrays_that_flax_cut_into_pieces(tmp_path):
  """flax stores an array above 1 GiB as chunks; the form is the same for small ones."""
  path = synthetic.write_legacy(tmp_path / 'c', SCANNED, inline=True)
  tree = msgpack.unpackb((path / 'checkpoint').read_bytes(), raw=False)
  values = SCANNED['decoder/decoder/q_wi_fused/kernel']
  pieces = [synthetic.pack_array(p) for p in np.split(values.ravel(), [100, 200])]
  tree['optimizer']['target']['decoder']['decoder']['q_wi_fused']['kernel'] = {
    '__msgpack_chunked_array__': True,
    'shape': {str(i): n for i, n in enumerate(values.shape)},
    'chunks': {str(i): p for i, p in enumerate(pieces)},
  }
  (path / 'checkpoint').write_bytes(msgpack.packb(tree))
  check(open_checkpoint(path))


def test_old_orbax_index(tmp_path):
  """Orbax's first releases: a msgpack tree with placeholders, and a directory an array."""
  path = synthetic.write_orbax(tmp_path / 'c', SCANNED, ocdbt=False)
  (path / 'state' / '_METADATA').unlink()
  tree = {f'target/{n}': f'PLACEHOLDER://target.{n.replace("/", ".")}' for n in SCANNED}
  tree['state/step'] = synthetic.pack_array(np.int32(7))
  (path / 'state' / 'checkpoint').write_bytes(msgpack.packb(synthetic.nest(tree)))
  checkpoint = open_checkpoint(path)
  check(checkpoint)
  assert (checkpoint.format, checkpoint.step) == ('orbax', 7)


def test_real_checkpoints_of_both_formats_agree(palm_tiny, testdata):
  """palm_tiny as T5X wrote it itself and through Orbax."""
  legacy = open_checkpoint(palm_tiny)
  orbax = open_checkpoint(testdata / 'palm_tiny_orbax' / 'checkpoint_1000')
  assert (legacy.format, orbax.format, legacy.step, orbax.step) == ('t5x', 'orbax', 1000, 1000)
  config = ModelConfig(**PRESETS['palm_tiny'])
  check(orbax, {name: t.read() for name, t in legacy.tensors.items()}, config)
  assert legacy.config == config


def test_real_per_layer_checkpoint(testdata):
  """Against tensorstore's own reading of one layer's fused kernel."""
  path = testdata / 'palm_unscanned' / 'checkpoint_0'
  checkpoint = open_checkpoint(path)
  assert checkpoint.config == ModelConfig(3, 48, 192, 6, 16, 384)
  kernel = (
    ts.open(
      {'driver': 'zarr', 'kvstore': f'file://{path}/target.decoder.layers_2.q_wi_fused.kernel/'}
    )
    .result()
    .read()
    .result()
  )  # [48, 6, 16 + 2 * 32]
  for name, columns in (
    ('query', slice(0, 16)),
    ('gate', slice(16, 48)),
    ('linear', slice(48, 80)),
  ):
    read = checkpoint.tensors[name].read((slice(2, 3),))[0]
    np.testing.assert_array_equal(read, kernel[:, :, columns].reshape(48, -1))


@pytest.mark.parametrize(
  'ocdbt,zarr3', [(True, False), (True, True), (False, False), (False, True)]
)
def test_what_orbax_itself_writes(tmp_path, ocdbt, zarr3):
  ocp = pytest.importorskip('orbax.checkpoint', reason='orbax-checkpoint is not installed')
  tree = synthetic.nest(
    {f'target/{n}': v for n, v in SCANNED.items()} | {'state/step': np.int32(7)}
  )
  path = tmp_path / 'c'
  with ocp.Checkpointer(
    ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=zarr3)
  ) as checkpointer:
    checkpointer.save(path / 'state', tree)
  check(open_checkpoint(path))
  check(open_checkpoint(path / 'state'))


@pytest.mark.parametrize(
  'given,config,applied,said',
  [
    (None, None, 'zero', 'assumed'),
    ('one', None, 'one', 'given'),
    ('zero', None, 'zero', 'given'),
    (
      None,
      ModelConfig(**{**synthetic.CONFIG.to_dict(), 'norm_scale': 'one'}),
      'one',
      'given with the model',
    ),
  ],
)
def test_norm_scales_are_recorded_not_guessed(tmp_path, given, config, applied, said):
  checkpoint = open_checkpoint(
    synthetic.write_legacy(tmp_path / 'c', SCANNED), norm_scale=given, config=config
  )
  assert checkpoint.config.norm_scale == applied
  assert any(f'norm_scale: {applied} ({said}' in note for note in checkpoint.notes)
  assert any('average' in note for note in checkpoint.notes) == (
    applied == 'one'
  )  # the values are around zero


def test_notes_say_what_was_found(palm_tiny: pathlib.Path):
  notes = '\n'.join(open_checkpoint(palm_tiny).notes)
  for words in (
    'T5X checkpoint',
    str(palm_tiny),
    'step 1000',
    '4 layers',
    'd_model 256',
    '3,835,136',
    'float32',
  ):
    assert words in notes
