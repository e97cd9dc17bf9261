"""One turn of the engine's threads in all processes: the same commands, then the same step.

Process 0 takes what its clients ask, and tells the others turn by turn (SharedInbox does so step by
step; here passes that score prompts travel with the commands, in one message).
"""

from collections.abc import Sequence
import pickle
from typing import NamedTuple

import jax

from t5x_inference_ext import distributed
from t5x_inference_ext.engine.inbox import Command, Inbox
from t5x_inference_ext.engine.request import Handle


class PromptToScore(NamedTuple):
  """A prompt whose tokens are scored.

  Attributes:
    tokens: Token ids, BOS included. Each but the first is scored, given those before it.
    top: How many of the most likely tokens are told at each place.
  """

  tokens: tuple[int, ...]
  top: int


class TurnInbox(Inbox):
  """The inbox of a server's scheduler. The commands of a turn are taken when the turn begins.

  Args:
    name: Unique name of the scheduler in the run.
  """

  def __init__(self, name: str = 'turns') -> None:
    super().__init__()
    self._messages = distributed.Messages(name)
    self._turn: list[tuple[Command, Handle | None]] = []

  @property
  def empty(self) -> bool:
    """Whether nothing is queued, and nothing of the turn is left."""
    return not self._commands and not self._turn

  def begin_turn(self, prompts: Sequence[PromptToScore] = ()) -> list[PromptToScore]:
    """Begin a turn in this process; return the prompts to score before its step.

    Args:
      prompts: In process 0, the prompts to score. The other processes wait until process 0 begins.
    """
    if jax.process_count() == 1:
      self._turn += super().take()
      return list(prompts)

    def make() -> bytes:
      self._turn += super(TurnInbox, self).take()
      return pickle.dumps((self.closed, list(prompts), [command for command, _ in self._turn]))

    message = self._messages.next(make)
    if distributed.is_main():
      return list(prompts)
    self.closed, found, commands = pickle.loads(message)  # from process 0 of this very run
    self.submitted += sum(command.request is not None for command in commands)
    self._turn = [(c, Handle(c.number, c.request) if c.request else None) for c in commands]
    return found

  def take(self) -> list[tuple[Command, Handle | None]]:
    """Return the commands of the turn."""
    turn, self._turn = self._turn, []
    return turn
