"""The order service as FastAPI + asyncpg would have it: `POST /v1/orders`, with what ours promises for it.

One round trip to PostgreSQL for an order (`place_order` in `orders.sql`). Product records and verified tokens are
cached as ours caches them. `BENCH_POSTGRES` is where the database is. uvicorn runs it, in two processes.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any, NamedTuple

import asyncpg
import msgspec
from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from bench.peers.web.tokens import Caller, Refused, TokenCheck
from services.web.ids import Ids, now_ms, order_number, timestamp

DSN = "BENCH_POSTGRES"
# Connections of one process: the fastest of 2, 4, 8, 16 and 32. Fewer leave nothing to do while one waits for the disk,
# more only make longer the line of backends that wait for the one row.
CONNECTIONS = 16
EXPIRY_MS = 30 * 60 * 1000
# An attempt fails only where staff changed a product since it was cached, or another process drew the same id.
_ATTEMPTS_MAX = 8
_KEY = re.compile(r"\A[!-~]{1,255}\Z")
_PLACE = "SELECT * FROM place_order($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15)"
_REFUSE = "INSERT INTO idempotency VALUES ($1, $2, $3, '', $4, $5) ON CONFLICT DO NOTHING"
_encode = msgspec.json.Encoder().encode


class Line(BaseModel):
    model_config = ConfigDict(extra="forbid")

    sku: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    quantity: Annotated[int, Field(ge=1, le=1_000_000)]


class Placement(BaseModel):
    model_config = ConfigDict(extra="forbid")

    lines: Annotated[list[Line], Field(min_length=1, max_length=100)]


class Product(NamedTuple):
    sku: str
    name: str
    price: int
    currency: str
    version: int


class PlainConnection(asyncpg.Connection):  # type: ignore[misc]  # asyncpg comes without types
    """The pool would send statements that reset a session after each use; nothing here changes a session."""

    def get_reset_query(self) -> str:
        return ""


class Orders:
    """One per process."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._check = TokenCheck()
        self._products: dict[str, Product] = {}
        self._ids = Ids()

    async def caller(self, request: Request) -> Caller:
        """Raises `Refused`."""
        if self._check.is_stale():
            keys = await self._pool.fetch("SELECT kid, secret FROM signing_key")
            ended = await self._pool.fetch("SELECT id FROM ended_session")
            self._check.learn({row["kid"]: row["secret"] for row in keys}, {row["id"] for row in ended})
        return self._check.caller(request.headers.get("authorization"))

    async def place(self, request: Request, placement: Placement) -> Response:
        try:
            caller = await self.caller(request)
        except Refused as refusal:
            return _problem(401, str(refusal))
        key = request.headers.get("idempotency-key")
        if key is None or not _KEY.match(key):
            return _problem(400, "invalid_idempotency_key" if key else "idempotency_key_required")
        scope = f"{caller.user_id} POST /v1/orders {key}"
        plain = [(line.sku, line.quantity) for line in placement.lines]
        fingerprint = hashlib.blake2b(_encode(plain), digest_size=16).hexdigest()
        demand: dict[str, int] = {}
        for sku, quantity in plain:
            demand[sku] = demand.get(sku, 0) + quantity
        skus = sorted(demand)
        for _ in range(_ATTEMPTS_MAX):
            products = await self._read(skus)
            if products is None:
                return await self._refuse(scope, fingerprint, 422, "unknown_product")
            if len({product.currency for product in products}) > 1:
                return await self._refuse(scope, fingerprint, 422, "mixed_currencies")
            try:
                return await self._attempt(scope, fingerprint, caller.user_id, products, demand)
            except asyncpg.RaiseError as error:
                if error.message == "insufficient_stock":
                    return await self._refuse(scope, fingerprint, 409, error.message)
                for sku in skus:
                    self._products.pop(sku, None)
            except asyncpg.UniqueViolationError:  # another process drew the same id: draw again, as ours does
                continue
        return _problem(503, "products_changing")

    async def _attempt(
        self, scope: str, fingerprint: str, user_id: int, products: list[Product], demand: dict[str, int]
    ) -> Response:
        order_id, now = self._ids.next(), now_ms()
        lines = [
            {
                "sku": product.sku,
                "name": product.name,
                "quantity": demand[product.sku],
                "unit_price": product.price,
                "total": demand[product.sku] * product.price,
            }
            for product in products
        ]
        number, currency = order_number(order_id), products[0].currency
        total = sum(demand[product.sku] * product.price for product in products)
        location = f"/v1/orders/{order_id}"
        body = _encode(
            {
                "id": order_id,
                "number": number,
                "user_id": user_id,
                "state": "pending_payment",
                "currency": currency,
                "lines": lines,
                "total": total,
                "created_at": timestamp(now),
            }
        )
        found = await self._pool.fetchrow(
            _PLACE, scope, fingerprint, location, body.decode(), order_id, number, user_id, currency,
            _encode(lines).decode(), total, [product.sku for product in products],
            [demand[product.sku] for product in products], [product.version for product in products], now,
            now + EXPIRY_MS,
        )  # fmt: skip
        if found is None:
            return _answer(201, body, {"Location": location})
        if found["found_fingerprint"] != fingerprint:
            return _problem(422, "idempotency_key_reused")
        headers = {"Location": found["found_location"], "Idempotent-Replayed": "true"}
        return _answer(found["found_status"], found["found_body"].encode(), headers)

    async def _read(self, skus: list[str]) -> list[Product] | None:
        missing = [sku for sku in skus if sku not in self._products]
        if missing:
            rows = await self._pool.fetch(
                "SELECT sku, name, price, currency, version FROM product WHERE sku = ANY($1)", missing
            )
            self._products.update({row["sku"]: Product(*row) for row in rows})
        products = [self._products.get(sku) for sku in skus]
        found = [product for product in products if product is not None]
        return found if len(found) == len(skus) else None

    async def _refuse(self, scope: str, fingerprint: str, status: int, code: str) -> Response:
        problem = _problem(status, code)
        await self._pool.execute(_REFUSE, scope, fingerprint, status, bytes(problem.body).decode(), now_ms())
        return problem


def _answer(status: int, body: bytes, headers: dict[str, str]) -> Response:
    media_type = "application/json" if status < 400 else "application/problem+json"
    return Response(body, status, {"Cache-Control": "no-store", **headers}, media_type=media_type)


def _problem(status: int, code: str) -> Response:
    return _answer(status, _encode({"type": f"/problems/{code}", "status": status, "code": code}), {})


@asynccontextmanager
async def _lifespan(application: FastAPI) -> AsyncIterator[None]:
    pool = await asyncpg.create_pool(
        os.environ[DSN], min_size=CONNECTIONS, max_size=CONNECTIONS, connection_class=PlainConnection
    )
    async with pool:
        application.state.orders = Orders(pool)
        yield


app = FastAPI(lifespan=_lifespan)


@app.get("/readyz")
async def readyz() -> Response:
    return Response(status_code=200)


@app.post("/v1/orders")
async def place_order(request: Request, placement: Placement) -> Response:
    orders: Orders = app.state.orders
    return await orders.place(request, placement)
