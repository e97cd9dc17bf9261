"""What a run says, in process 0 alone; how far a long step is: a bar on a terminal, now and then a line elsewhere."""

from collections.abc import Iterable, Iterator
import sys
import time

import tqdm

from t5x_inference_ext import distributed

LINE_SECONDS = 10  # between lines, where there is no terminal


def print_on_main(text: str) -> None:
  """Prints a line."""
  if distributed.is_main():
    print(text)


def progress(items: Iterable, what: str, total: int | None = None) -> Iterator:
  """Yields the items, showing on stderr how many of `total` (None: unknown) are done."""
  if not distributed.is_main():
    yield from items
    return
  if sys.stderr.isatty():
    yield from tqdm.tqdm(items, desc=what, total=total, leave=False)
    return
  start = said = time.monotonic()
  for done, item in enumerate(items, 1):
    yield item
    now = time.monotonic()
    if now - said >= LINE_SECONDS:
      said = now
      of = '' if total is None else f' of {total}'
      print(f'{what}: {done}{of}, {now - start:.0f} s', file=sys.stderr, flush=True)
