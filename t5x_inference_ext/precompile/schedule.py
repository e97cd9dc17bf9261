"""The overlapped time of a program, by simulation of its schedule in order.

The simulated chip has three resources. Its cores run one instruction after another. Its links carry
one collective at a time. Its memory serves one asynchronous copy at a time, into on-chip memory or
within HBM. An asynchronous operation occupies its resource from its start, or as
soon as the resource is free. The instruction that ends the operation waits until it is complete.

Reads by the cores while they compute do not slow down asynchronous copies here.
"""

from collections.abc import Callable, Sequence

from t5x_inference_ext.precompile.loops import Executed
from t5x_inference_ext.precompile.operations import OperationCost

# Key of a stretch of the schedule (see `stretch`), and the name of an operation that starts there.
_Key = tuple[tuple[object, ...], str]


def stretch(run: Executed) -> tuple[object, ...]:
  """Return a key of the stretch of the schedule in which an instruction runs."""
  return run.computation.name, run.loops, run.branches


def exposed_seconds(
  runs: Sequence[Executed],
  costs: Sequence[OperationCost],
  alone: Callable[[OperationCost], float],
  busy: Callable[[OperationCost], float],
) -> list[float]:
  """Return for each instruction the time that the schedule spends on it.

  The times of all runs of an instruction are added up. Within one stretch of the schedule, all
  instructions run equally often, so these sums can be compared.

  Args:
    runs: sequence of Executed. The instructions in the order of the schedule.
    costs: sequence of OperationCost. The cost of each instruction.
    alone: function. Returns the time of an operation that is not asynchronous.
    busy: function. Returns the time for which an asynchronous operation occupies its resource.

  Returns:
    The times in seconds; their sum is the overlapped time. The time for which the end of an
    asynchronous operation waits is counted at the operation's start.
  """
  found = [0.0] * len(runs)
  now, links_free, memory_free = 0.0, 0.0, 0.0
  under_way: dict[_Key, tuple[int, float]] = {}
  for n, (run, cost) in enumerate(zip(runs, costs)):
    step, begin = cost.step, now
    if step and step.begins:
      seconds = busy(cost)
      if not seconds:  # in a branch that does not run, or a permute sent beside a longer one
        end = now
      elif cost.collective:
        end = links_free = max(now, links_free) + seconds
      else:
        end = memory_free = max(now, memory_free) + seconds
      under_way[stretch(run), step.start] = n, end
    elif step and step.ends:
      started, end = under_way.pop((stretch(run), step.start), (n, now))
      now = max(now, end)
      found[started] += now - begin
    elif cost.collective:
      now = links_free = max(now, links_free) + alone(cost)
      found[n] = now - begin
    else:
      now += alone(cost)
      found[n] = now - begin
  return found
