"""Precompiled programs of slot refill: what the scheduler runs, caches in place, times."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_inference_ext.config import preset
from t5x_inference_ext.engine import saved_program
from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.engine.slot_table import SlotTable
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.model.chunks import page_shards
from t5x_inference_ext.precompile.analysis import analyze
from t5x_inference_ext.precompile.case import CHUNK, CompileCase
from t5x_inference_ext.precompile.program import compile_case, phase_function
from t5x_inference_ext.precompile.report import report_text
from t5x_inference_ext.precompile.report_json import report_dict
from t5x_inference_ext.precompile.slot_programs import slot_config
from t5x_inference_ext.sharding.layout import Layout
from t5x_inference_ext.sharding.mesh import make_mesh

SMALL = preset('palm_tiny', num_layers=2)
ROWS, CONTEXT, PROMPT = 8, 16, 4


def _case(phase, **fields):
  return CompileCase(
    SMALL, 'bfloat16', phase, ROWS, CONTEXT, **{**dict(dtype='float32', prompt=PROMPT), **fields}
  )


def _put(struct, value=0):
  return jax.device_put(
    np.broadcast_to(np.asarray(value, struct.dtype), struct.shape), struct.sharding
  )


def _zeros(tree):
  return jax.tree.map(_put, tree)


@pytest.mark.parametrize('layout', ['ws_2d/batch', 'wg_xyz/batch'])
def test_a_prompt_goes_through_all_programs(layout):
  """Two chunks of prompts, insertion, steps: the tokens of a prefill and of decode steps."""
  mesh = make_mesh((2, 2, 2))
  prefilling = Layout.parse(layout)
  extend, (weights, prompts, tokens, counts) = phase_function(
    _case('extend', prompt=2, layout=prefilling), mesh
  )
  random = np.random.default_rng(0)
  weights = jax.tree.map(
    lambda x: jax.device_put(random.normal(size=x.shape).astype(x.dtype) * 0.05, x.sharding),
    weights,
  )
  asked = random.integers(3, 380, (ROWS, PROMPT), np.int32)
  prompts = _zeros(prompts)
  for i in range(0, PROMPT, 2):
    prompts = extend(weights, prompts, _put(tokens, asked[:, i : i + 2]), _put(counts, 2))
  admit, (_, slots, held, *_, asks, prompt, length, generated) = phase_function(
    _case('admit', prompt=CONTEXT, other_layout=prefilling), mesh
  )
  run, (_, _, _, alive, steps, until_free) = phase_function(
    _case('slots', other_layout=prefilling), mesh
  )
  model = _case('slots', other_layout=prefilling).model(mesh)
  table = SlotTable(slot_config(model, ROWS, CONTEXT), page_shards(model, ROWS))
  slots, steps_of_row = _zeros(slots), []

  def pages_of(row):
    table.pool.begin(row, 0)
    assert table.pool.grow(row, PROMPT + 4)
    return table.pages_to_write(row, [])

  group = held.logits.shape[0]  # of prompts that are on their way together
  for row in range(ROWS):
    of_group = jax.tree.map(
      lambda x, to, at=row // group: jax.device_put(_rows(x, ROWS, at * group, group), to.sharding),
      prompts,
      held,
    )
    some = dataclasses.replace(_zeros(asks), limits=jnp.full(1, 10))
    slots, output = admit(
      weights,
      slots,
      of_group,
      np.int32(row % group),
      np.int32(row),
      pages_of(row),
      some,
      _put(prompt),
      _put(length, PROMPT),
      _put(generated),
    )
    steps_of_row.append(output.chosen.tokens[0, 0])
  chosen = [np.stack(steps_of_row)]
  for _ in range(3):
    slots, output = run(
      weights, slots, table.pages(), _put(alive, True), _put(steps, 1), _put(until_free)
    )
    assert output.counts.tolist() == [1] * ROWS and not any(output.ended)
    chosen.append(output.chosen.tokens[0])
  found = np.stack(chosen, axis=1)
  # The same by the programs of a static batch.
  prefill, (_, tokens, lengths) = phase_function(_case('prefill'), mesh)
  decode, _ = phase_function(_case('decode', prompt=None), mesh)
  token, cache = prefill(weights, _put(tokens, asked), _put(lengths, PROMPT))
  expected = [token]
  for _ in range(3):
    token, cache = decode(weights, cache, token)
    expected.append(token)
  np.testing.assert_array_equal(found, np.stack(expected, axis=1))
  assert slots.cache.lengths.tolist() == [PROMPT + 3] * ROWS


def _rows(x, rows, first, count):
  axis = x.shape.index(rows)
  return jax.lax.slice_in_dim(x, first, first + count, axis=axis)


def test_a_saved_program_takes_and_gives_what_it_did(tmp_path):
  mesh, case = (
    make_mesh((2, 2, 2)),
    _case('slots', sampling=SamplingParams(1.0, repetition_penalty=1.1)),
  )
  program = compile_case(case, mesh)
  saved_program.save(tmp_path / 'slots', program.compiled, program.arguments, mesh, case.to_dict())
  loaded = saved_program.load(tmp_path / 'slots', *phase_function(case, mesh), mesh, case.to_dict())
  with_nobody = lambda: _zeros(program.arguments)
  results = [jax.tree.map(np.asarray, run(*with_nobody())) for run in (loaded, program.compiled)]
  jax.tree.map(np.testing.assert_array_equal, *results)


def test_drafts_are_checked_as_decode_steps_would():
  """Drafts have 2 tokens after the last one; some rows have shorter ones, some slots are free."""
  mesh = make_mesh((2, 2, 2))
  check, (weights, cache, tokens, counts) = phase_function(_case('verify', prompt=3), mesh)
  random = np.random.default_rng(0)
  weights = jax.tree.map(
    lambda x: jax.device_put(random.normal(size=x.shape).astype(x.dtype) * 0.05, x.sharding),
    weights,
  )
  asked = random.integers(3, 380, (ROWS, 3), np.int32)
  number = np.asarray([3, 2, 1, 0] * (ROWS // 4), np.int32)
  found, cache = check(weights, _zeros(cache), _put(tokens, asked), _put(counts, number))
  assert cache.lengths.tolist() == number.tolist()
  decode, (_, dense, token) = phase_function(_case('decode', prompt=None), mesh)
  dense, compared = _zeros(dense), 0
  for i in range(3):
    wanted, dense = decode(weights, dense, _put(token, asked[:, i]))
    some = number > i
    compared += int(some.sum())
    np.testing.assert_array_equal(np.asarray(found)[some, i], np.asarray(wanted)[some])
  assert compared == number.sum()


def test_the_default_chunk_is_the_scheduler_s():
  assert CompileCase(SMALL, 'int8', 'extend', 8, 2048).length == CHUNK == 256
  assert CompileCase(SMALL, 'int8', 'extend', 8, 64).length == 64
  assert CompileCase(SMALL, 'int8', 'slots', 8, 64).length == 1
  assert CompileCase(SMALL, 'int8', 'verify', 8, 64).length == 9
  with pytest.raises(RequestError, match='prompt=65 does not fit into context=64'):
    CompileCase(SMALL, 'int8', 'extend', 8, 64, prompt=65)


@functools.cache
def _answer(phase, sampling=SamplingParams(), layout='ws_2d/batch', **fields):
  config = dataclasses.replace(preset('palm_8b'), num_layers=3)
  return analyze(
    config,
    'int8',
    'v4:2x2x2',
    phase,
    16,
    512,
    layout=layout,
    mesh='2x2x2',
    scan_layers=True,
    prompt=128,
    sampling=sampling,
    **fields,
  )


@pytest.mark.libtpu
@pytest.mark.parametrize(
  'phase, unit',
  [('extend', 'a chunk'), ('slots', 'a step'), ('verify', 'a step'), ('admit', 'a prompt')],
)
def test_the_report_tells_the_time_of_one(phase, unit):
  answer = _answer(phase)
  text, found = report_text(answer), answer.estimate
  assert f'phase:  {phase} in ws_2d/batch' in text and f' {unit} with nothing overlapped' in text
  # How many pages an insertion copies is known only when it runs.
  assert ('the trip count of loop' in text) == (phase == 'admit')
  memory, data = answer.program.memory, report_dict(answer)
  # [L, B, K, S, Q] of keys and of values in 2 bytes: 2 of the 16 rows on each of 8 chips, and with
  # pages one more of 128 positions.
  positions = 16 // 8 * 512 + (0 if phase == 'extend' else 128)
  assert memory.cache == pytest.approx(2 * 2 * 3 * positions * 256, rel=0.01)
  assert answer.program.compiled.memory_analysis().alias_size_in_bytes >= memory.cache  # in place
  assert data['case']['phase'] == phase and data['case']['prompt'] == (
    None if phase == 'slots' else 128
  )
  if phase == 'slots':
    assert len(found.unknown_loops) == 1
    assert 0.9 * found.serial_seconds < data['seconds']['step']['serial'] < found.serial_seconds


@pytest.mark.libtpu
def test_a_step_of_slots_is_a_decode_step_and_the_choice_of_tokens():
  step, _ = _answer('slots').estimate.turn_seconds
  sampled, _ = _answer('slots', SamplingParams(1.0, top_k=40)).estimate.turn_seconds
  decode = _answer('decode').estimate.serial_seconds
  assert decode < step < 1.25 * decode
  assert step < sampled


@pytest.mark.libtpu
def test_the_state_of_rows_is_whole_on_every_chip():
  """Where XLA's partitioner may split it, each of its arrays takes an all-reduce in every step."""
  sent = [c for c in _answer('slots').estimate.costs if c.collective and c.op_name]
  assert sent and all('shard_map' in c.op_name for c in sent)


@pytest.mark.libtpu
@pytest.mark.parametrize(
  'layout, other',
  [('ws_2d/batch', 'ws_2d/batch'), ('ws_2d/batch', 'wg_xyz/batch'), ('ws_2d/heads', 'wg_xy/batch')],
)
def test_admission_moves_one_row(layout, other):
  """No collective carries more than a row of keys, values or logits; the cache isn't read whole."""
  answer = _answer('admit', layout=layout, other_layout=other)
  row = max(
    2 * 3 * 128 * 256, 4 * answer.case.config.vocab_size
  )  # bytes of a prompt's keys, or of its logits
  sent = [c.collective.bytes for c in answer.estimate.costs if c.collective]
  assert max(sent, default=0) <= 2 * row
  assert bool(sent) == (layout != other)  # in the same layout a row is where it belongs
  assert answer.program.memory.temporaries < 8 * row
