"""What the client sends again, what it does not, and what it says when time is up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from msgspec import Raw

import kvstore
from kvstore import Client, DeleteResult, InternalError, OutcomeUnknown, Refused, Unavailable, codec
from kvstore.client import call as client_call
from kvstore.codec import Write
from kvstore.errors import UNAVAILABLE_CODES
from tests.fake_server import (
    Action,
    FakeCluster,
    FakeNode,
    answer,
    apply_and_close,
    apply_and_fail,
    apply_and_lose,
    close,
    fail,
    swallow,
    until,
)

NEGATIVE_CODES = sorted(UNAVAILABLE_CODES - {"timeout", "closed", "transfer_failed"})


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
        await kv.put(b"first", b"")  # connected, with a session
        for node in cluster.nodes:
            node.frames.clear()
        yield kv


@pytest.mark.parametrize("code", NEGATIVE_CODES)
async def test_what_was_not_taken_is_sent_again(kv: Client, node: FakeNode, code: str) -> None:
    node.script.extend((fail(code), fail(code)))
    assert (await kv.add(b"n", 1)).value == 1
    assert len(node.writes) == 3
    assert len({(write.session, write.seq) for write in node.writes}) == 1
    node.script.extend((fail(code), fail(code)))
    assert await kv.get(b"n") is not None


@pytest.mark.parametrize("action", [apply_and_close, close, apply_and_fail("outcome_unknown"), fail("outcome_unknown")])
async def test_what_is_in_doubt_is_sent_again_and_applied_once(
    kv: Client, cluster: FakeCluster, node: FakeNode, action: Action
) -> None:
    node.script.append(action)
    assert (await kv.add(b"n", 1)).value == 1
    first, second = node.writes
    assert (first.session, first.seq) == (second.session, second.seq)
    assert cluster.fake.applied[first.session, first.seq] == 1
    assert cluster.fake.records[b"n"].value == b"1"


async def test_many_in_doubt_are_applied_once(kv: Client, cluster: FakeCluster, node: FakeNode) -> None:
    node.script.extend([apply_and_lose] * 50 + [apply_and_close])
    results = await asyncio.gather(*(kv.add(b"n", 1) for _ in range(100)))
    assert sorted(result.value for result in results) == list(range(1, 101))
    assert max(cluster.fake.applied.values()) == 1


@pytest.mark.parametrize("action", [swallow, apply_and_lose, apply_and_fail("outcome_unknown")])
async def test_a_write_in_doubt_at_its_deadline_is_of_unknown_outcome(
    kv: Client, node: FakeNode, action: Action
) -> None:
    node.always = action
    with pytest.raises(OutcomeUnknown) as caught:
        await kv.put(b"a", b"1", timeout=0.1)
    assert caught.value.code == "outcome_unknown"
    node.always = None
    await kv.put(b"a", b"2")  # and the client goes on


async def test_one_doubt_is_enough(kv: Client, node: FakeNode) -> None:
    """A definite no to a later attempt says nothing of the earlier one."""
    node.script.append(apply_and_close)
    node.always = fail("overloaded")
    with pytest.raises(OutcomeUnknown):
        await kv.put(b"a", b"1", timeout=0.2)


async def test_a_write_that_was_never_taken_is_unavailable(kv: Client, cluster: FakeCluster, node: FakeNode) -> None:
    node.always = fail("overloaded")
    with pytest.raises(Unavailable) as caught:
        await kv.put(b"a", b"1", timeout=0.2)
    assert caught.value.code == "overloaded", "the last definite no, rather than that time was up"
    assert "told to say overloaded" in caught.value.message
    node.always = None
    await kv.get(b"a")
    assert b"a" not in cluster.fake.records


async def test_a_read_at_its_deadline_is_unavailable(kv: Client, node: FakeNode) -> None:
    node.always = swallow
    with pytest.raises(Unavailable) as caught:
        await kv.get(b"a", timeout=0.1)
    assert caught.value.code == "timeout"


async def test_what_is_unanswered_at_the_deadline_is_a_timeout_whatever_came_before(kv: Client, node: FakeNode) -> None:
    node.script.append(fail("overloaded"))
    node.always = swallow
    with pytest.raises(Unavailable) as caught:
        await kv.get(b"a", timeout=0.3)
    assert caught.value.code == "timeout"


async def test_retries_back_off(kv: Client, node: FakeNode) -> None:
    node.always = fail("overloaded")
    with pytest.raises((Unavailable, OutcomeUnknown)):  # the time may be up while the last attempt is on its way
        await kv.put(b"a", b"1", timeout=1.0)
    # With full jitter the n-th wait is half of 10 ms * 2**n on average; 40 is far beyond any luck.
    assert 3 <= len(node.writes) <= 40


@pytest.mark.parametrize("code", ["invalid_request", "out_of_range", "lease_not_found", "a_code_of_a_newer_server"])
async def test_a_refusal_is_final(kv: Client, node: FakeNode, code: str) -> None:
    node.script.append(fail(code))
    with pytest.raises(Refused) as caught:
        await kv.put(b"a", b"1")
    assert caught.value.code == code
    assert len(node.writes) == 1


async def test_a_bug_in_the_server_is_not_spread_to_the_others(kv: Client, node: FakeNode) -> None:
    node.script.append(fail("internal"))
    with pytest.raises(InternalError):
        await kv.put(b"a", b"1")
    assert len(node.writes) == 1


async def test_an_answer_of_the_wrong_kind_is_a_bug(kv: Client, node: FakeNode) -> None:
    def mixed_up(node: FakeNode, connection: object, frame: Write) -> None:
        result = codec.encode_result(DeleteResult(1, 0))
        connection.reply(codec.Answer(frame.id, Raw(result)))  # type: ignore[attr-defined]

    node.script.append(mixed_up)  # type: ignore[arg-type]
    with pytest.raises(InternalError):
        await kv.put(b"a", b"1")


@pytest.mark.parametrize("junk", [b"\x01", b"\x92\x63\x02", b"\x92\xcd\x03\xe7\x02"])
async def test_an_answer_that_is_none_leaves_the_outcome_in_doubt(
    kv: Client, cluster: FakeCluster, node: FakeNode, junk: bytes
) -> None:
    def answer_junk(node: FakeNode, connection: object, frame: Write) -> None:
        node.execute(frame)
        connection.reply(codec.Answer(frame.id, Raw(junk)))  # type: ignore[attr-defined]

    node.script.append(answer_junk)  # type: ignore[arg-type]
    assert (await kv.add(b"n", 1)).value == 1, "asked again, it gave the answer it had stored"
    node.always = answer_junk  # type: ignore[assignment]
    with pytest.raises(OutcomeUnknown):
        await kv.add(b"n", 1, timeout=0.2)
    assert cluster.fake.records[b"n"].value == b"2"


async def test_a_late_answer_reaches_nobody(kv: Client, cluster: FakeCluster, node: FakeNode) -> None:
    late: list[object] = []

    def hold(node: FakeNode, connection: object, frame: object) -> None:
        late.append(lambda: answer(node, connection, frame))  # type: ignore[arg-type]

    node.script.append(hold)
    with pytest.raises(OutcomeUnknown):
        await kv.put(b"a", b"1", timeout=0.05)
    late[0]()  # type: ignore[operator]
    await kv.put(b"b", b"2")
    assert (await kv.range(prefix=b"")).count >= 2


async def test_concurrent_timeouts_are_each_their_own(kv: Client, node: FakeNode) -> None:
    node.always = swallow
    outcomes = await asyncio.gather(
        *(kv.put(b"%d" % number, b"", timeout=0.05 + 0.002 * number) for number in range(50)), return_exceptions=True
    )
    assert all(isinstance(outcome, OutcomeUnknown) for outcome in outcomes)
    assert len({id(outcome) for outcome in outcomes}) == 50


async def test_too_many_reads_at_once(kv: Client, node: FakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_call, "READS_MAX", 10)
    node.always = swallow
    calls = [asyncio.ensure_future(kv.get(b"a", timeout=0.1)) for _ in range(10)]
    await until(lambda: len(node.reads) == 10)
    with pytest.raises(Unavailable) as caught:
        await kv.get(b"a")
    assert caught.value.code == "overloaded"
    await asyncio.wait(calls)
    assert all(isinstance(call.exception(), Unavailable) for call in calls)
    node.always = None
    await kv.get(b"a")


# --- membership: not protected by a session -------------------------------------------------------------------------


async def test_membership_changes_go_to_the_leader() -> None:
    async with FakeCluster(3) as cluster, kvstore.connect(cluster.nodes[1].address) as kv:
        cluster.elect(cluster.nodes[2])
        members = await kv.member_add("n4", "127.0.0.1:1", "127.0.0.1:2", "id", cluster.cluster_id)
        assert [member.name for member in members] == ["n1", "n2", "n3"]
        await kv.member_promote("n4")
        await kv.transfer_leader()
        await kv.member_remove("n4")
        kinds = [type(frame).__name__ for frame in cluster.administered]
        assert kinds == ["MemberAdd", "MemberPromote", "TransferLeader", "MemberRemove"]


async def test_membership_refusals(cluster: FakeCluster) -> None:
    async with kvstore.connect(cluster.endpoints) as kv:
        for code, kind in (("would_lose_quorum", Refused), ("transfer_failed", Unavailable)):
            cluster.admin_failure = code
            with pytest.raises(kind) as caught:
                await kv.member_remove("n1")
            assert caught.value.code == code
        cluster.admin_failure = "outcome_unknown"
        with pytest.raises(OutcomeUnknown):
            await kv.member_remove("n1")
        assert len(cluster.administered) == 3


async def test_a_membership_change_in_doubt_is_not_repeated(cluster: FakeCluster) -> None:
    async with kvstore.connect(cluster.endpoints) as kv:
        await kv.put(b"a", b"")
        cluster.nodes[0].silent = True
        with pytest.raises(OutcomeUnknown):
            await kv.member_remove("n1", timeout=0.1)
