"""What `python -m services seed` makes, and that it may be run again, interrupted, and twice at once."""

from __future__ import annotations

import asyncio
import collections
import json
from pathlib import Path

import msgspec
import pytest

import kvstore
from services.orders.products import index_keys
from services.orders.records import decode_adjustment, decode_product, product_key
from services.seed.assortment import CATEGORIES
from services.seed.load import can_sign_in, load_products, load_users
from services.seed.people import user
from services.seed.products import product
from services.users.postal import check_country
from services.users.records import EMAILS, NEWEST, ROLES
from services.web.problems import Problem
from tests.cluster.harness import ClusterProcesses
from tests.services.indexes import check_indexes
from tests.services.processes import command
from tests.services.shop import Shop

PASSWORD = "walk-the-shop-42"


def ignore(count: int) -> None:
    """A progress bar that nobody looks at."""


async def keys(store: kvstore.Client, prefix: bytes) -> list[bytes]:
    return [record.key async for record in store.scan(prefix=prefix, keys_only=True)]


async def check_stock(store: kvstore.Client) -> None:
    """What is on hand is what the adjustments say, for every product."""
    levels: dict[str, int] = collections.defaultdict(int)
    async for record in store.scan(prefix=b"stock/"):
        if b"/adjustment/" in record.key:
            adjustment = decode_adjustment(record.value)
            levels[adjustment.sku] += adjustment.delta
            assert adjustment.reason
    held = [record async for record in store.scan(prefix=b"stock/") if record.key.endswith(b"/on_hand")]
    assert {record.key.split(b"/")[1].decode(): int(record.value) for record in held} == levels


# --- what is made -----------------------------------------------------------------------------------------------------


def test_the_same_seed_makes_the_same_shop() -> None:
    assert [product(7, number) for number in (1, 26, 4999)] == [product(7, number) for number in (1, 26, 4999)]
    assert user(7, 3, PASSWORD) == user(7, 3, PASSWORD)
    assert product(7, 1) != product(8, 1)
    assert user(7, 3, PASSWORD) != user(8, 3, PASSWORD)


def test_a_whole_catalogue() -> None:
    products = [product(1, number) for number in range(1, 5001)]
    assert len({each.sku for each in products}) == len({each.product.name for each in products}) == 5000
    per_category = collections.Counter(each.product.category for each in products)
    assert len(per_category) == len(CATEGORIES) == 25
    assert set(per_category.values()) == {200}
    for each in products:
        level = 0
        for delta, reason in each.stock:
            level += delta
            assert reason
            assert level >= 0, each
        assert each.product.price >= 100
        assert each.product.description
    assert any(not each.stock for each in products)
    assert any(not each.product.is_active for each in products)


def test_a_town_of_people() -> None:
    people = [user(1, number, PASSWORD) for number in range(1, 2001)]
    assert len({each.account.email for each in people}) == 2000
    assert all(each.account.email.isascii() for each in people)
    assert {len(each.addresses) for each in people} == {1, 2, 3}
    assert len({address.country for each in people for address in each.addresses}) == 8
    for each in people:
        for address in each.addresses:
            check_country(address)


# --- loading it -------------------------------------------------------------------------------------------------------


async def test_products_are_as_the_service_would_have_written_them(store: kvstore.Client) -> None:
    told: list[int] = []
    loading = await load_products(store, 1, 100, told.append)
    assert (loading.created, loading.existing, sum(told)) == (100, 0, 100)
    await check_indexes(store)
    await check_stock(store)
    wanted = product(1, 3)
    record = await store.get(product_key(wanted.sku))
    assert record is not None
    loaded = decode_product(record.value)
    async with Shop(store, with_users=False) as shop:
        staff = await shop.staff()
        body = msgspec.structs.asdict(wanted.product)
        answer = await shop.orders.put(f"/v1/products/{wanted.sku}", json=body, headers=staff.headers)
        assert answer.status == 200  # it was there
        again = await store.get(product_key(wanted.sku))
        assert again is not None
        served = decode_product(again.value)
        assert index_keys(served) == index_keys(loaded)
        assert (served.name, served.price, served.category) == (loaded.name, loaded.price, loaded.category)
        assert served.created_ms == loaded.created_ms
        path = f"/v1/products/{wanted.sku}/stock/adjustments"
        listed = (await (await shop.orders.get(path, headers=staff.headers)).json())["data"]
        assert [(one["delta"], one["reason"]) for one in listed] == list(wanted.stock)[::-1]
        assert {one["user_id"] for one in listed} == {0}


async def test_users_sign_in_and_have_their_addresses(shop: Shop) -> None:
    loading = await load_users(shop.store, 1, 40, PASSWORD, ignore)
    assert (loading.created, loading.existing) == (40, 0)
    for prefix in (b"user/", EMAILS, NEWEST, ROLES, b"audit/"):
        assert len(await keys(shop.store, prefix)) >= 40, prefix
    wanted = user(1, 7, PASSWORD)
    person = await shop.sign_in(wanted.account.email, PASSWORD)
    me = await (await shop.users.get("/v1/users/me", headers=person.headers)).json()
    assert (me["name"], me["age"], me["role"]) == (wanted.account.name, wanted.account.age, "customer")
    listed = await (await shop.users.get("/v1/users/me/addresses", headers=person.headers)).json()
    assert [one["line1"] for one in listed["data"]] == [one.line1 for one in wanted.addresses][::-1]
    activity = await (await shop.users.get("/v1/users/me/activity", headers=person.headers)).json()
    actions = [one["action"] for one in activity["data"]]
    assert sorted(actions) == sorted(["signed_in", "registered", *["address_added"] * len(wanted.addresses)])
    assert await can_sign_in(shop.store, wanted.account.email, PASSWORD)
    assert not await can_sign_in(shop.store, wanted.account.email, "another password")
    assert not await can_sign_in(shop.store, "nobody@example.com", PASSWORD)


async def test_what_is_there_stays_as_it_is(store: kvstore.Client) -> None:
    """An interrupted run is one that loaded less."""
    await load_products(store, 1, 35, ignore)
    await load_users(store, 1, 35, PASSWORD, ignore)
    products, users = (
        await load_products(store, 1, 100, ignore),
        await load_users(store, 1, 50, PASSWORD, ignore),
    )
    assert (products.created, products.existing) == (65, 35)
    assert (users.created, users.existing) == (15, 35)
    await check_indexes(store)
    await check_stock(store)
    whole = await keys(store, b"")
    told: list[int] = []
    products, users = (
        await load_products(store, 1, 100, told.append),
        await load_users(store, 1, 50, "some other password", told.append),
    )
    assert (products.created, products.existing, users.created, users.existing) == (0, 100, 0, 50)
    assert sum(told) == 150
    assert await keys(store, b"") == whole
    assert await can_sign_in(store, user(1, 1, PASSWORD).account.email, PASSWORD)


async def test_two_at_once_load_everything_once(store: kvstore.Client) -> None:
    loadings = await asyncio.gather(*(load_products(store, 1, 90, ignore) for _ in range(2)))
    assert sum(loading.created for loading in loadings) == 90
    assert sum(loading.existing for loading in loadings) == 90
    await check_indexes(store)
    await check_stock(store)
    assert len(await keys(store, b"product/")) == 90
    loadings = await asyncio.gather(*(load_users(store, 1, 60, PASSWORD, ignore) for _ in range(2)))
    assert sum(loading.created for loading in loadings) == 60
    for prefix in (b"user/", EMAILS, NEWEST, ROLES):
        assert len(await keys(store, prefix)) == 60, prefix


@pytest.mark.parametrize("password", ["short", "x" * 129, "password1"])
async def test_a_password_that_nobody_may_choose(store: kvstore.Client, password: str) -> None:
    with pytest.raises(Problem):
        await load_users(store, 1, 1, password, ignore)
    assert await keys(store, b"user/") == []


async def test_the_command(tmp_path: Path) -> None:
    async with ClusterProcesses(tmp_path, nodes=1) as cluster:
        arguments = ("seed", "--endpoints", cluster.endpoints, "--products", "40", "--users", "10")
        code, out = await command(*arguments, "--json")
        assert code == 0, out
        first = json.loads(out)
        assert (first["products_created"], first["products_existing"]) == (40, 0)
        assert (first["users_created"], first["users_existing"]) == (10, 0)
        assert (first["email"], first["password"]) == (user(1, 1, PASSWORD).account.email, PASSWORD)
        code, out = await command(*arguments)
        assert code == 0, out
        assert "0 products (40 were there), 0 users (10 were there)" in out
        assert f'{{"email":"{first["email"]}","password":"{PASSWORD}"}}' in out
        code, out = await command(*arguments, "--password", "one of their own")
        assert code == 0, out
        assert "keep the password that they had" in out
        code, out = await command(*arguments, "--password", "password1")
        assert code == 1
        assert "common_password" in out
        for wrong in (("--products", "-1"), ("--users", "x"), ("--seed", "s")):
            code, out = await command("seed", *wrong)
            assert code == 2, out
