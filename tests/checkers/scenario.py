"""Histories written by hand, for tests of the checkers: `ok`, `failed` and `unknown` make entries at given events."""

from __future__ import annotations

from typing import Any

from tests.checkers.history import NEVER, Entry, History, Outcome

_HISTORY = History(lambda: 0.0, "by hand")


def ok(
    called: int, returned: int, operation: Any, result: Any = None, *, revision: int = 0, changed: bool = False
) -> Entry:
    return Entry(_HISTORY, 0, operation, called, 0.0, Outcome.OK, result, returned, revision=revision, changed=changed)


def failed(called: int, returned: int, operation: Any) -> Entry:
    return Entry(_HISTORY, 0, operation, called, 0.0, Outcome.FAILED, None, returned)


def unknown(called: int, operation: Any) -> Entry:
    return Entry(_HISTORY, 0, operation, called, 0.0, Outcome.UNKNOWN, None, NEVER)
