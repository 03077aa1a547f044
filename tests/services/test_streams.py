"""Clients of an order's stream who leave, before it begins and while nothing happens."""

from __future__ import annotations

from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request

import kvstore
from services.orders.feed import HEARTBEAT_S, EventFeed
from services.web.answers import REQUEST_ID
from services.web.app import STATE
from tests.cluster.harness import until
from tests.services.paid_shop import PaidShop


async def test_a_client_who_leaves_before_its_stream_begins_is_no_error(
    store: kvstore.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def gone(*_: object) -> None:
        raise aiohttp.ClientConnectionResetError("Cannot write to closing transport")

    monkeypatch.setattr(web.StreamResponse, "prepare", gone)
    request = make_mocked_request("GET", "/")
    request[REQUEST_ID] = "1"
    response = await EventFeed(store).stream(request, 1)
    assert not response.prepared


async def test_a_stream_ends_soon_after_its_client_has_left(store: kvstore.Client, tmp_path: Path) -> None:
    async with PaidShop(store, tmp_path, workers=0) as paid:
        await paid.shop.stock(paid.staff, "cup", 10)
        order = await paid.placed()
        app = paid.shop.orders.server.app  # type: ignore[attr-defined]
        url = f"/v1/orders/{order['id']}/events/stream"
        async with paid.shop.orders.get(url, headers=paid.buyer.headers) as answer:
            assert (await answer.content.readline()).startswith(b"retry")
            assert app[STATE].in_flight == 1

        async def has_ended() -> bool:
            return bool(app[STATE].in_flight == 0)

        await until(has_ended, HEARTBEAT_S / 3, "the stream to end", poll_s=0.01)
