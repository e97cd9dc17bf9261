"""The request log: one JSON object per line, without prompts unless --log_prompts is given."""

import contextlib
import datetime
import json
import logging
import logging.handlers
import queue
import sys
from typing import Any, TextIO

_MOST = 10_000  # maximum number of lines waiting to be written; more are dropped


class _Lossy(logging.handlers.QueueHandler):
  """A queue handler that drops lines if the queue is full: requests never wait for the log."""

  def enqueue(self, record: logging.LogRecord) -> None:
    with contextlib.suppress(queue.Full):
      self.queue.put_nowait(record)


class RequestLog:
  """Writes lines in a thread of its own.

  Args:
    stream: Where to write; None: stderr.
  """

  def __init__(self, stream: TextIO | None = None) -> None:
    lines: queue.Queue = queue.Queue(_MOST)
    handler = logging.StreamHandler(stream or sys.stderr)
    self._listener = logging.handlers.QueueListener(lines, handler)
    self._logger = logging.Logger('t5x_inference_ext.server.requests')
    self._logger.addHandler(_Lossy(lines))
    self._listener.start()

  def write(self, **fields: Any) -> None:
    """Write a line. Fields that are None are left out."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec='milliseconds')
    known = {name: _rounded(value) for name, value in fields.items() if value is not None}
    self._logger.info('%s', json.dumps({'time': now, **known}))

  def close(self) -> None:
    """Write the waiting lines, and end the thread."""
    self._listener.stop()


def _rounded(value: Any) -> Any:
  return round(value, 4) if isinstance(value, float) else value
