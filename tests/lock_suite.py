"""What locks and elections promise: one suite for the embedded store and for a cluster (see `client_suite.py`)."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest

from kvstore import (
    Client,
    Delete,
    DoneResult,
    KvError,
    OutcomeUnknown,
    Put,
    Record,
    Refused,
    Unavailable,
    Watch,
)
from kvstore.client.lock import lock_prefix
from kvstore.model import LEASE_KEYS_MAX, TXN_OPERATIONS_MAX
from tests.client_suite import ClientSuite, KvFactory, drop_connections, refused

WITHIN_S = 8.0


class LockSuite(ClientSuite):
    async def test_one_at_a_time_in_order_with_rising_tokens(self, kv: Client, kv_factory: KvFactory, p: bytes) -> None:
        clients = [kv, await kv_factory(), await kv_factory()]
        holders: list[int] = []
        tokens: list[int] = []
        inside = 0

        async def work(number: int) -> None:
            nonlocal inside
            async with clients[number % 3].lock(p, ttl_s=5.0) as lock:
                inside += 1
                assert inside == 1
                holders.append(number)
                tokens.append(lock.token)
                assert not lock.lost
                await clients[number % 3].add(p + b"done", 1)
                inside -= 1

        async with asyncio.timeout(WITHIN_S):
            async with kv.lock(p):
                workers = []
                for number in range(6):
                    workers.append(asyncio.ensure_future(work(number)))
                    while (await kv.range(prefix=b"_lock/" + p, count_only=True)).count < number + 2:
                        await asyncio.sleep(0.01)
            await asyncio.gather(*workers)
        assert holders == list(range(6)), "first come, first served"
        assert tokens == sorted(set(tokens))
        assert (await kv.range(prefix=b"_lock/" + p, count_only=True)).count == 0

    async def test_only_if_it_is_free(self, kv: Client, p: bytes) -> None:
        async with kv.lock(p, wait_s=0):
            for wait_s in (0.0, 0.3):
                with pytest.raises(Unavailable) as caught:
                    async with kv.lock(p, wait_s=wait_s):
                        pass
                assert caught.value.code == "lock_held"
            async with kv.lock(p + b"other", wait_s=0), kv.lock(p[:-1], wait_s=0):
                pass
        async with kv.lock(p, wait_s=0) as lock:
            assert lock.token

    async def test_a_holder_that_lost_it_writes_nothing(self, kv: Client, kv_factory: KvFactory, p: bytes) -> None:
        lost = asyncio.Event()
        async with asyncio.timeout(WITHIN_S):
            async with kv.lock(p, ttl_s=1.0, on_lost=lost.set) as lock:
                done = await kv.txn(compare=[lock.held], success=[Put(p + b"a", b"1")])
                assert done.succeeded
                old = lock.held
                # An operator ends it, as an expiry would.
                await (await kv_factory()).revoke_lease(int(lock.key[-16:], 16))
                async with kv.lock(p) as next_one:
                    assert next_one.token > lock.token
                    assert not (await kv.txn(compare=[old], success=[Put(p + b"a", b"2")])).succeeded
                await lost.wait()
                assert lock.lost
            with pytest.raises(Refused) as caught:
                _ = lock.held
            assert caught.value.code == "lock_not_held"
        record = await kv.get(p + b"a")
        assert record is not None
        assert record.value == b"1"

    async def test_a_dead_holder_keeps_it_for_its_time_and_no_longer(
        self, kv: Client, kv_factory: KvFactory, p: bytes
    ) -> None:
        loop = asyncio.get_running_loop()
        dead = await kv.grant_lease(1.0)
        await kv.put(b"_lock/" + p + b"\x00%016x" % dead.lease, b"", lease=dead.lease)
        began_s = loop.time()
        async with asyncio.timeout(WITHIN_S), kv.lock(p):
            assert 0.9 < loop.time() - began_s < 5.0

    async def test_more_wait_than_one_answer_holds(self, kv: Client, kv_factory: KvFactory, p: bytes) -> None:
        other = await kv_factory()
        dead = (await other.grant_lease(60.0)).lease
        prefix = lock_prefix(p)
        for first in range(0, LEASE_KEYS_MAX, TXN_OPERATIONS_MAX):
            puts = [Put(prefix + b"%016d" % n, b"", dead) for n in range(first, first + TXN_OPERATIONS_MAX)]
            await other.txn(success=puts)
        assert (await kv.range(prefix=prefix, keys_only=True)).more, "they do not fit"
        async with asyncio.timeout(WITHIN_S):
            waiting = asyncio.ensure_future(self._hold(kv, p))
            await self._in_line(other, p, LEASE_KEYS_MAX + 1)
            # Not even those who come after may go before it.
            with pytest.raises(Unavailable) as caught:
                async with other.lock(p, wait_s=0.1):
                    pass
            assert caught.value.code == "lock_held"
            assert not waiting.done()
            await other.revoke_lease(dead)
            await waiting

    async def test_others_give_up_in_the_middle(self, kv: Client, kv_factory: KvFactory, p: bytes) -> None:
        other = await kv_factory()
        keys = [lock_prefix(p) + b"%016x" % number for number in range(30)]
        for key in reversed(keys):
            await other.put(key, b"")
        line = keys[::-1]
        async with asyncio.timeout(WITHIN_S):
            waiting = asyncio.ensure_future(self._hold(kv, p))
            await self._in_line(other, p, 31)
            await other.delete(line.pop())
            await other.delete(line.pop(10))
            await other.txn(success=[Delete(line.pop()) for _ in range(12)])  # all that it knows
            await other.delete(line.pop(0))
            await asyncio.sleep(0.05)
            assert not waiting.done()
            while line:
                assert not waiting.done()
                await other.delete(line.pop(0))
            await waiting

    async def test_who_is_cancelled_leaves_the_line(self, kv: Client, kv_factory: KvFactory, p: bytes) -> None:
        other = await kv_factory()
        async with asyncio.timeout(WITHIN_S):
            async with kv.lock(p):
                for delay_turns in (0, 1, 3, 10, 1000):
                    waiting = [asyncio.ensure_future(self._hold(other, p)) for _ in range(5)]
                    if delay_turns == 1000:
                        await self._in_line(kv, p, 6)
                    for _ in range(min(delay_turns, 10)):
                        await asyncio.sleep(0)
                    for task in waiting:
                        task.cancel()
                    ends = await asyncio.gather(*waiting, return_exceptions=True)
                    assert [type(end) for end in ends] == [asyncio.CancelledError] * 5
                    await self._in_line(kv, p, 1)
            await self._hold(other, p)

    async def test_history_that_goes_while_it_waits(
        self, kv: Client, kv_factory: KvFactory, p: bytes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        waiter = await kv_factory()
        watch, compacted = waiter.watch, 0

        def too_late(key: bytes, *, from_revision: int, puts: bool) -> Watch:
            nonlocal compacted
            compacted += 1
            return watch(key, from_revision=from_revision if compacted > 3 else 1, puts=puts)

        async with asyncio.timeout(WITHIN_S):
            async with kv.lock(p):
                newest = (await kv.put(p, b"")).revision
                await kv.compact(newest)
                monkeypatch.setattr(waiter, "watch", too_late)
                waiting = asyncio.ensure_future(self._hold(waiter, p))
                while compacted <= 3:
                    assert not waiting.done(), waiting
                    await asyncio.sleep(0.01)
            await waiting

    async def test_leaving_a_lock_that_cannot_be_given_up(
        self, kv: Client, p: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        for failure in (Unavailable("gone", code="timeout"), OutcomeUnknown("who knows")):

            async def unreachable(
                lease: int, *, timeout: float | None = None, failure: KvError = failure
            ) -> DoneResult:
                raise failure

            with monkeypatch.context() as patched:
                patched.setattr(kv, "revoke_lease", unreachable)
                async with kv.lock(p, ttl_s=1.0) as lock:
                    assert lock.token
                assert "within 1 s" in caplog.text
                with pytest.raises(ZeroDivisionError) as caught:
                    async with asyncio.timeout(WITHIN_S), kv.lock(p, ttl_s=1.0):  # after the first ended with its lease
                        _ = 1 // 0
                assert caught.value.__context__ is None
        async with asyncio.timeout(WITHIN_S):
            await self._hold(kv, p)

    async def _hold(self, kv: Client, p: bytes) -> None:
        async with kv.lock(p) as lock:
            assert not lock.lost

    async def _in_line(self, kv: Client, p: bytes, count: int) -> None:
        while (await kv.range(prefix=lock_prefix(p), count_only=True)).count != count:
            await asyncio.sleep(0.01)

    async def test_no_leader_is_shown_twice_and_none_after_a_later_one(
        self, kv: Client, kv_factory: KvFactory, p: bytes
    ) -> None:
        other = await kv_factory()
        seen: list[Record | None] = []
        observed = asyncio.Event()

        async def observe() -> None:
            async for leader in kv.election(p).observe():
                seen.append(leader)
                observed.set()

        async def lead(number: int) -> None:
            async with other.election(p).campaign(b"%d" % number) as lead:
                await other.put(lead.key, b"%d again" % number, lease=int(lead.key[-16:], 16))
                await asyncio.sleep(0.01)

        observer = asyncio.ensure_future(observe())
        async with asyncio.timeout(WITHIN_S):
            await observed.wait()
            for _ in range(3):
                await asyncio.gather(*(lead(number) for number in range(5)))
                drop_connections(kv)
            while seen[-1] is not None:
                await asyncio.sleep(0.01)
        observer.cancel()
        created = [leader.create_revision for leader in seen if leader is not None]
        assert created == sorted(set(created))
        assert created
        assert all(one is not None or next_one is not None for one, next_one in pairwise(seen))

    async def test_an_election_is_seen(self, kv: Client, p: bytes) -> None:
        election = kv.election(p)
        assert await election.leader() is None
        seen: list[bytes | None] = []

        async def observe() -> None:
            async for leader in election.observe():
                seen.append(None if leader is None else leader.value)

        async def until(values: list[bytes | None]) -> None:
            while seen != values:
                await asyncio.sleep(0.01)

        observer = asyncio.ensure_future(observe())
        async with asyncio.timeout(WITHIN_S):
            await until([None])
            async with election.campaign(b"first"):
                await until([None, b"first"])
                second = asyncio.ensure_future(self._lead(kv, p, until, [None, b"first", b"second"]))
                leader = await election.leader()
                assert leader is not None
                assert leader.value == b"first"
                # Else the first may go before the second has asked, and nobody leads for a moment, which is seen too.
                while (await kv.range(prefix=lock_prefix(p), count_only=True)).count < 2:
                    await asyncio.sleep(0.01)
            await second
            await until([None, b"first", b"second", None])
        observer.cancel()

    async def _lead(self, kv: Client, p: bytes, until, values: list[bytes | None]) -> None:  # type: ignore[no-untyped-def]
        async with kv.election(p).campaign(b"second"):
            await until(values)

    async def test_names(self, kv: Client, p: bytes) -> None:
        for name in ("", b"", "a\x00b"):
            with pytest.raises(ValueError, match="name"):
                kv.lock(name)
        for make in (lambda **how: kv.lock("a", **how), lambda **how: kv.election("a").campaign(b"", **how)):
            for wait_s in (-1.0, float("nan")):
                with pytest.raises(ValueError, match="wait_s"):
                    make(wait_s=wait_s)
            with pytest.raises(TypeError, match="wait_s must be a number"):
                make(wait_s="1")
            with pytest.raises(ValueError, match="lives at least"):
                make(ttl_s=0.5)
            with pytest.raises(TypeError, match="ttl_s must be a number"):
                make(ttl_s="1")
        async with refused("lock_not_held"):
            _ = kv.lock(p).held
