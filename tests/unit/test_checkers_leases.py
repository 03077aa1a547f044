"""What is judged about leases: one history for each rule that breaks it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.checkers.history import Entry
from tests.checkers.leases import GONE, Attach, Grant, Keep, LastLook, Look, Revoke, check_lease
from tests.checkers.scenario import failed, ok, unknown
from tests.checkers.verdict import Inconsistent

# An event's place is also its time in seconds here.
GRANT = Grant("l1", 10.3)  # surely lives for 10 s


def at(called: int, operation: Any, result: Any = None) -> Entry:
    return timed(ok(called, called + 1, operation, result))


def timed(entry: Entry) -> Entry:
    entry.called_at_s, entry.returned_at_s = float(entry.called), float(entry.returned)
    return entry


def bad(rule: str, *entries: Entry) -> None:
    with pytest.raises(Inconsistent) as caught:
        check_lease(list(entries))
    assert caught.value.rule == rule, caught.value


BEGIN = [at(0, GRANT), at(2, Attach("l1"))]
THERE, NOTHING = (lambda called: at(called, Look("l1"), True)), (lambda called: at(called, Look("l1"), False))


def test_a_good_lease() -> None:
    check_lease([*BEGIN, THERE(4), at(6, Keep("l1")), THERE(14), NOTHING(17), at(19, Keep("l1"), GONE)])
    check_lease([*BEGIN, at(4, Revoke("l1")), NOTHING(6), at(8, LastLook("l1"), False)])
    check_lease([*BEGIN, timed(unknown(4, Revoke("l1"))), THERE(6), NOTHING(8)])
    check_lease([*BEGIN, THERE(40), NOTHING(42)])
    check_lease([at(0, GRANT), NOTHING(2), at(4, Attach("l1"), GONE)][:2])


def test_one_that_ends_too_soon() -> None:
    bad("lease_ended_early", *BEGIN, NOTHING(8))
    bad("lease_ended_early", *BEGIN, at(6, Keep("l1")), NOTHING(14))
    bad("lease_ended_early", *BEGIN, at(8, Keep("l1"), GONE))
    bad("lease_ended_early", *BEGIN, NOTHING(6), timed(ok(8, 9, Revoke("l1"))))
    bad("lease_ended_early", *BEGIN, timed(failed(4, 5, Revoke("l1"))), NOTHING(6))


def test_what_was_not_put_yet_need_not_be_there() -> None:
    check_lease([at(0, GRANT), NOTHING(2), at(4, Attach("l1"))])
    check_lease([at(0, GRANT), timed(unknown(2, Attach("l1"))), NOTHING(4)])


def test_one_that_comes_back() -> None:
    bad("lease_came_back", *BEGIN, NOTHING(20), THERE(22))
    bad("lease_came_back", *BEGIN, NOTHING(20), at(22, Keep("l1")))
    bad("lease_came_back", *BEGIN, at(4, Revoke("l1")), THERE(6))


def test_one_that_never_ends() -> None:
    bad("lease_outlives_its_time", *BEGIN, at(100, LastLook("l1"), True))
