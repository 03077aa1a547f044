"""Lists of products: every filter, every index, and the bound of a page."""

from __future__ import annotations

import random
from typing import Any

import pytest

import kvstore
from services.orders import search
from services.orders.products import product_operations, product_words, words_of
from services.orders.records import Product, on_hand_key
from services.orders.search import EXAMINED_MAX, ProductSearch, ProductsQuery
from tests.services.shop import Shop, problem


async def fill(store: kvstore.Client, *products: Product) -> None:
    for product in products:
        await store.txn(success=product_operations(product, None))


def product(sku: str, name: str = "A thing", price: int = 100, **fields: Any) -> Product:
    return Product(sku, name, price, fields.pop("currency", "EUR"), 1, created_ms=1, **fields)


async def skus(store: kvstore.Client, *, is_staff: bool = False, **conditions: Any) -> list[str]:
    """Of all pages, in their order."""
    searching, found, cursor = ProductSearch(store), [], None
    while True:
        query = ProductsQuery(**{"limit": 3, **conditions}, starting_after=cursor)
        page = await searching.page(query, is_staff=is_staff)
        found += [one.sku for one in page.data]
        assert len(page.data) <= query.limit
        assert page.has_more is (page.next_cursor is not None)
        if not page.has_more:
            return found
        assert page.next_cursor != cursor
        cursor = page.next_cursor


KITCHEN = (
    product("KIT-1", "Blue Cup", 500, category="kitchen"),
    product("KIT-2", "Red cup", 700, category="kitchen"),
    product("KIT-3", "Cupboard for cups", 9900, category="kitchen", currency="USD"),
    product("GAR-1", "Blue Spade", 1500, category="garden"),
    product("GAR-2", "Spade, old", 900, category="garden", is_active=False),
    product("x", "Café crème", 300),
)


@pytest.mark.parametrize(
    ("conditions", "wanted"),
    [
        ({}, ["GAR-1", "KIT-1", "KIT-2", "KIT-3", "x"]),
        ({"category": "kitchen"}, ["KIT-1", "KIT-2", "KIT-3"]),
        ({"category": "kit"}, []),
        ({"sku_prefix": "KIT-"}, ["KIT-1", "KIT-2", "KIT-3"]),
        ({"sku_prefix": "kit"}, []),
        ({"q": "blue"}, ["GAR-1", "KIT-1"]),
        ({"q": "BLUE cup"}, ["KIT-1"]),
        ({"q": "cup"}, ["KIT-1", "KIT-2", "KIT-3"]),  # KIT-3 once, though two of its words begin so
        ({"q": "cups"}, ["KIT-3"]),
        ({"q": "board"}, []),
        ({"q": "--"}, []),
        ({"q": "cafe"}, ["x"]),
        ({"q": "kit-2"}, ["KIT-2"]),
        ({"q": "kit red"}, ["KIT-2"]),
        ({"q": "b"}, ["GAR-1", "KIT-1"]),
        ({"q": "blue", "category": "garden"}, ["GAR-1"]),
        ({"q": "cup", "sku_prefix": "KIT-2"}, ["KIT-2"]),
        ({"category": "kitchen", "currency": "EUR"}, ["KIT-1", "KIT-2"]),
        ({"min_price": 500, "max_price": 700}, ["KIT-1", "KIT-2"]),
        ({"min_price": 701, "max_price": 700}, []),
        ({"in_stock": True}, ["KIT-1", "x"]),
        ({"in_stock": True, "q": "cup"}, ["KIT-1"]),
        ({"in_stock": False, "category": "kitchen"}, ["KIT-2", "KIT-3"]),
        ({"is_active": False}, []),
    ],
)
async def test_filters(store: kvstore.Client, conditions: dict[str, Any], wanted: list[str]) -> None:
    await fill(store, *KITCHEN)
    for sku, number in (("KIT-1", 3), ("KIT-2", 0), ("x", 1)):
        await store.put(on_hand_key(sku), b"%d" % number)
    assert await skus(store, **conditions) == wanted
    assert await skus(store, limit=1, **conditions) == wanted


async def test_staff_find_what_is_archived(store: kvstore.Client) -> None:
    await fill(store, *KITCHEN)
    assert await skus(store, is_staff=True, q="spade") == ["GAR-1", "GAR-2"]
    assert await skus(store, is_staff=True, is_active=False) == ["GAR-2"]
    assert await skus(store, is_staff=True, is_active=True, category="garden") == ["GAR-1"]


@pytest.mark.parametrize("seed", range(4))
async def test_every_query_finds_what_a_look_at_all_products_finds(
    store: kvstore.Client, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Against a plain filter over all of them, with batches and pages small enough to be many."""
    monkeypatch.setattr(search, "_BATCH_RECORDS", 4)
    monkeypatch.setattr(search, "EXAMINED_MAX", 10)
    chance = random.Random(seed)
    vocabulary = ("cup", "cups", "cupboard", "blue", "bluebell", "a", "ab", "abc", "7", "70")
    products = [
        product(
            f"{chance.choice('ab')}{number:02d}",
            " ".join(chance.choices(vocabulary, k=3)),
            chance.randint(1, 5),
            category=chance.choice(("", "one", "two")),
            currency=chance.choice(("EUR", "USD")),
            is_active=chance.random() < 0.8,
        )
        for number in range(40)
    ]
    in_stock = {one.sku for one in products if chance.random() < 0.5}
    await fill(store, *products)
    for sku in in_stock:
        await store.put(on_hand_key(sku), b"1")
    choices: dict[str, list[Any]] = {
        "q": ["cup", "blue", "a", "ab 7", "cup cupb", "b0 cup", "a1"],
        "category": ["one", "two"],
        "sku_prefix": ["a", "b1"],
        "currency": ["EUR"],
        "min_price": [2],
        "max_price": [4],
        "in_stock": [True, False],
    }
    for _ in range(30):
        conditions = {name: chance.choice(choices[name]) for name in chance.sample(list(choices), chance.randint(0, 4))}

        def matches(one: Product, conditions: dict[str, Any] = conditions) -> bool:
            words = product_words(one)
            return (
                one.is_active
                and all(any(word.startswith(each) for word in words) for each in words_of(conditions.get("q", "")))
                and conditions.get("category") in (None, one.category)
                and one.sku.startswith(conditions.get("sku_prefix", ""))
                and conditions.get("currency") in (None, one.currency)
                and conditions.get("min_price", 0) <= one.price <= conditions.get("max_price", 9)
                and conditions.get("in_stock") in (None, one.sku in in_stock)
            )

        found = await skus(store, **conditions)
        assert sorted(found) == sorted(one.sku for one in products if matches(one)), conditions
        if "q" not in conditions or "sku_prefix" in conditions:
            assert found == sorted(found)


async def test_a_page_looks_at_so_many_and_no_more(store: kvstore.Client) -> None:
    """Of many candidates one matches, the last: the first page is empty, and says where to go on."""
    many = [product(f"s{number:04d}", price=1, category="c") for number in range(EXAMINED_MAX + 10)]
    many.append(product("t", price=9, category="c"))
    for start in range(0, len(many), 100):
        await store.txn(success=[one for each in many[start : start + 100] for one in product_operations(each, None)])
    choices: tuple[dict[str, Any], ...] = ({}, {"category": "c"}, {"q": "thing"})
    for conditions in choices:
        query = ProductsQuery(limit=5, min_price=9, **conditions)
        first = await ProductSearch(store).page(query, is_staff=False)
        assert (first.data, first.has_more) == ([], True)
        query = ProductsQuery(limit=5, min_price=9, starting_after=first.next_cursor, **conditions)
        second = await ProductSearch(store).page(query, is_staff=False)
        assert ([one.sku for one in second.data], second.has_more) == (["t"], False)


async def test_an_index_entry_that_its_product_has_left_shows_nothing(store: kvstore.Client) -> None:
    """Between the read of the index and that of the record a product may change; here the entry just stays."""
    await fill(store, product("cup", "Blue cup", category="kitchen"))
    await store.put(b"product-category/garden/cup", b"")
    await store.put(b"product-word/red/cup", b"")
    await store.put(b"product-word/red/gone", b"")
    assert await skus(store, category="garden") == []
    assert await skus(store, q="red") == []


async def test_the_largest_products_fit_a_page(store: kvstore.Client) -> None:
    largest = [
        product(f"{number:064d}", "\U0001f600" * 200, description="\U0001f600" * 2000, category="c" * 64)
        for number in range(100)
    ]
    await fill(store, *largest)
    choices: tuple[dict[str, Any], ...] = ({}, {"category": "c" * 64}, {"in_stock": False})
    for conditions in choices:
        page = await ProductSearch(store).page(ProductsQuery(limit=100, **conditions), is_staff=False)
        assert [one.sku for one in page.data] == [one.sku for one in largest]
        assert page.has_more is False


async def test_lists_over_http(store: kvstore.Client) -> None:
    await fill(store, *KITCHEN)
    async with Shop(store, with_users=False) as shop:
        page: dict[str, str | int] = {"category": "kitchen", "limit": 2, "max_price": 9900}
        first = await (await shop.orders.get("/v1/products", params=page)).json()
        assert [one["sku"] for one in first["data"]] == ["KIT-1", "KIT-2"]
        assert set(first["data"][0]) == set(await (await shop.orders.get("/v1/products/KIT-1")).json())
        rest = {**page, "starting_after": first["next_cursor"]}
        second = await (await shop.orders.get("/v1/products", params=rest)).json()
        assert [one["sku"] for one in second["data"]] == ["KIT-3"]
        assert (second["has_more"], second["next_cursor"]) == (False, None)
        for parameter, value in (
            ("category", "Kitchen!"),
            ("q", ""),
            ("q", "x" * 101),
            ("sku_prefix", "-"),
            ("currency", "eur"),
            ("min_price", "-1"),
            ("max_price", "1.5"),
            ("in_stock", "maybe"),
            ("limit", "101"),
            ("starting_after", "!"),
            ("colour", "red"),
        ):
            answer = await shop.orders.get("/v1/products", params={parameter: value})
            found = await problem(answer, 400, "invalid_parameter")
            assert found["errors"][0]["pointer"] == f"/{parameter}"
