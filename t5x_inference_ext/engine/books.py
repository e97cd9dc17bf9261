"""The books of a scheduler: what must add up when it is idle."""

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
  """Return a sentence for each thing that does not add up.

  Args:
    table: Slots and pages.
    tree: Cached beginnings, or None.
    rows_wait: Whether rows wait although no request is unfinished.
    rows_decode: Whether rows have slots although no request is unfinished.
    requests: Numbers of requests that came, that have finished, and that have not.
    queued: Number of requests that have not been looked at.
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
