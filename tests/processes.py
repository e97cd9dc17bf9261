"""A command started as the processes of one run, each with its share of eight simulated devices."""

from collections.abc import Callable
import contextlib
import os
import pathlib
import re
import socket
import subprocess
import tempfile
import time
from typing import NamedTuple

from tests import memory

COUNT = 2
TIMEOUT_SECONDS = 240


class Result(NamedTuple):
  """How one process ended."""

  returncode: int
  stdout: str
  stderr: str


# What the transport of CPU runs prints, from C++ threads, a piece at a time: lines of several
# threads are mixed.
_GLOO = re.compile(
  r'\[Gloo\] Rank |is connected to |peer ranks\. |'
  r'Expected number of connected peer ranks is : |\d+|\s'
)


def own(stdout: str) -> str:
  """What the command itself printed, without blanks and digits, where that should be nothing."""
  return _GLOO.sub('', stdout)


def free_port() -> int:
  with socket.create_server(('', 0)) as server:
    return server.getsockname()[1]


def run(
  command: Callable[[int, int], list[str]], cwd: pathlib.Path, **environment: str
) -> list[Result]:
  """Runs command(port of the coordinator, process id) for each process, at once; none outlives this
  call.
  """
  port = free_port()
  env = {
    **os.environ,
    'XLA_FLAGS': f'--xla_force_host_platform_device_count={8 // COUNT} {memory.QUICK_FLAGS}',
    'JAX_DEFAULT_MATMUL_PRECISION': 'highest',
    **environment,
  }
  deadline = time.monotonic() + TIMEOUT_SECONDS
  with contextlib.ExitStack() as stack:
    started = []
    for process in range(COUNT):
      # Files, not pipes: a process must not wait for its output to be read while another is waited
      # for.
      outputs = [
        stack.enter_context(tempfile.TemporaryFile('w+', encoding='utf-8')) for _ in range(2)
      ]
      running = subprocess.Popen(
        command(port, process), cwd=cwd, env=env, stdout=outputs[0], stderr=outputs[1]
      )
      stack.callback(running.wait)
      stack.callback(running.kill)
      started.append((running, outputs))
    results = []
    for running, outputs in started:
      code = running.wait(max(deadline - time.monotonic(), 0))
      for file in outputs:
        file.seek(0)
      results.append(Result(code, *(file.read() for file in outputs)))
    return results
