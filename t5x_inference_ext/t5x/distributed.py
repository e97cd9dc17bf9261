"""Several processes under T5X's commands, which have no flags for them (distributed.gin has)."""

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

  For bindings that T5X's commands evaluate before they ask jax for devices. t5x.infer asks for the
  first time when it writes its configuration, and evaluates infer.output_dir for that. The other
  commands ask when the model is made.

  Args:
    value: Value of the parameter that this call is bound to.
    coordinator_address: See rendezvous.ProcessOptions for this and the next two.
    num_processes: Processes of the run.
    process_id: Index of this process.

  Raises:
    RequestError: Options that don't go together, or processes that don't find each other.
  """
  distributed.initialize(ProcessOptions(coordinator_address, num_processes, process_id))
  return value
