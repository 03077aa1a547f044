"""Leases that are gone before their time: what needs one takes another, and nobody is told."""

from __future__ import annotations

import asyncio
import time

import pytest

import kvstore
from services.web.leases import SharedLease, forget_lost
from services.work import steps
from services.work.steps import StepRun
from services.work.worker import Worker
from tests.services.shop import PASSWORD, Shop


async def revoke(store: kvstore.Client, *prefixes: bytes) -> None:
    """The leases of all records there."""
    leases = {record.lease for prefix in prefixes for record in (await store.range(prefix=prefix)).records}
    assert leases - {0}
    for lease in leases - {0}:
        await store.revoke_lease(lease)


async def test_orders_and_carts_outlive_their_leases(shop: Shop) -> None:
    staff, ada = await shop.staff(), await shop.customer()
    await shop.stock(staff, "cup", 10)
    assert (await shop.order(ada, {"cup": 1})).status == 201
    assert (await shop.orders.post("/v1/carts", headers=ada.once())).status == 201
    await revoke(shop.store, b"idem/", b"cart/")
    # Some at once: each meets the lease that is gone, and all go on.
    answers = await asyncio.gather(*(shop.order(ada, {"cup": 1}) for _ in range(4)))
    assert [answer.status for answer in answers] == [201] * 4
    assert (await shop.orders.post("/v1/carts", headers=ada.once())).status == 201
    assert len({record.lease for record in (await shop.store.range(prefix=b"idem/")).records}) == 1
    assert await shop.on_hand("cup") == 5


async def test_accounts_outlive_their_leases(shop: Shop) -> None:
    ada = await shop.register()
    await revoke(shop.store, b"audit/", b"session/")
    ada = await shop.sign_in(ada.email)
    assert ada.token
    await revoke(shop.store, b"audit/")
    changed = {"old_password": PASSWORD, "new_password": "another horse battery"}
    answer = await shop.users.post("/v1/users/me/password", json=changed, headers=ada.headers)
    assert answer.status in (200, 204), await answer.text()


async def test_only_leases_that_were_granted_before_are_forgotten(store: kvstore.Client) -> None:
    lease = SharedLease(store, 60.0, 60.0)
    first = await lease.take()
    gone = kvstore.Refused("there is no such lease", code="lease_not_found")
    assert not forget_lost(kvstore.Refused("no", code="out_of_range"), time.monotonic())
    assert await lease.take() == first
    began_s = time.monotonic()
    assert forget_lost(gone, began_s)
    second = await lease.take()
    assert second != first
    assert forget_lost(gone, began_s)  # another request, that began when the first one did
    assert await lease.take() == second


async def test_a_step_takes_another_lease(store: kvstore.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "BACKOFF_MIN_S", 0.01)
    shared = SharedLease(store, 60.0, 60.0)
    await store.revoke_lease(await shared.take())
    done = asyncio.Event()

    async def handler(run: StepRun) -> None:
        await store.put(b"mailed", b"", lease=await shared.take())
        assert await run.finish()
        done.set()

    await store.txn(success=[steps.put("kind", "a")])
    worker = asyncio.create_task(Worker(store, {"kind": handler}).run())
    async with asyncio.timeout(10):
        await done.wait()
    worker.cancel()
    with pytest.raises(asyncio.CancelledError):
        await worker
