"""An order can be read and changed however large its parts are, and nobody makes it larger than is of use."""

from __future__ import annotations

import json
from typing import Any

import pytest

import kvstore
from services.orders import fulfilling
from services.orders.records import EventRecord, encode, event_key, order_key, part_key
from tests.services.paid_shop import ADDRESS
from tests.services.shop import Person, Shop, problem

SKUS = 20
RETURNS = 3


async def _delivered(shop: Shop, staff: Person, buyer: Person) -> tuple[str, list[dict[str, Any]]]:
    skus = [f"prod-{number:03d}-{'x' * 50}" for number in range(SKUS)]
    for sku in skus:
        await shop.stock(staff, sku, 100, price=0)
    order = await (await shop.order(buyer, dict.fromkeys(skus, 100), ship_to=ADDRESS)).json()
    path = f"/v1/orders/{order['id']}"
    lines = [{"sku": sku, "quantity": 100} for sku in skus]
    parcel = {"lines": lines, "carrier": "Post", "tracking": "P"}
    for tail, body in (("/shipments", parcel), ("/shipments/1/deliver", None)):
        answer = await shop.orders.post(path + tail, json=body, headers=staff.once())
        assert answer.status < 300, await answer.text()
    return path, [{"sku": sku, "quantity": 1} for sku in skus]


async def test_returns_that_nobody_has_decided_are_few(store: kvstore.Client) -> None:
    async with Shop(store, with_users=False) as shop:
        staff, buyer = await shop.staff(), await shop.customer()
        path, lines = await _delivered(shop, staff, buyer)
        asked = {"lines": lines, "reason": "😀" * 500}
        for _ in range(fulfilling.OPEN_RETURNS_MAX):
            answer = await shop.orders.post(f"{path}/returns", json=asked, headers=buyer.once())
            assert answer.status == 201, await answer.text()
        more = await shop.orders.post(f"{path}/returns", json=asked, headers=buyer.once())
        await problem(more, 409, "order_state")
        rejected = await shop.orders.post(f"{path}/returns/1/reject", json={"note": "no"}, headers=staff.once())
        assert rejected.status == 200
        more = await shop.orders.post(f"{path}/returns", json=asked, headers=buyer.once())
        assert more.status == 201


async def test_an_order_that_is_larger_than_a_result_of_the_store_is_read_and_changed(store: kvstore.Client) -> None:
    """As older versions, which bounded less, may have left it."""
    async with Shop(store, with_users=False) as shop:
        staff, buyer = await shop.staff(), await shop.customer()
        path, lines = await _delivered(shop, staff, buyer)
        for _ in range(RETURNS):
            answer = await shop.orders.post(
                f"{path}/returns", json={"lines": lines, "reason": "r"}, headers=buyer.once()
            )
            assert answer.status == 201
        order_id = int(path.rpartition("/")[2])
        for number in range(1, RETURNS + 1):
            key = part_key("return", order_id, number)
            record = await store.get(key)
            assert record is not None
            await store.put(key, json.dumps({**json.loads(record.value), "reason": "r" * 400_000}).encode())
        with pytest.raises(kvstore.Refused, match="result"):
            await store.txn(success=[kvstore.Range(order_key(order_id)), kvstore.Range(b"return/", b"return0")])
        returns = await shop.orders.get(f"{path}/returns", headers=buyer.headers)
        assert [one["number"] for one in await returns.json()] == [1, 2, 3]
        rejected = await shop.orders.post(f"{path}/returns/2/reject", json={"note": "no"}, headers=staff.once())
        assert (rejected.status, (await rejected.json())["state"]) == (200, "rejected")


async def test_large_events_are_all_listed_and_streamed(store: kvstore.Client) -> None:
    async with Shop(store, with_users=False) as shop:
        staff, buyer = await shop.staff(), await shop.customer()
        await shop.stock(staff, "cup", 1)
        order = await (await shop.order(buyer, {"cup": 1})).json()
        last = 8
        for seq in range(2, last + 1):
            event = EventRecord(order["id"], seq, "order.lines_cancelled", 1, {"reason": "r" * 300_000})
            await store.put(event_key(order["id"], seq), encode(event))
        listed: list[int] = []
        cursor = ""
        while True:
            url = f"/v1/orders/{order['id']}/events?limit=100{cursor}"
            page = await (await shop.orders.get(url, headers=buyer.headers)).json()
            listed += [one["seq"] for one in page["data"]]
            if not page["has_more"]:
                break
            cursor = f"&starting_after={page['next_cursor']}"
        assert listed == list(range(last, 0, -1))
        streamed: list[int] = []
        url = f"/v1/orders/{order['id']}/events/stream"
        async with shop.orders.get(url, headers=buyer.headers) as answer:
            buffer = b""
            while len(streamed) < last:
                buffer += await answer.content.readany()
                *whole, buffer = buffer.split(b"\n\n")
                streamed += [int(one[4 : one.index(b"\n")]) for one in whole if one.startswith(b"id: ")]
        assert streamed == list(range(1, last + 1))
