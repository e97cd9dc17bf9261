"""Several processes that run one program, each with its own devices: join, exchange, agree.

Every computation over the mesh needs all processes, so all of them take equal steps. If a step can
fail in a single process (reading a file that it lacks, writing the output in process 0), the step
ends with an exchange, through which all processes learn of the error and end. With a single process
these functions cost nothing.
"""

from collections.abc import Callable, Iterable, Iterator
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
from typing import Any, TypeVar

import jax
from jax._src import distributed as jax_distributed  # the coordination service has no other API
from jax.experimental import multihost_utils
import numpy as np

from t5x_inference_ext import rendezvous
from t5x_inference_ext.errors import MeshError, RequestError, UserError
from t5x_inference_ext.rendezvous import AUTO, ProcessOptions

TIMEOUT_SECONDS = 120  # limit on waiting for the other processes
# Seconds that a finished process waits for the others: tf.data takes up to a minute to drop an
# iterator.
SHUTDOWN_SECONDS = 120
# Milliseconds that a process waits for a message; long, because process 0 may be idle for a day.
_MESSAGE_MS = 86_400_000
# Attribute of errors that all processes know, which need no exchange.
_EXCHANGED = '_exchanged'

_T = TypeVar('_T')


def initialize(processes: ProcessOptions, *, timeout: float = TIMEOUT_SECONDS) -> None:
  """Join this process to the others of its run; to be called before jax looks for devices.

  Args:
    processes: The coordinator's address, the number of processes, and the index of this one. With
      the address 'auto', jax finds all three; this works on TPU pods, SLURM, Open MPI and
      Kubernetes.
    timeout: Seconds to wait for the others.

  Raises:
    RequestError: The processes don't find each other, or this process already joined another run.
  """
  address, count, process = dataclasses.astuple(processes)
  if address is None:
    return
  if jax.distributed.is_initialized():
    found = (jax.process_count(), jax.process_index())
    if address != AUTO and found != (count, process):
      raise RequestError(
        f"this process is already process {found[1]} of {found[0]}, and can't become process "
        f'{process} of {count}'
      )
    return
  arguments: dict[str, Any] = {}
  if address != AUTO:
    rendezvous.meet(address, count, process, timeout)
    arguments = dict(coordinator_address=address, num_processes=count, process_id=process)
  try:
    # On CPU, collectives between processes use gloo, jax's default.
    jax.distributed.initialize(
      **arguments, initialization_timeout=int(timeout), shutdown_timeout_seconds=SHUTDOWN_SECONDS
    )
  except (RuntimeError, ValueError) as error:
    hint = ''
    if address == AUTO:
      hint = (
        ': auto needs a cluster that jax knows; elsewhere give coordinator_address=HOST:PORT, '
        'num_processes and process_id'
      )
    raise RequestError(
      f'jax.distributed: {str(error).splitlines()[0].rstrip(".")}{hint}'
    ) from error


def is_main() -> bool:
  """Return whether this is process 0, the one that writes and prints."""
  return jax.process_index() == 0


def check_mesh(mesh: jax.sharding.Mesh) -> None:
  """Raise MeshError if a process has no device in the mesh: it could not take part."""
  idle = set(range(jax.process_count())) - {device.process_index for device in mesh.devices.flat}
  if idle:
    raise MeshError(
      f'the mesh has {mesh.size} of {jax.device_count()} devices, but none of process {min(idle)}: '
      f'with {jax.process_count()} processes it needs devices of each: use a larger mesh, or fewer '
      'processes'
    )


def exchange(make: Callable[[], _T]) -> list[_T]:
  """Return the values of `make` from all processes, by process index. All must call this.

  Args:
    make: Returns a JSON-ready value.

  Raises:
    Exception: The error of `make`, in the process where it was raised.
    RequestError: In the other processes, an error with the message of that error.
  """
  if jax.process_count() == 1:
    return [make()]
  value, error = None, None
  try:
    value = make()
  except Exception as e:  # any error: the other processes must not wait for this one
    error = e
  answers = [json.loads(text) for text in _gather(json.dumps([_message(error), value]))]
  if error is not None:
    raise _exchanged(error)
  for process, (message, _) in enumerate(answers):
    if message is not None:
      raise _exchanged(RequestError(f'process {process}: {message}'))
  return [answer for _, answer in answers]


def from_main(make: Callable[[], _T]) -> _T:
  """Call `make` only in process 0, and return its value, or raise its error, in all processes."""
  values: list[Any] = exchange(lambda: make() if is_main() else None)
  return values[0]


def check_same(**parts: Any) -> None:
  """Raise RequestError in all processes if a value differs between them.

  Args:
    **parts: Values with a readable repr, by their names in the error.
  """
  digests = exchange(lambda: {name: _digest(part) for name, part in parts.items()})
  for process, digest in enumerate(digests):
    for name, value in digests[0].items():
      if digest[name] != value:
        raise _exchanged(
          RequestError(
            f'{name} of process {process} and of process 0 differ: all processes need the same '
            'flags and files'
          )
        )


@contextlib.contextmanager
def together() -> Iterator[None]:
  """Context manager: if the block raises in one process, raise in all processes."""
  try:
    yield
  except Exception as error:
    # After an error in jax's runtime the processes can no longer communicate.
    if not hasattr(error, _EXCHANGED) and not isinstance(error, jax.errors.JaxRuntimeError):
      exchange(functools.partial(_raise, error))
    raise
  exchange(lambda: None)


def lockstep(items: Iterable[_T], key: Callable[[_T], Any] = lambda item: None) -> Iterator[_T]:
  """Yield items in lockstep with the other processes, after checking that all have equal items.

  Args:
    items: The items of this process.
    key: Function from an item to a value that must be equal in all processes, with a readable repr.

  Raises:
    RequestError: The processes have different items, or different numbers of them.
  """
  iterator = iter(items)
  for count in itertools.count():
    taken: list[_T] = []
    digests = exchange(functools.partial(_take, iterator, key, taken))
    for process, other in enumerate(digests):
      if other != digests[0]:
        raise _exchanged(
          RequestError(
            f'batch {count} of process {process} differs from that of process 0: the processes '
            'must read the same examples in the same order'
          )
        )
    if not taken:
      return
    yield taken[0]


def _take(iterator: Iterator[_T], key: Callable[[_T], Any], taken: list[_T]) -> str | None:
  """Move the next item into `taken`; return a digest of its key, or None after the last item."""
  taken.extend(itertools.islice(iterator, 1))
  return _digest(key(taken[0])) if taken else None


def _digest(value: Any) -> str:
  return hashlib.sha256(repr(value).encode()).hexdigest()


def _gather(text: str) -> list[str]:
  """Return the texts of all processes. They are padded to a few sizes, to save compilations."""
  data = np.frombuffer(text.encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.asarray(len(data), np.int32))
  width = -(-int(sizes.max()) // 1024) * 1024
  rows = multihost_utils.process_allgather(np.pad(data, (0, width - len(data))))
  return [bytes(row[:size]).decode() for row, size in zip(rows, sizes)]


def _message(error: Exception | None) -> str | None:
  if error is None:
    return None
  return str(error) if isinstance(error, UserError) else f'{type(error).__name__}: {error}'


def _exchanged(error: Exception) -> Exception:
  setattr(error, _EXCHANGED, True)
  return error


def _raise(error: Exception) -> None:
  raise error


class Messages:
  """Sends bytes from process 0 to the others, in order, between hosts; devices are not involved.

  Messages are stored in jax's coordination service. After every SERIES messages there is a barrier,
  and process 0 deletes the messages, which all processes have read.

  Args:
    name: Name of this sequence of messages, unique in the run.
  """

  SERIES = 512

  def __init__(self, name: str) -> None:
    self._name, self._count = name, 0
    self._client: Any = jax_distributed.global_state.client

  def next(self, make: Callable[[], bytes]) -> bytes:
    """Return the next message; process 0 makes and sends it, the others wait for it."""
    if jax.process_count() == 1:
      return make()
    series, number = divmod(self._count, self.SERIES)
    self._count += 1
    if series and not number:
      self._client.wait_at_barrier(f'{self._name}-{series}', _MESSAGE_MS)
      if is_main():
        self._client.key_value_delete(f'{self._name}/{series - 1}/')
    key = f'{self._name}/{series}/{number}'
    if not is_main():
      return self._client.blocking_key_value_get_bytes(key, _MESSAGE_MS)
    message = make()
    self._client.key_value_set_bytes(key, message)
    return message
