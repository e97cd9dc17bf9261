"""Consistency checks of an idle scheduler's records."""

from t5x_inference_ext.engine.prefix_tree import PrefixTree
from t5x_inference_ext.engine.slot_table import SlotTable


def wrong_books(
  table: SlotTable,
  tree: PrefixTree | None,
  *,
  rows_wait: bool,
  rows_decode: bool,
  requests: tuple[int, int, int],
  queued: int,
) -> list[str]:
  """Return one sentence for each inconsistency; [] if there is none.

  Args:
    table: Slots and pages.
    tree: Prefix tree, or None.
    rows_wait: Whether rows wait although no request is unfinished.
    rows_decode: Whether rows have slots although no request is unfinished.
    requests: Numbers of submitted, finished and unfinished requests.
    queued: Number of requests that the scheduler has not taken yet.
  """
  wrong = table.check() + (tree.check() if tree is not None else [])
  for found, what in ((rows_wait, 'wait'), (rows_decode, 'have slots')):
    if found:
      wrong.append(f'no request is unfinished, and rows still {what}')
  came, finished, unfinished = requests
  if came != finished + unfinished + queued:
    wrong.append(
      f'{came} requests came, {finished} have finished, {unfinished} have not and {queued} are '
      'queued'
    )
  return wrong
