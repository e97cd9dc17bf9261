"""The table of compiled steps that check drafts."""

import pytest

from benchmarks import few_layers, verify_compile


def test_a_row_has_the_time_of_a_token_by_acceptance():
  """Half of the tokens of a draft of two are right: 1 + 1/2 + 1/4 tokens a step."""
  cells = [cell.strip() for cell in verify_compile.table_row(8, 2, 0.007, 0.001, 0.004).split('|')]
  assert cells[1:7] == ['8', '2', '7.00', '1.00', '1.75', '4.00']
  assert len(cells) == 2 + len(verify_compile.TITLES) + len(verify_compile.ACCEPTANCES)


@pytest.mark.libtpu
def test_a_step_that_checks_a_draft_takes_longer(monkeypatch):
  """Compiled with one and two layers, to be quick."""
  monkeypatch.setattr(few_layers, 'FEW_LAYERS', (1, 2))
  case = 'palm_8b', 'int8', 'v4:2x2x1', 'ws_2d/batch', 8
  plain, checking = (verify_compile.step_seconds(*case, draft, 256) for draft in (0, 4))
  assert 1e-3 < plain < checking < 3 * plain
