"""What all services share: request ids, problems, bounds, health, where they may listen."""

from __future__ import annotations

import asyncio
import io
import json
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

import kvstore
from services.orders.app import create_app
from services.web import app as web_app
from services.web.app import STATE, new_app
from services.web.endpoints import Api
from services.web.idempotency import IdempotencyKeys
from services.web.logs import AccessLog
from services.web.problems import PROBLEMS, Problem
from services.web.runner import ServiceRunner
from services.web.serve import CannotServe, check_host
from services.web.tokens import SigningKeys, Tokens
from tests.services.shop import Shop, problem

TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


async def test_request_ids(shop: Shop) -> None:
    answer = await shop.orders.get("/livez", headers={"X-Request-Id": "trace-0123.abc:1"})
    assert answer.headers["X-Request-Id"] == "trace-0123.abc:1"
    made = set()
    for wish in (
        "",
        "short",
        "a b c d e f",
        "x" * 129,
        "<script>alert",
        "\u00e9\u00e9\u00e9\u00e9\u00e9\u00e9\u00e9\u00e9",
    ):
        answer = await shop.orders.get("/livez", headers={"X-Request-Id": wish})
        assert answer.headers["X-Request-Id"] != wish
        made.add(answer.headers["X-Request-Id"])
    assert len(made) == 6
    answer = await shop.orders.get("/nowhere", headers={"X-Request-Id": "trace-0123"})
    assert (await problem(answer, 404, "not_found"))["request_id"] == "trace-0123"


async def test_paths_and_methods_that_are_not_there(shop: Shop) -> None:
    await problem(await shop.orders.get("/"), 404, "not_found")
    await problem(await shop.orders.get("/v1/orders/1/2"), 404, "not_found")
    answer = await shop.orders.delete("/v1/orders")
    await problem(answer, 405, "method_not_allowed")
    assert answer.headers["Allow"] == "GET,HEAD,POST"


async def test_each_problem_has_its_page(shop: Shop) -> None:
    for code, kind in PROBLEMS.items():
        answer = await shop.users.get(f"/problems/{code}")
        assert await answer.json() == {
            "code": code,
            "title": kind.title,
            "status": kind.status,
            "retryable": kind.retryable,
        }
    await problem(await shop.users.get("/problems/nonsense"), 404, "not_found")


async def test_health(shop: Shop) -> None:
    for client in (shop.users, shop.orders):
        assert (await client.get("/livez")).status == 200
        assert (await client.get("/readyz")).status == 200
    assert shop.orders.app is not None
    shop.orders.app[STATE].stopping = True
    await problem(await shop.orders.get("/readyz"), 503, "shutting_down")
    assert (await shop.orders.get("/livez")).status == 200


async def test_requests_in_flight_are_bounded(store: kvstore.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_app, "IN_FLIGHT_MAX", 2)
    release = asyncio.Event()

    async def wait(request: web.Request) -> web.Response:
        await release.wait()
        return web.Response()

    app = new_app(store, Api("Test", "", Tokens(SigningKeys(store)), IdempotencyKeys(store)))
    app.add_routes([web.get("/wait", wait)])
    client: TestClient[Any, Any] = TestClient(TestServer(app))
    async with client:
        held = [asyncio.ensure_future(client.get("/wait")) for _ in range(2)]
        while app[STATE].in_flight < 2:
            await asyncio.sleep(0)
        answer = await client.get("/wait")
        assert (await problem(answer, 503, "overloaded"))["retryable"] is True
        assert answer.headers["Retry-After"] == "1"
        assert (await client.get("/livez")).status == 200
        release.set()
        assert [(await one).status for one in held] == [200, 200]
        assert (await client.get("/wait")).status == 200


async def test_an_unforeseen_error_tells_the_client_nothing(store: kvstore.Client) -> None:
    async def fail(request: web.Request) -> web.Response:
        raise RuntimeError("a secret")

    app = new_app(store, Api("Test", "", Tokens(SigningKeys(store)), IdempotencyKeys(store)))
    app.add_routes([web.get("/fail", fail)])
    client: TestClient[Any, Any] = TestClient(TestServer(app))
    async with client:
        answer = await client.get("/fail")
        await problem(answer, 500, "internal")
        assert "secret" not in await answer.text()


async def test_an_unknown_outcome_without_a_key_is_not_called_retryable(store: kvstore.Client) -> None:
    async def fail(request: web.Request) -> web.Response:
        raise kvstore.OutcomeUnknown("lost")

    app = new_app(store, Api("Test", "", Tokens(SigningKeys(store)), IdempotencyKeys(store)))
    app.add_routes([web.post("/do", fail), web.put("/do", fail)])
    client: TestClient[Any, Any] = TestClient(TestServer(app))
    async with client:
        assert (await problem(await client.post("/do"), 503, "outcome_unknown"))["retryable"] is False
        assert (await problem(await client.put("/do"), 503, "outcome_unknown"))["retryable"] is True


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_is_allowed(host: str) -> None:
    check_host(host, insecure=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.com", ""])
def test_a_public_address_is_refused(host: str) -> None:
    with pytest.raises(CannotServe) as caught:
        check_host(host, insecure=False)
    assert caught.value.code == "address_not_loopback"
    check_host(host, insecure=True)


def test_every_problem_is_an_error() -> None:
    for code, kind in PROBLEMS.items():
        assert 400 <= kind.status < 600
        assert Problem(code, "x").body("/", "r")


async def test_the_access_log_has_a_line_for_each_request(store: kvstore.Client) -> None:
    stream = io.BytesIO()
    access_log = AccessLog("orders", stream)
    client: TestClient[Any, Any] = TestClient(TestServer(create_app(store, access_log)))
    async with client:
        headers = {"X-Request-Id": "trace-0123", "traceparent": TRACEPARENT}
        await client.get("/order/7?token=secret", headers=headers)
        for _ in range(300):
            await client.get("/livez")
    access_log.flush()
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert len(lines) == 301
    assert lines[0].pop("duration_ms") >= 0
    assert lines[0].pop("timestamp").endswith("Z")
    assert lines[0] == {
        "event": "request",
        "level": "info",
        "service": "orders",
        "method": "GET",
        "path": "/order/7",
        "status": 401,
        "request_id": "trace-0123",
        "user": None,
        "traceparent": TRACEPARENT,
    }


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET /order/%ff HTTP/1.1\r\nHost: x\r\n\r\n", 401),
        (b"GET /v1/products/\xff HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET /order/7 HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer \xff.\xfe.x\r\n\r\n", 401),
        (b"GET /order/7 HTTP/1.1\r\nHost: x\r\nAuthorization: \xff\r\n\r\n", 401),
        (b"GET /livez HTTP/1.1\r\nHost: x\r\nX-Request-Id: \xff\xff\xff\xff\xff\xff\xff\xff\r\n\r\n", 200),
        (b"GET /v1/products/x HTTP/1.1\r\nHost: x\r\nIf-None-Match: \xff\r\n\r\n", 404),
        (b"POST /v1/orders HTTP/1.1\r\nHost: x\r\nContent-Type: \xff\r\nContent-Length: 1\r\n\r\nx", 401),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\n\r\n", 400),
        (b"GET /livez HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 20_000 + b"\r\n\r\n", 400),
    ],
)
async def test_bytes_that_no_browser_sends(store: kvstore.Client, request_bytes: bytes, status: int) -> None:
    stream = io.BytesIO()
    access_log = AccessLog("orders", stream)
    runner = ServiceRunner(create_app(store, access_log))
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        reader, writer = await asyncio.open_connection(*runner.addresses[0][:2])
        try:
            writer.write(request_bytes)
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            length = next(line for line in head.splitlines() if line.startswith("Content-Length: ")).partition(" ")[2]
            body = json.loads(await reader.readexactly(int(length)))
        finally:
            writer.close()
            await writer.wait_closed()
    finally:
        await runner.cleanup()
    assert int(head.split()[1]) == status
    if status >= 400:
        assert "Content-Type: application/problem+json\r\n" in head
        assert (body["status"], body["retryable"]) == (status, False)
        assert f"X-Request-Id: {body['request_id']}\r\n" in head
    access_log.flush()
    for line in stream.getvalue().splitlines():
        assert json.loads(line)["status"] == status
