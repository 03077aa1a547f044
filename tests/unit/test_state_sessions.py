"""Exactly-once, one rule at a time."""

from __future__ import annotations

from typing import Any

import pytest

from kvstore.model import (
    Add,
    CloseSession,
    DoneResult,
    ExpireSessions,
    KeepSession,
    OpenSession,
    Put,
    Range,
    SessionResult,
)
from kvstore.state import layout, sessions
from kvstore.state.machine import DATA, NOOP, Machine
from kvstore.state.sessions import TTL_MS
from kvstore.state.storage import MemoryDisk
from tests.state_model import Call, code_of, decoded, entry

INCREMENT = Add(b"n", 1)


class Node:
    def __init__(self) -> None:
        self.disk = MemoryDisk()
        self.machine = Machine(self.disk.open, "state")

    def raw(self, *calls: Any, at_ms: int = 0) -> list[bytes]:
        return self.machine.apply(self.machine.applied_index + 1, 1, DATA, entry(at_ms, calls))

    def apply(self, *calls: Any, at_ms: int = 0) -> list[Any]:
        return decoded(self.raw(*calls, at_ms=at_ms))

    def open(self, at_ms: int = 0) -> int:
        [result] = self.apply(OpenSession(), at_ms=at_ms)
        assert isinstance(result, SessionResult)
        return result.session

    def value(self) -> bytes | None:
        records = decoded([self.machine.read(Range(b"n"))])[0].records
        return records[0].value if records else None

    def restart(self) -> None:
        digest = self.machine.digest()
        self.machine.close()
        self.machine = Machine(self.disk.open, "state")
        assert self.machine.digest() == digest


@pytest.fixture
def node() -> Node:
    return Node()


def test_an_id_is_where_it_was_opened(node: Node) -> None:
    assert node.apply(OpenSession(), Put(b"a", b""), OpenSession()) == [
        SessionResult(1 << 16, TTL_MS),
        node.apply(Put(b"a", b""))[0].__class__(1),
        SessionResult(1 << 16 | 2, TTL_MS),
    ]
    assert node.open() == 3 << 16


def test_a_repeat_gets_the_same_bytes_and_changes_nothing(node: Node) -> None:
    session = node.open()
    call = Call(INCREMENT, session, 1, 1)
    [first] = node.raw(call)
    assert node.raw(call, call) == [first, first]
    node.restart()
    assert node.raw(call) == [first]
    assert node.value() == b"1"


def test_a_refusal_is_an_answer_too(node: Node) -> None:
    session = node.open()
    [first] = node.raw(Call(Add(b"n", -1, min=0), session, 1, 1))
    node.apply(Put(b"n", b"5"))
    assert node.raw(Call(Add(b"n", -1, min=0), session, 1, 1)) == [first]
    assert node.value() == b"5"


def test_any_order_of_sequence_numbers(node: Node) -> None:
    session = node.open()
    answers = node.apply(*[Call(INCREMENT, session, seq, 1) for seq in (3, 1, 7, 2, 3, 7)])
    assert [answer.value for answer in answers] == [1, 2, 3, 4, 1, 3]


def test_what_was_acknowledged_is_stale(node: Node) -> None:
    session = node.open()
    node.apply(Call(INCREMENT, session, 1, 1), Call(INCREMENT, session, 2, 1))
    [third] = node.apply(Call(INCREMENT, session, 3, 3))
    assert third.value == 3
    for seq in (1, 2):
        assert code_of(node.apply(Call(INCREMENT, session, seq, 1))[0]) == "stale_sequence"
    assert node.apply(Call(INCREMENT, session, 3, 1)) == [third]
    # Acknowledging a number that was never used makes it stale as well.
    assert code_of(node.apply(Call(INCREMENT, session, 9, 10))[0]) == "stale_sequence"
    assert node.value() == b"3"


@pytest.mark.parametrize("seq", [0, -1])
def test_sequence_numbers_start_at_1(node: Node, seq: int) -> None:
    assert code_of(node.apply(Call(INCREMENT, node.open(), seq, 0))[0]) == "invalid_request"
    assert node.value() is None


def test_an_unknown_session_executes_nothing(node: Node) -> None:
    for request in (INCREMENT, KeepSession(), CloseSession(), OpenSession()):
        assert code_of(node.apply(Call(request, 99, 1, 1))[0]) == "session_expired"
    for request in (KeepSession(), CloseSession()):
        assert code_of(node.apply(request)[0]) == "session_expired"
    assert node.value() is None
    assert node.machine.session_count == 0


def test_without_a_session_every_request_executes(node: Node) -> None:
    node.apply(INCREMENT, INCREMENT)
    assert node.value() == b"2"


def test_a_closed_session_is_gone(node: Node) -> None:
    session = node.open()
    assert node.apply(Call(INCREMENT, session, 1, 1), Call(CloseSession(), session))[1] == SessionResult(
        session, TTL_MS
    )
    assert code_of(node.apply(Call(INCREMENT, session, 1, 1))[0]) == "session_expired"
    node.restart()
    assert code_of(node.apply(Call(INCREMENT, session, 2, 1))[0]) == "session_expired"
    assert node.machine.session_count == 0


def test_keeping_a_session_renews_and_acknowledges(node: Node) -> None:
    session = node.open()
    node.apply(Call(INCREMENT, session, 1, 1))
    assert node.apply(Call(KeepSession(), session, 0, 2), at_ms=TTL_MS - 1) == [SessionResult(session, TTL_MS)]
    assert node.apply(ExpireSessions(), at_ms=2 * TTL_MS - 2) == [DoneResult(1, 0)]
    assert code_of(node.apply(Call(INCREMENT, session, 1, 1))[0]) == "stale_sequence"


def test_opening_under_a_session_is_done_once(node: Node) -> None:
    session = node.open()
    call = Call(OpenSession(), session, 1, 1)
    assert node.apply(call) == node.apply(call)
    assert node.machine.session_count == 2


# --- expiry ---------------------------------------------------------------------------------------------------------


def test_a_session_ends_when_its_time_has_passed_and_someone_says_so(node: Node) -> None:
    quiet, busy = node.open(at_ms=1000), node.open(at_ms=1000)
    node.apply(Call(INCREMENT, busy, 1, 1), at_ms=30_000)
    assert not node.machine.expiry_due(999 + TTL_MS)
    assert node.machine.expiry_due(1000 + TTL_MS)
    assert node.apply(ExpireSessions(), at_ms=999 + TTL_MS) == [DoneResult(1, 0)]
    # Its time has passed, but nobody has said so yet: it lives on.
    node.apply(Call(INCREMENT, quiet, 1, 1), at_ms=1000 + TTL_MS)
    assert node.apply(ExpireSessions(), at_ms=30_000 + TTL_MS) == [DoneResult(2, 1)]
    assert code_of(node.apply(Call(INCREMENT, busy, 2, 1))[0]) == "session_expired"
    assert code_of(node.apply(Call(INCREMENT, quiet, 2, 1))[0]) == ""
    node.restart()
    assert node.machine.session_count == 1


def test_every_kind_of_request_renews(node: Node) -> None:
    session = node.open()
    for number, call in enumerate(
        [
            Call(INCREMENT, session, 1, 1),
            Call(INCREMENT, session, 1, 1),  # a repeat
            Call(INCREMENT, session, 1, 2),  # a stale one
            Call(Add(b"n", 1, max=0), session, 2, 2),  # a refused one
            Call(Range(b"n"), session, 3, 2),
        ],
        1,
    ):
        now_ms = number * (TTL_MS - 1)
        assert node.apply(ExpireSessions(), call, at_ms=now_ms)[0].count == 0
    node.restart()
    assert node.machine.session_count == 1


def test_one_entry_ends_only_so_many(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "EXPIRED_PER_ENTRY_MAX", 2)
    node.apply(OpenSession(), OpenSession())
    node.apply(OpenSession(), at_ms=1)
    assert node.apply(ExpireSessions(), at_ms=TTL_MS + 1) == [DoneResult(0, 2)]
    assert node.machine.expiry_due(TTL_MS + 1)
    assert code_of(node.apply(Call(INCREMENT, 2 << 16, 1, 1))[0]) == ""  # the youngest is left
    assert not node.machine.expiry_due(TTL_MS + 1)


# --- bounds ---------------------------------------------------------------------------------------------------------


def test_too_many_sessions(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "SESSIONS_MAX", 2)
    answers = node.apply(OpenSession(), OpenSession(), OpenSession())
    assert [code_of(answer) for answer in answers] == ["", "", "too_many_sessions"]
    node.apply(Call(CloseSession(), 1 << 16))
    assert code_of(node.apply(OpenSession())[0]) == ""


def test_too_many_answers(node: Node) -> None:
    session = node.open()
    node.apply(*[Call(INCREMENT, session, seq, 1) for seq in range(1, 1025)])
    [full] = node.apply(Call(INCREMENT, session, 1025, 1))
    assert full.code == "session_full"
    assert node.apply(Call(INCREMENT, session, 1024, 1))[0].value == 1024  # a repeat is answered all the same
    node.restart()
    assert node.apply(Call(INCREMENT, session, 1025, 1)) == [full]
    assert node.apply(Call(INCREMENT, session, 1025, 2))[0].value == 1025


def test_too_large_answers(node: Node) -> None:
    session = node.open()
    node.apply(Put(b"big", bytes(1024 * 1024)))
    answers = node.apply(*[Call(Range(b"big"), session, seq, 1) for seq in range(1, 6)])
    assert [code_of(answer) for answer in answers] == ["", "", "", "", "session_full"]
    node.restart()
    assert code_of(node.apply(Call(Range(b"big"), session, 5, 1))[0]) == "session_full"
    assert code_of(node.apply(Call(Range(b"big"), session, 5, 2))[0]) == ""


# --- what is stored -------------------------------------------------------------------------------------------------


def test_outcomes_go_once_their_sessions_are_written(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "_UNWRITTEN_ENTRIES_MAX", 10)
    monkeypatch.setattr(sessions, "_TRIM_ENTRIES", 8)
    quiet, busy = node.open(), node.open()
    node.apply(Call(INCREMENT, quiet, 1, 1))
    for seq in range(1, 500):
        node.apply(Call(INCREMENT, busy, seq, seq))
    node.restart()
    storage = node.disk.open("state", True)
    assert len(list(storage.scan(layout.OUTCOME, layout.family_end(layout.OUTCOME)))) < 30
    assert node.apply(Call(INCREMENT, quiet, 1, 1), Call(INCREMENT, busy, 499, 1))[0].value == 1
    assert node.value() == b"500"


def test_sessions_of_a_quiet_store_cost_nothing_for_ever(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only renewals, no change of any record: nothing may pile up."""
    monkeypatch.setattr(sessions, "_UNWRITTEN_ENTRIES_MAX", 10)
    monkeypatch.setattr(sessions, "_TRIM_ENTRIES", 8)
    session = node.open()
    for _ in range(500):
        node.apply(Call(KeepSession(), session))
        node.machine.apply(node.machine.applied_index + 1, 1, NOOP, b"")
    node.machine.flush()
    assert len(list(node.disk.open("state", True).scan(b"", b"\xff"))) < 40
