"""What is judged about locks: one history for each rule that breaks it."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from kvstore import Client, Unavailable
from tests.checkers.history import Entry, History
from tests.checkers.locks import (
    Acquire,
    End,
    Fenced,
    Held,
    Look,
    Release,
    Sight,
    Waiting,
    Write,
    check_lock,
)
from tests.checkers.scenario import failed, ok, unknown
from tests.checkers.verdict import Inconsistent
from tests.workloads import locks as workload


# An event's place is also its time in seconds here.
def timed(entry: Entry) -> Entry:
    entry.called_at_s, entry.returned_at_s = float(entry.called), float(entry.returned)
    return entry


def key(token: int) -> bytes:
    return b"k%015d" % token


def place(token: int) -> Waiting:
    return Waiting(key(token), token)


def acquired(called: int, token: int, valid_for_s: float = 9.9) -> Entry:
    return timed(ok(called, called + 1, Acquire("l", 10.0), Held(key(token), token, valid_for_s)))


def wrote(called: int, token: int, number: int, revision: int, before: Write | None, *queue: int) -> Entry:
    sight = Sight(tuple(map(place, queue)), before, True, 9.9)
    asked = Fenced("l", key(token), token, number)
    return timed(ok(called, called + 1, asked, sight, revision=revision, changed=True))


def refused(called: int, token: int, number: int, revision: int, before: Write | None, *queue: int) -> Entry:
    asked = Fenced("l", key(token), token, number)
    return timed(ok(called, called + 1, asked, Sight(tuple(map(place, queue)), before), revision=revision))


def looked(called: int, revision: int, before: Write | None, *queue: int) -> Entry:
    return timed(ok(called, called + 1, Look("l"), Sight(tuple(map(place, queue)), before), revision=revision))


def released(called: int, token: int, valid_for_s: float = 9.9) -> Entry:
    return timed(ok(called, called + 1, Release("l", token, valid_for_s)))


def doubtful(called: int, operation: Any) -> Entry:
    return timed(unknown(called, operation))


def bad(rule: str, *entries: Entry) -> None:
    with pytest.raises(Inconsistent) as caught:
        check_lock(sorted(entries, key=lambda entry: entry.called))
    assert caught.value.rule == rule, caught.value


FIRST = acquired(0, 5)
WRITTEN = wrote(2, 5, 1, 6, None, 5)
W1, W2 = Write(1, 5, 6), Write(2, 8, 9)


def test_what_is_as_it_should_be() -> None:
    check_lock(
        [
            FIRST,
            WRITTEN,
            looked(4, 8, W1, 5, 8),
            released(6, 5),
            acquired(8, 8),
            refused(10, 5, 9, 8, W1, 8),
            wrote(12, 8, 2, 9, W1, 8),
            looked(14, 9, W2, 8),
        ]
    )
    # One that was not given up goes to the next when its time is over, and a little before, for the clocks.
    check_lock([FIRST, acquired(10, 8)])
    check_lock([FIRST, looked(20, 7, None)])
    # What is not known to have been written may have been.
    check_lock([FIRST, doubtful(2, Fenced("l", key(5), 5, 1)), looked(4, 7, W1, 5)])
    check_lock([FIRST, doubtful(2, Fenced("l", key(5), 5, 1)), looked(4, 7, None, 5)])


def test_a_fence_that_stands_open() -> None:
    bad("lock_fence_open", FIRST, wrote(2, 5, 1, 6, None))
    bad("lock_fence_open", FIRST, wrote(2, 5, 1, 9, None, 8))
    bad("lock_fence_open", FIRST, wrote(2, 5, 1, 9, None, 3, 5))


def test_a_fence_that_is_shut() -> None:
    bad("lock_fence_shut", FIRST, refused(2, 5, 1, 6, None, 5))


def test_an_older_holder_that_writes_after_a_newer_one() -> None:
    lost = doubtful(2, Fenced("l", key(5), 5, 1))
    late = Write(1, 5, 10)
    bad(
        "lock_fence_order",
        FIRST,
        lost,
        released(3, 5),
        acquired(5, 8),
        wrote(7, 8, 2, 9, None, 8),
        looked(9, 10, late, 8),
    )


def test_writes_that_are_lost_or_that_nobody_made() -> None:
    bad("lock_writes", FIRST, WRITTEN, looked(4, 7, None, 5))
    bad("lock_writes", FIRST, looked(4, 7, W1, 5))
    bad("lock_writes", FIRST, timed(failed(2, 3, Fenced("l", key(5), 5, 1))), looked(4, 7, W1, 5))
    bad("lock_writes", FIRST, WRITTEN, looked(4, 7, Write(1, 4, 6), 5))
    bad("lock_writes", FIRST, WRITTEN, looked(4, 7, Write(1, 5, 7), 5))
    bad("lock_writes", FIRST, refused(2, 5, 1, 7, None), looked(4, 7, W1))


def test_tokens_that_do_not_grow() -> None:
    bad("lock_token", FIRST, released(2, 5), acquired(4, 5))
    bad("lock_token", FIRST, released(2, 5), acquired(4, 3))


def test_one_that_came_first_and_still_waits() -> None:
    bad("lock_out_of_order", acquired(0, 5), released(2, 5), looked(4, 7, None, 4))


def test_two_at_once() -> None:
    bad("lock_held_twice", FIRST, acquired(5, 8))
    bad("lock_held_twice", FIRST, wrote(8, 5, 1, 6, None, 5), acquired(14, 8))
    bad("lock_held_twice", FIRST, released(8, 5), acquired(4, 8))
    # The one that asked first gets it last.
    bad("lock_held_twice", timed(ok(0, 5, Acquire("l", 10.0), Held(key(5), 5, 9.9))), acquired(2, 8))
    # But not if somebody ended its lease.
    check_lock([FIRST, timed(ok(2, 3, End("l", key(5)))), acquired(5, 8)])
    check_lock([FIRST, doubtful(2, End("l", key(5))), acquired(5, 8)])
    bad("lock_held_twice", FIRST, timed(failed(2, 3, End("l", key(5)))), acquired(5, 8))


def test_one_that_holds_it_and_is_not_there() -> None:
    bad("lock_lost_early", FIRST, looked(4, 7, None))
    bad("lock_lost_early", FIRST, looked(4, 7, None, 8))
    bad("lock_lost_early", FIRST, refused(4, 5, 1, 7, None))
    check_lock([FIRST, released(3, 5), looked(4, 7, None)])


def test_one_that_gets_it_too_late() -> None:
    bad("lock_entered_lost", acquired(0, 5, valid_for_s=0.0))


class Deaf:
    """A client that reaches nobody."""

    def __getattr__(self, _name: str) -> Any:
        async def call(*_arguments: Any, **_options: Any) -> None:
            raise Unavailable("It was not sent", code="timeout")

        return call


async def test_one_that_is_not_to_be_had_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workload, "LAST_S", 0.01)
    locks = workload.LockWorkload(History(asyncio.get_running_loop().time), timeout_s=0.01, locks=1)
    await locks.finish(cast(Client, Deaf()))
    with pytest.raises(Inconsistent) as caught:
        locks.check()
    assert caught.value.rule == "lock_stays"
