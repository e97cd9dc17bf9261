"""The accelerator benchmark at a tiny shape on a CPU: its counts, table and programs."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import benchmarks
from benchmarks import accelerator
from benchmarks.accelerator import SHAPES, Cell, Machine
from benchmarks.random_model import RandomModel
from t5x_inference_ext.config import ModelConfig, preset

TINY = SHAPES['tiny'][0]
MACHINE = Machine(bandwidth=1e9, flops=1e12)


def _cells(line: str) -> list[str]:
  return [cell.strip() for cell in line.strip('|').split('|')]


@pytest.mark.parametrize('config', [preset('palm_tiny'), TINY])
def test_prefill_flops_are_counted_token_by_token(config):
  c, batch, prompt = config, 3, 5
  multiplied = 0
  for position in range(prompt):
    for _ in range(c.num_layers):
      for outputs in (c.num_heads * c.d_head, c.d_head, c.d_head, *(c.d_ff for _ in c.mlp_inputs)):
        multiplied += c.d_model * outputs
      for inputs in (c.num_heads * c.d_head, c.d_ff):
        multiplied += inputs * c.d_model
      multiplied += 2 * c.num_heads * c.d_head * (position + 1)  # itself and those before it
  multiplied += c.d_model * c.vocab_size
  assert accelerator.prefill_flops(c, batch, prompt) == 2 * batch * multiplied


def test_row_relates_times_to_the_machine():
  cell = Cell(batch=2, decode=0.5, prefill=4.0, generate=8.0, transformers=12.0)
  flops = accelerator.prefill_flops(TINY, 2, 32)
  cells = _cells(
    accelerator.row(cell, 'int8', TINY, int(4e8), Machine(1e9, flops), prompt=32, new=16)
  )
  assert len(cells) == len(accelerator.TITLES + accelerator.OTHER_TITLES)
  # Reading the weights takes 0.4 s of 0.5; the FLOPs of the prefill 1 s of 4 at full rate; the
  # 32 tokens 8 and 12 s.
  assert cells[:5] == ['int8', '2', '500.000', '400.000', '80.0%']
  assert cells[7:] == ['25.0%', '4', '3', '1.50x']


def test_row_without_another_side_ends_before_its_titles():
  line = accelerator.row(Cell(1, 1.0, 1.0, 1.0), 'int8', TINY, 1, MACHINE, 32, 8)
  assert len(_cells(line)) == len(accelerator.TITLES)


@pytest.mark.parametrize('shape', SHAPES)
def test_shapes_have_the_sizes_of_their_names(shape):
  config, prompt, new = SHAPES[shape]
  billions = {'palm_8b': 8.6, 'falcon_7b': 6.9}
  if shape in billions:
    assert config.num_params / 1e9 == pytest.approx(billions[shape], abs=0.05)
  assert accelerator.is_falcon(config) == (shape != 'palm_8b')
  assert prompt > 1 and new > 1


@pytest.mark.parametrize(
  'field, value',
  [('block', 'serial'), ('mlp', 'swiglu'), ('norm', 'rms'), ('num_kv_heads', 4), ('d_head', 16)],
)
def test_other_shapes_are_no_falcons(field, value):
  assert not accelerator.is_falcon(ModelConfig(**{**TINY.to_dict(), field: value}))


@pytest.mark.parametrize('kind, scan_layers', [('bfloat16', True), ('int8', False)])
def test_programs_agree_and_start_over(kind, scan_layers):
  """Steps timed alone give what a whole generation gives, also when they run again."""
  own = RandomModel.make(TINY, kind, scan_layers)
  assert own.weights.quantized == (kind == 'int8') and own.weights.stacked == scan_layers
  programs = own.programs(batch=3, prompt=6, new_tokens=5)
  tokens = np.asarray(programs.generate())
  assert tokens.shape == (3, 5) and len(np.unique(tokens)) > 6  # so that equal means something
  np.testing.assert_array_equal(programs.prefill()[0], tokens[:, 0])
  for _ in range(2):
    np.testing.assert_array_equal(programs.decode(), tokens[:, -1])


@pytest.mark.parametrize('kind', ['bfloat16', 'int8'])
def test_random_weights_keep_activations_near_one(kind):
  own = RandomModel.make(TINY, kind, True)
  logits = own.model.logits(own.weights, jnp.arange(16).reshape(2, 8))
  assert 0.05 < float(np.std(logits)) < 0.2  # of the normed activations with an embedding of 0.1
  assert own.weight_bytes == sum(np.asarray(x).nbytes for x in jax.tree.leaves(own.weights))


def test_layers_differ():
  layers = RandomModel.make(TINY, 'int8', True).weights.layers
  w = np.asarray(jax.tree.leaves(layers['parallel'].w_in)[0])
  assert w.dtype == np.int8 and w.min() < -120 and w.max() > 120
  assert (w[0] != w[1]).mean() > 0.9


def test_table_of_a_tiny_shape(monkeypatch):
  monkeypatch.setattr(accelerator, 'other_side', lambda config, context: (None, 'nobody beside'))
  lines = list(accelerator.table('tiny', MACHINE, ['int8'], [2], repeats=1, prompt=4, new=3))
  text = '\n'.join(lines)
  assert 'nobody beside' in text and 'prompt 4, generate 3' in text
  rows = [_cells(line) for line in text.splitlines() if line.startswith('| int8')]
  assert [r[1] for r in rows] == ['2']
  assert len(rows[0]) == len(accelerator.TITLES) and float(rows[0][2]) > 0


def test_too_much_memory_is_an_answer(monkeypatch):

  def refuse(*_):
    raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory')

  monkeypatch.setattr(accelerator, 'other_side', lambda config, context: (None, ''))
  monkeypatch.setattr(accelerator, 'measure', refuse)
  assert (
    list(accelerator.table('tiny', MACHINE, ['int8'], [64]))[-1] == '| int8 | 64 | out of memory |'
  )


def test_other_side_says_why_it_is_absent(monkeypatch):
  assert accelerator.other_side(preset('palm_8b'), 8) == (
    None,
    'transformers has no model of this shape (it has that of --shape=falcon_7b)',
  )
  monkeypatch.setitem(sys.modules, 'torch', None)
  monkeypatch.delitem(sys.modules, 'benchmarks.falcon', raising=False)
  monkeypatch.delattr(benchmarks, 'falcon', raising=False)
  side, remark = accelerator.other_side(TINY, 8)
  assert side is None and 'torch is not importable' in remark


@pytest.mark.parametrize(
  'flags', [['--shape=palm_9b'], ['--weights=int4'], ['--generate=1'], ['--batch=one']]
)
def test_wrong_flags(flags, monkeypatch, capsys):
  monkeypatch.setattr('sys.argv', ['accelerator', *flags])
  with pytest.raises(SystemExit) as e:
    accelerator.main()
  assert e.value.code == 2 and flags[0].split('=')[1] in capsys.readouterr().err
