"""A saved generation runs in infer and the engine as a compiled one, only where it fits."""

import dataclasses
import json

import numpy as np
import pytest

from t5x_inference_ext.checkpoints import open_checkpoint
from t5x_inference_ext.checkpoints.convert import convert
from t5x_inference_ext.commands import infer
from t5x_inference_ext.engine import saved_generation, saved_program
from t5x_inference_ext.engine.engine import Engine
from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.engine.saved_generation import SavedGeneration
from t5x_inference_ext.engine.saved_program import SavedError
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.precompile.case import CompileCase
from t5x_inference_ext.precompile.program import compile_case
from t5x_inference_ext.sharding.layout import Layout
from t5x_inference_ext.sharding.mesh import make_mesh

SAMPLER = SamplingParams(temperature=0.7, top_k=20)
PROMPTS = [[103, 104, 105], [108, 112], [], [40, 41, 42, 43, 44], [97]]


@pytest.fixture(scope='module')
def path(palm_tiny, tmp_path_factory):
  """For 8 rows of up to 16 tokens and 6 new ones, over 2x2x2."""
  mesh = make_mesh((2, 2, 2))
  case = CompileCase(
    open_checkpoint(palm_tiny).config,
    'bfloat16',
    'generate',
    batch=8,
    context=24,
    prompt=16,
    max_new_tokens=6,
    sampling=SAMPLER,
    dtype='float32',
  )
  program = compile_case(case, mesh)
  assert program.memory.weights > 0 and program.memory.cache == 0
  path = tmp_path_factory.mktemp('saved') / 'generation'
  saved_program.save(path, program.compiled, program.arguments, mesh, case.to_dict())
  return path


LIES = (
  *(None, True, False, 0, -1, 1.5, float('nan'), float('inf'), 10**400, 2**31, 2**63),
  *('', 'x', '\ud800', '\x1b[31m', '9' * 5000, 'x' * 10**5),
  *([], [1], {}, {'a': 1}, [[[]]], {'': None}, [None] * 3),
)


def _places(value):
  """Yield (object or list, key) of every value within a JSON value."""
  for key in [*value] if isinstance(value, dict) else range(len(value)):
    yield value, key
    if isinstance(value[key], (dict, list)):
      yield from _places(value[key])


@pytest.fixture(scope='module')
def described(palm_tiny):
  """A model, and the header of a generation for it: nothing is compiled or loaded."""
  mesh = make_mesh((1, 1, 1))
  model = Model(open_checkpoint(palm_tiny).config, mesh, dtype='float32')
  run = saved_generation.GenerationShape(8, 16, 32, 16)
  layouts = model.prefill_layout, model.decode_layout
  header = {
    **saved_program._here(mesh),
    'description': saved_generation.describe_run(
      model.config, 'float32', layouts, 'float32', 'float32', False, run
    ),
    'arguments': {'[0]': 'int32[8] P()'},
    'bytes': 3,
    'sha256': '',
  }
  return model, json.dumps(header)


def test_a_header_that_lies_is_one_sentence(described, tmp_path):
  """300 headers with values of other types, fields left out or added, and flipped bits."""
  model, text = described
  path, random, refused = tmp_path / 'saved', np.random.default_rng(14), 0
  for _ in range(300):
    header = json.loads(text)
    places = list(_places(header))
    where, key = places[random.integers(len(places))]
    lie = LIES[random.integers(len(LIES))]
    act = random.integers(4)
    if act < 2:
      where[key] = lie
    elif act == 2 or not isinstance(where, dict):
      del where[key]
    else:
      where[str(lie)[:50]] = lie
    line = bytearray(json.dumps(header).encode())
    if random.integers(3) == 0:
      line[random.integers(len(line))] ^= 1 << random.integers(8)
    path.write_bytes(saved_program.PROGRAM_FORMAT + line + b'\nxyz')
    for check in (
      lambda: SavedGeneration.open(path, model, 'float32', False),
      lambda: saved_generation.check_saved_run(path, max_new_tokens=16, max_length=None),
    ):
      try:
        check()
      except SavedError as error:
        refused += 1
        assert str(error).isprintable() and len(str(error)) < 1000
  assert refused > 300


def _engine(palm_tiny, **options):
  return Engine.load(palm_tiny, **{**dict(mesh='2x2x2', dtype='float32'), **options})


def test_the_engine_gives_what_it_gives_without(palm_tiny, path):
  prompts = [*PROMPTS, *PROMPTS[:3]]
  options = dict(
    max_new_tokens=6, sampling=SAMPLER, seeds=list(range(8)), cache_size=24, prompt_size=16
  )
  loaded = _engine(palm_tiny, executable=path)
  first = loaded.generate(prompts, **options)
  assert (
    first == loaded.generate(prompts, **options) == _engine(palm_tiny).generate(prompts, **options)
  )
  assert any(len(completion.tokens) == 6 for completion in first)


def test_int4_weights_are_saved(palm_tiny, tmp_path):
  """JAX itself refuses int4 arrays as arguments of programs that are loaded."""
  convert(str(palm_tiny), str(tmp_path / 'rounded'), 'int4')
  checkpoint, mesh = open_checkpoint(tmp_path / 'rounded'), make_mesh((1, 1, 2))
  case = CompileCase(
    checkpoint.config,
    checkpoint.weights,
    'generate',
    batch=2,
    context=24,
    prompt=16,
    max_new_tokens=6,
    dtype='float32',
    scan_layers=True,
  )
  program = compile_case(case, mesh)
  path = tmp_path / 'generation'
  saved_program.save(path, program.compiled, program.arguments, mesh, case.to_dict())
  options = dict(mesh='1x1x2', scan_layers=True)
  found = _engine(checkpoint, executable=path, **options)
  calls = dict(max_new_tokens=6, cache_size=24, prompt_size=16)
  wanted = _engine(checkpoint, **options).generate(PROMPTS[:2], **calls)
  assert found.generate(PROMPTS[:2], **calls) == wanted == found.generate(PROMPTS[:2], **calls)
  assert any(
    'int4[' in text for text in saved_program.read_program_header(path)['arguments'].values()
  )


def test_a_model_without_bos_runs_the_same_program(palm_tiny, path):
  checkpoint = open_checkpoint(palm_tiny)
  text = dataclasses.replace(checkpoint.text, bos_id=None)
  checkpoint = dataclasses.replace(checkpoint, text=text)
  options = dict(max_new_tokens=6, sampling=SAMPLER, cache_size=24, prompt_size=16)
  prompts = [[0, *prompt] for prompt in [*PROMPTS, *PROMPTS[:2]]] + [list(range(40, 56))]
  found = _engine(checkpoint, executable=path).generate(prompts, **options)
  assert found == _engine(checkpoint).generate(prompts, **options)
  with_bos = _engine(palm_tiny, executable=path)
  assert found[:7] == with_bos.generate([p[1:] for p in prompts], **options)[:7]


@pytest.mark.parametrize(
  'options,words',
  [
    (dict(max_new_tokens=5), 'max_new_tokens 6, and here it is 5'),
    (dict(sampling=SamplingParams()), 'sampling.temperature 0.7, and here it is 0.0'),
    (dict(cache_size=32), 'context 24, and here it is 32'),
    (dict(prompt_size=8), 'prompt 16, and here it is 8'),
  ],
)
def test_the_engine_refuses_another_run(palm_tiny, path, options, words):
  engine = _engine(palm_tiny, executable=path)
  with pytest.raises(SavedError, match=words):
    engine.generate(
      [[1]] * 8,
      **{**dict(max_new_tokens=6, sampling=SAMPLER, cache_size=24, prompt_size=16), **options},
    )


@pytest.mark.parametrize(
  'options,words',
  [
    (dict(mesh='1x2x2'), 'mesh .*and here it is .*pass its mesh, 2x2x2'),
    (dict(dtype='bfloat16'), 'dtype float32'),
    (dict(cache='int8'), 'cache as dtype, and here it is int8'),
    (
      dict(prefill_layout='wg_xyz/batch'),
      'prefill_layout ws_2d/batch, and here it is wg_xyz/batch',
    ),
    (dict(norm_scale='one'), 'model.norm_scale zero, and here it is one'),
  ],
)
def test_another_engine_is_refused_before_weights_are_read(palm_tiny, path, options, words):
  def no_weights(jobs):
    pytest.fail('weights were read')

  with pytest.raises(SavedError, match=words):
    _engine(palm_tiny, executable=path, progress=no_weights, **options)


def test_a_step_is_no_generation(palm_tiny, tmp_path):
  mesh = make_mesh((2, 2, 2))
  case = CompileCase(
    open_checkpoint(palm_tiny).config, 'bfloat16', 'decode', 8, 24, Layout(), dtype='float32'
  )
  program = compile_case(case, mesh)
  saved_program.save(tmp_path / 'step', program.compiled, program.arguments, mesh, case.to_dict())
  with pytest.raises(SavedError, match='holds a decode program: infer runs whole generations'):
    _engine(palm_tiny, executable=tmp_path / 'step')


def _copy_with(path, tmp_path, **changes):
  """Copy a file, with other values in its description; ... removes a field."""
  lead, header, payload = path.read_bytes().split(b'\n', 2)
  header = json.loads(header)
  described = {**header['description'], **changes}
  header['description'] = {k: v for k, v in described.items() if v is not ...}
  copy = tmp_path / 'changed'
  copy.write_bytes(b'\n'.join([lead, json.dumps(header).encode(), payload]))
  return copy


@pytest.mark.parametrize(
  'changes, words',
  [
    (dict(batch=0), 'has batch 0'),
    (dict(batch=10**30), 'has batch 1000'),
    (dict(batch='8'), "has batch '8'"),
    (dict(batch=True), 'has batch True'),
    (dict(batch=...), 'has no batch'),
    (dict(prompt=-1), 'has prompt -1'),
    (dict(context=2.5), 'has context 2.5'),
    (dict(max_length=0), 'has max_length 0'),
    (dict(sampling=...), 'has no sampling'),
    (dict(sampling=5), 'has invalid sampling parameters'),
    (dict(sampling=[]), 'has invalid sampling parameters'),
    (dict(sampling={'heat': 1}), 'has invalid sampling parameters .*heat'),
    (dict(sampling={'temperature': 'x'}), 'has invalid sampling parameters'),
    (dict(sampling={'top_p': 7}), 'has invalid sampling parameters .*top_p must be'),
  ],
)
def test_a_description_that_makes_no_sense_is_refused(path, tmp_path, changes, words):
  copy = _copy_with(path, tmp_path, **changes)
  with pytest.raises(SavedError, match=f'the header of .* {words}.*: it is damaged'):
    saved_generation.check_saved_run(copy, max_new_tokens=6)


def test_flipped_descriptions_are_refused_or_work(palm_tiny, path, tmp_path):
  """Any byte of the header may be damaged: nothing but SavedError comes of it."""
  model = _engine(palm_tiny).model
  whole = path.read_bytes()
  first, second = whole.index(b'\n') + 1, whole.index(b'\n', whole.index(b'\n') + 1)
  begin = whole.index(b'"description"', first, second)
  end = whole.index(b'"arguments"', begin, second)
  random = np.random.default_rng(0)
  copy, refused = tmp_path / 'flipped', 0
  for place in random.integers(begin, end, 100):
    data = bytearray(whole)
    data[place] ^= 1 << random.integers(8)
    copy.write_bytes(data)
    try:
      saved_generation.check_saved_run(copy, max_new_tokens=6)
      SavedGeneration.open(copy, model, 'bfloat16', True)
    except SavedError:
      refused += 1
  assert refused > 90


def _infer(palm_tiny, tmp_path, name, *flags):
  prompts, output = tmp_path / 'prompts', tmp_path / name
  prompts.write_text(''.join(json.dumps({'prompt': p}) + '\n' for p in PROMPTS))
  code = infer.run(
    [
      'infer',
      f'--checkpoint={palm_tiny}',
      f'--prompts={prompts}',
      f'--output={output}',
      '--dtype=float32',
      '--mesh=2x2x2',
      '--temperature=0.7',
      '--top_k=20',
      *flags,
    ]
  )
  return output.read_text() if code == 0 else code


def test_infer_writes_the_same_rows(palm_tiny, path, tmp_path, capsys):
  with_it = _infer(palm_tiny, tmp_path, 'with', '--max_new_tokens=6', f'--executable={path}')
  assert f'batch: 8 rows, as {path} was compiled' in capsys.readouterr().out
  without = _infer(palm_tiny, tmp_path, 'without', '--max_new_tokens=6', '--cache_length=24')
  rows = [[json.loads(line) for line in text.splitlines()] for text in (with_it, without)]
  assert [row['tokens'] for row in rows[0]] == [row['tokens'] for row in rows[1]] and len(
    rows[0]
  ) == len(PROMPTS)
  assert [row['score'] for row in rows[0]] == pytest.approx(
    [row['score'] for row in rows[1]], rel=1e-5
  )


@pytest.mark.parametrize(
  'flags,words',
  [
    (['--max_new_tokens=7'], 'was compiled for max_new_tokens 6, and here it is 7'),
    (['--max_new_tokens=6', '--mode=score'], "can't run mode=score"),
    (['--max_new_tokens=6', '--mesh=1x1x1'], 'pass its mesh, 2x2x2'),
  ],
)
def test_infer_refuses_in_one_line(palm_tiny, path, tmp_path, capsys, flags, words):
  assert _infer(palm_tiny, tmp_path, 'out', *flags, f'--executable={path}') == 2
  err = capsys.readouterr().err
  assert words in err and err.startswith('error: ') and not (tmp_path / 'out').exists()


def test_a_prompt_that_is_too_long_is_refused(palm_tiny, path, tmp_path, capsys, monkeypatch):
  monkeypatch.setitem(globals(), 'PROMPTS', [[1] * 17])
  assert _infer(palm_tiny, tmp_path, 'out', '--max_new_tokens=6', f'--executable={path}') == 2
  assert 'the longest prompt has 17 tokens' in capsys.readouterr().err
