"""Carts over HTTP, and what placing an order from one builds on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import ClientResponse

import kvstore
from services.orders.carts import (
    CARTS_MAX,
    KEPT_S,
    Cart,
    CartLine,
    Carts,
    CartState,
    active_carts_of,
    cart_key,
    cart_operations,
    carts_of,
    decode_cart,
    read_cart,
)
from services.orders.records import LINES_MAX
from services.web.ids import Ids
from tests.services.shop import Person, Shop, problem


@pytest.fixture
async def shop(store: kvstore.Client) -> AsyncIterator[Shop]:
    async with Shop(store, with_users=False) as orders_only:
        yield orders_only


async def begin(shop: Shop, person: Person) -> str:
    """The path of a new cart."""
    answer = await shop.orders.post("/v1/carts", headers=person.once())
    assert answer.status == 201, await answer.text()
    return answer.headers["Location"]


async def put_line(
    shop: Shop, person: Person, path: str, sku: str, quantity: Any, if_match: str | None = None
) -> ClientResponse:
    headers = person.headers if if_match is None else {**person.headers, "If-Match": if_match}
    return await shop.orders.put(f"{path}/lines/{sku}", json={"quantity": quantity}, headers=headers)


async def fill(shop: Shop, person: Person, path: str, **lines: int) -> dict[str, Any]:
    for sku, quantity in lines.items():
        answer = await put_line(shop, person, path, sku, quantity)
        assert answer.status == 200, await answer.text()
    return await read(shop, person, path)


async def read(shop: Shop, person: Person, path: str) -> dict[str, Any]:
    answer = await shop.orders.get(path, headers=person.headers)
    assert answer.status == 200, await answer.text()
    cart: dict[str, Any] = await answer.json()
    return cart


async def archive(shop: Shop, staff: Person, sku: str) -> None:
    body = {"name": f"A {sku}", "price": 1, "currency": "EUR", "is_active": False}
    assert (await shop.orders.put(f"/v1/products/{sku}", json=body, headers=staff.headers)).status == 200


async def order_it(shop: Shop, person: Person, path: str, **more: Any) -> ClientResponse:
    body = {"cart_id": int(path.rpartition("/")[2]), **more}
    return await shop.orders.post("/v1/orders", json=body, headers=person.once())


async def ordered(shop: Shop, person: Person, path: str) -> int:
    """The order that the cart becomes."""
    answer = await order_it(shop, person, path)
    assert answer.status == 201, await answer.text()
    order_id: int = (await answer.json())["id"]
    return order_id


async def records(shop: Shop, person: Person) -> tuple[int, int, int]:
    """How many carts there are, of this person, and of this person active."""
    prefixes = (b"cart/", carts_of(person.id), active_carts_of(person.id))
    carts, own, active = [len((await shop.store.range(prefix=prefix)).records) for prefix in prefixes]
    return carts, own, active


# --- a cart's life ----------------------------------------------------------------------------------------------------


async def test_a_cart_is_begun_filled_changed_and_emptied(shop: Shop) -> None:
    staff, ada = await shop.staff(), await shop.customer()
    await shop.stock(staff, "cup", 5, price=1250)
    await shop.stock(staff, "pot", 1, price=4999)
    answer = await shop.orders.post("/v1/carts", headers=ada.once())
    assert answer.status == 201
    cart = await answer.json()
    path = answer.headers["Location"]
    assert path == f"/v1/carts/{cart['id']}"
    assert (cart["user_id"], cart["state"], cart["version"], cart["lines"], cart["total"]) == (
        ada.id,
        "active",
        1,
        [],
        0,
    )
    assert (cart["currency"], cart["can_be_ordered"], cart["order_id"]) == (None, False, None)
    assert await read(shop, ada, path) == cart

    answer = await put_line(shop, ada, path, "cup", 3)
    assert answer.status == 200
    cart = await answer.json()
    assert cart["version"] == 2
    assert cart["lines"] == [
        {
            "sku": "cup", "quantity": 3, "name": "A cup", "unit_price": 1250, "currency": "EUR", "total": 3750,
            "available": 5, "problem": None,
        }
    ]  # fmt: skip
    assert (cart["total"], cart["currency"], cart["can_be_ordered"]) == (3750, "EUR", True)
    tag = answer.headers["ETag"]
    again = await shop.orders.get(path, headers={**ada.headers, "If-None-Match": tag})
    assert (again.status, again.headers["ETag"]) == (200, tag)  # its prices are not the cart's

    cart = await fill(shop, ada, path, pot=1, cup=2)
    assert [(line["sku"], line["quantity"]) for line in cart["lines"]] == [("cup", 2), ("pot", 1)]
    assert (cart["version"], cart["total"]) == (4, 7499)
    assert cart["updated_at"] >= cart["created_at"]
    same = await put_line(shop, ada, path, "pot", 1)
    assert (await same.json())["version"] == 4  # nothing changed

    answer = await shop.orders.delete(f"{path}/lines/cup", headers=ada.headers)
    assert answer.status == 200
    assert [line["sku"] for line in (await answer.json())["lines"]] == ["pot"]
    await problem(await shop.orders.delete(f"{path}/lines/cup", headers=ada.headers), 404, "not_found")
    cart = await (await shop.orders.delete(f"{path}/lines/pot", headers=ada.headers)).json()
    assert (cart["version"], cart["lines"], cart["currency"]) == (6, [], None)

    assert (await shop.orders.delete(path, headers=ada.headers)).status == 204
    for answer in (
        await shop.orders.get(path, headers=ada.headers),
        await shop.orders.delete(path, headers=ada.headers),
        await put_line(shop, ada, path, "cup", 1),
    ):
        await problem(answer, 404, "not_found")
    assert await records(shop, ada) == (0, 0, 0)


async def test_a_cart_is_begun_once_per_key(shop: Shop) -> None:
    ada = await shop.customer()
    headers = ada.once()
    answers = await asyncio.gather(*(shop.orders.post("/v1/carts", headers=headers) for _ in range(5)))
    assert {answer.status for answer in answers} == {201}
    assert len({answer.headers["Location"] for answer in answers}) == 1
    assert sum("Idempotent-Replayed" in answer.headers for answer in answers) == 4
    assert await records(shop, ada) == (1, 1, 1)
    await problem(await shop.orders.post("/v1/carts", headers=ada.headers), 400, "idempotency_key_required")
    await problem(await shop.orders.post("/v1/carts"), 401, "authentication_required")


async def test_a_taken_cart_id_is_drawn_again(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    ada = await shop.customer()
    first = int((await begin(shop, ada)).rpartition("/")[2])
    fresh = Ids.next
    drawn = iter([first, first])
    monkeypatch.setattr(Ids, "next", lambda self: next(drawn, None) or fresh(self))
    assert await begin(shop, ada) != f"/v1/carts/{first}"
    assert await records(shop, ada) == (2, 2, 2)


async def test_another_users_cart_is_not_there(shop: Shop) -> None:
    staff, ada, bob = await shop.staff(), await shop.customer(), await shop.customer()
    await shop.stock(staff, "cup", 5)
    path = await begin(shop, ada)
    cart = await fill(shop, ada, path, cup=1)
    for person in (bob, staff):
        for answer in (
            await put_line(shop, person, path, "cup", 2),
            await shop.orders.delete(f"{path}/lines/cup", headers=person.headers),
            await shop.orders.delete(path, headers=person.headers),
        ):
            await problem(answer, 404, "not_found")
    await problem(await shop.orders.get(path, headers=bob.headers), 404, "not_found")
    await problem(await shop.orders.get(path), 401, "authentication_required")
    assert await read(shop, staff, path) == cart
    assert (await (await shop.orders.get("/v1/carts", headers=bob.headers)).json())["data"] == []
    for unknown in ("0", "x", "99999999999999999999", "1"):
        await problem(await shop.orders.get(f"/v1/carts/{unknown}", headers=ada.headers), 404, "not_found")


# --- what a line may be -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantity", [0, -1, 1_000_001, "1", 1.5, None])
async def test_bad_quantities(shop: Shop, quantity: Any) -> None:
    staff, ada = await shop.staff(), await shop.customer()
    await shop.stock(staff, "cup", 5)
    path = await begin(shop, ada)
    found = await problem(await put_line(shop, ada, path, "cup", quantity), 422, "invalid_body")
    assert [error["pointer"] for error in found["errors"]] == ["/quantity"]
    assert (await read(shop, ada, path))["version"] == 1


async def test_products_that_cannot_be_put_into_a_cart(shop: Shop) -> None:
    staff, ada = await shop.staff(), await shop.customer()
    await shop.stock(staff, "cup", 5)
    await shop.stock(staff, "dollar", 5, currency="USD")
    await shop.stock(staff, "old", 5)
    await archive(shop, staff, "old")
    path = await begin(shop, ada)
    before = await fill(shop, ada, path, cup=1)
    await problem(await put_line(shop, ada, path, "nothing", 1), 404, "not_found")
    await problem(await put_line(shop, ada, path, "a%00b", 1), 404, "not_found")
    await problem(await put_line(shop, ada, path, "old", 1), 409, "product_unavailable")
    await problem(await put_line(shop, ada, path, "dollar", 1), 422, "mixed_currencies")
    assert await read(shop, ada, path) == before
    # Once nothing else is in it, the cart takes the other currency.
    await shop.orders.delete(f"{path}/lines/cup", headers=ada.headers)
    assert (await fill(shop, ada, path, dollar=2))["currency"] == "USD"


async def test_lines_show_what_keeps_them_from_being_ordered(shop: Shop) -> None:
    staff, ada = await shop.staff(), await shop.customer()
    for sku, price in (("cup", 100), ("few", 200), ("old", 300), ("dear", 400), ("dollar", 500)):
        await shop.stock(staff, sku, 5, price=price)
    path = await begin(shop, ada)
    assert (await fill(shop, ada, path, cup=1, few=6, old=1, dear=1, dollar=1))["can_be_ordered"] is False
    await archive(shop, staff, "old")
    await shop.stock(staff, "dear", 0, price=401)
    await shop.stock(staff, "dollar", 0, price=500, currency="USD")
    cart = await read(shop, ada, path)
    assert [(line["sku"], line["unit_price"], line["total"], line["problem"]) for line in cart["lines"]] == [
        ("cup", 100, 100, None),
        ("few", 200, 1200, "insufficient_stock"),
        ("old", None, None, "product_unavailable"),
        ("dear", 401, 401, None),
        ("dollar", 500, None, "mixed_currencies"),
    ]
    assert (cart["total"], cart["can_be_ordered"]) == (1701, False)
    for sku in ("few", "old", "dollar"):
        answer = await shop.orders.delete(f"{path}/lines/{sku}", headers=ada.headers)
    assert (await answer.json())["can_be_ordered"] is True


async def test_totals_that_no_number_holds(shop: Shop) -> None:
    staff, ada = await shop.staff(), await shop.customer()
    for number in range(11):
        await shop.stock(staff, f"sun{number}", 1000, price=10**12)
    path = await begin(shop, ada)
    cart = await fill(shop, ada, path, sun0=1_000_000)
    assert (cart["lines"][0]["problem"], cart["lines"][0]["total"], cart["total"]) == ("total_too_large", None, None)
    cart = await fill(shop, ada, path, **{f"sun{number}": 900 for number in range(11)})
    assert {line["problem"] for line in cart["lines"]} == {None}
    assert (cart["total"], cart["can_be_ordered"]) == (None, False)


async def test_a_cart_has_room_for_so_many_lines(shop: Shop) -> None:
    staff, ada = await shop.staff(), await shop.customer()
    await shop.stock(staff, "cup", 5)
    await shop.stock(staff, "one-more", 5)
    path = await begin(shop, ada)
    await fill(shop, ada, path, cup=1)
    stored = await read_cart(shop.store, ada.id, int(path.rpartition("/")[2]))
    lines = (*stored.cart.lines, *(CartLine(f"s{number}", 1) for number in range(LINES_MAX - 1)))
    full = Cart(stored.cart.id, ada.id, CartState.ACTIVE, 2, lines, 1, 1, currency="EUR")
    await shop.store.txn(success=cart_operations(full, await Carts(shop.store).lease()))
    await problem(await put_line(shop, ada, path, "one-more", 1), 409, "too_many_lines")
    assert len((await fill(shop, ada, path, cup=2))["lines"]) == LINES_MAX


# --- at the same time -------------------------------------------------------------------------------------------------


async def test_changes_at_once_are_all_there(shop: Shop) -> None:
    staff, ada = await shop.staff(), await shop.customer()
    skus = [f"s{number}" for number in range(6)]
    for sku in skus:
        await shop.stock(staff, sku, 9)
    path = await begin(shop, ada)
    async with Shop(shop.store, with_users=False) as elsewhere:
        answers = await asyncio.gather(
            *(put_line(shop if number % 2 else elsewhere, ada, path, sku, 1) for number, sku in enumerate(skus))
        )
    assert {answer.status for answer in answers} == {200}
    assert len({answer.headers["ETag"] for answer in answers}) == len(skus)
    cart = await read(shop, ada, path)
    assert sorted(line["sku"] for line in cart["lines"]) == skus
    assert cart["version"] == 1 + len(skus)


async def test_a_change_of_what_was_read(shop: Shop) -> None:
    staff, ada = await shop.staff(), await shop.customer()
    await shop.stock(staff, "cup", 9)
    path = await begin(shop, ada)
    tag = (await shop.orders.get(path, headers=ada.headers)).headers["ETag"]
    answers = await asyncio.gather(*(put_line(shop, ada, path, "cup", number, tag) for number in range(1, 6)))
    assert sorted(answer.status for answer in answers) == [200, 412, 412, 412, 412]
    assert (await read(shop, ada, path))["version"] == 2
    headers = {**ada.headers, "If-Match": tag}
    for stale in (f"{path}/lines/cup", path):
        await problem(await shop.orders.delete(stale, headers=headers), 412, "precondition_failed")
    await problem(await put_line(shop, ada, path, "cup", 1, "x"), 400, "malformed_request")
    newer = (await shop.orders.get(path, headers=ada.headers)).headers["ETag"]
    assert (await shop.orders.delete(path, headers={**ada.headers, "If-Match": newer})).status == 204


async def test_active_carts_are_bounded_also_when_begun_at_once(shop: Shop) -> None:
    ada, bob = await shop.customer(), await shop.customer()
    await shop.stock(await shop.staff(), "cup", 9)
    paths = [await begin(shop, ada) for _ in range(CARTS_MAX - 2)]
    answers = await asyncio.gather(*(shop.orders.post("/v1/carts", headers=ada.once()) for _ in range(5)))
    assert sorted(answer.status for answer in answers) == [201, 201, 409, 409, 409]
    headers = ada.once()
    await problem(await shop.orders.post("/v1/carts", headers=headers), 409, "too_many_carts")
    await begin(shop, bob)
    # One that was ordered takes no room; what was answered stays answered.
    await fill(shop, ada, paths[0], cup=1)
    await ordered(shop, ada, paths[0])
    await problem(await shop.orders.post("/v1/carts", headers=headers), 409, "too_many_carts")
    await begin(shop, ada)
    assert (await shop.orders.delete(paths[1], headers=ada.headers)).status == 204
    await begin(shop, ada)
    await problem(await shop.orders.post("/v1/carts", headers=ada.once()), 409, "too_many_carts")
    assert (await records(shop, ada))[1:] == (CARTS_MAX + 1, CARTS_MAX)


# --- lists, orders, the end -------------------------------------------------------------------------------------------


async def test_ones_carts_are_listed_newest_first(shop: Shop) -> None:
    staff, ada, bob = await shop.staff(), await shop.customer(), await shop.customer()
    await shop.stock(staff, "cup", 9)
    paths = [await begin(shop, ada) for _ in range(3)]
    await begin(shop, bob)
    await fill(shop, ada, paths[1], cup=2)
    order_id = await ordered(shop, ada, paths[1])
    first = await (await shop.orders.get("/v1/carts", params={"limit": 2}, headers=ada.headers)).json()
    assert [f"/v1/carts/{cart['id']}" for cart in first["data"]] == paths[:0:-1]
    shown = first["data"][1]
    assert (shown["state"], shown["order_id"], shown["line_count"]) == ("ordered", order_id, 1)
    rest = {"limit": 2, "starting_after": first["next_cursor"]}
    second = await (await shop.orders.get("/v1/carts", params=rest, headers=ada.headers)).json()
    assert [f"/v1/carts/{cart['id']}" for cart in second["data"]] == paths[:1]
    assert second["has_more"] is False


async def test_an_ordered_cart_stays_as_it_is(shop: Shop) -> None:
    staff, ada = await shop.staff(), await shop.customer()
    await shop.stock(staff, "cup", 9)
    path = await begin(shop, ada)
    await fill(shop, ada, path, cup=2)
    order_id = await ordered(shop, ada, path)
    cart = await read(shop, ada, path)
    assert (cart["state"], cart["order_id"], cart["version"], cart["can_be_ordered"]) == ("ordered", order_id, 3, False)
    for answer in (
        await put_line(shop, ada, path, "cup", 1),
        await shop.orders.delete(f"{path}/lines/cup", headers=ada.headers),
        await shop.orders.delete(path, headers=ada.headers),
        await order_it(shop, ada, path),
    ):
        found = await problem(answer, 409, "cart_ordered")
        assert str(order_id) in found["detail"]
    assert await read(shop, ada, path) == cart


async def test_a_cart_becomes_one_order(shop: Shop) -> None:
    staff, ada = await shop.staff(), await shop.customer()
    await shop.stock(staff, "cup", 9)
    path = await begin(shop, ada)
    await fill(shop, ada, path, cup=2)
    async with Shop(shop.store, with_users=False) as elsewhere:
        answers = await asyncio.gather(*(order_it(shop if n % 2 else elsewhere, ada, path) for n in range(6)))
    assert sorted(answer.status for answer in answers) == [201] + [409] * 5
    assert [await shop.on_hand("cup"), await shop.reserved("cup")] == [7, 2]


@pytest.mark.parametrize("first", ["order", "change"])
async def test_a_cart_that_changes_while_it_is_ordered(shop: Shop, first: str) -> None:
    """Whoever comes first: an order has what the cart showed in the end, to the last line."""
    staff, ada = await shop.staff(), await shop.customer()
    await shop.stock(staff, "cup", 100)
    for _ in range(5):
        path = await begin(shop, ada)
        await fill(shop, ada, path, cup=1)
        both = [order_it(shop, ada, path), put_line(shop, ada, path, "cup", 2)]
        answers = await asyncio.gather(*(both if first == "order" else reversed(both)))
        placed, changed = answers if first == "order" else reversed(answers)
        assert placed.status == 201
        (line,) = (await placed.json())["lines"]
        assert changed.status == (200 if line["quantity"] == 2 else 409)
        assert [one["quantity"] for one in (await read(shop, ada, path))["lines"]] == [line["quantity"]]


async def test_a_cart_with_a_problem_is_not_ordered(shop: Shop) -> None:
    staff, ada, bob = await shop.staff(), await shop.customer(), await shop.customer()
    await shop.stock(staff, "cup", 1)
    await shop.stock(staff, "old", 5)
    path = await begin(shop, ada)
    cart = await fill(shop, ada, path, cup=1, old=1)
    await problem(await order_it(shop, bob, path), 404, "not_found")
    await problem(await order_it(shop, ada, path, cart_version=cart["version"] - 1), 409, "cart_changed")
    await archive(shop, staff, "old")
    await problem(await order_it(shop, ada, path), 409, "product_unavailable")
    assert (await shop.orders.delete(f"{path}/lines/old", headers=ada.headers)).status == 200
    assert (await fill(shop, ada, path, cup=2))["can_be_ordered"] is False
    await problem(await order_it(shop, ada, path), 409, "insufficient_stock")
    assert (await read(shop, ada, path))["state"] == "active"
    assert [await shop.on_hand("cup"), await shop.reserved("cup")] == [1, 0]
    assert (await fill(shop, ada, path, cup=1))["can_be_ordered"] is True
    await ordered(shop, ada, path)


async def test_a_cart_and_its_places_in_lists_end_together(shop: Shop) -> None:
    """With their lease, thirty days after the last change; here the lease is ended by hand."""
    staff, ada = await shop.staff(), await shop.customer()
    await shop.stock(staff, "cup", 9)
    path = await begin(shop, ada)
    async with Shop(shop.store, with_users=False) as elsewhere:
        await fill(elsewhere, ada, path, cup=1)  # another process, and so another lease
    record = await shop.store.get(cart_key(int(path.rpartition("/")[2])))
    assert record is not None
    assert decode_cart(record.value).lines == (CartLine("cup", 1),)
    status = await shop.store.lease_status(record.lease)
    assert status.remaining_ms >= KEPT_S * 1000
    assert status.key_count == 3
    await shop.store.revoke_lease(record.lease)
    assert await records(shop, ada) == (0, 0, 0)
    await problem(await shop.orders.get(path, headers=ada.headers), 404, "not_found")
