"""Processes under T5X's commands, which have no flags for them: gin joins them (configs/t5x/distributed.gin)."""

from typing import TypeVar

from t5x_inference_ext import distributed
from t5x_inference_ext.rendezvous import ProcessOptions

_T = TypeVar('T')


def initialized(
  value: _T,
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
) -> _T:
  """Returns `value`, once this process has joined the others.

  For bindings that T5X's commands evaluate before they ask jax for devices. t5x.infer asks for the first time when it
  writes its configuration, which takes infer.output_dir; the others when the model is made.

  Args:
    value: of the parameter that this is bound to.
    coordinator_address, num_processes, process_id: as rendezvous.ProcessOptions'; its errors and
      distributed.initialize's are raised.
  """
  distributed.initialize(ProcessOptions(coordinator_address, num_processes, process_id))
  return value
