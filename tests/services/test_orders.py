"""Products, stock and orders over HTTP."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import jwt
import pytest
from aiohttp import ClientResponse
from aiohttp.test_utils import TestClient, TestServer
from yarl import URL

import kvstore
from services.orders.app import create_app
from services.web.ids import Ids, parse_order_number
from services.web.tokens import ALGORITHM, AUDIENCE, ISSUER
from tests.services.shop import Person, Shop, problem


@pytest.fixture
async def shop(store: kvstore.Client) -> AsyncIterator[Shop]:
    async with Shop(store, with_users=False) as orders_only:
        yield orders_only


async def orders_in_store(shop: Shop) -> list[dict[str, Any]]:
    found = await shop.store.range(prefix=b"order/")
    return [json.loads(record.value) for record in found.records]


async def untouched(shop: Shop, sku: str, on_hand: int) -> None:
    """No order, nothing reserved."""
    assert await orders_in_store(shop) == []
    assert (await shop.store.range(prefix=b"user-orders/")).records == ()
    assert await shop.on_hand(sku) == on_hand
    assert await shop.reserved(sku) == 0


# --- products and stock -----------------------------------------------------------------------------------------------


async def test_put_and_read_a_product(shop: Shop) -> None:
    staff = await shop.staff()
    body = {"name": "A cup", "price": 1250, "currency": "EUR"}
    answer = await shop.orders.put("/v1/products/cup-1", json=body, headers=staff.headers)
    assert answer.status == 201
    assert answer.headers["Location"] == "/v1/products/cup-1"
    product = await answer.json()
    assert product == {
        "sku": "cup-1", **body, "description": "", "category": "", "is_active": True,
        "created_at": product["created_at"], "updated_at": product["created_at"],
    }  # fmt: skip
    tag = answer.headers["ETag"]
    read = await shop.orders.get("/v1/products/cup-1")
    assert read.status == 200
    assert read.headers["ETag"] == tag
    assert await read.json() == product
    assert (await shop.orders.get("/v1/products/cup-1", headers={"If-None-Match": tag})).status == 304

    answer = await shop.orders.put("/v1/products/cup-1", json={**body, "price": 1300}, headers=staff.headers)
    assert answer.status == 200
    assert answer.headers["ETag"] != tag
    assert (await (await shop.orders.get("/v1/products/cup-1")).json())["price"] == 1300
    assert (await shop.orders.get("/v1/products/cup-1", headers={"If-None-Match": tag})).status == 200


async def test_preconditions_on_a_product(shop: Shop) -> None:
    staff = await shop.staff()
    body = {"name": "A cup", "price": 1250, "currency": "EUR"}

    async def put(**headers: str) -> ClientResponse:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await shop.orders.put("/v1/products/cup", json=body, headers={**staff.headers, **named})

    await problem(await put(If_Match="*"), 412, "precondition_failed")
    await problem(await put(If_Match='"1"'), 412, "precondition_failed")
    first = await put(If_None_Match="*")
    assert first.status == 201
    await problem(await put(If_None_Match="*"), 412, "precondition_failed")
    second = await put(If_Match=first.headers["ETag"])
    assert second.status == 200
    await problem(await put(If_Match=first.headers["ETag"]), 412, "precondition_failed")
    assert (await put(If_Match="*")).status == 200
    for headers in ({"If_Match": "x"}, {"If_None_Match": '"1"'}, {"If_Match": "*", "If_None_Match": "*"}):
        await problem(await put(**headers), 400, "malformed_request")


async def test_stock_is_adjusted_once_per_key_and_says_why(shop: Shop) -> None:
    staff = await shop.staff()
    await shop.stock(staff, "cup", 0)
    headers = staff.once()
    body = {"delta": 10, "reason": "received"}
    first = await shop.orders.post("/v1/products/cup/stock", json=body, headers=headers)
    assert first.status == 201
    adjustment = await first.json()
    assert adjustment["delta"] == 10
    assert adjustment["user_id"] == staff.id
    again = await shop.orders.post("/v1/products/cup/stock", json=body, headers=headers)
    assert again.status == 201
    assert again.headers["Idempotent-Replayed"] == "true"
    assert await again.json() == adjustment
    assert await shop.on_hand("cup") == 10
    other = await shop.orders.post("/v1/products/cup/stock", json={**body, "delta": 11}, headers=headers)
    await problem(other, 422, "idempotency_key_reused")
    down = await shop.orders.post(
        "/v1/products/cup/stock", json={"delta": -4, "reason": "broken"}, headers=staff.once()
    )
    assert down.status == 201
    assert await shop.on_hand("cup") == 6
    records = (await shop.store.range(prefix=b"stock/cup/adjustment/")).records
    assert sorted((json.loads(one.value)["delta"], json.loads(one.value)["reason"]) for one in records) == [
        (-4, "broken"),
        (10, "received"),
    ]


async def test_stock_never_falls_below_nothing_nor_grows_without_end(shop: Shop) -> None:
    staff = await shop.staff()
    await shop.stock(staff, "cup", 5)
    headers = staff.once()
    body = {"delta": -6, "reason": "count"}
    answer = await shop.orders.post("/v1/products/cup/stock", json=body, headers=headers)
    found = await problem(answer, 409, "insufficient_stock")
    assert found["errors"][0]["pointer"] == "/delta"
    assert await shop.on_hand("cup") == 5
    # It was answered, so it stays answered, also when there would be enough by now.
    await shop.stock(staff, "cup", 5)
    answer = await shop.orders.post("/v1/products/cup/stock", json=body, headers=headers)
    assert answer.headers["Idempotent-Replayed"] == "true"
    await problem(answer, 409, "insufficient_stock")
    assert await shop.on_hand("cup") == 10

    await shop.store.put(b"stock/cup/on_hand", b"%d" % (2**53 - 2))
    answer = await shop.orders.post(
        "/v1/products/cup/stock", json={"delta": 2, "reason": "count"}, headers=staff.once()
    )
    await problem(answer, 422, "stock_too_large")


async def test_reading_stock(shop: Shop) -> None:
    staff, ada = await shop.staff(), await shop.customer()
    await shop.stock(staff, "cup", 5)
    assert (await shop.order(ada, {"cup": 2})).status == 201
    for headers in ({}, ada.headers):
        answer = await shop.orders.get("/v1/products/cup/stock", headers=headers)
        assert await answer.json() == {"sku": "cup", "available": 3}
    answer = await shop.orders.get("/v1/products/cup/stock", headers=staff.headers)
    assert await answer.json() == {"sku": "cup", "on_hand": 3, "reserved": 2, "allocated": 0}
    await problem(await shop.orders.get("/v1/products/cap/stock"), 404, "not_found")


async def test_products_and_stock_are_for_staff(shop: Shop) -> None:
    ada = await shop.customer()
    product = {"name": "A cup", "price": 1, "currency": "EUR"}
    stock = {"delta": 1, "reason": "mine"}
    await problem(await shop.orders.put("/v1/products/cup", json=product, headers=ada.headers), 403, "forbidden")
    await problem(await shop.orders.post("/v1/products/cup/stock", json=stock, headers=ada.once()), 403, "forbidden")
    await problem(await shop.orders.put("/v1/products/cup", json=product), 401, "authentication_required")
    assert (await shop.store.range(prefix=b"product/")).records == ()


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({"delta": 0, "reason": "x"}, "/delta"),
        ({"delta": 1.5, "reason": "x"}, "/delta"),
        ({"delta": 10**10, "reason": "x"}, "/delta"),
        ({"delta": 1}, "/reason"),
        ({"delta": 1, "reason": ""}, "/reason"),
        ({"delta": 1, "reason": "x" * 501}, "/reason"),
        ({"set": 1, "reason": "x"}, "/set"),
    ],
)
async def test_bad_adjustments(shop: Shop, body: dict[str, Any], pointer: str) -> None:
    staff = await shop.staff()
    await shop.stock(staff, "cup", 1)
    answer = await shop.orders.post("/v1/products/cup/stock", json=body, headers=staff.once())
    found = await problem(answer, 422, "invalid_body")
    assert found["errors"][0]["pointer"] == pointer
    assert await shop.on_hand("cup") == 1


async def test_stock_of_an_unknown_product(shop: Shop) -> None:
    staff = await shop.staff()
    body = {"delta": 1, "reason": "received"}
    for path in ("/v1/products/cup/stock", "/v1/products/%2e%2e/stock", "/v1/products/a%00b/stock"):
        answer = await shop.orders.post(URL(path, encoded=True), json=body, headers=staff.once())
        assert answer.status == 404
        assert (await answer.json(content_type=None))["code"] == "not_found"
    assert (await shop.store.range(prefix=b"stock/")).records == ()


# --- placing an order -------------------------------------------------------------------------------------------------


async def test_place_and_read_an_order(shop: Shop) -> None:
    staff, ada = await shop.staff(), await shop.customer()
    await shop.stock(staff, "cup", 10, price=1250)
    await shop.stock(staff, "pot", 10, price=4999)
    answer = await shop.order(ada, {"pot": 1, "cup": 3})
    assert answer.status == 201
    order = await answer.json()
    assert answer.headers["Location"] == f"/v1/orders/{order['id']}"
    assert "Idempotent-Replayed" not in answer.headers
    assert order["state"] == "pending_payment"
    assert order["user_id"] == ada.id
    assert order["currency"] == "EUR"
    assert order["total"] == 3 * 1250 + 4999
    none_yet = {"shipped": 0, "delivered": 0, "cancelled": 0, "returned": 0}
    assert order["lines"] == [
        {"sku": "cup", "name": "A cup", "quantity": 3, "unit_price": 1250, "total": 3750, **none_yet},
        {"sku": "pot", "name": "A pot", "quantity": 1, "unit_price": 4999, "total": 4999, **none_yet},
    ]
    assert parse_order_number(order["number"]) == order["id"]
    assert 0 < order["id"] < 2**53
    assert [await shop.on_hand("cup"), await shop.reserved("cup")] == [7, 3]
    assert [await shop.on_hand("pot"), await shop.reserved("pot")] == [9, 1]
    index = (await shop.store.range(prefix=b"user-orders/%d/" % ada.id)).records
    assert [record.key.rpartition(b"/")[2] for record in index] == [b"%d" % order["id"]]

    for reader in (ada, staff):
        read = await shop.orders.get(answer.headers["Location"], headers=reader.headers)
        assert read.status == 200
        assert await read.json() == order
        total = await shop.orders.get(f"/order/{order['id']}", headers=reader.headers)
        assert await total.json() == {"id": order["id"], "user_id": ada.id, "total": order["total"]}
    tag = {"If-None-Match": read.headers["ETag"]}
    assert (await shop.orders.get(answer.headers["Location"], headers={**ada.headers, **tag})).status == 304


async def test_a_users_orders_are_indexed_newest_first(shop: Shop) -> None:
    staff, ada = await shop.staff(), await shop.customer()
    await shop.stock(staff, "cup", 10)
    placed = []
    for _ in range(3):
        placed.append((await (await shop.order(ada, {"cup": 1})).json())["id"])
        before = time.time_ns() // 1_000_000
        while time.time_ns() // 1_000_000 == before:  # the index is by milliseconds
            await asyncio.sleep(0)
    index = (await shop.store.range(prefix=b"user-orders/%d/" % ada.id)).records
    assert [int(record.key.rpartition(b"/")[2]) for record in index] == placed[::-1]


async def test_an_order_costs_one_round_trip(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    staff, ada = await shop.staff(), await shop.customer()
    await shop.stock(staff, "cup", 10)
    assert (await shop.order(ada, {"cup": 1})).status == 201
    calls: list[str] = []
    for name in ("txn", "get", "put", "range"):
        original = getattr(shop.store, name)

        async def counting(*args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
            calls.append(name)
            return await original(*args, **kwargs)

        monkeypatch.setattr(shop.store, name, counting)
    assert (await shop.order(ada, {"cup": 1})).status == 201
    assert calls == ["txn"]


async def test_demand_for_a_product_in_several_lines_is_summed(shop: Shop) -> None:
    staff, ada = await shop.staff(), await shop.customer()
    await shop.stock(staff, "cup", 5)
    lines = [{"sku": "cup", "quantity": 3}, {"sku": "cup", "quantity": 3}]
    answer = await shop.orders.post("/v1/orders", json={"lines": lines}, headers=ada.once())
    found = await problem(answer, 409, "insufficient_stock")
    assert [error["pointer"] for error in found["errors"]] == ["/lines/0/quantity", "/lines/1/quantity"]
    await untouched(shop, "cup", 5)
    lines[1]["quantity"] = 2
    answer = await shop.orders.post("/v1/orders", json={"lines": lines}, headers=ada.once())
    assert answer.status == 201
    assert [line["quantity"] for line in (await answer.json())["lines"]] == [5]
    assert await shop.on_hand("cup") == 0


async def test_where_one_product_is_short_nothing_is_taken(shop: Shop) -> None:
    staff, ada = await shop.staff(), await shop.customer()
    await shop.stock(staff, "cup", 5)
    await shop.stock(staff, "pot", 1)
    found = await problem(await shop.order(ada, {"cup": 2, "pot": 2}), 409, "insufficient_stock")
    assert [error["pointer"] for error in found["errors"]] == ["/lines/1/quantity"]
    assert "pot" in found["detail"]
    assert found["retryable"] is False
    await untouched(shop, "cup", 5)
    await untouched(shop, "pot", 1)


async def test_the_last_one_is_sold_once(shop: Shop) -> None:
    staff, ada = await shop.staff(), await shop.customer()
    await shop.stock(staff, "cup", 3)
    answers = await asyncio.gather(*(shop.order(ada, {"cup": 1}) for _ in range(12)))
    assert sorted(answer.status for answer in answers) == [201] * 3 + [409] * 9
    assert [await shop.on_hand("cup"), await shop.reserved("cup")] == [0, 3]
    assert len(await orders_in_store(shop)) == 3


async def test_a_product_without_stock(shop: Shop) -> None:
    staff, ada = await shop.staff(), await shop.customer()
    await shop.stock(staff, "cup", 0)
    await problem(await shop.order(ada, {"cup": 1}), 409, "insufficient_stock")


async def test_unknown_products(shop: Shop) -> None:
    staff, ada = await shop.staff(), await shop.customer()
    await shop.stock(staff, "cup", 5)
    found = await problem(await shop.order(ada, {"cap": 1, "cup": 1, "top": 1}), 422, "unknown_product")
    assert [error["pointer"] for error in found["errors"]] == ["/lines/0/sku", "/lines/2/sku"]
    await untouched(shop, "cup", 5)


async def test_a_price_that_changes_elsewhere_is_the_price(shop: Shop) -> None:
    """The cache of this process is stale; the transaction notices."""
    staff, ada = await shop.staff(), await shop.customer()
    await shop.stock(staff, "cup", 5, price=100)
    assert (await (await shop.order(ada, {"cup": 1})).json())["total"] == 100
    elsewhere = Shop(shop.store, with_users=False)
    async with elsewhere:
        await elsewhere.stock(staff, "cup", 0, price=250)
        await elsewhere.stock(staff, "new", 3, price=1)
    assert (await (await shop.order(ada, {"cup": 2})).json())["total"] == 500
    assert (await (await shop.order(ada, {"cup": 1, "new": 1})).json())["total"] == 251
    assert await shop.on_hand("cup") == 1


async def test_one_order_one_currency(shop: Shop) -> None:
    staff, ada = await shop.staff(), await shop.customer()
    await shop.stock(staff, "cup", 5, currency="EUR")
    await shop.stock(staff, "pot", 5, currency="USD")
    await problem(await shop.order(ada, {"cup": 1, "pot": 1}), 422, "mixed_currencies")
    await untouched(shop, "cup", 5)
    # Mended by another process: what this one had cached does not decide.
    async with Shop(shop.store, with_users=False) as elsewhere:
        await elsewhere.stock(staff, "pot", 0, currency="EUR")
    assert (await shop.order(ada, {"cup": 1, "pot": 1})).status == 201


async def test_a_total_that_no_number_holds(shop: Shop) -> None:
    staff, ada = await shop.staff(), await shop.customer()
    await shop.stock(staff, "sun", 1_000_000, price=10**12)
    await problem(await shop.order(ada, {"sun": 1_000_000}), 422, "total_too_large")
    await untouched(shop, "sun", 1_000_000)


async def test_a_taken_order_id_is_drawn_again(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    staff, ada = await shop.staff(), await shop.customer()
    await shop.stock(staff, "cup", 5)
    first = (await (await shop.order(ada, {"cup": 1})).json())["id"]
    fresh = Ids.next
    drawn = iter([first, first])
    monkeypatch.setattr(Ids, "next", lambda self: next(drawn, None) or fresh(self))
    answer = await shop.order(ada, {"cup": 1})
    assert answer.status == 201
    assert (await answer.json())["id"] != first
    assert len(await orders_in_store(shop)) == 2


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({}, ""),
        ({"lines": []}, "/lines"),
        ({"lines": [{"sku": "cup", "quantity": 0}]}, "/lines/0/quantity"),
        ({"lines": [{"sku": "cup", "quantity": -1}]}, "/lines/0/quantity"),
        ({"lines": [{"sku": "cup", "quantity": 1}, {"sku": "cup", "quantity": -1}]}, "/lines/1/quantity"),
        ({"lines": [{"sku": "cup", "quantity": 2**64}]}, "/lines/0/quantity"),
        ({"lines": [{"sku": "cup", "quantity": "1"}]}, "/lines/0/quantity"),
        ({"lines": [{"sku": "cup"}]}, "/lines/0/quantity"),
        ({"lines": [{"sku": "cup", "quantity": 1, "unit_price": 0}]}, "/lines/0/unit_price"),
        ({"lines": [{"sku": "../order/1", "quantity": 1}]}, "/lines/0/sku"),
        ({"lines": [{"sku": "cup", "quantity": 1}], "user_id": 1}, "/user_id"),
        ({"lines": [{"sku": "cup", "quantity": 1}], "total": 0}, "/total"),
    ],
)
async def test_bad_orders(shop: Shop, body: dict[str, Any], pointer: str) -> None:
    staff, ada = await shop.staff(), await shop.customer()
    await shop.stock(staff, "cup", 5)
    found = await problem(await shop.orders.post("/v1/orders", json=body, headers=ada.once()), 422, "invalid_body")
    assert [error["pointer"] for error in found["errors"]] == [pointer]
    await untouched(shop, "cup", 5)


@pytest.mark.parametrize(
    ("raw", "content_type", "status", "code"),
    [
        (b"", "application/json", 400, "malformed_json"),
        (b"{", "application/json", 400, "malformed_json"),
        (b"\x80\x04K\x01.", "application/json", 400, "malformed_json"),
        (b"lines=1", "application/x-www-form-urlencoded", 415, "unsupported_media_type"),
        (b"{}", "text/plain", 415, "unsupported_media_type"),
        (b'{"lines":"' + b"x" * 70_000 + b'"}', "application/json", 413, "body_too_large"),
    ],
)
async def test_what_is_no_body(shop: Shop, raw: bytes, content_type: str, status: int, code: str) -> None:
    ada = await shop.customer()
    answer = await shop.orders.post("/v1/orders", data=raw, headers={**ada.once(), "Content-Type": content_type})
    await problem(answer, status, code)


async def test_a_compressed_body_is_not_unpacked(shop: Shop) -> None:
    ada = await shop.customer()
    headers = {**ada.once(), "Content-Type": "application/json", "Content-Encoding": "gzip"}
    answer = await shop.orders.post("/v1/orders", data=gzip.compress(b"x" * 10_000_000), headers=headers)
    await problem(answer, 415, "unsupported_media_type")


# --- idempotency ------------------------------------------------------------------------------------------------------


async def test_an_order_needs_an_idempotency_key(shop: Shop) -> None:
    staff, ada = await shop.staff(), await shop.customer()
    await shop.stock(staff, "cup", 5)
    body = {"lines": [{"sku": "cup", "quantity": 1}]}
    answer = await shop.orders.post("/v1/orders", json=body, headers=ada.headers)
    await problem(answer, 400, "idempotency_key_required")
    for key in ("", "a b", "x" * 256, "\u00e9"):
        answer = await shop.orders.post("/v1/orders", json=body, headers={**ada.headers, "Idempotency-Key": key})
        await problem(answer, 400, "invalid_idempotency_key")
    await untouched(shop, "cup", 5)


async def test_a_repeated_order_is_answered_from_its_record(shop: Shop) -> None:
    staff, ada = await shop.staff(), await shop.customer()
    await shop.stock(staff, "cup", 5)
    first = await shop.order(ada, {"cup": 1}, "k")
    again = await shop.order(ada, {"cup": 1}, "k")
    assert (first.status, again.status) == (201, 201)
    assert await again.read() == await first.read()
    assert again.headers["Location"] == first.headers["Location"]
    assert again.headers["Idempotent-Replayed"] == "true"
    assert again.content_type == "application/json"
    assert await shop.on_hand("cup") == 4
    async with Shop(shop.store, with_users=False) as elsewhere:
        assert (await elsewhere.order(ada, {"cup": 1}, "k")).headers["Idempotent-Replayed"] == "true"
    assert await shop.on_hand("cup") == 4


async def test_the_same_key_with_another_body(shop: Shop) -> None:
    staff, ada = await shop.staff(), await shop.customer()
    await shop.stock(staff, "cup", 5)
    assert (await shop.order(ada, {"cup": 1}, "k")).status == 201
    await problem(await shop.order(ada, {"cup": 2}, "k"), 422, "idempotency_key_reused")
    # Also where that body would have been refused anyway.
    await problem(await shop.order(ada, {"cup": 100}, "k"), 422, "idempotency_key_reused")
    await problem(await shop.order(ada, {"cap": 1}, "k"), 422, "idempotency_key_reused")
    assert await shop.on_hand("cup") == 4


async def test_spacing_makes_no_other_body(shop: Shop) -> None:
    staff, ada = await shop.staff(), await shop.customer()
    await shop.stock(staff, "cup", 5)
    headers = {**ada.once("k"), "Content-Type": "application/json"}
    spellings = (b'{"lines":[{"sku":"cup","quantity":1}]}', b' {"lines": [{"quantity": 1, "sku": "cup"}]}\n')
    answers = [await shop.orders.post("/v1/orders", data=raw, headers=headers) for raw in spellings]
    assert [answer.status for answer in answers] == [201, 201]
    assert await shop.on_hand("cup") == 4


async def test_a_keys_scope_is_the_caller_and_the_path(shop: Shop) -> None:
    staff, ada = await shop.staff(), await shop.customer()
    await shop.stock(staff, "cup", 5)
    assert (await shop.order(ada, {"cup": 1}, "k")).status == 201
    other = await shop.order(staff, {"cup": 1}, "k")
    assert other.status == 201
    assert "Idempotent-Replayed" not in other.headers
    body = {"delta": 1, "reason": "received"}
    answer = await shop.orders.post("/v1/products/cup/stock", json=body, headers=staff.once("k"))
    assert answer.status == 201
    assert "Idempotent-Replayed" not in answer.headers
    assert await shop.on_hand("cup") == 4


@pytest.mark.parametrize("same_process", [True, False])
async def test_of_one_key_many_times_at_once_there_is_one_order(shop: Shop, same_process: bool) -> None:
    staff, ada = await shop.staff(), await shop.customer()
    await shop.stock(staff, "cup", 50)
    async with Shop(shop.store, with_users=False) as elsewhere:
        shops = [shop, shop if same_process else elsewhere]
        answers = await asyncio.gather(*(shops[number % 2].order(ada, {"cup": 1}, "k") for number in range(16)))
        bodies = {await answer.read() for answer in answers}
    assert [answer.status for answer in answers] == [201] * 16
    assert len(bodies) == 1
    assert sum("Idempotent-Replayed" in answer.headers for answer in answers) == 15
    assert [await shop.on_hand("cup"), await shop.reserved("cup")] == [49, 1]
    assert len(await orders_in_store(shop)) == 1


async def test_a_refusal_that_was_answered_stays(shop: Shop) -> None:
    """Else a copy of the request, late on the network, would place an order that its buyer was told is not."""
    staff, ada = await shop.staff(), await shop.customer()
    await shop.stock(staff, "cup", 1)
    first = await shop.order(ada, {"cup": 2}, "k")
    await problem(first, 409, "insufficient_stock")
    await problem(await shop.order(ada, {"cap": 1}, "u"), 422, "unknown_product")
    await shop.stock(staff, "cup", 10)
    await shop.stock(staff, "cap", 10)
    again = await shop.order(ada, {"cup": 2}, "k")
    assert again.headers["Idempotent-Replayed"] == "true"
    assert await again.read() == await first.read()
    await problem(again, 409, "insufficient_stock")
    await problem(await shop.order(ada, {"cap": 1}, "u"), 422, "unknown_product")
    await untouched(shop, "cup", 11)
    assert (await shop.order(ada, {"cup": 2}, "new")).status == 201


# --- the store fails --------------------------------------------------------------------------------------------------


async def test_an_unavailable_store(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    staff, ada = await shop.staff(), await shop.customer()
    await shop.stock(staff, "cup", 5)
    assert (await shop.order(ada, {"cup": 1})).status == 201

    async def fail(*args: Any, **kwargs: Any) -> Any:
        raise kvstore.Unavailable("no leader", code="no_leader")

    monkeypatch.setattr(shop.store, "txn", fail)
    monkeypatch.setattr(shop.store, "get", fail)
    answer = await shop.order(ada, {"cup": 1})
    found = await problem(answer, 503, "store_unavailable")
    assert found["retryable"] is True
    assert answer.headers["Retry-After"] == "1"
    await problem(await shop.orders.get("/readyz"), 503, "store_unavailable")
    assert (await shop.orders.get("/livez")).status == 200


async def test_an_unknown_outcome_is_settled_by_the_same_key(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    staff, ada = await shop.staff(), await shop.customer()
    await shop.stock(staff, "cup", 5)
    assert (await shop.order(ada, {"cup": 1})).status == 201
    txn = shop.store.txn

    async def lose_the_answer(*args: Any, **kwargs: Any) -> Any:
        await txn(*args, **kwargs)
        monkeypatch.setattr(shop.store, "txn", txn)
        raise kvstore.OutcomeUnknown("the connection broke")

    monkeypatch.setattr(shop.store, "txn", lose_the_answer)
    answer = await shop.order(ada, {"cup": 1}, "k")
    found = await problem(answer, 503, "outcome_unknown")
    assert found["retryable"] is True
    assert answer.headers["Retry-After"] == "1"
    again = await shop.order(ada, {"cup": 1}, "k")
    assert again.status == 201
    assert again.headers["Idempotent-Replayed"] == "true"
    assert [await shop.on_hand("cup"), await shop.reserved("cup")] == [3, 2]


async def test_what_nobody_foresaw_is_ours(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    staff, ada = await shop.staff(), await shop.customer()
    await shop.stock(staff, "cup", 5)
    await shop.store.put(b"stock/cup/on_hand", b"many")
    answer = await shop.order(ada, {"cup": 1})
    found = await problem(answer, 500, "internal")
    assert "number" not in found["detail"]


# --- who reads --------------------------------------------------------------------------------------------------------


async def placed(shop: Shop) -> tuple[Person, int]:
    staff, ada = await shop.staff(), await shop.customer()
    await shop.stock(staff, "cup", 5)
    return ada, (await (await shop.order(ada, {"cup": 1})).json())["id"]


async def test_another_users_order_is_not_there(shop: Shop) -> None:
    ada, order_id = await placed(shop)
    bob = await shop.customer()
    assert (await shop.orders.get(f"/order/{order_id}", headers=ada.headers)).status == 200
    for path in ("/order", "/v1/orders"):
        bodies = []
        for guess in (order_id, order_id + 1, order_id - 1):
            body = await problem(await shop.orders.get(f"{path}/{guess}", headers=bob.headers), 404, "not_found")
            bodies.append({key: value for key, value in body.items() if key not in ("request_id", "instance")})
        assert bodies[0] == bodies[1] == bodies[2]
        await problem(await shop.orders.get(f"{path}/{order_id}"), 401, "authentication_required")


@pytest.mark.parametrize("guess", ["0", "-1", "x", "1e5", "0x10", str(2**53), "9" * 400, "1%2F..%2F2", "%00"])
async def test_what_is_no_order_id(shop: Shop, guess: str) -> None:
    staff = await shop.staff()
    for path in ("/order", "/v1/orders"):
        answer = await shop.orders.get(URL(f"{path}/{guess}", encoded=True), headers=staff.headers)
        assert answer.status == 404
        assert (await answer.json(content_type=None))["code"] == "not_found"


async def test_a_stale_token_places_and_reads_nothing(shop: Shop) -> None:
    ada, order_id = await placed(shop)
    current = await shop.store.get(b"signing-key-current")
    assert current is not None
    keys = await shop.store.get(b"signing-key/" + current.value)
    assert keys is not None
    now = int(time.time())
    stale = jwt.encode(
        {"iss": ISSUER, "aud": AUDIENCE, "sub": str(ada.id), "role": "customer", "iat": now - 700, "exp": now - 100},
        base64.b64decode(json.loads(keys.value)["secret"]),
        ALGORITHM,
        headers={"kid": current.value.decode()},
    )
    old = Person(ada.id, ada.email, stale)
    await problem(await shop.order(old, {"cup": 1}), 401, "token_expired")
    await problem(await shop.orders.get(f"/order/{order_id}", headers=old.headers), 401, "token_expired")
    assert await shop.on_hand("cup") == 4


# --- the application --------------------------------------------------------------------------------------------------


async def test_the_application_does_not_own_the_store(store: kvstore.Client) -> None:
    client: TestClient[Any, Any] = TestClient(TestServer(create_app(store)))
    async with client:
        assert (await client.get("/readyz")).status == 200
    assert await store.get(b"ready") is None
