"""Rendezvous of a run's processes. If some do not arrive, the others name the missing ones.

Without a rendezvous, jax 0.10 aborts after a timeout, with a C++ stack trace that does not name the
missing processes and no Python error to handle. Here process 0 listens at the coordinator's port
until the other processes have sent their indices. Then it sends the result to all of them, and
frees the port for jax. Messages are one JSON object per line.
"""

import contextlib
import dataclasses
import json
import socket
import time
from typing import Any

from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.options import check_options, option

AUTO = 'auto'
NAME = 't5x_inference_ext'  # field of every message, to recognize other programs at the port
RETRY_SECONDS = 0.2
HELLO_SECONDS = 5  # time limit for a connection to send its index
MAX_MESSAGE = 4096
_PROCESSES = 'Several processes'


@dataclasses.dataclass(frozen=True)
class ProcessOptions:
  """How this process joins the others of its run. With a single process all fields are None.

  Raises:
    RequestError: A value is out of its range, or the options exclude each other.
  """

  coordinator_address: str | None = option(
    None,
    help='HOST:PORT of process 0, for several processes that share one run; or auto, on TPU pods '
    'and other clusters that jax knows. Also works with gin flags.',
    group=_PROCESSES,
  )
  num_processes: int | None = option(
    None,
    help='Number of processes of the run, all started with the same flags except --process_id.',
    group=_PROCESSES,
    least=1,
  )
  process_id: int | None = option(
    None,
    help='Index of this process, from 0. Process 0 writes the output.',
    group=_PROCESSES,
    least=0,
  )

  def __post_init__(self) -> None:
    check_options(self)
    missing = [name for name, value in dataclasses.asdict(self).items() if value is None]
    if self.coordinator_address == AUTO:
      if len(missing) < 2:
        raise RequestError(
          'coordinator_address=auto finds num_processes and process_id by itself: leave them out'
        )
      return
    if missing and len(missing) < 3:
      raise RequestError(
        f'coordinator_address, num_processes and process_id go together: {" and ".join(missing)} '
        'not given'
      )
    if self.coordinator_address is None or self.num_processes is None or self.process_id is None:
      return
    parse_address(self.coordinator_address)
    if self.process_id >= self.num_processes:
      raise RequestError(
        f'process_id must be 0 to num_processes - 1 = {self.num_processes - 1}, got '
        f'{self.process_id}'
      )


def parse_address(address: str) -> tuple[str, int]:
  """Parse 'HOST:PORT'; raise RequestError for other text."""
  host, colon, port = address.rpartition(':')
  if not colon or not host or not port.isdecimal() or len(port) > 5 or not 0 < int(port) < 2**16:
    raise RequestError(
      f'coordinator_address is HOST:PORT of process 0, e.g. 10.0.0.1:1234, or auto, got {address!r}'
    )
  return host.strip('[]'), int(port)


def meet(address: str, num_processes: int, process_id: int, timeout: float) -> None:
  """Wait until all processes have arrived.

  Args:
    address: HOST:PORT of process 0.
    num_processes: Number of processes of the run.
    process_id: Index of this process.
    timeout: Maximum number of seconds to wait.

  Raises:
    RequestError: Process 0 can't be reached or can't listen; or processes are missing, have the
      same index, or belong to another run.
  """
  host, port = parse_address(address)
  deadline = time.monotonic() + timeout
  if process_id == 0:
    _receive_all(port, num_processes, deadline, timeout)
  else:
    _report(host, port, num_processes, process_id, deadline, timeout)


def _receive_all(port: int, num_processes: int, deadline: float, timeout: float) -> None:
  """In process 0, wait for the other processes, and send them the result."""
  arrived, connections, error = {0}, [], None
  with contextlib.ExitStack() as stack:
    server = stack.enter_context(_listen(port, num_processes))
    while len(arrived) < num_processes and error is None:
      server.settimeout(_left(deadline))
      try:
        connection = stack.enter_context(server.accept()[0])
      except TimeoutError:
        missing = sorted(set(range(num_processes)) - arrived)
        error = (
          f'{_names(missing)} of {num_processes} did not arrive within {timeout:g} s: are they '
          'started with the same coordinator_address?'
        )
        break
      connection.settimeout(HELLO_SECONDS)
      hello = _read(connection)
      if hello is None:
        continue
      connections.append(connection)
      process = hello['process_id']
      if hello['num_processes'] != num_processes:
        error = (
          f'process {process} was started with num_processes={hello["num_processes"]} and process '
          f'0 with {num_processes}'
        )
      elif process in arrived:
        error = f'two processes were started with process_id={process}'
      arrived.add(process)
    for connection in connections:
      with contextlib.suppress(OSError):  # the process has ended, as jax will notice
        _write(connection, error=error)
  if error is not None:
    raise RequestError(error)


def _report(
  host: str, port: int, num_processes: int, process_id: int, deadline: float, timeout: float
) -> None:
  """Send this process's index to process 0, and wait for the result."""
  while True:
    try:
      with socket.create_connection((host, port), timeout=_left(deadline)) as connection:
        _write(connection, process_id=process_id, num_processes=num_processes)
        connection.settimeout(_left(deadline))
        verdict = _read(connection)
      reason = 'another program answers there'
    except OSError as error:
      verdict, reason = None, error.strerror or str(error)
    if verdict is not None:
      break
    if time.monotonic() + RETRY_SECONDS > deadline:
      raise RequestError(
        f'process 0 was not reached at coordinator_address={host}:{port} within {timeout:g} s '
        f'({reason}): is it started there, and the port open?'
      )
    time.sleep(RETRY_SECONDS)
  if verdict['error'] is not None:
    raise RequestError(verdict['error'])


def _left(deadline: float) -> float:
  """Return the seconds until a deadline, above 0: a timeout of 0 makes sockets nonblocking."""
  return max(deadline - time.monotonic(), 0.001)


def _listen(port: int, backlog: int) -> socket.socket:
  both = socket.has_dualstack_ipv6()
  try:
    return socket.create_server(
      ('', port),
      family=socket.AF_INET6 if both else socket.AF_INET,
      backlog=backlog,
      dualstack_ipv6=both,
    )
  except OSError as error:
    raise RequestError(
      f"process 0 can't listen at port {port} of coordinator_address ({error.strerror}): choose "
      'another port, for all processes'
    ) from error


def _write(connection: socket.socket, **message: Any) -> None:
  connection.sendall(json.dumps({'name': NAME, **message}).encode() + b'\n')


def _read(connection: socket.socket) -> dict[str, Any] | None:
  """Read a message; return None for other data, since any program may connect to the port."""
  try:
    with connection.makefile('rb') as stream:
      message = json.loads(stream.readline(MAX_MESSAGE))
  except (OSError, ValueError):
    return None
  return message if isinstance(message, dict) and message.get('name') == NAME else None


def _names(processes: list[int]) -> str:
  shown = ', '.join(map(str, processes[:8])) + (', ...' if len(processes) > 8 else '')
  return f'process{"es" if len(processes) > 1 else ""} {shown}'
