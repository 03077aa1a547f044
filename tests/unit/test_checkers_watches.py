"""What is judged about watches: one history for each rule that breaks it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest

from kvstore import Client, Refused
from kvstore.model import Event, PutResult, Record
from tests.checkers.history import Entry, History
from tests.checkers.scenario import failed, ok, unknown
from tests.checkers.verdict import Inconsistent
from tests.checkers.watches import Change, Segment, check_watches
from tests.workloads import watches as workload


def put(revision: int, key: bytes, value: bytes, before: bytes | None = None) -> Event:
    prev = None if before is None else Record(key, before, 1, 1, 1)
    return Event(key, revision, Record(key, value, revision, revision, 1), prev)


def gone(revision: int, key: bytes, before: bytes | None = None) -> Event:
    return Event(key, revision, None, None if before is None else Record(key, before, 1, 1, 1))


def made(revision: int, writes: dict[bytes, bytes | None], *idle: bytes) -> Entry:
    asked = Change({**writes, **dict.fromkeys(idle)})
    return ok(revision, revision, asked, writes, revision=revision, changed=True)


CHANGES = [
    made(1, {b"a": b"1"}),
    made(2, {b"a": b"2", b"b": b"3"}),
    unknown(3, Change({b"a": b"4"})),
    made(5, {b"a": None}, b"c"),
    failed(6, 7, Change({b"b": b"5"})),
]
FIRST, SECOND = (put(1, b"a", b"1"),), (put(2, b"a", b"2", b"1"), put(2, b"b", b"3"))
THIRD, FOURTH = (put(4, b"a", b"4", b"2"),), (gone(5, b"a", b"4"),)


def seen(*revisions: tuple[Event, ...], first: int = 1, to: int = 6) -> Segment:
    return Segment("w", first, to, list(revisions))


def bad(rule: str, *segments: Segment) -> None:
    with pytest.raises(Inconsistent) as caught:
        check_watches(CHANGES, segments)
    assert caught.value.rule == rule, caught.value


def test_what_is_as_it_should_be() -> None:
    check_watches(CHANGES, [seen(FIRST, SECOND, THIRD, FOURTH)])
    check_watches(CHANGES, [seen(SECOND, first=2, to=4), seen(FIRST, SECOND, THIRD, FOURTH), seen(first=6)])
    # What is not known to have happened may have happened or not.
    check_watches(CHANGES, [seen(FIRST, SECOND, (gone(5, b"a", b"2"),))])


def test_what_is_missing() -> None:
    bad("watch_misses", seen(SECOND, THIRD, FOURTH))
    bad("watch_misses", seen(FIRST, SECOND[:1], THIRD, FOURTH))
    bad("watch_misses", seen(FIRST, SECOND, THIRD))
    check_watches(CHANGES, [seen(SECOND, THIRD, FOURTH, first=2)])


def test_what_comes_out_of_order_or_twice() -> None:
    bad("watch_order", seen(SECOND, FIRST))
    bad("watch_order", seen(FIRST, SECOND, SECOND))
    bad("watch_order", seen(FIRST, (*SECOND, SECOND[1])))
    bad("watch_order", seen(FIRST, (SECOND[0], THIRD[0])))
    bad("watch_order", seen(FIRST, SECOND, first=2))
    bad("watch_order", seen(FIRST, SECOND, to=2))


def test_what_nobody_did() -> None:
    bad("watch_invents", seen(FIRST, SECOND, (put(4, b"a", b"9", b"2"),), (gone(5, b"a", b"9"),)))
    bad("watch_invents", seen(FIRST, SECOND, THIRD, FOURTH, (put(6, b"b", b"5", b"3"),), to=7))
    bad("watch_invents", seen(FIRST, SECOND, THIRD, FOURTH, (gone(6, b"b", b"3"),), to=7))
    bad("watch_invents", seen(FIRST, SECOND, (put(3, b"a", b"1", b"2"),), (gone(5, b"a", b"1"),)))


def test_a_record_before_that_is_another() -> None:
    bad("watch_prev", seen(FIRST, (put(2, b"a", b"2", b"0"), SECOND[1])))
    bad("watch_prev", seen(FIRST, SECOND, THIRD, (gone(5, b"a"),)))


def test_two_watchers_that_saw_different_things() -> None:
    other = seen(FIRST, SECOND, (put(3, b"a", b"4", b"2"),), to=5)
    bad("watches_disagree", seen(FIRST, SECOND, THIRD, FOURTH), other)
    bad("watches_disagree", seen(FIRST, SECOND, to=5), other)
    check_watches(CHANGES, [seen(FIRST, SECOND, to=3), other])


# --- what the workload itself finds -----------------------------------------------------------------------------------


class FakeWatches:
    """A client whose watches are refused with an error, or stand, and then hear nothing for ever."""

    next_revision = 1

    def __init__(self, refusal: Refused | None) -> None:
        self.refusal = refusal

    def watch(self, **_arguments: Any) -> FakeWatches:
        return self

    async def standing(self) -> None:
        if self.refusal is not None:
            raise self.refusal

    async def revisions(self) -> AsyncIterator[tuple[Event, ...]]:
        await asyncio.Event().wait()
        yield ()

    async def close(self) -> None: ...

    async def put(self, *_arguments: Any, **_options: Any) -> PutResult:
        return PutResult(revision=5)


@pytest.mark.parametrize(
    ("refusal", "rule"),
    [(None, "watch_stalls"), (Refused("Junk was sent", code="bad_request"), "watch_refused")],
)
async def test_a_watch_that_stalls_or_is_refused(
    refusal: Refused | None, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workload, "LAST_LOOK_S", 0.01)
    kv = cast(Client, FakeWatches(refusal))
    watches = workload.WatchWorkload(History(asyncio.get_running_loop().time), timeout_s=1.0)
    await watches.set_up(kv)
    await watches.finish(kv)
    with pytest.raises(Inconsistent) as caught:
        watches.check()
    assert caught.value.rule == rule
