"""A compiled program through a file gives the same results; anything else is refused clearly."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_inference_ext.config import preset
from t5x_inference_ext.engine import saved_program
from t5x_inference_ext.engine.saved_program import SavedError
from t5x_inference_ext.precompile.case import CompileCase
from t5x_inference_ext.precompile.program import compile_case, phase_function
from t5x_inference_ext.sharding.mesh import make_mesh

CASE = CompileCase(
  preset('palm_tiny', num_layers=2),
  'int8',
  'decode',
  batch=8,
  context=16,
  dtype='float32',
  scan_layers=True,
)


@pytest.fixture(scope='module')
def mesh():
  return make_mesh((2, 2, 2))


@pytest.fixture(scope='module')
def program(mesh):
  return compile_case(CASE, mesh)


@pytest.fixture
def path(program, mesh, tmp_path):
  path = tmp_path / 'decode.bin'
  saved_program.save(path, program.compiled, program.arguments, mesh, CASE.to_dict())
  return path


def _values(arguments):
  """Return random arrays of these shapes on their devices, new ones each time: some are donated."""
  random = np.random.default_rng(0)

  def value(x):
    if x.dtype == jnp.int32:
      return jax.device_put(np.full(x.shape, 3, np.int32), x.sharding)
    if x.dtype == jnp.int8:
      return jax.device_put(random.integers(-127, 128, x.shape, np.int8), x.sharding)
    return jax.device_put(random.normal(size=x.shape).astype(x.dtype) * 0.1, x.sharding)

  return jax.tree.map(value, arguments)


def _load(path, mesh, case=CASE):
  return saved_program.load(path, *phase_function(case, mesh), mesh, case.to_dict())


def test_the_round_trip_gives_what_jit_gives(path, program, mesh):
  loaded = _load(path, mesh)
  got, want = (
    loaded(*_values(program.arguments)),
    phase_function(CASE, mesh)[0](*_values(program.arguments)),
  )
  assert jax.tree.structure(got) == jax.tree.structure(want)
  jax.tree.map(np.testing.assert_array_equal, got, want)
  assert got[1].lengths.tolist() == [4] * 8 and np.abs(np.asarray(got[1].keys)[..., 3, :]).min() > 0


def test_the_loaded_cache_is_written_in_place(path, program, mesh):
  weights, cache, tokens = _values(program.arguments)
  _load(path, mesh)(weights, cache, tokens)
  assert cache.keys.is_deleted()


def test_the_header_tells_what_it_is_without_loading(path):
  header = saved_program.read_program_header(path)
  assert header['jax'] == jax.__version__ and header['description']['batch'] == 8
  assert header['mesh'] == {'x': 2, 'y': 2, 'z': 2} and header['platform'] == 'cpu'
  assert any('int8[2,' in text for text in header['arguments'].values())


def _rewrite(path, **fields):
  lead, header, payload = path.read_bytes().split(b'\n', 2)
  path.write_bytes(
    b'\n'.join([lead, json.dumps({**json.loads(header), **fields}).encode(), payload])
  )


@pytest.mark.parametrize(
  'field,words',
  [
    ('jax', 'was compiled for jax 0.0.1, and here it is .*install jax 0.0.1, or compile it again'),
    ('jaxlib', 'jaxlib 0.0.1'),
    ('libtpu', 'libtpu 0.0.1, and here it is None'),
    ('platform', 'platform 0.0.1, and here it is cpu'),
    ('device_kind', 'device kind 0.0.1'),
  ],
)
def test_other_versions_and_chips_are_refused(path, mesh, field, words):
  _rewrite(path, **{field: '0.0.1'})
  with pytest.raises(SavedError, match=words):
    _load(path, mesh)


def _write_header(path, header: bytes) -> None:
  lead, _, payload = path.read_bytes().split(b'\n', 2)
  path.write_bytes(b'\n'.join([lead, header, payload]))


@pytest.mark.parametrize(
  'header, words',
  [
    (b'{}', 'has no jax'),
    (b'[]', 'is not a JSON object'),
    (b'5', 'is not a JSON object'),
    (b'null', 'is not a JSON object'),
    (b'', 'is not JSON'),
    (b'{"jax": "0.1"', 'is not JSON'),
    (b'\xff\xfe', 'is not JSON'),
    (b'[' * 100_000, 'is not JSON'),
    (b'9' * 5000, 'is not JSON'),
  ],
)
def test_a_damaged_header_is_one_sentence(path, mesh, header, words):
  _write_header(path, header)
  for read in (lambda: saved_program.read_program_header(path), lambda: _load(path, mesh)):
    with pytest.raises(SavedError, match=f'the header of .* {words}.*: it is damaged') as e:
      read()
    assert '\n' not in str(e.value)


def _header(path) -> dict:
  return json.loads(path.read_bytes().split(b'\n', 2)[1])


def test_every_field_of_a_header_is_checked(path):
  whole = _header(path)
  assert len(whole) == 11
  for field in whole:
    _write_header(path, json.dumps({k: v for k, v in whole.items() if k != field}).encode())
    with pytest.raises(SavedError, match=f'the header of .* has no {field}: it is damaged'):
      saved_program.read_program_header(path)
    _write_header(path, json.dumps({**whole, field: 1.5}).encode())
    with pytest.raises(SavedError, match=f'has {field} that is not .*: 1.5: it is'):
      saved_program.read_program_header(path)


def test_control_characters_of_a_header_are_escaped(path, mesh):
  _rewrite(path, platform='tpu\n\x1b[31merror: fake')
  with pytest.raises(SavedError) as e:
    _load(path, mesh)
  assert str(e.value).isprintable() and '\\x1b' in str(e.value)


def test_flipped_headers_are_refused_or_work(path, mesh):
  """Any byte of the header may be damaged: the file is refused, or holds the same program."""
  whole = path.read_bytes()
  first, second = whole.index(b'\n') + 1, whole.index(b'\n', whole.index(b'\n') + 1)
  random = np.random.default_rng(0)
  described = CASE.to_dict()
  refused = 0
  for place in random.integers(first, second, 100):
    data = bytearray(whole)
    data[place] ^= 1 << random.integers(8)
    path.write_bytes(data)
    try:
      saved_program.check_header(path, mesh, described)
      _load(path, mesh)
    except SavedError:
      refused += 1
  assert refused > 90


def test_another_platform_is_said_before_its_compiler(path, mesh):
  _rewrite(path, platform='tpu', libtpu='0.0.1')  # here there is no libtpu in use
  with pytest.raises(SavedError, match='platform tpu, and here it is cpu'):
    _load(path, mesh)


def test_another_mesh_is_refused(path, program):
  mesh = make_mesh((4, 2, 1))
  with pytest.raises(
    SavedError, match="mesh {'x': 2, 'y': 2, 'z': 2}, and here it is .*pass its mesh, 2x2x2"
  ):
    _load(path, mesh)


def test_other_devices_are_refused(path):
  mesh = make_mesh((2, 2, 2), jax.devices()[::-1])
  with pytest.raises(SavedError, match='other numbers, or another order'):
    _load(path, mesh)


@pytest.mark.parametrize(
  'fields,words',
  [
    (dict(batch=16), 'batch 8, and here it is 16'),
    (dict(context=32), 'context 16, and here it is 32'),
    (dict(weights='bfloat16'), 'weights int8, and here it is bfloat16'),
  ],
)
def test_another_setting_is_refused_by_name(path, mesh, fields, words):
  with pytest.raises(SavedError, match=words):
    _load(path, mesh, dataclasses.replace(CASE, **fields))


def test_other_shapes_are_refused_by_argument(path, program, mesh):
  function, (weights, cache, tokens) = phase_function(CASE, mesh)
  tokens = jax.ShapeDtypeStruct((8,), jnp.uint32, sharding=tokens.sharding)
  with pytest.raises(
    SavedError, match=r'the argument .*\[2\].* as int32\[8\].*here it is uint32\[8\]'
  ):
    saved_program.load(path, function, (weights, cache, tokens), mesh, CASE.to_dict())


def test_damage_is_found_before_anything_runs(path, mesh):
  data = bytearray(path.read_bytes())
  data[-5] ^= 1
  path.write_bytes(data)
  with pytest.raises(SavedError, match='damaged'):
    _load(path, mesh)
  path.write_bytes(data[:-100])
  with pytest.raises(SavedError, match='damaged: it should hold'):
    _load(path, mesh)


def test_what_is_no_executable_is_refused(tmp_path, mesh):
  other = tmp_path / 'other'
  other.write_bytes(b'something else')
  with pytest.raises(SavedError, match='is not an executable'):
    saved_program.read_program_header(other)
  with pytest.raises(SavedError, match="can't read the executable .*missing: No such file"):
    saved_program.read_program_header(tmp_path / 'missing')


def test_a_file_that_cannot_be_written_is_an_error(program, mesh, tmp_path):
  with pytest.raises(SavedError, match="can't write the executable"):
    saved_program.save(tmp_path / 'nowhere' / 'x', program.compiled, program.arguments, mesh, {})
