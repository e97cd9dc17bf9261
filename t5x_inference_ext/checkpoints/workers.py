"""Threads that read and write chunks."""

from collections.abc import Callable, Iterable
import concurrent.futures
import os

from t5x_inference_ext.errors import UserError

MAX_WORKERS = 1024


def cores() -> int:
  """Return the number of CPU cores that this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def worker_count(workers: int | None) -> int:
  """Return the number of threads to use: one a core for None. Raises UserError for a number out of range."""
  if workers is None:
    return min(cores(), MAX_WORKERS)
  if not 1 <= workers <= MAX_WORKERS:
    raise UserError(f'workers must be at least 1 and at most {MAX_WORKERS}, got {workers}')
  return workers


def run_jobs(jobs: Iterable[Callable[[], None]], workers: int) -> None:
  """Run independent jobs on `workers` threads.

  Raises:
    Exception: the first error of any job, once no job runs any more. Jobs not yet begun are dropped.
  """
  with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    futures = [pool.submit(job) for job in jobs]
    try:
      for future in concurrent.futures.as_completed(futures):
        future.result()
    finally:  # also of Ctrl-C, which arrives in this thread
      pool.shutdown(cancel_futures=True)
