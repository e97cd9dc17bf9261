"""Turns of the engine threads of all processes: each takes equal commands, then an equal step.

Process 0 takes the clients' requests, and sends them to the other processes turn by turn. Prompts
to score are sent in the same message as the commands.
"""

from collections.abc import Sequence
from typing import NamedTuple

from t5x_inference_ext.engine.inbox import Command, SharedInbox
from t5x_inference_ext.engine.request import Handle


class PromptToScore(NamedTuple):
  """A prompt whose tokens are scored.

  Attributes:
    tokens: Token ids, BOS included. All but the first are scored, given the tokens before them.
    top: Number of most likely tokens to return at each position.
  """

  tokens: tuple[int, ...]
  top: int


class TurnInbox(SharedInbox):
  """The inbox of a server's scheduler. The commands of a turn are taken when the turn begins.

  Args:
    name: Unique name of the scheduler in the run.
  """

  def __init__(self, name: str = 'turns') -> None:
    super().__init__(name)
    self._turn: list[tuple[Command, Handle | None]] = []

  @property
  def empty(self) -> bool:
    """Whether no command is queued, and none of the current turn is left."""
    return not self._commands and not self._turn

  def begin_turn(self, prompts: Sequence[PromptToScore] = ()) -> list[PromptToScore]:
    """Begin a turn in this process; return the prompts to score before its step.

    Args:
      prompts: In process 0, the prompts to score. The other processes wait until process 0 begins.
    """
    commands, prompts = self.take_with(list(prompts))
    self._turn += commands
    return list(prompts)

  def take(self) -> list[tuple[Command, Handle | None]]:
    """Return the commands of the turn."""
    turn, self._turn = self._turn, []
    return turn
