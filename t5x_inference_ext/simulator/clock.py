"""Time as the loop of a service sees it: the machine's own, or virtual."""

import time
from typing import Protocol


class ServiceClock(Protocol):
  """Says how late it is, and lets time pass."""

  def now(self) -> float:
    """Return the time in seconds."""

  def sleep_until(self, moment: float) -> None:
    """Return at this time, or at once if it has passed."""


class WallClock:
  """The machine's time, from 0 on."""

  def __init__(self) -> None:
    self._begin = time.perf_counter()

  def now(self) -> float:
    """Return the seconds since the clock was made."""
    return time.perf_counter() - self._begin

  def sleep_until(self, moment: float) -> None:
    """Sleep until this time."""
    time.sleep(max(0.0, moment - self.now()))


class VirtualClock:
  """Virtual time of a host and of the devices that it feeds.

  The devices do their work in the order in which the host starts it. The host goes on at once, and
  waits only where it reads a result.

  Args:
    shared: Whether the devices stand still while the host works: they are the host's own cores.
  """

  def __init__(self, shared: bool = False) -> None:
    self._now = self._devices_free = 0.0
    self._shared = shared

  def now(self) -> float:
    """Return the host's time in seconds."""
    return self._now

  def sleep_until(self, moment: float) -> None:
    """Let the host's time pass until this time."""
    self._now = max(self._now, moment)

  def spend(self, seconds: float) -> None:
    """Let the host work for some seconds."""
    if self._shared and self._devices_free > self._now:
      self._devices_free += seconds
    self._now += seconds

  def start(self, seconds: float) -> float:
    """Start work of the devices that takes some seconds; return the time when it will be done."""
    self._devices_free = max(self._now, self._devices_free) + seconds
    return self._devices_free

  def drain(self) -> None:
    """Let the host wait until the devices have done all their work."""
    self.sleep_until(self._devices_free)
