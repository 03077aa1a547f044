"""The simulated shoppers' own judgement: what they must take for an error, and what not."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from services.shoppers.accounts import Account
from services.shoppers.ledger import THE_ORDER, Ledger, OrderNote
from services.shoppers.simulation import Options, Simulation, StaffCredentials
from services.shoppers.tally import Histogram, Tally
from services.shoppers.wire import Broken, GaveUp, Refused, Wire
from services.web.problems import Problem

Respond = Callable[[web.Request], Awaitable[web.Response]]


@asynccontextmanager
async def wire_to(respond: Respond, patience_s: float = 5.0) -> AsyncIterator[tuple[Wire, Tally]]:
    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", respond)
    tally = Tally()
    async with TestServer(app) as server, aiohttp.ClientSession() as session:
        yield Wire(session, [str(server.make_url(""))], tally, Random(1), patience_s), tally


def problem(code: str) -> web.Response:
    return Problem(code, "so it is").response("/", "1")


# --- answers ----------------------------------------------------------------------------------------------------------


async def test_a_request_is_sent_again_with_its_key_until_there_is_an_answer() -> None:
    keys: list[str] = []

    async def respond(request: web.Request) -> web.Response:
        keys.append(request.headers["Idempotency-Key"])
        if len(keys) == 1:
            return problem("store_unavailable")
        if len(keys) == 2:
            assert request.transport is not None
            request.transport.close()
        return web.json_response({"id": 1}, status=201)

    async with wire_to(respond, patience_s=20.0) as (wire, tally):
        answer = await wire.send("POST", "/v1/orders", key="k", body={})
    assert (answer.status, answer.body, answer.attempts) == (201, {"id": 1}, 3)
    assert keys == ["k"] * 3
    (figures,) = tally.endpoints()
    assert figures.answers == {"store_unavailable": 1, "connection_lost": 1, "201": 1}
    assert tally.error_count == 0


async def test_a_shopper_gives_up() -> None:
    async def respond(_: web.Request) -> web.Response:
        return problem("overloaded")

    async with wire_to(respond, patience_s=0.1) as (wire, tally):
        with pytest.raises(GaveUp):
            await wire.send("GET", "/v1/orders")
    assert tally.error_count == 0


async def test_a_problem_that_may_be_is_told_and_no_error() -> None:
    async def respond(_: web.Request) -> web.Response:
        return problem("insufficient_stock")

    async with wire_to(respond) as (wire, tally):
        with pytest.raises(Refused) as refused:
            await wire.send("POST", "/v1/orders", allowed=("insufficient_stock",))
        assert refused.value.code == "insufficient_stock"
        assert tally.error_count == 0
        with pytest.raises(Broken, match="unexpectedly"):
            await wire.send("POST", "/v1/orders")
        assert tally.error_count == 1


@pytest.mark.parametrize(
    ("response", "why"),
    [
        (lambda: problem("internal"), "internal"),
        (lambda: web.Response(status=500, text="oops"), "no known problem"),
        (lambda: web.Response(status=502), "no known problem"),
        (lambda: web.Response(status=503), "no known problem"),
        (lambda: web.json_response({"code": "none_of_ours"}, status=409), "no known problem"),
        (lambda: web.json_response({"code": "not_found"}, status=404), "no known problem"),  # not problem+json
        (lambda: web.Response(status=302, headers={"Location": "/x/"}), "no known problem"),
    ],
)
async def test_any_other_answer_is_an_error(response: Callable[[], web.Response], why: str) -> None:
    async def respond(_: web.Request) -> web.Response:
        return response()

    async with wire_to(respond) as (wire, tally):
        with pytest.raises(Broken):
            await wire.send("GET", "/v1/orders", allowed=("not_found",))
        assert why in tally.stories[0]


async def test_a_gap_in_a_stream_of_events_is_an_error() -> None:
    async def respond(_: web.Request) -> web.Response:
        return web.Response(body=b"id: 1\nevent: a\ndata: {}\n\nid: 3\nevent: b\ndata: {}\n\n")

    async with wire_to(respond) as (wire, tally):
        events = wire.stream("/v1/orders/{}/events/stream", 1, token="t", after=0)
        assert (await anext(events)).seq == 1
        with pytest.raises(Broken, match="event 3 came in the place of 2"):
            await anext(events)
    assert tally.error_count == 1


# --- the ledger -------------------------------------------------------------------------------------------------------


def order_body(order_id: int = 7, **changes: Any) -> dict[str, Any]:
    body = {
        "id": order_id, "number": f"N{order_id}", "user_id": 1, "state": "pending_payment", "total": 10,
        "lines": [{"sku": "cup", "quantity": 2}], "captured": 0, "refunded": 0, "cart_id": None,
    }  # fmt: skip
    return {**body, **changes}


class Told:
    """A ledger that was told of one order, and services that say what a test wants."""

    def __init__(self, wire: Wire) -> None:
        self.tally = Tally()
        self.ledger = Ledger(self.tally)
        self.account = Account(1, "a@example.com", "a password", wire, wire, Random(1))
        self.account.user_id = 1
        placement = self.ledger.asks(self.account, {"cup": 2})
        self.note: OrderNote = self.ledger.placed(placement, order_body())

    def saw(self, **changes: Any) -> str:
        self.ledger.saw_order(self.note, self.note.known(), order_body(**changes))
        return " ".join(story.partition(":")[0] for story in self.tally.stories)


@asynccontextmanager
async def told(listed: list[dict[str, Any]] | None = None, parts: list[Any] | None = None) -> AsyncIterator[Told]:
    listed = [order_body()] if listed is None else listed

    async def respond(request: web.Request) -> web.Response:
        path = request.path
        if path == "/v1/sessions/refresh":
            return web.json_response({"access_token": "a", "refresh_token": "r", "user_id": 1})
        if path == "/v1/orders":
            return web.json_response({"data": listed, "has_more": False, "next_cursor": None})
        if path.count("/") == 3:
            found = [body for body in listed if str(body["id"]) == path.rpartition("/")[2]]
            return web.json_response(found[0]) if found else problem("not_found")
        return web.json_response(parts or [])

    async with wire_to(respond) as (wire, _):
        yield Told(wire)


async def test_an_order_that_goes_its_way_is_fine() -> None:
    async with told(
        [order_body(state="completed", captured=10, refunded=3)], [{"attempt": 1, "state": "captured"}]
    ) as it:
        assert it.saw(state="confirmed", captured=10) == ""
        it.ledger.saw(it.note, it.note.known(), ("payment", 1), "authorising")
        assert await it.ledger.read_back([it.account]) == 1
        assert it.tally.stories == []
        assert it.note.state == "completed"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"state": "confirmed"}, "went_back"),
        ({"state": "cancelled", "captured": 5}, "money_went_back"),
        ({"state": "cancelled", "refunded": 1}, "money_went_back"),
        ({"state": "cancelled", "total": 11}, "order_differs"),
        ({"state": "cancelled", "number": "N8"}, "order_differs"),
        ({"state": "cancelled", "user_id": 2}, "order_differs"),
        ({"state": "cancelled", "lines": [{"sku": "cup", "quantity": 1}]}, "order_differs"),
    ],
)
async def test_what_was_acknowledged_must_stay_so(changes: dict[str, Any], code: str) -> None:
    async with told() as it:
        assert it.saw(state="cancelled", captured=10, refunded=10) == ""
        assert it.saw(**{"captured": 10, "refunded": 10, **changes}) == code


async def test_an_answer_that_was_overtaken_accuses_nobody() -> None:
    async with told() as it:
        before = it.note.known()
        it.saw(state="confirmed")
        it.ledger.saw_order(it.note, before, order_body())
        assert it.tally.stories == []
        assert it.note.state == "confirmed"


async def test_an_order_that_is_not_listed_is_lost() -> None:
    async with told([]) as it:
        with pytest.raises(ExceptionGroup):
            await it.ledger.read_back([it.account])
        assert it.tally.stories[0].startswith("order_lost")


async def test_orders_that_nobody_asked_for() -> None:
    async with told([order_body(9), order_body(8), order_body()]) as it:
        it.ledger.asks(it.account, {"cup": 2})  # and was never answered: one of the two is its work
        await it.ledger.read_back([it.account])
        assert [story.partition(":")[0] for story in it.tally.stories] == ["order_unasked"]


async def test_orders_from_before_are_nobodys_business() -> None:
    async with told([order_body(), order_body(6)]) as it:
        it.account.newest_before = 6
        await it.ledger.read_back([it.account])
        assert it.tally.stories == []


async def test_a_payment_that_was_told_of_and_is_not_there() -> None:
    async with told(parts=[{"attempt": 1, "state": "captured"}]) as it:
        for attempt in (1, 2):
            it.ledger.saw(it.note, it.note.known(), ("payment", attempt), "created")
        await it.ledger.read_back([it.account])
        assert it.tally.stories == ["part_lost: order 7 has no payment 2"]
        assert it.note.states[THE_ORDER] == "pending_payment"


# --- counting, and who comes when -------------------------------------------------------------------------------------


def test_percentiles_are_off_by_a_twentieth_at_most() -> None:
    histogram = Histogram()
    assert histogram.percentile_ms(0.5) == 0.0
    for latency_ms in range(1, 1001):
        histogram.add(float(latency_ms))
    assert histogram.percentile_ms(0.5) == pytest.approx(500, rel=0.05)
    assert histogram.percentile_ms(0.99) == pytest.approx(990, rel=0.05)
    assert histogram.percentile_ms(1.0) == 1000.0
    histogram.add(1e9)
    histogram.add(0.0)
    assert histogram.longest_ms == 1e9


async def test_nothing_passes_where_the_services_do_not_answer_as_they_must() -> None:
    async def respond(_: web.Request) -> web.Response:
        return web.Response(status=500)

    async with TestServer(web.Application()) as server, aiohttp.ClientSession() as session:
        url = str(server.make_url(""))
        options = Options(users_urls=[url], orders_urls=[url], accounts=1, hot_products=1)
        simulation = Simulation(options, StaffCredentials("staff@example.com", "x"), session)
        with pytest.raises(Broken):
            await simulation.prepare()
        assert simulation.tally.error_count == 1
