"""The peer's order service keeps the promises that it is compared by; against a PostgreSQL of its own."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import msgspec
import pytest
from fastapi import Request, Response

from bench.peers import postgres_server
from bench.peers.postgres_server import PostgresServer
from bench.peers.web import fastapi, orders
from bench.peers.web.orders import Line, Orders, Placement
from bench.people import People
from bench.results import BenchError
from bench.websystem import PRICE, SKU, STOCK
from services.web.ids import Ids
from tests.unit.test_bench_http import KEY, Clock, header


def _is_installed() -> bool:
    try:
        postgres_server.program("postgres")
    except BenchError:
        return False
    return True


pytestmark = pytest.mark.skipif(not _is_installed(), reason="PostgreSQL is not installed: make bench-deps")


@pytest.fixture(scope="module")
def database() -> Iterator[PostgresServer]:
    # Not pytest's own directory: PostgreSQL runs as another user where we are root, and must get through.
    with tempfile.TemporaryDirectory(prefix="kvstore-test-") as name:
        os.chmod(name, 0o711)
        (Path(name) / "p").mkdir()
        server = PostgresServer()
        try:
            server.start(Path(name) / "p")
            server.run_script("schema.sql", fastapi.schema(People(KEY, (), "")))
            yield server
        finally:
            server.stop()


@pytest.fixture
async def pool(database: PostgresServer) -> AsyncIterator[Any]:
    async with asyncpg.create_pool(fastapi.dsn(database.directory), connection_class=orders.PlainConnection) as made:
        yield made


async def place(to: Orders, key: str | None, quantity: int = 1, sku: str = SKU, token: str | None = None) -> Response:
    token = header(Clock()) if token is None else token
    headers = [(b"authorization", token.encode()), *([(b"idempotency-key", key.encode())] if key else [])]
    request = Request({"type": "http", "headers": headers})
    return await to.place(request, Placement(lines=[Line(sku=sku, quantity=quantity)]))


def body(answer: Response) -> Any:
    return msgspec.json.decode(bytes(answer.body))


async def stock(pool: Any) -> tuple[int, int]:
    return tuple(await pool.fetchrow("SELECT on_hand, reserved FROM stock WHERE sku = $1", SKU))  # type: ignore[return-value]


async def rows(pool: Any) -> list[int]:
    tables = ("orders", "order_event", "step", "idempotency")
    return [await pool.fetchval(f"SELECT count(*) FROM {table}") for table in tables]


async def test_an_order_is_placed_once(pool: Any) -> None:
    service = Orders(pool)
    on_hand, reserved = await stock(pool)
    before = await rows(pool)
    first = await place(service, "once", 2)
    assert first.status_code == 201
    assert body(first)["total"] == 2 * PRICE
    assert first.headers["location"] == f"/v1/orders/{body(first)['id']}"
    # From the same process, from another one, and at the same time.
    others = await asyncio.gather(*(place(Orders(pool), "once", 2) for _ in range(5)), place(service, "once", 2))
    for other in others:
        assert (other.status_code, other.body) == (201, first.body)
        assert other.headers["idempotent-replayed"] == "true"
    assert (await place(service, "once", 3)).status_code == 422
    assert await stock(pool) == (on_hand - 2, reserved + 2)
    assert await rows(pool) == [count + 1 for count in before]


async def test_what_is_refused_changes_nothing_and_is_remembered(pool: Any) -> None:
    service = Orders(pool)
    level = await stock(pool)
    await pool.execute("UPDATE stock SET on_hand = 3 WHERE sku = $1", SKU)
    orders_before = await pool.fetchval("SELECT count(*) FROM orders")
    short = await place(service, "short", 4)
    assert (short.status_code, body(short)["code"]) == (409, "insufficient_stock")
    await pool.execute("UPDATE stock SET on_hand = $2, reserved = $3 WHERE sku = $1", SKU, *level)
    assert (await place(service, "short", 4)).status_code == 409
    unknown = await place(service, "unknown", sku="none")
    assert (unknown.status_code, body(unknown)["code"]) == (422, "unknown_product")
    assert (await place(service, None)).status_code == 400
    assert (await place(service, "a key")).status_code == 400
    assert (await place(service, "token", token="Bearer x")).status_code == 401
    assert await stock(pool) == level
    assert await pool.fetchval("SELECT count(*) FROM orders") == orders_before


async def test_a_price_that_changed_is_read_again(pool: Any) -> None:
    service = Orders(pool)
    assert (await place(service, "old-price")).status_code == 201
    await pool.execute("UPDATE product SET price = price + 5, version = version + 1 WHERE sku = $1", SKU)
    answer = await place(service, "new-price")
    assert (answer.status_code, body(answer)["total"]) == (201, PRICE + 5)
    await pool.execute("UPDATE product SET price = price - 5, version = version + 1 WHERE sku = $1", SKU)


async def test_an_id_that_another_process_drew_is_drawn_again(pool: Any) -> None:
    service, other = Orders(pool), Orders(pool)
    taken = body(await place(other, "first-id"))["id"]
    service._ids = Ids(clock_ms=lambda: 0)  # behind what was drawn last, so it counts up from there
    service._ids._last = taken - 1
    answer = await place(service, "second-id")
    assert (answer.status_code, body(answer)["id"]) == (201, taken + 1)


def test_the_product_is_on_sale(database: PostgresServer) -> None:
    assert int(database.sql("-c", f"SELECT on_hand + reserved FROM stock WHERE sku = '{SKU}'")) == STOCK
