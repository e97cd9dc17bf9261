"""The overlapped time of a program: its schedule run through in order.

A chip has three resources here. Its cores run one instruction after another. Its links carry one
collective at a time, its memory one asynchronous copy at a time (prefetches into on-chip memory, or
copies within HBM). An asynchronous operation occupies its resource from its start, or from when the
resource is free, and the instruction that ends it waits for what is left.

What cores read from memory while they compute is not counted against asynchronous copies.
"""

from collections.abc import Callable, Sequence

from t5x_inference_ext.precompile.loops import Executed
from t5x_inference_ext.precompile.operations import OperationCost

# A stretch of the schedule, and the name of an operation that starts there.
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

  The times of all runs of a loop are added up: within a loop's body all of them are multiplied by
  its turns alike, so that they can be compared.

  Args:
    runs: sequence of Executed. The instructions in the order of the schedule.
    costs: sequence of OperationCost. Their costs.
    alone: function. Returns the time of an operation that is not asynchronous.
    busy: function. Returns the time for which an asynchronous operation occupies its resource.

  Returns:
    The times in seconds. For an asynchronous operation it is the time that its end waits, given to
    its start. Their sum is the overlapped time.
  """
  found = [0.0] * len(runs)
  now, links_free, memory_free = 0.0, 0.0, 0.0
  under_way: dict[_Key, tuple[int, float]] = {}
  for n, (run, cost) in enumerate(zip(runs, costs)):
    step, begin = cost.step, now
    if step and step.begins:
      seconds = busy(cost)
      if not seconds:  # in a branch that does not run; or sent beside a longer one
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
