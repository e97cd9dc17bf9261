"""Several processes: the others repeat each step of process 0, and send heartbeats."""

from collections.abc import Callable, Sequence
import contextlib
import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import jax
from jax._src import distributed as jax_distributed  # the coordination service has no other API

from t5x_inference_ext.engine.scheduler import Scheduler
from t5x_inference_ext.server.lockstep import PromptToScore, StepInbox

BEAT_SECONDS = 1.0
LOST_SECONDS = 7.0  # a process without a heartbeat for this long counts as lost
_KEY = 't5x_inference_ext/server/alive/{}'


def follow(
  scheduler: Scheduler, inbox: StepInbox, score: Callable[[Sequence[PromptToScore]], list[Any]]
) -> None:
  """Repeat the steps of process 0 in this process, until process 0 ends.

  The first SIGTERM to this process has no effect, because process 0 drains and then ends all
  processes. A second SIGTERM ends this process at once.

  Args:
    scheduler: The scheduler of this process.
    inbox: The scheduler's inbox.
    score: Function that scores prompts, as in Driver.
  """
  signalled = False

  def handle_exit(sig: int, frame: FrameType | None) -> None:
    nonlocal signalled
    del frame
    if signalled:
      os._exit(128 + sig)
    signalled = True

  for each in (signal.SIGTERM, signal.SIGINT):
    signal.signal(each, handle_exit)
  start_heartbeat()
  while True:
    prompts = inbox.begin_step()
    if inbox.closed:
      return
    if prompts:
      with contextlib.suppress(Exception):  # process 0 reports the error
        score(prompts)
    scheduler.step()


def start_heartbeat() -> None:
  """Start a thread that sends heartbeats of this process."""
  client: Any = jax_distributed.global_state.client
  key = _KEY.format(jax.process_index())

  def beat() -> None:
    count = 0
    while True:
      try:
        client.key_value_set(key, str(count), allow_overwrite=True)
      except Exception:  # process 0 has ended, and jax ends this process
        return
      count += 1
      time.sleep(BEAT_SECONDS)

  threading.Thread(target=beat, name='life', daemon=True).start()


def watch_others(lost: Callable[[str], None]) -> None:
  """Start a thread that calls `lost(text)` when another process stops sending heartbeats.

  To be called in process 0.
  """
  client: Any = jax_distributed.global_state.client
  others = range(1, jax.process_count())

  def watch() -> None:
    began = time.monotonic()
    seen: dict[int, tuple[str, float]] = dict.fromkeys(others, ('', began))
    while True:
      for process, (before, at) in seen.items():
        try:
          count = client.key_value_try_get(_KEY.format(process))
        except Exception:  # the process has not sent a heartbeat yet
          count = ''
        if count != before:
          seen[process] = count, time.monotonic()
        elif time.monotonic() - at > LOST_SECONDS:
          lost(f'process {process} has ended or hangs')
          return
      time.sleep(BEAT_SECONDS)

  if others:
    threading.Thread(target=watch, name='watch', daemon=True).start()
