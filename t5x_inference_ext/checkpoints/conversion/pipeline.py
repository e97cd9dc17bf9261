"""Slices through a pool of threads: while one is written, the next is read.

Reading a chunk, numpy's arithmetic on a block and writing all run outside of Python's lock. Each slice is worked on in
steps (find its scales, write it); a step's jobs, one a block, run in any order, and the next step begins when all are
done. A worker that finds the current step handed out takes up the next slice.
"""

from collections.abc import Callable, Iterator
import threading
from typing import Protocol


class PipelineWork(Protocol):
  """A slice on its way."""

  def jobs(self) -> list[Callable[[], None]] | None:
    """The next step's jobs, called when all of the last step's are done; None when there is no step left."""

  def may_start(self) -> bool:
    """Whether its first job may run while the slice before it is being finished."""


class _Open:
  """A slice being worked on."""

  def __init__(self, work: PipelineWork):
    self.work, self.waiting, self.running, self.started = work, [], 0, False


class Pipeline:
  """Runs works in order, at most two at a time, on a number of threads."""

  def __init__(self, works: Iterator[PipelineWork], workers: int):
    self._works, self._workers = works, workers
    self._open = []
    self._exhausted, self._error = False, None
    self._changed = threading.Condition()

  def run(self) -> None:
    """Returns when all are done. Raises the first error of any job, once no job runs any more."""
    threads = [
      threading.Thread(target=self._worker, name=f'convert-{i}', daemon=True)
      for i in range(self._workers)
    ]
    for thread in threads:
      thread.start()
    try:
      for thread in threads:
        thread.join()
    except BaseException as e:  # Ctrl-C arrives in this thread
      self._fail(e)
      for thread in threads:
        thread.join()
      raise
    if self._error is not None:
      raise self._error

  def _worker(self) -> None:
    while True:
      with self._changed:
        try:
          while (taken := self._take()) is None:
            if self._error is not None or (self._exhausted and not self._open):
              return
            self._changed.wait()
        except BaseException as e:  # pylint: disable=broad-except  # raised by run
          self._fail(e)
          return
      opened, job = taken
      try:
        job()
      except BaseException as e:  # pylint: disable=broad-except  # raised by run
        self._fail(e)
        return
      with self._changed:
        opened.running -= 1
        self._changed.notify_all()

  def _take(self) -> tuple[_Open, Callable[[], None]] | None:
    """A job for this thread, or None where there is none at present."""
    if self._error is not None:
      return None
    position = 0
    while position < 2:
      if position == len(self._open) and not self._exhausted:
        work = next(self._works, None)
        if work is None:
          self._exhausted = True
          self._changed.notify_all()
        else:
          self._open.append(_Open(work))
      if position == len(self._open):
        return None
      opened = self._open[position]
      if not opened.waiting and not opened.running and (position == 0 or not opened.started):
        if position == 0 or opened.work.may_start():
          jobs = opened.work.jobs()
          opened.started = True
          if jobs is None:
            del self._open[position]
            continue
          opened.waiting = jobs[::-1]
          if not jobs:
            continue  # nothing to wait for: the next step
      if opened.waiting and (position == 0 or opened.work.may_start()):
        opened.running += 1
        return opened, opened.waiting.pop()
      position += 1
    return None

  def _fail(self, error: BaseException) -> None:
    with self._changed:
      self._error = self._error or error
      self._changed.notify_all()
