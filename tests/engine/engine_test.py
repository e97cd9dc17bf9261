"""The Python API: what it refuses, and why it says so; and the edges of what it takes."""

import asyncio

import jax.numpy as jnp
import numpy as np
import pytest

from t5x_inference_ext.checkpoints import open_checkpoint
from t5x_inference_ext.engine.engine import Engine
from t5x_inference_ext.engine.inputs import check_generation
from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.errors import MeshError, RequestError

pytestmark = pytest.mark.usefixtures('quick_programs')

PROMPTS = [[103, 104, 105], [108]]


@pytest.fixture(scope='module')
def engine(palm_tiny):
  return Engine.load(palm_tiny, mesh='2x1x1', dtype='float32')


def test_an_empty_prompt_starts_from_bos(engine):
  """BOS is id 0, so that the first logits are those of [0] alone."""
  (completion,) = engine.generate([[]] * 2, max_new_tokens=4)[:1]
  inputs = [0]
  for token in completion.tokens:
    logits = engine.logits(np.array([inputs + [0] * (4 - len(inputs))] * 2))[0, len(inputs) - 1]
    assert token == np.argmax(logits)
    inputs.append(token)


def test_the_first_eos_ends_a_row_and_is_counted(engine):
  free = engine.generate(PROMPTS, max_new_tokens=8, eos_id=-1)
  eos = free[0].tokens[3]
  ended = engine.generate(PROMPTS, max_new_tokens=8, eos_id=eos)
  expected = free[0].tokens[: free[0].tokens.index(eos) + 1]
  assert ended[0].tokens == expected
  assert 0 > ended[0].score > free[0].score


def test_an_open_checkpoint_is_as_good_as_its_path(engine, palm_tiny):
  again = Engine.load(open_checkpoint(palm_tiny), mesh='2x1x1', dtype='float32')
  assert again.generate(PROMPTS, max_new_tokens=8) == engine.generate(PROMPTS, max_new_tokens=8)


def test_a_full_cache_is_enough(engine):
  """3 prompt tokens and 8 new ones: BOS takes a position and the last new token none."""
  free = engine.generate(PROMPTS, max_new_tokens=8)
  assert engine.generate(PROMPTS, max_new_tokens=8, cache_size=11) == free


def test_padded_batch_is_accepted(engine):
  assert [engine.model.padded_batch(n) for n in (1, 2, 3, 5)] == [1, 2, 4, 6]


def test_the_least_that_a_request_can_ask_for():
  """One new token after BOS alone, which takes a single position."""
  check_generation([[]], 384, limits=[1], cache_size=1, prompt_size=0, max_length=1)


@pytest.mark.parametrize(
  'arguments, says',
  [
    (dict(prompts=[]), 'there are no prompts'),
    (dict(max_new_tokens=0), 'max_new_tokens must be at least 1, got 0'),
    (dict(prompts=[[3], [3, 384]]), 'prompt 1 holds token 384, outside the vocabulary of 384'),
    (dict(prompts=[[3], [-1]]), 'prompt 1 holds token -1'),
    (
      dict(cache_size=10),
      'prompt 0 is longer than the cache: 3 tokens and 8 new ones need 11 positions, the cache '
      'has 10',
    ),
    (dict(prompt_size=2), 'prompt 0 has 3 tokens, more than prompt_size=2'),
    (dict(seeds=[1]), '2 prompts need as many seeds, got 1'),
    (dict(prompts=[3, 4]), 'prompt 0 must be token ids, got 3'),
    (dict(prompts=[[3], [3.5]]), 'prompt 1 holds 3.5: token ids are whole numbers'),
    (dict(max_new_tokens=2.5), 'max_new_tokens must be a whole number, got 2.5'),
    (dict(seeds=[0, -1]), 'seeds must be whole numbers from 0 to 2**32 - 1, got -1'),
    (dict(prefill_chunk=0), 'prefill_chunk must be at least 1, got 0'),
  ],
)
def test_bad_requests(engine, arguments, says):
  with pytest.raises(RequestError) as error:
    engine.generate(**{'prompts': PROMPTS, 'max_new_tokens': 8, **arguments})
  assert says in str(error.value)


@pytest.mark.parametrize(
  'arguments, says',
  [
    (dict(prompts='def'), "prompts must be a list of prompts, got 'def'"),
    (dict(prompts=None), 'prompts must be a list of prompts, got None'),
    (dict(prompts={'a': 1}), 'prompts must be a list of prompts'),
    (dict(prompts=[]), 'there are no prompts'),
    (dict(prompts=[[True], [3]]), 'prompt 0 holds True: token ids are whole numbers'),
    (dict(prompts=[[3], [np.float32(3)]]), 'prompt 1 holds '),
    (dict(prompts=jnp.ones((2, 3))), 'prompt 0 holds 1.0: token ids are whole numbers'),
    (dict(prompts=np.ones((2, 3), bool)), 'prompt 0 holds True'),
    (dict(prompts=[['3'], [3]]), "prompt 0 holds '3'"),
    (dict(prompts=[b'abc', [3]]), "prompt 0 must be token ids, got b'abc'"),
    (dict(prompts=[[3], bytearray(b'abc')]), "prompt 1 must be token ids, got bytearray(b'abc')"),
    (dict(prompts=[[10**5000], [3]]), 'prompt 0 holds token '),
    (dict(max_new_tokens='8'), "max_new_tokens must be a whole number, got '8'"),
    (dict(max_new_tokens=None), 'max_new_tokens must be a whole number, got None'),
    (dict(max_new_tokens=10**20), 'max_new_tokens must be at most 2147483647'),
    (dict(max_new_tokens=True), 'max_new_tokens must be a whole number, got True'),
    (dict(max_new_tokens=[8]), '2 prompts need as many limits, got 1'),
    (dict(sampling={'temperature': 1}), "sampling must be SamplingParams, got {'temperature': 1}"),
    (dict(sampling=None), 'sampling must be SamplingParams, got None'),
    (dict(cache_size='x'), "cache_size must be a whole number, got 'x'"),
    (dict(prompt_size=3.5), 'prompt_size must be a whole number, got 3.5'),
    (dict(max_length=[3]), 'max_length must be a whole number, got [3]'),
    (dict(eos_id='x'), "eos_id must be a whole number, got 'x'"),
    (dict(seeds='ab'), "seeds must be whole numbers from 0 to 2**32 - 1, got 'ab'"),
    (dict(seeds=2**32), 'seeds must be whole numbers from 0 to 2**32 - 1, got 4294967296'),
  ],
)
def test_arguments_of_other_types(engine, arguments, says):
  """Each is one sentence, before anything is compiled."""
  with pytest.raises(RequestError) as error:
    engine.generate(**{'prompts': PROMPTS, 'max_new_tokens': 8, **arguments})
  assert says in str(error.value) and len(str(error.value)) < 300


def test_prompts_of_every_kind(engine):
  """Lists, tuples, arrays of NumPy and JAX, and generators."""
  wanted = engine.generate(PROMPTS, max_new_tokens=8)
  longest = max(map(len, PROMPTS))
  for kind in (
    tuple,
    np.array,
    lambda ids: np.array(ids, np.uint16),
    jnp.array,
    iter,
    lambda ids: [jnp.int32(i) for i in ids],
    lambda ids: [np.int64(i) for i in ids],
  ):
    found = engine.generate(
      (kind(ids) for ids in PROMPTS), max_new_tokens=np.int64(8), prompt_size=np.int32(longest)
    )
    assert found == wanted
  square = [[3, 4], [5, 6]]
  wanted = engine.requests(square, 4, seeds=[1, 2])
  for array in (np.array, jnp.array):
    assert engine.requests(array(square), array([4, 4]), seeds=array([1, 2])) == wanted


def test_the_default_mesh_is_the_commands(palm_tiny):
  assert dict(Engine.load(palm_tiny, dtype='float32').model.mesh.shape) == {'x': 2, 'y': 2, 'z': 2}
  one = Engine.load(palm_tiny, mesh=None, dtype='float32')
  assert one.model.mesh.size == 8


def test_a_batch_that_does_not_divide(engine):
  """3 rows on 2 devices: slower than 4, and as right."""
  prompts = [*PROMPTS, [103]]
  found = engine.generate(prompts, max_new_tokens=8)
  assert [c.tokens for c in found[:2]] == [
    c.tokens for c in engine.generate(PROMPTS, max_new_tokens=8, prompt_size=3)
  ]
  assert np.all(engine.score(np.ones((3, 4)), np.ones((3, 4))) < 0)


def test_each_phase_has_its_layout(engine, palm_tiny):
  """From one set of weights: the same completions."""
  other = Engine.load(
    palm_tiny,
    mesh='2x2x1',
    dtype='float32',
    prefill_layout='wg_xyz/batch',
    decode_layout='wg_x/heads',
  )
  assert [str(other.model.prefill_layout), str(other.model.decode_layout)] == [
    'wg_xyz/batch',
    'wg_x/heads',
  ]
  found, wanted = (e.generate(PROMPTS, max_new_tokens=8) for e in (other, engine))
  assert [c.tokens for c in found] == [c.tokens for c in wanted]
  np.testing.assert_allclose([c.score for c in found], [c.score for c in wanted], atol=1e-4)
  assert [other.model.padded_batch(n) for n in (1, 2, 3, 5)] == [2, 2, 4, 6]
  with pytest.raises(
    MeshError,
    match='wg_x/heads splits tokens over 2 devices of the mesh 2x2x1, and 3 rows of 1 do not '
    'divide: use a batch that is a multiple of 2',
  ):
    other.generate([[3]] * 3, max_new_tokens=8)


@pytest.mark.parametrize('shapes', [((2, 4), (2, 5)), ((2, 4), (1, 4)), ((4,), (4,))])
def test_score_takes_arrays_of_one_shape(engine, shapes):
  with pytest.raises(RequestError, match='must be arrays .* of one shape'):
    engine.score(*map(np.ones, shapes))
  with pytest.raises(RequestError, match='not empty'):
    engine.log_probs(np.zeros((0, 4), int), np.zeros((0, 4), int))


def test_a_model_without_bos_starts_from_a_prompt(testdata):
  engine = Engine.load(testdata / 'families' / 'smollm2', mesh='1x1x1', dtype='float32')
  for generate in (engine.generate, engine.stream):
    with pytest.raises(RequestError, match='prompt 1 is empty, and this model has no BOS'):
      generate([[5], []], max_new_tokens=2)
  with pytest.raises(RequestError, match='the prompt of pair 0 is empty, and this model has no'):
    engine.score_completions([([], [5])])
  # The first token of each has none before it.
  scored = engine.score_completions([([5], [6, 7]), ([5, 6], [7])])
  assert list(map(len, scored)) == [2, 1] and scored[0][1] == pytest.approx(scored[1][0], rel=1e-5)
  assert engine.log_probs([[5, 6]], [[6, 7]])[0].tolist() == pytest.approx(scored[0], rel=1e-5)


def test_tokens_beyond_learned_positions(testdata):
  """Refused before anything runs. A completion's last token is not read."""
  engine = Engine.load(testdata / 'families' / 'gpt2', mesh='1x1x1', dtype='float32')
  for generate in (engine.generate, engine.stream):
    with pytest.raises(RequestError, match='257 tokens to read, .* learned only 256 positions'):
      generate([[5] * 257], max_new_tokens=2)
  with pytest.raises(RequestError, match='pair 1 has 257 tokens to read'):
    engine.score_completions([([5] * 200, [5] * 57), ([5] * 200, [5] * 58)])


def test_what_can_t_be_scored(engine):
  for pair, says in (
    (([3], [384]), 'the completion of pair 1 holds token 384'),
    (([-1], [3]), 'the prompt of pair 1 holds'),
    (('a', [3]), 'the prompt of pair 1 must be token ids'),
  ):
    with pytest.raises(RequestError, match=says):
      engine.score_completions([([], [3]), pair])
  for pairs, says in (
    (3, 'prompts must be a list'),
    ([[3]], 'pair 0 must be .prompt, completion.'),
    ([3], 'pair 0 must be'),
    ([([3], [1.5])], 'the completion of pair 0 holds 1.5'),
  ):
    with pytest.raises(RequestError, match=says):
      engine.score_completions(pairs)
  for inputs, targets, says in (
    ([[1, 2], [3]], [[1, 2], [3]], 'rows here differ in length'),
    ([['a']], [['a']], 'arrays .B, T. of numbers'),
    ([[True]], [[True]], 'arrays .B, T. of numbers'),
    ([[None]], [[None]], 'arrays .B, T. of numbers'),
    ([[np.nan]], [[1]], 'the arrays hold token nan'),
  ):
    with pytest.raises(RequestError, match=says):
      engine.score(inputs, targets)
  with pytest.raises(RequestError, match='the arrays hold token 384'):
    engine.score(np.ones((2, 4), int), np.full((2, 4), 384))


@pytest.mark.parametrize(
  'mesh, says',
  [
    ('4x4x1', 'mesh 4x4x1 needs 16 devices and there are 8'),
    ('3x1x1', 'd_model=256 does not divide over the 3 devices of the mesh 3x1x1'),
    ('2x2', 'a mesh is written XxYxZ'),
    ('0x1x1', 'a mesh is written XxYxZ'),
    ((1, 1, 1), 'a mesh is written XxYxZ, e.g. 2x2x2 or 1x1x1, got (1, 1, 1)'),
  ],
)
def test_meshes_that_do_not_fit(palm_tiny, mesh, says):
  with pytest.raises(MeshError) as error:
    Engine.load(palm_tiny, mesh=mesh)
  assert says in str(error.value)


@pytest.mark.parametrize(
  'arguments, error, says',
  [
    (dict(dtype='float16'), RequestError, 'dtype must be one of float32, bfloat16'),
    (dict(cache='int4'), RequestError, "cache must be one of float32, bfloat16, int8, got 'int4'"),
    (
      dict(prefill_layout='ws_9d/batch'),
      MeshError,
      "unknown layout part 'ws_9d'; known: ws_1d, ws_2d",
    ),
    (dict(decode_layout='ws_2d'), MeshError, 'a layout is written feedforward/attention'),
    (
      dict(prefill_layout='wg_xyz/heads'),
      MeshError,
      'leaves none to split heads over; use wg_xyz/batch',
    ),
    (dict(decode_layout='ws_1d/batch'), MeshError, 'use ws_1d for both phases, or for neither'),
    (dict(norm_scale='two'), RequestError, 'norm_scale must be one of zero, one'),
    (dict(adapters=['a']), RequestError, "adapters must be a mapping of names to paths, got ['a']"),
  ],
)
def test_bad_loads(palm_tiny, arguments, error, says):
  with pytest.raises(error) as raised:
    Engine.load(palm_tiny, **arguments)
  assert says in str(raised.value)


@pytest.mark.parametrize(
  'values, says',
  [
    (dict(temperature=-0.1), 'temperature must be 0 or more'),
    (dict(temperature=float('nan')), 'temperature must be 0 or more'),
    (dict(temperature=float('inf')), 'temperature must be 0 or more'),
    (dict(top_k=-1), 'top_k must be a whole number, 0 (keep all) or more'),
    (dict(top_k=2.5), 'top_k must be a whole number, got 2.5'),
    (dict(temperature=1e39), 'temperature must be 0 or more'),
    (dict(top_p=0.0), 'top_p must be above 0'),
    (dict(top_p=1.1), 'top_p must be above 0 and at most 1'),
  ],
)
def test_bad_samplers(values, says):
  with pytest.raises(RequestError) as error:
    SamplingParams(**values)
  assert says in str(error.value)


def test_a_stream_gives_generate_s_tokens_as_they_are_made(engine):
  """Samples of a prompt too, each with a seed of its own."""
  options = dict(max_new_tokens=20, sampling=SamplingParams(1.0, top_k=20), seeds=[4, 9], eos_id=-1)
  found, events = {}, 0
  for event in engine.stream(PROMPTS, samples=2, slots=2, prefill_rows=4, **options):
    found.setdefault((event.request, event.sample), []).extend(event.tokens)
    events += 1
  assert events > 4
  seeds = {**options, 'seeds': [4, 5, 9, 10]}
  wanted = engine.generate([PROMPTS[0]] * 2 + [PROMPTS[1]] * 2, **seeds)
  assert [found[key] for key in sorted(found)] == [c.tokens for c in wanted]
  for bad, says in (
    (dict(samples=0), 'samples must be at least 1'),
    (dict(seeds=[1]), '2 prompts need as many seeds, got 1'),
    (dict(max_new_tokens=0), 'max_new_tokens must be at least 1'),
    (dict(slots=0), 'slots must be at least 1'),
    (dict(prefill_rows=0), 'prefill_rows must be at least 1'),
    (dict(top_log_probs=385), 'top_log_probs must be 0 to 384'),
  ):
    with pytest.raises(RequestError, match=says):
      engine.stream(PROMPTS, **{**options, **bad})


def test_an_int8_cache_gives_every_way_of_decoding_the_same(palm_tiny, engine):
  """A batch at once, prompts in chunks, slots with a shared beginning, turns of a chat; and score
  tells its probabilities.
  """
  int8 = Engine.load(palm_tiny, mesh='2x1x1', dtype='float32', cache='int8')
  begin = [byte + 3 for byte in b'import os\nimport sys\n\ndef main(argv):\n  ']
  prompts = [[*begin, 117, 104], [*begin, 105], begin]
  batch = [*prompts, prompts[0]]
  wanted = int8.generate(batch, max_new_tokens=12, eos_id=-1)
  assert [c.score for c in wanted] != [
    c.score for c in engine.generate(batch, max_new_tokens=12, eos_id=-1)
  ]
  chunks = int8.generate(batch, max_new_tokens=12, eos_id=-1, prefill_chunk=16)
  assert [c.tokens for c in chunks] == [c.tokens for c in wanted]
  np.testing.assert_allclose([c.score for c in chunks], [c.score for c in wanted], atol=1e-3)
  found = {}
  for event in int8.stream(prompts, max_new_tokens=12, eos_id=-1, slots=2):
    found.setdefault(event.request, []).extend(event.tokens)
  assert [found[i] for i in range(3)] == [c.tokens for c in wanted[:3]]
  chat = int8.chat(max_length=100, eos_id=-1)
  list(chat.reply(prompts[2][:20], max_new_tokens=1))
  chat.tokens.pop()
  assert list(chat.reply(prompts[2][20:], max_new_tokens=12)) == wanted[2].tokens
  targets = np.array([[*p, *c.tokens] for p, c in zip(batch, wanted) if p == prompts[0]])
  inputs = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
  scores = int8.score(
    inputs, targets, np.broadcast_to(np.arange(targets.shape[1]) >= len(prompts[0]), targets.shape)
  )
  np.testing.assert_allclose(scores, [wanted[0].score, wanted[3].score], atol=1e-3)


def test_prompts_that_are_texts(engine):
  """They are encoded by the checkpoint's vocabulary, and so are completions: from every method."""
  text = '    if x is None:\n        raise '
  ids = engine.checkpoint.vocabulary.encode(text)
  by_ids, by_text = engine.generate([ids, text], max_new_tokens=24, eos_id=-1)
  assert by_text.tokens == by_ids.tokens and by_ids.text is None
  assert by_text.text == engine.checkpoint.vocabulary.decode(by_text.tokens)
  stop = by_text.text[8:12]
  at = by_text.text.index(stop)
  # One stop text is not a sequence of letters.
  ((sample,),) = engine.complete([text], max_new_tokens=24, eos_id=-1, stop=stop, top_log_probs=2)
  assert (sample.text, sample.finish_reason) == (by_text.text[:at], 'stop')
  assert sample.tokens == by_text.tokens[: len(sample.tokens)]
  assert engine.checkpoint.vocabulary.decode(sample.tokens) == by_text.text[: at + 4]
  assert [top[0] for top in sample.top] == list(zip(sample.tokens, sample.log_probs))

  async def follow():
    return [event.text async for event in engine.stream([text], max_new_tokens=24, eos_id=-1)]

  assert ''.join(asyncio.run(follow())) == by_text.text
