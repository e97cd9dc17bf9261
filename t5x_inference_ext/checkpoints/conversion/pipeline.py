"""Slices through a pool of threads: while one is written, the next is read.

Reading a chunk, numpy's arithmetic on a block and writing all run outside of Python's lock. A slice is worked on in
steps (find its scales, write it). A step's jobs, one a block, run in any order, and the next step begins when all are
done. A worker that finds every job of the current step taken begins the next slice.
"""

from collections.abc import Callable, Iterator
import dataclasses
import threading
from typing import Protocol

PipelineJob = Callable[[], None]


class PipelineWork(Protocol):
  """A slice to be worked on."""

  def jobs(self) -> list[PipelineJob] | None:
    """Return the next step's jobs, None after the last step. Called when all jobs of the last step are done."""

  def may_start(self) -> bool:
    """Return whether its jobs may run while the slice before it is being finished."""


@dataclasses.dataclass
class _Open:
  """A slice being worked on.

  Attributes:
    work: The slice.
    waiting: Jobs of the current step that no thread has taken; the next one is last.
    running: Number of jobs that threads have taken and not finished.
    started: Whether its first step has begun.
  """

  work: PipelineWork
  waiting: list[PipelineJob] = dataclasses.field(default_factory=list)
  running: int = 0
  started: bool = False


class Pipeline:
  """Runs slices in order, at most two at a time, on a number of threads."""

  def __init__(self, works: Iterator[PipelineWork], workers: int):
    self._works, self._workers = works, workers
    self._open: list[_Open] = []
    self._exhausted = False
    self._error: BaseException | None = None
    self._changed = threading.Condition()

  def run(self) -> None:
    """Return when all slices are done. Raises the first error of any job, once no job runs any more."""
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
    try:
      while (taken := self._wait_for_job()) is not None:
        opened, job = taken
        job()
        with self._changed:
          opened.running -= 1
          self._changed.notify_all()
    except BaseException as e:  # run() raises it
      self._fail(e)

  def _wait_for_job(self) -> tuple[_Open, PipelineJob] | None:
    """Return a job for this thread; None when all are done, or one has failed."""
    with self._changed:
      while (taken := self._take()) is None:
        if self._error is not None or (self._exhausted and not self._open):
          return None
        self._changed.wait()
      return taken

  def _take(self) -> tuple[_Open, PipelineJob] | None:
    """Return a job that may begin now, if there is one. Call with the lock."""
    if self._error is not None:
      return None
    position = 0
    while position < 2:
      if position == len(self._open) and not self._open_next():
        return None
      opened = self._open[position]
      first = position == 0
      if first or opened.work.may_start():
        if not opened.waiting and not opened.running and (first or not opened.started):
          jobs = opened.work.jobs()
          opened.started = True
          if jobs is None:
            del self._open[position]
            continue
          opened.waiting = jobs[::-1]
          if not jobs:
            continue  # nothing to wait for: the next step
        if opened.waiting:
          opened.running += 1
          return opened, opened.waiting.pop()
      position += 1
    return None

  def _open_next(self) -> bool:
    """Open the next slice. Returns whether there is one."""
    work = None if self._exhausted else next(self._works, None)
    if work is None:
      self._exhausted = True
      self._changed.notify_all()
      return False
    self._open.append(_Open(work))
    return True

  def _fail(self, error: BaseException) -> None:
    with self._changed:
      self._error = self._error or error
      self._changed.notify_all()
