"""Parts of the infer command: seeds, default meshes, batches, the journal."""

import json

import pytest

from t5x_inference_ext.config import preset
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.runs import batches, output
from t5x_inference_ext.runs.clock import Clock
from t5x_inference_ext.runs.journal import Journal
from t5x_inference_ext.sharding.mesh_choice import default_mesh


def test_row_seeds_differ_and_stay():
  seeds = [batches.row_seed(7, row) for row in range(1000)]
  assert len(set(seeds)) == 1000
  assert all(0 <= seed < 2**32 for seed in seeds)
  assert not set(seeds) & {batches.row_seed(8, row) for row in range(1000)}
  assert batches.row_seed(7, 3) == seeds[3]


@pytest.mark.parametrize(
  'model, devices, mesh',
  [
    ('palm_tiny', 1, (1, 1, 1)),
    ('palm_tiny', 2, (1, 2, 1)),
    ('palm_tiny', 7, (1, 2, 2)),
    ('palm_tiny', 8, (2, 2, 2)),
    ('palm_540b', 64, (4, 4, 4)),
    ('palm_540b', 256, (8, 8, 4)),
  ],
)
def test_default_mesh_divides_the_model(model, devices, mesh):
  assert default_mesh(preset(model), devices) == mesh


@pytest.mark.parametrize(
  'longest, limit, size',
  [(0, None, 0), (1, None, 16), (16, None, 16), (17, None, 32), (17, 20, 20), (17, 17, 17)],
)
def test_prompts_are_padded_within_the_cache(longest, limit, size):
  assert batches.prompt_size(longest, limit) == size


def test_compilation_is_not_counted_as_work():
  import jax

  clock = Clock()
  step = jax.jit(lambda x: x @ x + 1)
  with clock:
    step(jax.numpy.ones((64, 64))).block_until_ready()
  compiled = clock.compile_seconds
  assert compiled > 0
  with clock:
    step(jax.numpy.ones((64, 64))).block_until_ready()
  assert clock.compile_seconds == compiled
  assert clock.seconds > 0


def test_a_file_appears_whole_or_not_at_all(tmp_path):
  path = tmp_path / 'rows.jsonl'
  with pytest.raises(KeyboardInterrupt), output.whole_file(str(path)) as file:
    file.write('half')
    raise KeyboardInterrupt
  assert not list(tmp_path.iterdir())
  with output.whole_file(str(path)) as file:
    file.write('all')
    assert not path.exists()
  assert path.read_text() == 'all'
  assert path.stat().st_mode & 0o444 == 0o444


@pytest.fixture
def journal(tmp_path):
  """Opens the journal of a run; the one before is closed, as when its process ends."""
  opened = []

  def open_journal(run='one'):
    for each in opened:
      each.close()
    opened.append(Journal(str(tmp_path / 'rows'), run))
    return opened[-1]

  yield open_journal
  for each in opened:
    each.close()


def keep(journal, rows):
  for row, result in rows:
    journal.keep(row, result)
  return journal


def test_a_journal_keeps_rows_until_the_run_has_ended(journal, tmp_path):
  keep(journal(), [(3, ['c', 1.5]), (0, ['a', 0.5])])
  again = journal()
  assert again.done == {3: ['c', 1.5], 0: ['a', 0.5]}
  keep(again, [(1, 'x')])
  assert list(again.in_order()) == [['a', 0.5], 'x', ['c', 1.5]]
  assert journal().done == again.done
  assert journal('another run').done == {}
  again.remove()
  assert not list(tmp_path.iterdir())
  again.remove()


def test_a_journal_that_was_cut_off_keeps_its_whole_lines(journal, tmp_path):
  keep(journal(), [(0, 'a'), (1, 'b')])
  path = tmp_path / 'rows'
  path.write_text(path.read_text()[:-3])
  assert journal().done == {0: 'a'}
  keep(journal(), [(1, 'b'), (2, 'c')])
  assert journal().done == {0: 'a', 1: 'b', 2: 'c'}
  path.write_text('')
  assert journal().done == {}


@pytest.mark.parametrize(
  'damage', ['{"row": 1', '5', '[]', '{"row": null, "result": 1}', '[' * 9999]
)
def test_a_damaged_line_costs_its_own_row_alone(journal, tmp_path, damage):
  keep(journal(), [(0, 'a'), (1, 'b'), (2, 'c')])
  path = tmp_path / 'rows'
  path.write_text(path.read_text().replace('{"row": 1, "result": "b"}', damage))
  assert journal().done == {0: 'a', 2: 'c'}


def test_a_run_that_is_killed_has_every_row_that_ended(journal, tmp_path):
  """Rows are read while the run that writes them has not closed its file."""
  keep(journal(), [(0, 'a'), (1, 'b')])
  lines = (tmp_path / 'rows').read_text().splitlines()
  assert [json.loads(line)['row'] for line in lines[1:]] == [0, 1]


def test_resuming_rewrites_nothing(journal, tmp_path):
  """What is there stays there, byte for byte: a kill at any moment finds every finished row."""
  keep(journal(), [(0, 'a'), (1, 'b')])
  before = (tmp_path / 'rows').read_bytes()
  again = journal()
  assert (tmp_path / 'rows').read_bytes() == before
  keep(again, [(2, 'c')])
  assert (tmp_path / 'rows').read_bytes().startswith(before)


def test_another_run_empties_a_journal(journal):
  keep(journal(), [(0, 'a')])
  keep(journal('other'), [(5, 'b')])
  assert journal('other').done == {5: 'b'} and journal().done == {}


def test_two_runs_of_one_output_are_refused(tmp_path):
  first = Journal(str(tmp_path / 'rows'), 'one')
  with pytest.raises(RequestError, match='another run is writing this output'):
    Journal(str(tmp_path / 'rows'), 'one')
  first.close()
  Journal(str(tmp_path / 'rows'), 'one').close()


def test_a_journal_that_cannot_be_written(tmp_path):
  with pytest.raises(RequestError, match='File name too long'):
    Journal(str(tmp_path / ('x' * 300)), 'one')
