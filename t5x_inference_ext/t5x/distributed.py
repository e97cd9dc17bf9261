"""Start of T5X's commands on several processes, for which they have no flags (distributed.gin)."""

from typing import TypeVar

from t5x_inference_ext import distributed
from t5x_inference_ext.rendezvous import ProcessOptions

T = TypeVar('T')


def initialized(
  value: T,
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
) -> T:
  """Join this process to the others of its run, and return `value`.

  It must run before T5X's command first uses jax's devices, so gin binds this call to a parameter
  that is evaluated earlier. t5x.infer first uses devices when it writes its configuration, for
  which it evaluates infer.output_dir. The other commands first use them when the model is made.

  Args:
    value: Value to return, that of the gin parameter to which this call is bound.
    coordinator_address: 'host:port' of process 0; see rendezvous.ProcessOptions.
    num_processes: Number of processes of the run.
    process_id: Index of this process.

  Raises:
    RequestError: The options contradict each other, or a process did not join in time.
  """
  distributed.initialize(ProcessOptions(coordinator_address, num_processes, process_id))
  return value
