"""Copies of one command, where what decides it changes between them: all are answered as the first one was."""

from __future__ import annotations

import asyncio

import msgspec

import kvstore
from services.work import steps
from services.work.steps import ParkedStep, Step, decode_parked
from tests.services.shop import Shop, problem

RETRY = "/v1/parked-steps/payment/1-1/retry"


async def park(store: kvstore.Client) -> None:
    parked = ParkedStep(Step("payment", "1-1", 1, 1), "provider_unknown", "no answer", 1)
    await store.put(steps.PARKED + b"payment/1-1", msgspec.json.encode(parked))


async def test_an_adjustment_of_a_product_that_was_not_there_stays_refused(shop: Shop) -> None:
    staff = await shop.staff()
    once, body = staff.once(), {"delta": 5, "reason": "received"}
    await problem(await shop.orders.post("/v1/products/new/stock", json=body, headers=once), 404, "not_found")
    await shop.stock(staff, "new", 0)
    again = await shop.orders.post("/v1/products/new/stock", json=body, headers=once)
    await problem(again, 404, "not_found")
    assert again.headers["Idempotent-Replayed"] == "true"
    assert await shop.on_hand("new") == 0


async def test_copies_of_a_retry_give_a_step_back_once(shop: Shop) -> None:
    staff = await shop.staff()
    await park(shop.store)
    once = staff.once()
    answers = await asyncio.gather(*(shop.orders.post(RETRY, headers=once) for _ in range(5)))
    assert [answer.status for answer in answers] == [200] * 5
    assert sum("Idempotent-Replayed" in answer.headers for answer in answers) == 4
    assert (await shop.store.range(prefix=steps.STEPS, count_only=True)).count == 1
    await park(shop.store)  # it has failed again meanwhile: a late copy does not give it back once more
    assert (await shop.orders.post(RETRY, headers=once)).status == 200
    [record] = (await shop.store.range(prefix=steps.PARKED)).records
    assert decode_parked(record.value).step.subject == "1-1"


async def test_a_retry_of_what_was_not_parked_stays_refused(shop: Shop) -> None:
    staff = await shop.staff()
    once = staff.once()
    await problem(await shop.orders.post(RETRY, headers=once), 404, "not_found")
    await park(shop.store)
    await problem(await shop.orders.post(RETRY, headers=once), 404, "not_found")
    assert (await shop.orders.post(RETRY, headers=staff.once())).status == 200
