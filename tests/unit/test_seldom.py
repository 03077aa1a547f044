"""Warnings that anyone can cause: one line in a while, with a count of the others."""

from __future__ import annotations

from kvstore import seldom
from kvstore.seldom import LOG_EVERY_S, SeldomLog
from tests.unit.server_fakes import RecordingLog, World


def test_one_line_in_a_while_for_each_event_and_code() -> None:
    world, log = World(), RecordingLog()
    lines = SeldomLog(log, world)
    for number in range(1000):
        lines.warning("refused", "malformed", number=number)
    lines.warning("refused", "too_large", number=0)
    lines.warning("closed", "malformed", number=0)
    world.advance(LOG_EVERY_S + 0.1)
    lines.warning("refused", "malformed", number=1000)
    world.advance(LOG_EVERY_S + 0.1)
    lines.warning("refused", "malformed", number=1001)
    assert log.events == [
        ("warning", "refused", {"code": "malformed", "suppressed": 0, "number": 0}),
        ("warning", "refused", {"code": "too_large", "suppressed": 0, "number": 0}),
        ("warning", "closed", {"code": "malformed", "suppressed": 0, "number": 0}),
        ("warning", "refused", {"code": "malformed", "suppressed": 999, "number": 1000}),
        ("warning", "refused", {"code": "malformed", "suppressed": 0, "number": 1001}),
    ]


def test_codes_without_end_share_a_line() -> None:
    log = RecordingLog()
    lines = SeldomLog(log, World())
    for number in range(10 * seldom.KINDS_MAX):
        lines.warning("refused", f"made up {number}")
    assert len(log.events) == seldom.KINDS_MAX + 1
