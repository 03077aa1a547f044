"""What is around an order: whose it is, where it goes, how it is found and followed, and what it is placed from."""

from __future__ import annotations

import asyncio
from typing import Any

from services.work import steps
from services.work.kinds import FORGET_CUSTOMER
from tests.cluster.harness import until
from tests.services.paid_shop import PaidShop
from tests.services.shop import problem


async def test_a_forged_webhook_changes_nothing(paid: PaidShop) -> None:
    body = b'{"id": "evt_1", "type": "charge.authorised", "key": "1:1:authorise", "charge": "ch_1", "created_ms": 1}'
    for headers in ({}, {"Sandbox-Signature": "t=1,v1=00"}):
        answer = await paid.shop.orders.post("/v1/webhooks/sandbox", data=body, headers=headers)
        await problem(answer, 400, "invalid_webhook")
    assert (await paid.shop.store.range(prefix=b"inbox/")).records == ()
    other = await paid.shop.orders.post("/v1/webhooks/other", data=body)
    await problem(other, 404, "not_found")


async def test_what_belongs_to_anothers_order_is_not_there(paid: PaidShop) -> None:
    order = await paid.placed()
    await paid.paid(order)
    await paid.becomes(order, payment_status="paid")
    eve = await paid.shop.customer()
    path = f"/v1/orders/{order['id']}"
    for tail in ("", "/payments", "/payments/1", "/refunds", "/refunds/1", "/shipments", "/returns", "/events",
                 "/events/stream"):  # fmt: skip
        answer = await paid.shop.orders.get(path + tail, headers=eve.headers)
        await problem(answer, 404, "not_found")
    for tail, body in (
        ("/payments", {"token": "tok_ok"}),
        ("/cancel", {"reason": "r"}),
        ("/returns", {"lines": [{"sku": "cup", "quantity": 1}], "reason": "r"}),
        ("/payments/1/complete", None),
    ):
        await problem(await paid.say(eve, path + tail, body), 404, "not_found")


async def test_when_a_customer_is_forgotten_orders_stay_and_addresses_go(paid: PaidShop) -> None:
    address = {"name": "Ada", "line1": "1 Street", "city": "Town", "country": "DE"}
    body = {"lines": [{"sku": "cup", "quantity": 1}], "ship_to": address}
    order = await paid.did(paid.buyer, "/v1/orders", body)
    nowhere = {**body, "ship_to": {**address, "country": "XX"}}
    wrong = await problem(await paid.say(paid.buyer, "/v1/orders", nowhere), 422, "invalid_body")
    assert wrong["errors"][0]["pointer"] == "/ship_to/country"
    cart = await paid.did(paid.buyer, "/v1/carts")
    details = await paid.get(f"/v1/orders/{order['id']}/details", paid.staff)
    assert details["ship_to"]["line1"] == "1 Street"
    await paid.shop.store.txn(success=[steps.put(FORGET_CUSTOMER, str(paid.buyer.id))])

    async def done() -> bool:
        found = await paid.get(f"/v1/orders/{order['id']}/details", paid.staff)
        return found["ship_to"] is None

    await until(done, 10.0, "an order without an address", poll_s=0.02)
    assert (await paid.get(f"/v1/orders/{order['id']}"))["total"] == 1250

    async def cart_gone() -> bool:
        return (await paid.shop.orders.get(f"/v1/carts/{cart['id']}", headers=paid.buyer.headers)).status == 404

    await until(cart_gone, 10.0, "no cart", poll_s=0.02)
    assert (await paid.shop.store.range(prefix=b"user-carts/")).records == ()
    assert (await paid.shop.store.range(prefix=b"user-active-carts/")).records == ()


async def test_the_events_of_an_order_are_streamed_and_resumed(paid: PaidShop) -> None:
    order = await paid.placed()
    url = f"/v1/orders/{order['id']}/events/stream"

    async def read(stop_at: str, last: int = 0) -> list[tuple[int, str]]:
        headers = {**paid.buyer.headers, **({"Last-Event-ID": str(last)} if last else {})}
        seen: list[tuple[int, str]] = []
        async with paid.shop.orders.get(url, headers=headers) as answer:
            assert answer.status == 200
            assert answer.content_type == "text/event-stream"
            async for line in answer.content:
                name, _, value = line.decode().strip().partition(": ")
                if name == "id":
                    number = int(value)
                elif name == "event":
                    seen.append((number, value))
                    if value == stop_at:
                        return seen
        raise AssertionError(f"the stream ended after {seen}")

    async with asyncio.timeout(20):
        following = asyncio.create_task(read("payment.captured"))
        await paid.paid(order)
        live = await following
        assert [name for _, name in live] == (await paid.types_of(order))
        assert [number for number, _ in live] == list(range(1, len(live) + 1))
        assert await read("payment.captured", last=live[3][0]) == live[4:]
    bad = await paid.shop.orders.get(url, headers={**paid.buyer.headers, "Last-Event-ID": "x"})
    await problem(bad, 400, "malformed_request")


async def test_an_order_is_placed_from_a_cart_once(paid: PaidShop) -> None:
    cart = await paid.did(paid.buyer, "/v1/carts")
    headers = paid.buyer.headers
    for sku, quantity in (("cup", 2), ("pot", 1)):
        path = f"/v1/carts/{cart['id']}/lines/{sku}"
        assert (await paid.shop.orders.put(path, json={"quantity": quantity}, headers=headers)).status == 200
    shown = await paid.get(f"/v1/carts/{cart['id']}")
    stale = {"cart_id": cart["id"], "cart_version": shown["version"] - 1}
    await problem(await paid.say(paid.buyer, "/v1/orders", stale), 409, "cart_changed")
    wrong = {"cart_id": cart["id"], "expected_total": 1}
    await problem(await paid.say(paid.buyer, "/v1/orders", wrong), 409, "total_changed")
    eve = await paid.shop.customer()
    await problem(await paid.say(eve, "/v1/orders", {"cart_id": cart["id"]}), 404, "not_found")
    body = {"cart_id": cart["id"], "cart_version": shown["version"], "expected_total": 6500}
    answers = await asyncio.gather(*(paid.say(paid.buyer, "/v1/orders", body) for _ in range(4)))
    assert sorted(answer.status for answer in answers) == [201, 409, 409, 409]
    order = await next(answer for answer in answers if answer.status == 201).json()
    assert (order["total"], order["cart_id"]) == (6500, cart["id"])
    found = await paid.get(f"/v1/carts/{cart['id']}")
    assert (found["state"], found["order_id"]) == ("ordered", order["id"])
    assert await paid.stock_of("cup") == (8, 2, 0)


async def test_orders_are_found_by_state_number_user_and_attention(paid: PaidShop) -> None:
    orders = [await paid.placed({"cup": 1}) for _ in range(5)]
    await paid.did(paid.buyer, f"/v1/orders/{orders[1]['id']}/cancel", {"reason": "no"})
    eve = await paid.shop.customer()
    other = await (await paid.shop.order(eve, {"pot": 1})).json()
    newest = [order["id"] for order in reversed([*orders, other])]

    async def found(query: str, who: Any = None) -> list[int]:
        ids: list[int] = []
        cursor = ""
        while True:
            page = await paid.get(f"/v1/orders?limit=2{query}{cursor}", who or paid.staff)
            ids += [order["id"] for order in page["data"]]
            if not page["has_more"]:
                return ids
            cursor = f"&starting_after={page['next_cursor']}"

    assert await found("") == newest
    assert await found("", paid.buyer) == newest[1:]
    assert await found("&state=cancelled") == [orders[1]["id"]]
    assert await found("&state=cancelled", paid.buyer) == [orders[1]["id"]]
    assert await found("&state=pending_payment", eve) == [other["id"]]
    assert await found(f"&user_id={eve.id}") == [other["id"]]
    assert await found(f"&number={orders[2]['number'].lower()}") == [orders[2]["id"]]
    assert await found(f"&number={orders[2]['number']}", eve) == []
    assert await found("&number=nonsense") == []
    assert await found("&needs_attention=true") == []
    assert await found(f"&needs_attention=false&state=pending_payment&user_id={paid.buyer.id}") == [
        order["id"] for order in reversed(orders) if order is not orders[1]
    ]
    for query in (f"?user_id={eve.id}", "?needs_attention=true"):
        await problem(await paid.shop.orders.get(f"/v1/orders{query}", headers=paid.buyer.headers), 403, "forbidden")


async def test_where_an_order_goes_is_its_owners_to_say_until_it_is_shipped(paid: PaidShop) -> None:
    order = await paid.placed({"cup": 2}, ship_to=None)
    path = f"/v1/orders/{order['id']}"
    await problem(await paid.shop.orders.get(f"{path}/ship-to", headers=paid.buyer.headers), 404, "not_found")
    address = {"name": "Ada", "line1": "1 Street", "city": "Town", "country": "DE"}
    await problem(await paid.say(paid.buyer, f"{path}/ship-to", {**address, "country": "XX"}), 422, "invalid_body")
    eve = await paid.shop.customer()
    await problem(await paid.say(eve, f"{path}/ship-to", address), 404, "not_found")
    said = await paid.did(paid.buyer, f"{path}/ship-to", address)
    assert (await paid.get(f"{path}/ship-to")) == said
    assert said["line1"] == "1 Street"
    await paid.paid(order)
    await paid.becomes(order, payment_status="paid")
    await paid.did(paid.staff, f"{path}/ship-to", {**address, "line1": "2 Street"})
    shipping = {"lines": [{"sku": "cup", "quantity": 1}], "carrier": "Post", "tracking": "P"}
    await paid.did(paid.staff, f"{path}/shipments", shipping)
    await problem(await paid.say(paid.buyer, f"{path}/ship-to", address), 409, "order_state")

    events = (await paid.get(f"{path}/events?limit=100", paid.staff))["data"]
    actors = [(event["type"], event["actor"]) for event in events]
    assert actors[:2] == [("shipment.shipped", paid.staff.id), ("order.address_changed", paid.staff.id)]
    assert ("order.address_changed", paid.buyer.id) in actors
    assert ("payment.created", paid.buyer.id) in actors
    assert ("payment.captured", None) in actors
    seen = (await paid.get(f"{path}/events?limit=100"))["data"]
    assert [event["type"] for event in seen] == [event["type"] for event in events]
    assert {event["actor"] for event in seen} == {None}


async def test_lists_of_large_orders_come_in_pages_like_others(paid: PaidShop) -> None:
    """A record each of some 60 KB, more together than the store answers at once."""
    name = "ü" * 200
    for number in range(100):
        product = {"name": name, "price": 10, "currency": "EUR"}
        answer = await paid.shop.orders.put(f"/v1/products/p{number}", json=product, headers=paid.staff.headers)
        assert answer.status == 201
        await paid.shop.store.put(f"stock/p{number}/on_hand".encode(), b"1000")
    orders = [await paid.placed({f"p{number}": 1 for number in range(100)}) for _ in range(25)]
    newest = [order["id"] for order in reversed(orders)]
    for query in (
        "?limit=100",
        "?limit=100&state=pending_payment",
        f"?limit=100&user_id={paid.buyer.id}&state=pending_payment",
    ):
        page = await paid.get(f"/v1/orders{query}", paid.staff)
        assert [order["id"] for order in page["data"]] == newest
    page = await paid.get("/v1/orders?limit=1&state=expired")
    assert page["data"] == []
    page = await paid.get("/v1/orders?limit=1&state=pending_payment")
    assert [order["id"] for order in page["data"]] == newest[:1]
