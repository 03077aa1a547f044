"""Products: their indexes, archiving, adjustments of stock."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest

import kvstore
from services.orders.catalogue import Catalogue
from services.orders.products import (
    WORD_CHARS_MAX,
    WORDS_MAX,
    product_operations,
    product_words,
    words_of,
)
from services.orders.records import PRODUCTS, Product, decode_product, product_key
from tests.services.indexes import check_indexes
from tests.services.shop import Person, Shop, problem


@pytest.fixture
async def shop(store: kvstore.Client) -> AsyncIterator[Shop]:
    async with Shop(store, with_users=False) as orders_only:
        yield orders_only


CUP = {"name": "A cup", "price": 1250, "currency": "EUR"}


async def put(shop: Shop, staff: Person, sku: str, **fields: Any) -> dict[str, Any]:
    answer = await shop.orders.put(f"/v1/products/{sku}", json={**CUP, **fields}, headers=staff.headers)
    assert answer.status in (200, 201), await answer.text()
    product: dict[str, Any] = await answer.json()
    return product


# --- words ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A cup", ("a", "cup")),
        ("Café-Crème, 250 ml", ("cafe", "creme", "250", "ml")),
        ("STRASSE Straße", ("strasse",)),
        ("snake_case 1.5l", ("snake", "case", "1", "5l")),
        ("ＷＩＤＥ", ("wide",)),
        ("—…!", ()),
        ("x" * 50, ("x" * WORD_CHARS_MAX,)),
    ],
)
def test_words(text: str, words: tuple[str, ...]) -> None:
    assert words_of(text) == words


def test_words_of_a_product_are_bounded() -> None:
    name = " ".join(chr(ord("a") + n // 10) + str(n % 10) for n in range(70))
    sku = ".".join("abcdefghijklmnopqrstuvwxyz012345")
    words = product_words(Product(sku, name[:200], 1, "EUR", 1))
    assert len(words) == WORDS_MAX
    assert set("abcdefghijklmnopqrstuvwxyz012345") <= set(words)  # the sku's come first


# --- putting ----------------------------------------------------------------------------------------------------------


async def test_a_product_with_all_its_fields(shop: Shop) -> None:
    staff = await shop.staff()
    fields = {"description": "Holds tea.\nAlso coffee.", "category": "kitchen", "is_active": True}
    product = await put(shop, staff, "cup", **fields)
    assert {name: product[name] for name in fields} == fields
    later = await put(shop, staff, "cup", name="A mug")
    assert (later["name"], later["description"], later["category"]) == ("A mug", "", "")  # replaced, not merged
    assert later["created_at"] == product["created_at"]
    assert later["updated_at"] >= product["updated_at"]


@pytest.mark.parametrize(
    ("change", "pointer"),
    [
        ({"description": "x" * 2001}, "/description"),
        ({"description": "a\tb"}, "/description"),
        ({"category": "Kitchen"}, "/category"),
        ({"category": "a--b"}, "/category"),
        ({"category": "a" * 65}, "/category"),
        ({"category": None}, "/category"),
        ({"is_active": "yes"}, "/is_active"),
        ({"created_ms": 1}, "/created_ms"),
        ({"price": -1}, "/price"),
    ],
)
async def test_bad_products(shop: Shop, change: dict[str, Any], pointer: str) -> None:
    staff = await shop.staff()
    answer = await shop.orders.put("/v1/products/cup", json={**CUP, **change}, headers=staff.headers)
    found = await problem(answer, 422, "invalid_body")
    assert [error["pointer"] for error in found["errors"]] == [pointer]
    assert (await shop.store.range(prefix=b"product")).records == ()


async def test_indexes_change_with_their_product(shop: Shop) -> None:
    staff = await shop.staff()
    await put(shop, staff, "cup-1", name="Blue cup", category="kitchen")
    assert [record.key for record in (await shop.store.range(prefix=b"product-")).records] == [
        b"product-category/kitchen/cup-1",
        b"product-word/1/cup-1",
        b"product-word/blue/cup-1",
        b"product-word/cup/cup-1",
    ]
    await put(shop, staff, "cup-1", name="Red cup", category="table")
    assert [record.key for record in (await shop.store.range(prefix=b"product-")).records] == [
        b"product-category/table/cup-1",
        b"product-word/1/cup-1",
        b"product-word/cup/cup-1",
        b"product-word/red/cup-1",
    ]
    await put(shop, staff, "cup-1", name="Red cup", category="")
    assert await check_indexes(shop.store) == 3


async def test_a_refused_change_leaves_the_indexes_as_they_were(shop: Shop) -> None:
    staff = await shop.staff()
    await put(shop, staff, "cup", name="Blue cup")
    headers = {**staff.headers, "If-Match": '"1"'}
    answer = await shop.orders.put("/v1/products/cup", json={**CUP, "name": "Red cup"}, headers=headers)
    await problem(answer, 412, "precondition_failed")
    assert await check_indexes(shop.store) == 2
    assert (await shop.store.get(b"product-word/blue/cup")) is not None


async def test_a_product_from_before_there_were_indexes(shop: Shop) -> None:
    """Its record has none of the newer fields; it is shown, and its next change puts it into the indexes."""
    staff = await shop.staff()
    old = {"v": 1, "sku": "cup", "name": "Old cup", "price": 5, "currency": "EUR", "updated_ms": 1_750_000_000_000}
    await shop.store.put(product_key("cup"), json.dumps(old).encode())
    shown = await (await shop.orders.get("/v1/products/cup")).json()
    assert (shown["is_active"], shown["category"], shown["created_at"]) == (True, "", "2025-06-15T15:06:40.000Z")
    assert [one["sku"] for one in (await (await shop.orders.get("/v1/products")).json())["data"]] == ["cup"]
    same = await put(shop, staff, "cup", name="Old cup", price=5)
    assert same["created_at"] == shown["created_at"]
    assert await check_indexes(shop.store) == 2


@pytest.mark.parametrize("seed", range(3))
async def test_the_indexes_hold_whoever_writes_at_the_same_time(store: kvstore.Client, seed: int) -> None:
    """Writers with caches of their own change the same few products at random."""
    chance = random.Random(seed)
    names = ("blue", "red", "cup", "mug", "big", "BIG", "Bïg", "small-cup")
    conflicts = 0

    async def write(catalogue: Catalogue, times: int) -> None:
        nonlocal conflicts
        for _ in range(times):
            name = " ".join(chance.sample(names, chance.randint(1, 4)))
            category = chance.choice(("", "kitchen", "table"))
            product = Product(chance.choice(("a", "b-1")), name, 1, "EUR", 2, category=category, created_ms=2)
            checks = 0

            def check(revision: int) -> None:
                nonlocal checks
                checks += 1

            await catalogue.put(product, check)
            conflicts += checks - 1

    await asyncio.gather(*(write(Catalogue(store), 15) for _ in range(4)))
    assert await check_indexes(store) > 2
    assert conflicts > 0  # or this test shows nothing
    products = [decode_product(record.value) for record in (await store.range(prefix=PRODUCTS)).records]
    assert sorted(product.sku for product in products) == ["a", "b-1"]


def test_a_change_writes_only_what_it_changes() -> None:
    before = Product("cup", "Blue cup", 1, "EUR", 1, category="kitchen", created_ms=1)
    same = product_operations(Product("cup", "Blue cup", 2, "EUR", 2, category="kitchen", created_ms=1), before)
    assert len(same) == 1
    moved = product_operations(Product("cup", "Red cup", 2, "EUR", 2, category="kitchen", created_ms=1), before)
    assert moved[1:] == [kvstore.Put(b"product-word/red/cup", b""), kvstore.Delete(b"product-word/blue/cup")]


# --- archived products ------------------------------------------------------------------------------------------------


async def test_an_archived_product_is_there_for_staff_only(shop: Shop) -> None:
    staff, ada = await shop.staff(), await shop.customer()
    await shop.stock(staff, "cup", 5)
    await put(shop, staff, "cup", is_active=False)
    for path in ("/v1/products/cup", "/v1/products/cup/stock"):
        for headers in ({}, ada.headers):
            await problem(await shop.orders.get(path, headers=headers), 404, "not_found")
        assert (await shop.orders.get(path, headers=staff.headers)).status == 200
    assert (await (await shop.orders.get("/v1/products", headers=ada.headers)).json())["data"] == []
    listed = (await (await shop.orders.get("/v1/products", headers=staff.headers)).json())["data"]
    assert [(one["sku"], one["is_active"]) for one in listed] == [("cup", False)]
    await put(shop, staff, "cup", is_active=True)
    assert (await shop.orders.get("/v1/products/cup")).status == 200


# --- adjustments ------------------------------------------------------------------------------------------------------


async def test_adjustments_are_listed_newest_first(shop: Shop) -> None:
    staff, ada = await shop.staff(), await shop.customer()
    await put(shop, staff, "cup")
    path = "/v1/products/cup/stock/adjustments"
    empty = await (await shop.orders.get(path, headers=staff.headers)).json()
    assert empty == {"data": [], "has_more": False, "next_cursor": None}
    made = []
    for delta, reason in ((10, "delivery"), (-2, "broken"), (3, "found again")):
        body = {"delta": delta, "reason": reason}
        answer = await shop.orders.post("/v1/products/cup/stock", json=body, headers=staff.once())
        made.append(await answer.json())
    first = await (await shop.orders.get(path, params={"limit": 2}, headers=staff.headers)).json()
    assert first["data"] == made[:0:-1]
    rest = {"limit": 2, "starting_after": first["next_cursor"]}
    second = await (await shop.orders.get(path, params=rest, headers=staff.headers)).json()
    assert second == {"data": made[:1], "has_more": False, "next_cursor": None}

    await problem(await shop.orders.get(path, headers=ada.headers), 403, "forbidden")
    await problem(await shop.orders.get(path), 401, "authentication_required")
    unknown = await shop.orders.get("/v1/products/cap/stock/adjustments", headers=staff.headers)
    await problem(unknown, 404, "not_found")
