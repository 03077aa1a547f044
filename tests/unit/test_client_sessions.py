"""Exactly once: how the client opens, numbers, acknowledges, renews, loses and closes its sessions."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import pytest
from msgspec import Raw

import kvstore
from kvstore import Client, OutcomeUnknown, Refused, Unavailable, codec
from kvstore.client import call as client_call
from kvstore.client import session as client_session
from kvstore.client.session import KEEPS, WINDOW, Session
from kvstore.codec import Answer, ClientFrame, Failure, Read, Write
from kvstore.model import CloseSession, ErrorResult, KeepLease, KeepSession, OpenSession, Put
from kvstore.state.sessions import ANSWERS_MAX
from tests.fake_server import (
    FakeCluster,
    FakeNode,
    answer,
    apply_and_close,
    close,
    fail,
    swallow,
    until,
)


@pytest.fixture
async def cluster() -> AsyncIterator[FakeCluster]:
    async with FakeCluster(1) as cluster:
        yield cluster


@pytest.fixture
async def node(cluster: FakeCluster) -> FakeNode:
    return cluster.nodes[0]


@pytest.fixture
async def kv(cluster: FakeCluster) -> AsyncIterator[Client]:
    async with kvstore.connect(cluster.endpoints) as kv:
        yield kv


def affairs(node: FakeNode) -> list[object]:
    """The session requests that came to a node, in order."""
    kinds = (OpenSession, KeepSession, CloseSession)
    mutations = [codec.decode_mutation(frame.request) for frame in node.frames if isinstance(frame, Write)]
    return [type(mutation) for mutation in mutations if isinstance(mutation, kinds)]


class _Patient(random.Random):
    """Makes every backoff as long as it may be."""

    def random(self) -> float:
        return 1.0


def expire_sessions(cluster: FakeCluster) -> None:
    cluster.fake.sessions.clear()


async def test_reading_opens_no_session(kv: Client, node: FakeNode) -> None:
    await kv.get(b"a")
    await kv.range(prefix=b"")
    assert affairs(node) == []


async def test_one_session_for_all_first_writes(kv: Client, node: FakeNode) -> None:
    await asyncio.gather(*(kv.put(b"%d" % number, b"") for number in range(20)))
    assert affairs(node) == [OpenSession]
    assert len({write.session for write in node.writes}) == 1
    assert sorted(write.seq for write in node.writes) == list(range(1, 21))


async def test_closing_the_client_closes_the_session(cluster: FakeCluster, node: FakeNode) -> None:
    async with kvstore.connect(cluster.endpoints) as kv:
        await kv.put(b"a", b"")
        assert len(cluster.fake.sessions) == 1
    assert affairs(node) == [OpenSession, CloseSession]
    assert not cluster.fake.sessions


async def test_a_lost_opening_is_repeated(kv: Client, cluster: FakeCluster, node: FakeNode) -> None:
    lost = 0
    received = node.received

    def lose_openings(connection: object, frame: ClientFrame) -> None:
        nonlocal lost
        if isinstance(frame, Write) and frame.session == 0 and lost < 2:
            lost += 1
            connection.close()  # type: ignore[attr-defined]
        else:
            received(connection, frame)  # type: ignore[arg-type]

    node.received = lose_openings  # type: ignore[method-assign]
    await kv.put(b"a", b"")
    assert lost == 2


@pytest.mark.parametrize("told", ["overloaded", "storage_failed", ""])
async def test_a_first_write_ends_with_the_reason_that_its_session_could_not_open(
    kv: Client, node: FakeNode, told: str
) -> None:
    """It waited in line and was never sent: what was said to the opening is all there is to say."""
    received = node.received

    def refuse_openings(connection: object, frame: ClientFrame) -> None:
        if not isinstance(frame, Write):
            received(connection, frame)  # type: ignore[arg-type]
        elif told:
            connection.reply(Failure(frame.id, told, "told to say no"))  # type: ignore[attr-defined]

    node.received = refuse_openings  # type: ignore[method-assign]
    early = asyncio.ensure_future(kv.put(b"a", b"", timeout=0.2))
    late = asyncio.ensure_future(kv.put(b"b", b"", timeout=30))
    with pytest.raises(Unavailable) as caught:
        await early
    assert caught.value.code == (told or "timeout")
    assert "opening a session" in caught.value.message
    assert node.address in caught.value.message
    assert ("told to say no" if told else "has not answered") in caught.value.message
    node.received = received  # type: ignore[method-assign]
    if not told:
        next(iter(node.connections)).close()
    await late


async def test_those_in_line_outlive_an_opening_whose_time_is_up(cluster: FakeCluster, node: FakeNode) -> None:
    """An opening ends at the client's own timeout with the code of its last no; calls with later deadlines go on."""
    received = node.received

    def refuse_openings(connection: object, frame: ClientFrame) -> None:
        if isinstance(frame, Write):
            connection.reply(Failure(frame.id, "overloaded", "told to say no"))  # type: ignore[attr-defined]
        else:
            received(connection, frame)  # type: ignore[arg-type]

    node.received = refuse_openings  # type: ignore[method-assign]
    async with kvstore.connect(cluster.endpoints, timeout_s=0.1) as kv:
        put = asyncio.ensure_future(kv.put(b"a", b"", timeout=30))
        with pytest.raises(Unavailable):
            await kv.put(b"b", b"", timeout=0.4)
        node.received = received  # type: ignore[method-assign]
        await put


async def test_too_many_sessions(kv: Client, node: FakeNode) -> None:
    received = node.received

    def refuse_openings(connection: object, frame: ClientFrame) -> None:
        if isinstance(frame, Write):
            result = codec.encode_result(ErrorResult("too_many_sessions", "100000 sessions are open"))
            connection.reply(Answer(frame.id, Raw(result)))  # type: ignore[attr-defined]
        else:
            received(connection, frame)  # type: ignore[arg-type]

    node.received = refuse_openings  # type: ignore[method-assign]
    outcomes = await asyncio.gather(*(kv.put(b"a", b"") for _ in range(3)), return_exceptions=True)
    assert [outcome.code for outcome in outcomes if isinstance(outcome, Refused)] == ["too_many_sessions"] * 3
    node.received = received  # type: ignore[method-assign]
    await kv.put(b"a", b"")


# --- acknowledging --------------------------------------------------------------------------------------------------


async def test_what_was_answered_is_acknowledged(kv: Client, cluster: FakeCluster, node: FakeNode) -> None:
    for number in range(5):
        await kv.put(b"%d" % number, b"")
    assert [(write.seq, write.acked_below) for write in node.writes] == [(n, n) for n in range(1, 6)]
    (session,) = cluster.fake.sessions.values()
    assert list(session.results) == [5]


async def test_nothing_unanswered_is_acknowledged(kv: Client, node: FakeNode) -> None:
    await kv.put(b"first", b"")
    held: list[object] = []

    def hold(node: FakeNode, connection: object, frame: Write | Read) -> None:
        held.append(lambda: answer(node, connection, frame))  # type: ignore[arg-type]

    node.script.append(hold)
    slow = asyncio.ensure_future(kv.put(b"slow", b""))
    await until(lambda: held)
    for number in range(5):
        await kv.put(b"%d" % number, b"")
    assert [write.acked_below for write in node.writes[2:]] == [2] * 5
    held[0]()  # type: ignore[operator]
    await slow
    await kv.put(b"last", b"")
    assert node.writes[-1].acked_below == node.writes[-1].seq


async def test_a_call_that_was_given_up_is_acknowledged_and_never_applied_later(
    kv: Client, cluster: FakeCluster, node: FakeNode
) -> None:
    held: list[object] = []

    def hold(node: FakeNode, connection: object, frame: Write | Read) -> None:
        held.append(lambda: answer(node, connection, frame))  # type: ignore[arg-type]

    node.script.extend((hold, hold))
    timed_out = asyncio.ensure_future(kv.put(b"late", b"", timeout=0.05))
    cancelled = asyncio.ensure_future(kv.put(b"late", b""))
    await until(lambda: len(held) == 2)
    with pytest.raises(OutcomeUnknown):
        await timed_out
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    await kv.put(b"next", b"")
    assert node.writes[-1].acked_below == 3
    for release in held:  # copies that were under way arrive at last
        release()  # type: ignore[operator]
    assert b"late" not in cluster.fake.records


async def test_repeated_frames_carry_a_bound_that_spares_them(kv: Client, node: FakeNode) -> None:
    chance = random.Random(7)
    for _ in range(60):
        node.script.append(chance.choice((answer, apply_and_close, close, fail("overloaded"), fail("unavailable"))))
    results = await asyncio.gather(*(kv.add(b"n", 1, timeout=20) for _ in range(200)))
    assert sorted(result.value for result in results) == list(range(1, 201))
    assert all(write.acked_below <= write.seq for write in node.writes)


def test_the_bound_follows_any_order_of_answers() -> None:
    chance = random.Random(1)
    session = Session(5)
    open_: set[int] = set()
    for _ in range(5000):
        if open_ and chance.random() < 0.5:
            seq = chance.choice(sorted(open_))
            open_.remove(seq)
            session.over(seq)
        else:
            open_.add(session.take())
        assert session.acked_below == min(open_, default=session.next_seq)
    for seq in sorted(open_):
        session.over(seq)
    assert not session._over


# --- bounds ---------------------------------------------------------------------------------------------------------


async def test_a_full_window_makes_callers_wait(kv: Client, node: FakeNode) -> None:
    await kv.put(b"first", b"")
    held: list[object] = []

    def hold(node: FakeNode, connection: object, frame: Write | Read) -> None:
        held.append(lambda: answer(node, connection, frame))  # type: ignore[arg-type]

    node.always = hold
    calls = [asyncio.ensure_future(kv.put(b"%d" % number, b"")) for number in range(WINDOW + 100)]
    await until(lambda: len(held) == WINDOW)
    assert len(node.writes) == WINDOW + 1
    node.always = None
    for release in held:
        release()  # type: ignore[operator]
    await asyncio.gather(*calls)
    sent = [(write.seq, write.acked_below) for write in node.writes]
    assert all(seq - acked_below < WINDOW for seq, acked_below in sent)


async def test_keep_alives_do_not_wait_behind_a_full_window(
    kv: Client, node: FakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_session, "WINDOW", 4)
    monkeypatch.setattr(client_session, "KEEPS", 2)
    await kv.put(b"first", b"")
    node.always = swallow
    calls: list[asyncio.Future[object]] = []
    calls += [asyncio.ensure_future(kv.put(b"%d" % number, b"")) for number in range(10)]
    calls += [asyncio.ensure_future(kv.keep_lease(7)) for _ in range(5)]
    await until(lambda: len(node.writes) >= 1 + 4 + 2)
    assert [type(codec.decode_mutation(write.request)) for write in node.writes] == [Put] * 5 + [KeepLease] * 2
    assert all(write.seq - write.acked_below < 4 + 2 for write in node.writes)
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)


def test_the_store_keeps_all_answers_that_may_be_unacknowledged() -> None:
    assert WINDOW + KEEPS == ANSWERS_MAX


async def test_callers_in_line_time_out_as_never_sent(kv: Client, node: FakeNode) -> None:
    await kv.put(b"first", b"")
    node.always = swallow
    sent = [asyncio.ensure_future(kv.put(b"%d" % number, b"", timeout=0.5)) for number in range(WINDOW)]
    in_line = [asyncio.ensure_future(kv.put(b"in line", b"", timeout=0.1)) for _ in range(10)]
    outcomes = await asyncio.gather(*in_line, return_exceptions=True)
    assert [outcome.code for outcome in outcomes if isinstance(outcome, Unavailable)] == ["timeout"] * 10
    outcomes = await asyncio.gather(*sent, return_exceptions=True)
    assert all(isinstance(outcome, OutcomeUnknown) for outcome in outcomes)
    assert len(node.writes) == WINDOW + 1


async def test_cancelled_in_line_is_never_sent(kv: Client, node: FakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_session, "WINDOW", 1)
    await kv.put(b"first", b"")
    held: list[object] = []

    def hold(node: FakeNode, connection: object, frame: Write | Read) -> None:
        held.append(lambda: answer(node, connection, frame))  # type: ignore[arg-type]

    node.script.append(hold)
    calls = [asyncio.ensure_future(kv.put(b"%d" % number, b"")) for number in range(3)]
    await until(lambda: held)
    calls[1].cancel()
    held[0]()  # type: ignore[operator]
    await calls[0]
    await calls[2]
    assert len(node.writes) == 3
    assert calls[1].cancelled()


async def test_the_line_has_an_end(kv: Client, node: FakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_session, "WINDOW", 4)
    monkeypatch.setattr(client_session, "LINE_MAX", 4)
    await kv.put(b"first", b"")
    node.always = swallow
    calls = [asyncio.ensure_future(kv.put(b"%d" % number, b"", timeout=0.2)) for number in range(8)]
    await until(lambda: len(node.writes) == 5)
    with pytest.raises(Unavailable) as caught:
        await kv.put(b"one too many", b"")
    assert caught.value.code == "overloaded"
    await asyncio.gather(*calls, return_exceptions=True)
    node.always = None
    await kv.put(b"again", b"")


async def test_large_requests_wait_for_room(kv: Client, node: FakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_session, "UNANSWERED_BYTES_MAX", 1_000_000)
    await kv.put(b"first", b"")
    held: list[object] = []

    def hold(node: FakeNode, connection: object, frame: Write | Read) -> None:
        held.append(lambda: answer(node, connection, frame))  # type: ignore[arg-type]

    node.script.extend([hold] * 3)
    calls = [asyncio.ensure_future(kv.put(b"%d" % number, bytes(400_000))) for number in range(6)]
    await until(lambda: len(held) == 3)
    assert len(node.writes) == 4
    for release in held:
        release()  # type: ignore[operator]
    await asyncio.gather(*calls)
    assert kv._sessions._unanswered_bytes == 0


async def test_session_full_is_waited_out(kv: Client, node: FakeNode) -> None:
    def full(node: FakeNode, connection: object, frame: Write | Read) -> None:
        result = codec.encode_result(ErrorResult("session_full", "1024 unacknowledged results"))
        connection.reply(Answer(frame.id, Raw(result)))  # type: ignore[attr-defined]

    node.script.extend((full, full))
    assert (await kv.add(b"n", 1)).value == 1
    assert len({write.seq for write in node.writes}) == 1


# --- expiry ---------------------------------------------------------------------------------------------------------


async def test_an_expired_session_is_replaced(kv: Client, cluster: FakeCluster, node: FakeNode) -> None:
    await kv.add(b"n", 1)
    expire_sessions(cluster)
    results = await asyncio.gather(*(kv.add(b"n", 1) for _ in range(20)))
    assert sorted(result.value for result in results) == list(range(2, 22))
    assert affairs(node).count(OpenSession) == 2
    old = node.writes[0].session
    new = {write.session for write in node.writes[21:]}
    assert old not in new
    assert len(new) == 1


async def test_what_was_in_doubt_at_expiry_is_not_repeated(kv: Client, cluster: FakeCluster, node: FakeNode) -> None:
    await kv.put(b"first", b"")

    def apply_expire_and_close(node: FakeNode, connection: object, frame: Write | Read) -> None:
        apply_and_close(node, connection, frame)  # type: ignore[arg-type]
        expire_sessions(cluster)

    node.script.append(apply_expire_and_close)
    with pytest.raises(OutcomeUnknown):
        await kv.add(b"n", 1)
    assert cluster.fake.records[b"n"].value == b"1"
    assert (await kv.add(b"n", 1)).value == 2


async def test_each_call_at_expiry_is_judged_for_itself(
    kv: Client, cluster: FakeCluster, node: FakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    await kv.put(b"first", b"")
    # A refused call that was sent again before the end of the connection is noticed would be in doubt as well.
    monkeypatch.setattr(client_call, "BACKOFF_MIN_S", client_call.BACKOFF_MAX_S)
    monkeypatch.setattr(kv._dispatcher, "_chance", _Patient())

    # Three get lost without effect, then the connection ends: all of those are in doubt. Two are refused for sure.
    def close_and_expire(node: FakeNode, connection: object, frame: Write | Read) -> None:
        close(node, connection, frame)  # type: ignore[arg-type]
        expire_sessions(cluster)

    node.script.extend((swallow, swallow, fail("overloaded"), fail("overloaded"), close_and_expire))
    outcomes = await asyncio.gather(*(kv.add(b"n", 1) for _ in range(5)), return_exceptions=True)
    unknown = [outcome for outcome in outcomes if isinstance(outcome, OutcomeUnknown)]
    done = [outcome for outcome in outcomes if isinstance(outcome, kvstore.AddResult)]
    assert (len(unknown), len(done)) == (3, 2)
    assert cluster.fake.records[b"n"].value == b"2"


async def test_an_idle_session_is_renewed(kv: Client, cluster: FakeCluster, node: FakeNode) -> None:
    cluster.fake.session_ttl_ms = 60
    await kv.put(b"a", b"")
    await until(lambda: affairs(node).count(KeepSession) >= 3)
    assert affairs(node).count(OpenSession) == 1


async def test_a_busy_session_needs_no_renewal(kv: Client, cluster: FakeCluster, node: FakeNode) -> None:
    cluster.fake.session_ttl_ms = 300
    async with asyncio.timeout(0.5):
        while kv._loop is None or len(node.writes) < 40:
            await kv.put(b"a", b"")
            await asyncio.sleep(0.005)
    assert KeepSession not in affairs(node)


async def test_a_renewal_that_fails_harms_nobody(kv: Client, cluster: FakeCluster, node: FakeNode) -> None:
    cluster.fake.session_ttl_ms = 60
    await kv.put(b"a", b"")
    expire_sessions(cluster)
    await until(lambda: KeepSession in affairs(node))
    await kv.put(b"a", b"")


# --- the end --------------------------------------------------------------------------------------------------------


async def test_closing_ends_what_is_under_way(cluster: FakeCluster, node: FakeNode) -> None:
    kv = await kvstore.connect(cluster.endpoints)
    await kv.put(b"first", b"")
    node.always = swallow
    sent = asyncio.ensure_future(kv.put(b"a", b""))
    read = asyncio.ensure_future(kv.get(b"a"))
    await until(lambda: len(node.writes) == 2 and node.reads)
    await kv.close()
    with pytest.raises(OutcomeUnknown):
        await sent
    with pytest.raises(Unavailable) as caught:
        await read
    assert caught.value.code == "closed"
    with pytest.raises(Unavailable) as caught:
        await kv.put(b"a", b"")
    assert caught.value.code == "closed"
    await kv.close()


async def test_closing_while_nobody_can_be_reached() -> None:
    async with FakeCluster(1) as cluster:
        endpoints = cluster.endpoints
    kv = await kvstore.connect(endpoints)
    waiting = asyncio.ensure_future(kv.put(b"a", b""))
    await until(lambda: kv._pool._parked)
    await kv.close()
    with pytest.raises(Unavailable) as caught:
        await waiting
    assert caught.value.code == "closed"


async def test_a_client_that_was_never_used_closes() -> None:
    kv = kvstore.connect("127.0.0.1:1")
    await kv.close()
    with pytest.raises(Unavailable):
        await kv.get(b"a")
