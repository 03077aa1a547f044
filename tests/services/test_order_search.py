"""Staff's search for orders: by when they were placed, by a product, by a customer's email; and what it may cost."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import pytest

import kvstore
from services.orders.order_search import LOOKED_AT_MAX
from services.orders.records import Order, OrderLine, encode, order_key, order_state_key, user_order_key
from services.orders.states import OrderState
from services.users.records import email_key
from services.web.ids import Ids, first_id, order_number, parse_moment, timestamp
from tests.services.shop import PASSWORD, Person, Shop, problem

DAY_MS = 24 * 3600 * 1000
NOON = "2026-03-01T12:00:00Z"


def moment(text: str) -> int:
    found = parse_moment(text)
    assert found is not None
    return found


async def keep(store: kvstore.Client, user_id: int, at_ms: list[int], sku: str = "cup") -> list[int]:
    """Orders that were placed at those moments; their ids. As placing keeps them, so far as search looks."""
    ids: list[int] = []
    for start in range(0, len(at_ms), 200):
        puts: list[kvstore.Operation] = []
        for at in at_ms[start : start + 200]:
            order_id = first_id(at) + len(ids) % 1000
            state = OrderState.PENDING_PAYMENT
            order = Order(
                order_id, order_number(order_id), user_id, state, "EUR", (OrderLine(sku, sku, 1, 5, 5),), 5, at
            )
            puts += [
                kvstore.Put(order_key(order_id), encode(order)),
                kvstore.Put(user_order_key(user_id, order_id, at), b""),
                kvstore.Put(order_state_key(state, order_id), b""),
            ]
            ids.append(order_id)
        await store.txn(success=puts)
    return ids


class Search:
    """What `who` finds, page by page; `pages` are how many orders each had."""

    def __init__(self, shop: Shop, who: Person) -> None:
        self._shop, self._who = shop, who
        self.pages: list[int] = []

    async def __call__(self, **query: Any) -> list[int]:
        self.pages, ids, cursor = [], [], None
        while True:
            given = {**query, **({"starting_after": cursor} if cursor else {})}
            answer = await self._shop.orders.get("/v1/orders", params=given, headers=self._who.headers)
            assert answer.status == 200, await answer.text()
            page = await answer.json()
            assert page["has_more"] is (page["next_cursor"] is not None)
            self.pages.append(len(page["data"]))
            ids += [order["id"] for order in page["data"]]
            cursor = page["next_cursor"]
            if cursor is None:
                return ids


async def refused(shop: Shop, who: Person, query: str, pointer: str, code: str) -> None:
    answer = await shop.orders.get(f"/v1/orders?{query}", headers=who.headers)
    found = await problem(answer, 400, "invalid_parameter")
    assert [(error["in"], error["pointer"], error["code"]) for error in found["errors"]] == [("query", pointer, code)]


# --- when -------------------------------------------------------------------------------------------------------------


async def test_orders_are_found_from_a_moment_on_and_before_another(shop: Shop) -> None:
    """Of two periods that meet, an order is in one; to the millisecond, also where its id was drawn just before."""
    staff = await shop.staff()
    noon = moment(NOON)
    ada = await keep(shop.store, 7, [noon - 1, noon, noon + 1, noon + DAY_MS])
    eve = await keep(shop.store, 8, [noon - DAY_MS, noon + 2])
    late = first_id(noon) - 1  # its id of the millisecond before
    order = Order(late, order_number(late), 7, OrderState.EXPIRED, "EUR", (), 5, noon)
    await shop.store.txn(
        success=[
            kvstore.Put(order_key(late), encode(order)),
            kvstore.Put(user_order_key(7, late, noon), b""),
            kvstore.Put(order_state_key(OrderState.EXPIRED, late), b""),
        ]
    )
    found = Search(shop, staff)
    newest = [ada[3], eve[1], ada[2], ada[1], late, ada[0], eve[0]]
    for limit in (1, 2, 100):
        assert await found(limit=limit, placed_from=NOON) == newest[:5]
        assert await found(limit=limit, placed_to=NOON) == newest[5:]
        assert found.pages == ([1, 1] if limit == 1 else [2])  # those of just after noon were looked at on the way
        assert await found(limit=limit, placed_from=NOON, placed_to=timestamp(noon + 2)) == newest[2:5]
        assert await found(limit=limit, placed_from=NOON, placed_to=NOON) == []
        assert await found(limit=limit, placed_from=NOON, placed_to=timestamp(noon + 2), user_id=8) == []
        assert await found(limit=limit, placed_from=NOON, placed_to=timestamp(noon + 3), user_id=8) == [eve[1]]
        assert sorted(await found(limit=limit, placed_from=NOON, placed_to=timestamp(noon + 1), user_id=7)) == [
            late, ada[1],
        ]  # fmt: skip
        assert await found(limit=limit, placed_from=NOON, state="expired") == [late]
    assert await found(placed_from=NOON, number=order_number(ada[0])) == []
    assert await found(placed_to=NOON, number=order_number(ada[0])) == [ada[0]]
    for query in ({"placed_from": "9999-12-31T23:59:59-23:59"}, {"placed_to": "0001-01-01T00:00:00+23:59"}):
        assert await found(**query) == await found(**query, user_id=7) == []
    for query in ({"placed_to": "9999-12-31T23:59:59-23:59"}, {"placed_from": "0001-01-01T00:00:00+23:59"}):
        assert await found(**query) == newest
        assert len(await found(**query, user_id=7)) == 5
    assert await Search(shop, Person(8, "", (await shop.customer()).token))(placed_from=NOON) == []


@pytest.mark.parametrize("apart_ms", [-3000, 3000])
async def test_the_time_that_is_shown_decides_and_not_that_of_the_id(shop: Shop, apart_ms: int) -> None:
    """They are apart where the process paused between the two, or its clock was set back."""
    noon = moment(NOON)
    order_id, state = first_id(noon + apart_ms), OrderState.CONFIRMED
    order = Order(order_id, order_number(order_id), 7, state, "EUR", (), 5, noon)
    await shop.store.txn(
        success=[
            kvstore.Put(order_key(order_id), encode(order)),
            kvstore.Put(user_order_key(7, order_id, noon), b""),
            kvstore.Put(order_state_key(state, order_id), b""),
        ]
    )
    found = Search(shop, await shop.staff())
    for more in ({}, {"user_id": 7}):
        for start, end, ids in ((-1, 0, []), (0, 1, [order_id]), (1, 2, [])):
            period = {"placed_from": timestamp(noon + start), "placed_to": timestamp(noon + end)}
            assert await found(**period, **more) == ids


async def test_customers_find_their_own_by_time_and_product(shop: Shop) -> None:
    staff, ada, eve = await shop.staff(), await shop.customer(), await shop.customer()
    await shop.stock(staff, "cup", 9)
    await shop.stock(staff, "pot", 9)
    placed = [await (await shop.order(who, lines)).json() for who, lines in (
        (ada, {"cup": 1}), (ada, {"cup": 1, "pot": 1}), (eve, {"pot": 1}), (ada, {"pot": 1}),
    )]  # fmt: skip
    found = Search(shop, ada)
    start, end = placed[1]["created_at"], placed[3]["created_at"]
    own = [order for order in reversed(placed) if order["user_id"] == ada.id]
    assert await found(placed_from=start, placed_to=end) == [
        order["id"] for order in own if start <= order["created_at"] < end
    ]
    assert await found(sku="pot") == [placed[3]["id"], placed[1]["id"]]
    assert await Search(shop, staff)(sku="pot") == [placed[number]["id"] for number in (3, 2, 1)]
    assert await Search(shop, staff)(sku="lid") == []


async def test_a_period_long_ago_is_a_part_of_the_index(shop: Shop) -> None:
    """Its first page is full, though there are more newer orders than a page may look at."""
    staff = await shop.staff()
    noon = moment(NOON)
    old = await keep(shop.store, 7, [noon + number for number in range(5)])
    await keep(shop.store, 7, [noon + DAY_MS + number for number in range(LOOKED_AT_MAX + 10)])
    found = Search(shop, staff)
    for more in ({}, {"state": "pending_payment"}, {"user_id": 7}):
        assert await found(limit=2, placed_to="2026-03-02T00:00:00Z", **more) == old[::-1]
        assert found.pages == [2, 2, 1]
        assert (
            await found(limit=2, placed_from="2026-02-01T00:00:00Z", placed_to=timestamp(noon + 3), **more)
            == old[2::-1]
        )


@pytest.mark.parametrize(
    ("text", "at_ms"),
    [
        ("1970-01-01T00:00:00Z", 0),
        ("2026-03-01T13:00:00+01:00", 1_772_366_400_000),
        ("2026-03-01t12:00:00.5z", 1_772_366_400_500),
        ("2026-03-01T12:00:00.0001-00:00", 1_772_366_400_001),  # the first millisecond that is not before it
        ("2026-03-01T12:00:00.000000000Z", 1_772_366_400_000),
        ("1969-12-31T23:59:59.9995Z", 0),
        ("2026-02-29T00:00:00Z", None),
    ],
)
def test_moments(text: str, at_ms: int | None) -> None:
    assert parse_moment(text) == at_ms


def test_the_first_id_of_a_moment() -> None:
    at_ms = moment(NOON)
    assert Ids(lambda: at_ms, lambda bits: 0).next() == first_id(at_ms)
    assert Ids(lambda: at_ms - 1, lambda bits: 2**bits - 1).next() < first_id(at_ms)


@pytest.mark.parametrize("name", ["placed_from", "placed_to"])
@pytest.mark.parametrize(
    "text",
    ["", "today", "1767225600", "2026-03-01", "2026-03-01T12:00:00", "2026-03-01 12:00:00Z", "2026-03-01T12:00Z",
     "2026-03-01T12:00:00,5Z", "2026-13-01T12:00:00Z", "2026-03-01T24:00:00Z", "2026-03-01T12:00:60Z",
     "2026-02-30T12:00:00Z", "0000-01-01T00:00:00Z", "2026-03-01T12:00:00+0100", "2026-03-01T12:00:00Z\n",
     "٢026-03-01T12:00:00Z"],
)  # fmt: skip
async def test_what_is_no_moment(shop: Shop, name: str, text: str) -> None:
    await refused(shop, await shop.customer(), f"{name}={quote(text)}", f"/{name}", "invalid_value")


async def test_a_period_has_its_beginning_before_its_end(shop: Shop) -> None:
    later = timestamp(moment(NOON) + 1)
    await refused(shop, await shop.staff(), f"placed_from={later}&placed_to={NOON}", "/placed_to", "not_combinable")
    # An offset's plus is a blank where it is not escaped.
    await refused(
        shop, await shop.staff(), "placed_from=2026-03-01T12:00:00+01:00", "/placed_from", "invalid_value"
    )  # fmt: skip


# --- what -------------------------------------------------------------------------------------------------------------


async def test_a_page_looks_at_so_many_orders_and_the_next_goes_on(shop: Shop) -> None:
    staff = await shop.staff()
    noon = moment(NOON)
    pots = await keep(shop.store, 7, [noon, noon + LOOKED_AT_MAX // 2], "pot")
    await keep(shop.store, 7, [noon + number for number in range(1, LOOKED_AT_MAX + 10)])
    found = Search(shop, staff)
    for more in ({}, {"state": "pending_payment"}, {"user_id": 7}):
        assert await found(sku="pot", limit=5, **more) == pots[::-1]
        assert found.pages == [1, 1]
        assert await found(sku="pot", limit=1, **more) == pots[::-1]
        assert await found(sku="pan", **more) == []
        assert found.pages == [0, 0]
        assert await found(sku="pot", placed_to=timestamp(noon + 2), **more) == pots[:1]
        assert found.pages == ([1] if "user_id" in more else [0, 1])  # an id is of a few seconds, a user's key exact


@pytest.mark.parametrize("sku", ["", "a b", "../order/1", "x" * 65, "-x"])
async def test_what_is_no_sku(shop: Shop, sku: str) -> None:
    await refused(shop, await shop.staff(), f"sku={quote(sku, safe='')}", "/sku", "invalid_value")


# --- who --------------------------------------------------------------------------------------------------------------


async def test_orders_are_found_by_their_customers_email(shop: Shop) -> None:
    staff = await shop.staff()
    await shop.stock(staff, "cup", 9)
    ada, eve = await shop.register(), await shop.register()
    placed = [await (await shop.order(who, {"cup": 1})).json() for who in (ada, eve, ada)]
    found = Search(shop, staff)
    of_ada = [placed[2]["id"], placed[0]["id"]]
    for email in (ada.email, ada.email.upper(), f" {ada.email} "):
        assert await found(email=email, limit=1) == of_ada
    assert await found(email=eve.email) == [placed[1]["id"]]
    assert await found(email="nobody@example.com") == []
    # With others, all must hold.
    assert await found(email=ada.email, user_id=ada.id) == of_ada
    assert await found(email=ada.email, user_id=eve.id) == []
    assert await found(email=ada.email, number=placed[0]["number"]) == [placed[0]["id"]]
    assert await found(email=ada.email, number=placed[1]["number"]) == []
    assert await found(email=ada.email, state="cancelled") == []
    assert await found(email=ada.email, sku="cup", placed_from=placed[2]["created_at"]) == [
        order["id"] for order in placed[::-2] if order["created_at"] >= placed[2]["created_at"]
    ]
    assert await found(email=ada.email, needs_attention="true") == []
    for who in (ada, eve):  # also for one's own: it would tell whose an email is
        answer = await shop.orders.get("/v1/orders", params={"email": ada.email}, headers=who.headers)
        await problem(answer, 403, "forbidden")


async def test_who_was_erased_is_not_found_by_their_email(shop: Shop) -> None:
    staff = await shop.staff()
    await shop.stock(staff, "cup", 9)
    ada = await shop.register()
    order = await (await shop.order(ada, {"cup": 1})).json()
    found = Search(shop, staff)
    assert await found(email=ada.email) == [order["id"]]
    erased = await shop.users.post("/v1/users/me/erasure", json={"password": PASSWORD}, headers=ada.headers)
    assert erased.status == 200, await erased.text()
    assert await shop.store.get(email_key(ada.email)) is None
    assert await found(email=ada.email) == []
    assert await found(user_id=ada.id) == [order["id"]]
    # Whoever takes the email next has none of them.
    body = {"email": ada.email, "password": PASSWORD, "name": "Ida", "age": 20}
    assert (await shop.users.post("/v1/users", json=body)).status == 201
    assert await found(email=ada.email) == []


@pytest.mark.parametrize("email", ["ada", "ada@", "@example.com", "ada@example", "a b@example.com", "a@b@example.com"])
async def test_what_is_no_email(shop: Shop, email: str) -> None:
    await refused(shop, await shop.staff(), f"email={quote(email)}", "/email", "invalid_value")


async def test_a_cursor_from_elsewhere_leads_to_another_place_of_the_same_list(shop: Shop) -> None:
    staff = await shop.staff()
    noon = moment(NOON)
    ids = await keep(shop.store, 7, [noon, noon + 1, noon + DAY_MS])
    page = await (await shop.orders.get("/v1/orders?limit=1", headers=staff.headers)).json()
    assert page["data"][0]["id"] == ids[2]
    for more in ({}, {"user_id": "7"}):
        for cursor, expected in ((page["next_cursor"], None), ("__8", []), ("AAAA", [ids[1], ids[0]])):
            query = {"placed_from": NOON, "placed_to": timestamp(noon + 2), "starting_after": cursor, **more}
            answer = await shop.orders.get("/v1/orders", params=query, headers=staff.headers)
            assert answer.status == 200
            found = [order["id"] for order in (await answer.json())["data"]]
            assert found == expected if expected is not None else set(found) <= set(ids[:2])
