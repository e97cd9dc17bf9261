"""Pool of threads that read and write chunks."""

from collections.abc import Callable, Iterable
import concurrent.futures
import os

from t5x_inference_ext.errors import UserError

MAX_WORKERS = 1024


def cores() -> int:
  """Return the number of CPU cores that this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def worker_count(workers: int | None) -> int:
  """Return the number of threads; None: one per core. Raises UserError if it is out of range."""
  if workers is None:
    return min(cores(), MAX_WORKERS)
  if not 1 <= workers <= MAX_WORKERS:
    raise UserError(f'workers must be at least 1 and at most {MAX_WORKERS}, got {workers}')
  return workers


def run_jobs(jobs: Iterable[Callable[[], None]], workers: int) -> None:
  """Run independent jobs on `workers` threads.

  Raises:
    Exception: The first error of a job. After it no job begins; it is raised when the running jobs
      have ended.
  """
  running: set[concurrent.futures.Future[None]] = set()
  with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    for job in jobs:
      if len(running) == workers:
        done, running = concurrent.futures.wait(
          running, return_when=concurrent.futures.FIRST_COMPLETED
        )
        for future in done:
          future.result()
      running.add(pool.submit(job))
    for future in concurrent.futures.as_completed(running):
      future.result()
