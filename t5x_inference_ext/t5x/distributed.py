"""Join several processes of a T5X command, which has no flags for that (distributed.gin)."""

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

  This has to run before T5X's command first uses jax's devices, so gin binds the call to a
  parameter that is evaluated earlier. t5x.infer first uses devices when it writes its
  configuration; for that it evaluates infer.output_dir. Other commands first use devices when they
  construct the model.

  Args:
    value: The value to return: that of the gin parameter to which this call is bound.
    coordinator_address: 'host:port' of process 0; see rendezvous.ProcessOptions.
    num_processes: Number of processes of the run.
    process_id: Index of this process.

  Raises:
    RequestError: The options contradict each other, or a process did not join in time.
  """
  distributed.initialize(ProcessOptions(coordinator_address, num_processes, process_id))
  return value
