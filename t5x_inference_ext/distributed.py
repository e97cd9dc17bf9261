"""Several processes that run one program, each with its own devices: joining them, and what they have to agree on.

All of them take the same steps, since every computation over the mesh needs all of them. So each step that one process
can fail at alone (a file that only it lacks, an output that only process 0 writes) ends with an exchange, in which all
learn of the error, and end. In one process nothing here costs anything.
"""

from collections.abc import Callable, Iterable, Iterator
import contextlib
import dataclasses
import hashlib
import json
from typing import Any, TypeVar

import jax
from jax.experimental import multihost_utils
import numpy as np

from t5x_inference_ext import rendezvous
from t5x_inference_ext.errors import MeshError, RequestError, UserError
from t5x_inference_ext.rendezvous import AUTO, ProcessOptions

TIMEOUT_SECONDS = 120  # to wait for the other processes
# That a process that is done waits for the others to end: tf.data takes up to a minute to drop an iterator.
SHUTDOWN_SECONDS = 120

_T = TypeVar('T')


def initialize(processes: ProcessOptions, *, timeout: float = TIMEOUT_SECONDS) -> None:
  """Join this process to the others of its run. Has to come before jax is asked for devices.

  Args:
    processes: the coordinator's address, the number of processes and this one's index. With the
      address 'auto' jax finds all three, as on TPU pods, SLURM, Open MPI and Kubernetes.
    timeout: seconds to wait for the others.

  Raises:
    RequestError: processes that don't find each other, or a second run with other processes.
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
  arguments = {}
  if address != AUTO:
    rendezvous.meet(address, count, process, timeout)
    arguments = dict(coordinator_address=address, num_processes=count, process_id=process)
  try:
    # On CPU the collectives between processes are gloo's, jax's default.
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
  """Whether this is process 0, the one that writes and prints."""
  return jax.process_index() == 0


def check_mesh(mesh: jax.sharding.Mesh) -> None:
  """Raises MeshError for a mesh that leaves a process without a device: it could not take part."""
  idle = set(range(jax.process_count())) - {device.process_index for device in mesh.devices.flat}
  if idle:
    raise MeshError(
      f'the mesh has {mesh.size} of {jax.device_count()} devices, and none of process {min(idle)}: with '
      f'{jax.process_count()} processes it needs devices of each: use a larger mesh, or fewer processes'
    )


def exchange(make: Callable[[], Any]) -> list[Any]:
  """What `make` returns in each process, in their order. Every process calls this at the same point.

  Args:
    make: returns something JSON-ready.

  Raises:
    Exception: whatever `make` raises, in its process.
    RequestError: with the same message, in the other processes.
  """
  if jax.process_count() == 1:
    return [make()]
  value, error = None, None
  try:
    value = make()
  except Exception as e:  # pylint: disable=broad-except  # whatever it is, the others must not wait for this process
    error = e
  answers = [json.loads(text) for text in _gather(json.dumps([_message(error), value]))]
  if error is not None:
    raise _told(error)
  for process, (message, _) in enumerate(answers):
    if message is not None:
      raise _told(RequestError(f'process {process}: {message}'))
  return [answer for _, answer in answers]


def from_main(make: Callable[[], Any]) -> Any:
  """What `make` returns in process 0, the only one that calls it, or its error."""
  return exchange(lambda: make() if is_main() else None)[0]


def check_same(**parts: Any) -> None:
  """Raises RequestError, in all processes, where they differ in something.

  Args:
    **parts: things with a telling repr, by the names that the error calls them.
  """
  digests = exchange(
    lambda: {k: hashlib.sha256(repr(part).encode()).hexdigest() for k, part in parts.items()}
  )
  for process, digest in enumerate(digests):
    for name, value in digests[0].items():
      if digest[name] != value:
        raise _told(
          RequestError(
            f'process {process} has other {name} than process 0: all processes need the same '
            'flags and files'
          )
        )


@contextlib.contextmanager
def together() -> Iterator[None]:
  """A step of every process: an error in one of them, in this block, ends all of them."""
  try:
    yield
  except Exception as error:  # pylint: disable=broad-except
    # The processes have either heard of this one, or can't hear any more.
    if not getattr(error, '_told', False) and not isinstance(error, jax.errors.JaxRuntimeError):
      exchange(_raise(error))
    raise
  exchange(lambda: None)


def lockstep(items: Iterable[_T], key: Callable[[_T], Any] = lambda item: None) -> Iterator[_T]:
  """The items, each when every process has one: so that all run the same batches.

  Args:
    items: of this process.
    key: what has to be the same everywhere, with a telling repr.

  Raises:
    RequestError: a process has more items than another, or others.
  """
  iterator, end, count = iter(items), object(), 0
  while True:

    def digest():
      nonlocal item
      item = next(iterator, end)
      return None if item is end else hashlib.sha256(repr(key(item)).encode()).hexdigest()

    item = end
    digests = exchange(digest)
    for process, other in enumerate(digests):
      if other != digests[0]:
        raise _told(
          RequestError(
            f'batch {count} of process {process} is not that of process 0: the processes must '
            'read the same examples in the same order'
          )
        )
    if item is end:
      return
    count += 1
    yield item


def _gather(text: str) -> list[str]:
  """The text of every process. Padded, so that there are few sizes to compile for."""
  data = np.frombuffer(text.encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.asarray(len(data), np.int32))
  width = -(-int(sizes.max()) // 1024) * 1024
  rows = multihost_utils.process_allgather(np.pad(data, (0, width - len(data))))
  return [bytes(row[:size]).decode() for row, size in zip(rows, sizes)]


def _message(error: Exception | None) -> str | None:
  if error is None:
    return None
  return str(error) if isinstance(error, UserError) else f'{type(error).__name__}: {error}'


def _told(error: Exception) -> Exception:
  """Marks an error that all processes know of: it is not to be exchanged again on its way out."""
  error._told = True
  return error


def _raise(error: Exception) -> Callable[[], None]:
  def make():
    raise error

  return make
