"""The sweep of compiled programs: its cases, its limits, and going on where a run stopped."""

import json

import pytest

from benchmarks import compile_sweep
from benchmarks.compile_sweep import bound, cases, exceptions, hop_seconds, series, table


def result(case, times, **bounds):
  """Return results of a case that takes some times its bound, of 10 ms unless given."""
  found = {'flops': 4.0, 'memory': 9.0, 'hops': 1.0, **bounds}
  serial = times * (max(found['flops'], found['memory']) + found['hops'])
  kinds = {'matmul': serial}
  return {'case': str(case), 'mesh': '2x2x1', **found, 'serial': serial, 'kinds': kinds}


def test_sixty_cases_over_the_sizes_that_were_asked():
  found = cases()
  assert len(found) == len(set(map(str, found))) == 60
  assert {case.slice_name.split(':')[0] for case in found} == {'v4', 'v5e', 'v5p', 'v6e'}
  assert {case.slice_name for case in found} >= {'v4:2x2x1', 'v4:8x8x8'}
  assert {case.model for case in found} == {'palm_8b', 'palm_62b', 'palm_540b', 'llama3_70b'}
  assert (min(c.batch for c in found), max(c.batch for c in found)) == (1, 512)
  assert (min(c.positions for c in found), max(c.positions for c in found)) == (512, 43008)


def test_one_quantity_grows_along_a_series():
  for some in series():
    columns = list(zip(*some))
    assert sum(len(set(column)) > 1 for column in columns) == (len(some) > 1)


def test_the_bound_is_the_longer_of_flops_and_memory_and_the_hops():
  assert bound({'flops': 4.0, 'memory': 9.0, 'hops': 1.5}) == 10.5
  assert bound({'flops': 14.0, 'memory': 9.0, 'hops': 1.5}) == 15.5


def test_hops_of_a_case():
  """PaLM 8B in 1D on a ring-less 2x2: collectives of 4 chips, of 2 hops, 32 layers."""
  (some,) = series('palm_8b v4:2x2x1 int8 decode ws_1d/batch 4 2048')
  layer, rest = hop_seconds(some[0], (1, 2, 2)) / 32, 20e-6
  # Two norms' all-reduces are one here; a gather, a reduce-scatter and two exchanges.
  assert 6e-6 < layer < 6e-6 + 8e-6 + rest


def test_exceptions_are_far_above_the_bound_or_a_neighbour():
  first, second, third, *others = series()[0]
  ratios = {first: 1.2, second: 1.9, third: 3.1}
  found = exceptions({str(case): result(case, times) for case, times in ratios.items()})
  assert set(found) == {str(second), str(third)}
  assert found[str(second)].startswith('1.6 times the ratio of ' + str(first))
  assert found[str(third)] == '3.1 times its bound'
  assert not exceptions({str(c): result(c, 2.9) for c in (first, second, third)})


def test_the_table_names_exceptions_and_their_largest_parts():
  first, second, *_ = series()[0]
  text = table({str(first): result(first, 3.5), str(second): {'error': 'does not fit'}})
  rows = [line for line in text.splitlines() if line.startswith('| palm')]
  assert '| 10 | 35 | 3.50 | ! |' in rows[0] and rows[1].endswith('| does not fit |')
  assert f'- {first}: 3.5 times its bound (matmul 35 ms)' in text


def test_a_run_goes_on_where_another_stopped(monkeypatch, tmp_path, capsys):
  path, ran = tmp_path / 'results.jsonl', []

  def compile_case(case):
    ran.append(str(case))
    if len(ran) == 3:
      raise KeyboardInterrupt
    return result(case, 2.0)

  monkeypatch.setattr(compile_sweep, 'compile_case', compile_case)
  arguments = ['compile_sweep', f'--results={path}', '--case=v5p']
  monkeypatch.setattr('sys.argv', arguments)
  with pytest.raises(KeyboardInterrupt):
    compile_sweep.main()
  compile_sweep.main()
  wanted = [str(case) for case in cases() if 'v5p' in str(case)]
  assert [json.loads(line)['case'] for line in path.read_text().splitlines()] == wanted
  assert ran == wanted[:3] + wanted[2:]
  monkeypatch.setattr('sys.argv', [*arguments, '--table'])
  capsys.readouterr()
  compile_sweep.main()
  assert capsys.readouterr().out.count('| palm') + 1 == len(wanted)  # and one Llama
