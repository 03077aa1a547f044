"""What leases promise to a client: one suite for the embedded store and for a cluster (see `client_suite.py`)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from kvstore import Client, Put
from tests.client_suite import ClientSuite, KvFactory, refused

# The shortest there is, and how late its end may come: the leader looks once a second, and then proposes.
TTL_S, LATE_S = 1.0, 3.0


async def until(condition: Callable[[], Awaitable[object]], within_s: float) -> None:
    async with asyncio.timeout(within_s):
        while not await condition():
            await asyncio.sleep(0.02)


class LeaseSuite(ClientSuite):
    async def test_a_record_goes_with_its_lease(self, kv: Client, p: bytes) -> None:
        lease = (await kv.grant_lease(60.0)).lease
        await kv.put(p + b"a", b"1", lease=lease)
        await kv.txn(success=[Put(p + b"b", b"2", lease=lease), Put(p + b"c", b"3")])
        status = await kv.lease_status(lease, keys=True)
        assert status.keys == (p + b"a", p + b"b")
        assert (status.key_count, status.ttl_ms) == (2, 60_000)
        assert 50_000 < status.remaining_ms <= 60_000
        assert (await kv.revoke_lease(lease)).count == 2
        assert [record.key async for record in kv.scan(prefix=p)] == [p + b"c"]

    async def test_a_lease_that_nobody_keeps_ends_and_not_too_soon(self, kv: Client, p: bytes) -> None:
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        lease = (await kv.grant_lease(TTL_S)).lease
        await kv.put(p + b"a", b"1", lease=lease)

        async def is_gone() -> bool:
            return await kv.get(p + b"a") is None

        await until(is_gone, TTL_S + LATE_S)
        assert loop.time() - began_s >= TTL_S / 1.01
        async with refused("lease_not_found"):
            await kv.lease_status(lease)

    async def test_a_block_keeps_its_lease_alive_and_revokes_it(self, kv: Client, p: bytes) -> None:
        async with kv.lease(TTL_S) as lease:
            await kv.put(p + b"a", b"1", lease=lease.id)
            assert 0.0 < lease.valid_for_s <= TTL_S
            await asyncio.sleep(2.5 * TTL_S)
            assert not lease.lost
            assert await kv.get(p + b"a") is not None
        assert lease.lost
        assert await kv.get(p + b"a") is None

    async def test_a_block_hears_that_its_lease_is_gone(self, kv: Client, kv_factory: KvFactory) -> None:
        lost = asyncio.Event()
        async with kv.lease(TTL_S, on_lost=lost.set) as lease:
            await (await kv_factory()).revoke_lease(lease.id)
            await asyncio.wait_for(lost.wait(), TTL_S)
            assert lease.lost

    async def test_ids_of_one_s_own_and_the_list_of_all(self, kv: Client) -> None:
        granted = (await kv.grant_lease(60.0)).lease
        own = granted ^ 1 << 40
        assert (await kv.grant_lease(60.0, lease=own)).lease == own
        async with refused("lease_exists"):
            await kv.grant_lease(60.0, lease=own)
        listed = [lease async for lease in kv.leases()]
        assert {granted, own} <= set(listed)
        assert listed == sorted(listed)
        assert (await kv.keep_lease(own)).ttl_ms == 60_000
        for lease in (granted, own):
            await kv.revoke_lease(lease)
        async with refused("lease_not_found"):
            await kv.keep_lease(own)

    async def test_what_no_lease_can_be(self, kv: Client) -> None:
        for ttl_s in (0.0, 0.999, 1e12, float("nan")):
            with pytest.raises(ValueError, match="lives at least"):
                await kv.grant_lease(ttl_s)
            with pytest.raises(ValueError, match="lives at least"):
                kv.lease(ttl_s)
        async with refused("lease_not_found"):
            await kv.put(b"a", b"1", lease=12345)
        async with refused("invalid_request"):
            await kv.put(b"a", b"1", lease=-1)
        with pytest.raises(TypeError):
            await kv.keep_lease("7")  # type: ignore[arg-type]
        for ttl in ("3", None, True, b"3"):
            with pytest.raises(TypeError, match="ttl_s must be a number"):
                await kv.grant_lease(ttl)  # type: ignore[arg-type]
            with pytest.raises(TypeError, match="ttl_s must be a number"):
                kv.lease(ttl)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="timeout must be a number, not str"):
            await kv.keep_lease(7, timeout="5")  # type: ignore[arg-type]
