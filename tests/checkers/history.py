"""What clients did and what they were told, in the one order that everything is judged by.

Every call and every return takes the next number of one counter, so "returned before the other was called" is a
comparison of two integers, also where many things happen at one virtual time. Clock times are noted for reading only.

Outcomes:
- `ok`: answered. A definite answer that changed nothing (a compare that failed) is one, too.
- `failed`: surely without effect (`Refused`, `Unavailable`). Whoever sees its effect has found a bug.
- `unknown`: may take effect at any time after its call, however late, at most once, or never. An operation that is
  still open when the history is judged counts as one.

`History.part` gives each workload a history of its own that shares the counter with all others of the run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from enum import IntEnum
from typing import Any

from msgspec import Struct

# The return of what is unknown: after everything.
NEVER = 2**62


class Outcome(IntEnum):
    OPEN = 0
    OK = 1
    FAILED = 2
    UNKNOWN = 3


class Entry(Struct, eq=False):
    """One operation of one worker. Made by `History.begin`; ended once by `ok`, `failed` or `unknown`."""

    history: History
    worker: int
    operation: Any
    called: int
    """Its call's place in the order of all events of the run."""
    called_at_s: float
    outcome: Outcome = Outcome.OPEN
    result: Any = None
    returned: int = NEVER
    """Its return's place; NEVER while its effect may still come."""
    returned_at_s: float = -1.0
    revision: int = 0
    """The store's revision that the answer named; 0 if it named none."""
    changed: bool = False
    """This operation made that revision."""
    reason: str = ""
    """The error code, where there is no answer."""

    def ok(self, result: Any = None, *, revision: int = 0, changed: bool = False) -> None:
        self._end(Outcome.OK, self.history.next_event())
        self.result, self.revision, self.changed = result, revision, changed

    def failed(self, reason: str = "") -> None:
        self._end(Outcome.FAILED, self.history.next_event())
        self.reason = reason

    def unknown(self, reason: str = "") -> None:
        self._end(Outcome.UNKNOWN, NEVER)
        self.reason = reason

    def _end(self, outcome: Outcome, returned: int) -> None:
        assert self.outcome is Outcome.OPEN, f"ended twice: {self}"
        self.outcome, self.returned, self.returned_at_s = outcome, returned, self.history.now_s()

    @property
    def is_ok(self) -> bool:
        return self.outcome is Outcome.OK

    @property
    def is_failed(self) -> bool:
        return self.outcome is Outcome.FAILED

    @property
    def is_unknown(self) -> bool:
        return self.outcome is Outcome.UNKNOWN or self.outcome is Outcome.OPEN

    def __str__(self) -> str:
        until = "…" if self.returned == NEVER else str(self.returned)
        times = f"{self.called_at_s:.4f}–{'…' if self.returned_at_s < 0 else f'{self.returned_at_s:.4f}'} s"
        if self.is_ok:
            told = f"-> {self.result}"
            if self.revision:
                told += f" {'made' if self.changed else 'at'} revision {self.revision}"
        else:
            told = "-> failed" if self.is_failed else "-> unknown"
            told += f" ({self.reason})" if self.reason else ""
        return f"[{self.called}–{until}] {times}  worker {self.worker}: {self.operation} {told}"


class History:
    """The operations of a run (or of one workload in it, see `part`), in the order of their calls."""

    def __init__(self, now_s: Callable[[], float], name: str = "", root: History | None = None) -> None:
        """`now_s` is only for display."""
        self.name = name
        self.now_s = now_s
        self.entries: list[Entry] = []
        self.root: History = root if root is not None else self
        self.next_event: Callable[[], int] = root.next_event if root is not None else itertools.count(1).__next__

    def part(self, name: str) -> History:
        """A history for one workload: what begins in it is also in the whole one, and the order is common."""
        return History(self.now_s, name, self.root)

    def begin(self, worker: int, operation: Any) -> Entry:
        """Note a call. `operation` is whatever the workload's checker understands; it prints as one line."""
        entry = Entry(self, worker, operation, self.next_event(), self.now_s())
        self.entries.append(entry)
        if self.root is not self:
            self.root.entries.append(entry)
        return entry

    def count(self, *outcomes: Outcome) -> int:
        """How many operations ended like that; of all outcomes if none is named."""
        return sum(1 for entry in self.entries if not outcomes or entry.outcome in outcomes)


def told(entries: Iterable[Entry], most: int = 30) -> str:
    """Lines for a message: entries in the order of their calls, at most so many (the last ones)."""
    lines = [f"  {entry}" for entry in sorted(entries, key=lambda entry: entry.called)]
    if len(lines) > most:
        lines[: len(lines) - most] = [f"  … {len(lines) - most} earlier ones"]
    return "\n".join(lines)
