"""What locks and elections promise: one suite for the embedded store and for a cluster (see `client_suite.py`)."""

from __future__ import annotations

import asyncio

import pytest

from kvstore import Client, Put, Refused, Unavailable
from kvstore.client.lock import lock_prefix
from tests.client_suite import ClientSuite, KvFactory, refused

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
        with pytest.raises(ValueError, match="wait_s"):
            kv.lock("a", wait_s=-1.0)
        async with refused("lock_not_held"):
            _ = kv.lock(p).held
