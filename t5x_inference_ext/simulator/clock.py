"""Clocks for the loop of a service: the machine's time, or virtual time."""

import time
from typing import Protocol


class ServiceClock(Protocol):
  """Interface: tells the time, and waits."""

  def now(self) -> float:
    """Return the time in seconds."""

  def sleep_until(self, moment: float) -> None:
    """Wait until this time, with nothing to do; return at once if it has passed."""


class WallClock:
  """The machine's time, in seconds since the clock was made."""

  def __init__(self) -> None:
    self._begin = time.perf_counter()

  def now(self) -> float:
    """Return the time in seconds."""
    return time.perf_counter() - self._begin

  def sleep_until(self, moment: float) -> None:
    """Sleep until this time, in seconds."""
    time.sleep(max(0.0, moment - self.now()))


class VirtualClock:
  """Virtual time of a host and of the devices that it feeds.

  The devices run programs in the order in which the host starts them. The host does not wait for a
  program until it reads the result.

  Args:
    shared: Whether the devices are the host's own cores, and so idle while the host works.
    wake: Seconds that the devices take longer for the first work after the host slept.
  """

  def __init__(self, shared: bool = False, wake: float = 0.0) -> None:
    self._now = self._devices_free = 0.0
    self._shared, self._wake = shared, wake

  def now(self) -> float:
    """Return the host's time in seconds."""
    return self._now

  def sleep_until(self, moment: float) -> None:
    """Advance the host's time to this time, with nothing to do."""
    if moment > self._now:
      self.read(moment)
      self.start(self._wake)

  def read(self, moment: float) -> None:
    """Advance the host's time to this time, at which devices have done some work."""
    self._now = max(self._now, moment)

  def spend(self, seconds: float) -> None:
    """Advance the host's time by some seconds of work."""
    if self._shared and self._devices_free > self._now:
      self._devices_free += seconds
    self._now += seconds

  def start(self, seconds: float) -> float:
    """Queue work of some seconds on the devices; return the time at which it will be done."""
    self._devices_free = max(self._now, self._devices_free) + seconds
    return self._devices_free

  def drain(self) -> None:
    """Advance the host's time until the devices have no work left."""
    self.read(self._devices_free)
