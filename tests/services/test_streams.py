"""Streams of an order's events: who leaves, who may not read on, and what many of them cost others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request

import kvstore
from services.orders import feed
from services.orders.feed import HEARTBEAT_S, STREAMS_EACH_MAX, EventFeed
from services.web import app as web_app
from services.web import ended
from services.web.answers import REQUEST_ID
from services.web.app import STATE, State
from services.web.tokens import Caller, Role, SigningKeys, Tokens
from tests.cluster.harness import until
from tests.services.paid_shop import PaidShop
from tests.services.shop import problem


@pytest.fixture
async def paid(store: kvstore.Client, tmp_path: Path) -> AsyncIterator[PaidShop]:
    async with PaidShop(store, tmp_path, workers=0, with_users=True) as paid:
        await paid.shop.stock(paid.staff, "cup", 10)
        yield paid


def state_of(paid: PaidShop) -> State:
    found: State = paid.shop.orders.server.app[STATE]  # type: ignore[attr-defined]
    return found


def url_of(order: dict[str, Any]) -> str:
    return f"/v1/orders/{order['id']}/events/stream"


async def test_a_client_who_leaves_before_its_stream_begins_is_no_error(
    store: kvstore.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def gone(*_: object) -> None:
        raise aiohttp.ClientConnectionResetError("Cannot write to closing transport")

    monkeypatch.setattr(web.StreamResponse, "prepare", gone)
    request = make_mocked_request("GET", "/")
    request[REQUEST_ID] = "1"
    response = await EventFeed(store, Tokens(SigningKeys(store))).stream(request, Caller(7, Role.CUSTOMER), 1)
    assert not response.prepared


async def test_a_stream_ends_soon_after_its_client_has_left(paid: PaidShop) -> None:
    order = await paid.placed()
    state = state_of(paid)
    async with paid.shop.orders.get(url_of(order), headers=paid.buyer.headers) as answer:
        assert (await answer.content.readline()).startswith(b"retry")
        assert (state.streams, state.in_flight) == (1, 0)

    async def has_ended() -> bool:
        return state.streams == 0

    await until(has_ended, HEARTBEAT_S / 3, "the stream to end", poll_s=0.01)
    assert state.in_flight == 0


async def test_streams_take_no_place_of_requests_and_each_caller_has_so_many(
    paid: PaidShop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web_app, "IN_FLIGHT_MAX", 2)
    order, orders = await paid.placed(), paid.shop.orders
    async with AsyncExitStack() as stack:
        for _ in range(STREAMS_EACH_MAX):
            answer = await stack.enter_async_context(orders.get(url_of(order), headers=paid.buyer.headers))
            assert answer.status == 200
        refused = await orders.get(url_of(order), headers=paid.buyer.headers)
        await problem(refused, 429, "too_many_streams")
        assert int(refused.headers["Retry-After"]) > 0
        assert (await orders.get(url_of(order), headers=paid.staff.headers)).status == 200  # another caller
        assert (await orders.get(f"/v1/orders/{order['id']}", headers=paid.buyer.headers)).status == 200
    state = state_of(paid)

    async def has_ended() -> bool:
        return state.streams <= 1

    await until(has_ended, HEARTBEAT_S / 3, "the streams to end", poll_s=0.01)
    assert (await orders.get(url_of(order), headers=paid.buyer.headers)).status == 200


async def test_streams_that_were_left_are_none_of_those_that_one_has(
    paid: PaidShop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also before we have looked: else who follows one order after the other would be refused for that long."""
    monkeypatch.setattr(feed, "LOOK_S", 6.0)
    order, orders = await paid.placed(), paid.shop.orders
    # As in a process of its own: aiohttp's test server, unlike that, cancels a handler whose client has left.
    orders.server.runner.server.handler_cancellation = False  # type: ignore[union-attr]
    async with AsyncExitStack() as stack:
        mine = [
            await stack.enter_async_context(orders.get(url_of(order), headers=paid.buyer.headers))
            for _ in range(STREAMS_EACH_MAX)
        ]
        await paid.did(paid.buyer, f"/v1/orders/{order['id']}/cancel", {"reason": "changed my mind"})
        for answer in mine:  # each has come to where it waits
            while await answer.content.readline() != b"event: order.cancelled\n":
                pass
    assert state_of(paid).streams > 0

    async def may_open() -> bool:
        answer = await orders.get(url_of(order), headers=paid.buyer.headers)
        answer.close()
        return answer.status == 200

    await until(may_open, 3.0, "another stream", poll_s=0.01)


async def test_probes_are_answered_when_too_many_requests_are_in_flight(paid: PaidShop) -> None:
    state_of(paid).in_flight += web_app.IN_FLIGHT_MAX
    assert (await paid.shop.orders.get("/readyz")).status == 200
    assert (await paid.shop.orders.get("/livez")).status == 200
    await problem(await paid.shop.orders.get("/v1/products"), 503, "overloaded")
    state_of(paid).in_flight -= web_app.IN_FLIGHT_MAX


async def test_a_stream_has_no_head(paid: PaidShop) -> None:
    order = await paid.placed()
    async with asyncio.timeout(10):
        answer = await paid.shop.orders.head(url_of(order), headers=paid.buyer.headers)
    assert answer.status == 405
    assert answer.headers["Allow"] == "GET"
    assert (await paid.shop.orders.head(f"/v1/orders/{order['id']}", headers=paid.buyer.headers)).status == 200


async def test_an_id_that_the_order_has_not_come_to_is_refused(paid: PaidShop) -> None:
    order = await paid.placed()
    for last in ("2", "900000", "1000000", "x"):
        headers = {**paid.buyer.headers, "Last-Event-ID": last}
        await problem(await paid.shop.orders.get(url_of(order), headers=headers), 400, "malformed_request")
    answer = await paid.shop.orders.get(url_of(order), headers={**paid.buyer.headers, "Last-Event-ID": "1"})
    assert answer.status == 200
    answer.close()


async def test_a_stream_ends_with_its_session(paid: PaidShop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ended, "LOOK_EVERY_S", 0.0)
    paid.buyer = await paid.shop.register()
    order = await paid.placed()
    async with paid.shop.orders.get(url_of(order), headers=paid.buyer.headers) as answer:
        assert (await answer.content.readline()).startswith(b"retry")
        gone = await paid.shop.users.delete("/v1/sessions/current", headers=paid.buyer.headers)
        assert gone.status == 204
        async with asyncio.timeout(HEARTBEAT_S / 3):
            await answer.content.read()


async def test_a_stream_ends_with_its_token(paid: PaidShop, monkeypatch: pytest.MonkeyPatch) -> None:
    order, ahead_s = await paid.placed(), 0.0
    is_still_good = Tokens.is_still_good

    async def later(tokens: Tokens, caller: Caller) -> bool:
        return await is_still_good(tokens, caller._replace(good_until_s=caller.good_until_s - ahead_s))

    monkeypatch.setattr(Tokens, "is_still_good", later)
    async with paid.shop.orders.get(url_of(order), headers=paid.buyer.headers) as answer:
        async with asyncio.timeout(HEARTBEAT_S / 3):
            while await answer.content.readline() != b"\n":
                pass
        ahead_s = 650.0
        async with asyncio.timeout(HEARTBEAT_S / 3):
            await answer.content.read()
