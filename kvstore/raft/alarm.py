"""Wakes a node when the next thing is due, with one timer."""

from __future__ import annotations

import math
from collections.abc import Callable

from kvstore.env import Environment, Timer

# What is overdue was looked at in the turn that sets the alarm; the next look need not be sooner.
SOONEST_S = 0.001


class Alarm:
    __slots__ = ("_at", "_env", "_timer", "_wake")

    def __init__(self, env: Environment, wake: Callable[[], None]) -> None:
        self._env = env
        self._wake = wake
        self._timer: Timer | None = None
        self._at = 0.0

    def set(self, due: float) -> None:
        """Wake at `due` (monotonic seconds; infinity: no need) at the latest. An earlier alarm that is set already
        stays: whoever is woken looks, and sets it anew; most deadlines move on with each message, and moving the timer
        each time is dearer."""
        if self._timer is not None:
            if self._at <= due:
                return
            self._timer.cancel()
            self._timer = None
        if due == math.inf:
            return
        now = self._env.clock.monotonic()
        self._at = max(due, now + SOONEST_S)
        self._timer = self._env.scheduler.call_later(self._at - now, self._ring)

    def _ring(self) -> None:
        self._timer = None
        self._wake()

    def cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
