"""Keep the engines of all processes in lockstep: equal commands before each step.

Process 0 receives the clients' requests. Before each step it sends the other processes one message,
with the commands and the prompts to score.
"""

from collections.abc import Sequence
from typing import NamedTuple

from t5x_inference_ext.engine.inbox import Command, SharedInbox
from t5x_inference_ext.engine.request import Handle


class PromptToScore(NamedTuple):
  """A prompt whose tokens are scored.

  Attributes:
    tokens: Token ids, BOS included, after the adapter's soft prompt. All but the first, and the
      soft prompt, are scored, given the tokens before them.
    top: Number of most likely tokens to return at each position.
    adapter: Name of the prompt's adapter; None: the model itself.
  """

  tokens: tuple[int, ...]
  top: int
  adapter: str | None = None


class StepInbox(SharedInbox):
  """The inbox of a server's scheduler. A step's commands are fixed when the step begins.

  Args:
    name: Unique name of the scheduler in the run.
  """

  def __init__(self, name: str = 'turns') -> None:
    super().__init__(name)
    self._turn: list[tuple[Command, Handle | None]] = []

  @property
  def empty(self) -> bool:
    """Whether no command is queued, nor left of the current step."""
    return not self._commands and not self._turn

  def begin_step(self, prompts: Sequence[PromptToScore] = ()) -> list[PromptToScore]:
    """Begin a step in this process; return the prompts to score before it.

    Args:
      prompts: In process 0, the prompts to score. The other processes wait until process 0 begins.
    """
    commands, prompts = self.take_with(list(prompts))
    self._turn += commands
    return list(prompts)

  def take(self) -> list[tuple[Command, Handle | None]]:
    """Return the commands of the current step."""
    turn, self._turn = self._turn, []
    return turn
