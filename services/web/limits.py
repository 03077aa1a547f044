"""Rate limits: so many requests in a window from one caller, or from one address where nobody signed in.

Counted in each process, in memory: a limit protects this process, and asking the store would cost more than what it
protects. With several processes behind one port a client may get several times the quota. (Sign-ins are throttled in
the store: see `services/users`.)

The algorithm is GCRA, one number per client: the time at which all that it has sent would have been spread evenly.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Final

from services.web.problems import Problem

# Some 10 MB; with more clients than that in one window, those longest idle start anew.
_CLIENTS_MAX: Final = 100_000


class Standing:
    """How one client stands after a request; the headers of its answer."""

    __slots__ = ("remaining", "reset_s")

    def __init__(self, remaining: int, reset_s: int) -> None:
        self.remaining = remaining
        self.reset_s = reset_s


class Limit:
    """`quota` requests in `window_s`, for each client."""

    def __init__(
        self, name: str, quota: int, window_s: float = 60.0, clock_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._name = name
        self._window_s = window_s
        self._each_s = window_s / quota
        self._clock_s = clock_s
        self._spread_until: dict[object, float] = {}
        self.policy = f'"{name}";q={quota};w={window_s:g}'

    def take(self, client: object) -> Standing:
        """Count one request. Raises `Problem` `rate_limited`, and counts nothing, past the quota."""
        now = self._clock_s()
        until = max(self._spread_until.pop(client, now), now) + self._each_s
        ahead_s = until - now
        if ahead_s > self._window_s:
            self._spread_until[client] = until - self._each_s
            wait_s = math.ceil(ahead_s - self._window_s)
            headers = {"Retry-After": str(wait_s), **self.headers(Standing(0, wait_s))}
            raise Problem("rate_limited", f"Wait {wait_s} s, then go on more slowly", headers=headers)
        if len(self._spread_until) >= _CLIENTS_MAX:
            del self._spread_until[next(iter(self._spread_until))]
        self._spread_until[client] = until  # at the end: the dict is in the order of last use
        return Standing(int((self._window_s - ahead_s) / self._each_s), math.ceil(ahead_s))

    def headers(self, standing: Standing) -> dict[str, str]:
        return {
            "RateLimit-Policy": self.policy,
            "RateLimit": f'"{self._name}";r={standing.remaining};t={standing.reset_s}',
        }
