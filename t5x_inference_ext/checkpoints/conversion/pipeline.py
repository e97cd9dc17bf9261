"""Thread pool that processes slices: while one slice is written, the next one is read.

Reading a chunk, numpy's arithmetic on a block and writing all release Python's lock. A slice is
processed in steps (find its scales, write it). The jobs of a step, one per block, run in any order,
and the next step begins when all of them are done. When no job of the current step is left to take,
idle threads start the next slice.
"""

from collections.abc import Callable, Iterator
import concurrent.futures
import dataclasses
from typing import Protocol

PipelineJob = Callable[[], None]


class PipelineWork(Protocol):
  """A slice to process."""

  def jobs(self) -> list[PipelineJob] | None:
    """Return the next step's jobs, or None after the last step. Called when no job is left."""

  def may_start(self) -> bool:
    """Return whether the jobs may run while the previous slice is being finished."""


@dataclasses.dataclass
class _Open:
  """A slice that is being processed.

  Attributes:
    work: The slice.
    waiting: Jobs of the current step that no thread has taken. Threads take them from the end.
    running: Number of jobs that threads have taken but not finished.
    started: Whether the slice's first step has begun.
  """

  work: PipelineWork
  waiting: list[PipelineJob] = dataclasses.field(default_factory=list)
  running: int = 0
  started: bool = False


class Pipeline:
  """Runs slices in order, at most two at a time, on a number of threads."""

  def __init__(self, works: Iterator[PipelineWork], workers: int) -> None:
    self._works, self._workers = works, workers
    self._open: list[_Open] = []

  def run(self) -> None:
    """Run all slices. If a job raises, wait for the running jobs, then raise its error."""
    running: dict[concurrent.futures.Future[None], _Open] = {}
    with concurrent.futures.ThreadPoolExecutor(self._workers) as pool:
      while True:
        while len(running) < self._workers and (taken := self._take()) is not None:
          opened, job = taken
          running[pool.submit(job)] = opened
        if not running:
          return
        done, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
        for future in done:
          running.pop(future).running -= 1
          future.result()

  def _take(self) -> tuple[_Open, PipelineJob] | None:
    """Return a job that can start now, or None."""
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
            continue  # the step had no jobs: continue with the next step
        if opened.waiting:
          opened.running += 1
          return opened, opened.waiting.pop()
      position += 1
    return None

  def _open_next(self) -> bool:
    """Start the next slice; return whether there was one."""
    work = next(self._works, None)
    if work is not None:
      self._open.append(_Open(work))
    return work is not None
