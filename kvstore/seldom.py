"""Warnings that anyone outside can cause, thousands in a second: logged seldom, and counted.

At most one line in `LOG_EVERY_S` for each event and code; the next one says in `suppressed` how many it stands for
beside itself. Whoever wants every single one counted keeps a counter of their own.
"""

from __future__ import annotations

from typing import Any

from kvstore.env import Clock, Log

LOG_EVERY_S = 10.0
# Codes may come from the other side; those past as many as nobody needs to tell apart share one line per event.
KINDS_MAX = 256


class SeldomLog:
    """A log for such warnings."""

    def __init__(self, log: Log, clock: Clock) -> None:
        self._log = log
        self._clock = clock
        self._logged: dict[tuple[str, str], tuple[float, int]] = {}  # when last, and how many were suppressed since

    def warning(self, event: str, code: str, /, **fields: Any) -> None:
        """Log `event` with `code` and `fields`, unless that was done just now."""
        key, now = (event, code), self._clock.monotonic()
        if key not in self._logged and len(self._logged) >= KINDS_MAX:
            key = (event, "")
        last, suppressed = self._logged.get(key, (now - LOG_EVERY_S, 0))
        if now - last < LOG_EVERY_S:
            self._logged[key] = (last, suppressed + 1)
            return
        self._logged[key] = (now, 0)
        self._log.warning(event, code=code, suppressed=suppressed, **fields)
