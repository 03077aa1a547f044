"""The order service over HTTP.

    PUT  /v1/products/{sku}        staff: create (201) or replace (200)   {sku, name, price, currency}
    GET  /v1/products/{sku}        anyone                                 200 as above
    POST /v1/products/{sku}/stock  staff, Idempotency-Key                 201 {id, sku, delta, reason, …}
    GET  /v1/products/{sku}/stock  staff                                  200 {sku, on_hand, reserved}
                                   anyone                                 200 {sku, available}
    POST /v1/orders                Idempotency-Key                        201 an order, pending_payment
    GET  /v1/orders/{id}           owner or staff; others get 404         200 an order
    GET  /order/{id}               owner or staff; others get 404         200 {id, user_id, total}

An order for a product that does not exist is 422 with a pointer to its line, since the body is at fault and not the
path; a path that names an unknown product is 404.
"""

from __future__ import annotations

import re
from typing import Annotated, Final

from aiohttp import web
from msgspec import Meta, Struct

import kvstore
from services.orders.catalogue import Catalogue, no_product
from services.orders.placing import Placement, Placing, order_body
from services.orders.records import (
    AMOUNT_MAX,
    SKU_PATTERN,
    Order,
    Product,
    decode_order,
    encode,
    order_key,
    product_key,
)
from services.web.app import json_response, new_app
from services.web.bodies import BodyReader, Name, RequestBody, Text
from services.web.etags import etag, precondition, tagged_response
from services.web.idempotency import idempotency_of
from services.web.ids import now_ms, parse_id
from services.web.logs import AccessLog
from services.web.problems import Problem, field_problem
from services.web.tokens import Caller, SigningKeys, Tokens

_SKU: Final = re.compile(SKU_PATTERN)
DELTA_MAX: Final = 1_000_000_000


class ProductInput(RequestBody, frozen=True):
    name: Name
    price: Annotated[int, Meta(ge=0, le=AMOUNT_MAX)]
    currency: Annotated[str, Meta(pattern=r"\A[A-Z]{3}\Z")]


class AdjustmentInput(RequestBody, frozen=True):
    delta: Annotated[int, Meta(ge=-DELTA_MAX, le=DELTA_MAX)]
    reason: Text


class ProductBody(Struct, frozen=True):
    sku: str
    name: str
    price: int
    currency: str


class StockBody(Struct, frozen=True):
    """For staff."""

    sku: str
    on_hand: int
    reserved: int


class AvailabilityBody(Struct, frozen=True):
    """For everyone else: how much others have reserved is not their business."""

    sku: str
    available: int


class OrderTotalBody(Struct, frozen=True):
    id: int
    user_id: int
    total: int


def create_app(store: kvstore.Client, access_log: AccessLog | None = None) -> web.Application:
    app = new_app(store, access_log)
    endpoints = _Endpoints(store, Tokens(SigningKeys(store)))
    app.add_routes(
        [
            web.post("/v1/orders", endpoints.place_order),
            web.get("/v1/orders/{id}", endpoints.read_order),
            web.get("/order/{id}", endpoints.read_order_total),
            web.put("/v1/products/{sku}", endpoints.put_product),
            web.get("/v1/products/{sku}", endpoints.read_product),
            web.post("/v1/products/{sku}/stock", endpoints.adjust_stock),
            web.get("/v1/products/{sku}/stock", endpoints.read_stock),
        ]
    )
    return app


class _Endpoints:
    def __init__(self, store: kvstore.Client, tokens: Tokens) -> None:
        self._store = store
        self._tokens = tokens
        self._catalogue = Catalogue(store)
        self._placing = Placing(store, self._catalogue)
        self._products = BodyReader(ProductInput)
        self._adjustments = BodyReader(AdjustmentInput)
        self._placements = BodyReader(Placement)

    # --- orders -------------------------------------------------------------------------------------------------------

    async def place_order(self, request: web.Request) -> web.Response:
        caller = await self._tokens.caller(request)
        placement = await self._placements.read(request)
        idempotency = idempotency_of(request, caller, "/v1/orders", placement)
        return await self._placing.place(request, idempotency, caller.user_id, placement)

    async def read_order(self, request: web.Request) -> web.Response:
        order, revision = await self._order(request)
        return tagged_response(request, order_body(order), revision)

    async def read_order_total(self, request: web.Request) -> web.Response:
        order, revision = await self._order(request)
        return tagged_response(request, encode(OrderTotalBody(order.id, order.user_id, order.total)), revision)

    async def _order(self, request: web.Request) -> tuple[Order, int]:
        caller = await self._tokens.caller(request)
        order_id = parse_id(request.match_info["id"])
        record = await self._store.get(order_key(order_id)) if order_id is not None else None
        order = decode_order(record.value) if record is not None else None
        # Another's order and none at all look the same.
        if record is None or order is None or not (order.user_id == caller.user_id or caller.is_staff):
            raise Problem("not_found", "There is no such order, or none that you may read")
        return order, record.mod_revision

    # --- products and stock -------------------------------------------------------------------------------------------

    async def put_product(self, request: web.Request) -> web.Response:
        await self._staff(request)
        sku = _sku(request)
        body = await self._products.read(request)
        product = Product(sku, body.name, body.price, body.currency, now_ms())
        stored, created = await self._catalogue.put(product, precondition(request, product_key(sku)))
        response = json_response(_product_body(product), 201 if created else 200)
        response.headers["ETag"] = etag(stored.revision)
        if created:
            response.headers["Location"] = f"/v1/products/{sku}"
        return response

    async def read_product(self, request: web.Request) -> web.Response:
        sku = _sku(request)
        stored = await self._catalogue.read(sku)
        if stored is None:
            raise no_product(sku)
        return tagged_response(request, _product_body(stored.product), stored.revision)

    async def adjust_stock(self, request: web.Request) -> web.Response:
        caller = await self._staff(request)
        sku = _sku(request)
        body = await self._adjustments.read(request)
        if body.delta == 0:
            raise field_problem("/delta", "invalid_value", "An adjustment by 0 adjusts nothing")
        idempotency = idempotency_of(request, caller, f"/v1/products/{sku}/stock", body)
        return await self._catalogue.adjust(request, idempotency, sku, body.delta, body.reason, caller.user_id)

    async def read_stock(self, request: web.Request) -> web.Response:
        caller = await self._tokens.caller(request) if "Authorization" in request.headers else None
        sku = _sku(request)
        level = await self._catalogue.stock(sku)
        if level is None:
            raise no_product(sku)
        if caller is not None and caller.is_staff:
            return json_response(encode(StockBody(sku, level.on_hand, level.reserved)))
        return json_response(encode(AvailabilityBody(sku, level.on_hand)))

    # --- who asks -----------------------------------------------------------------------------------------------------

    async def _staff(self, request: web.Request) -> Caller:
        caller = await self._tokens.caller(request)
        if not caller.is_staff:
            raise Problem("forbidden", "This is for staff")
        return caller


def _sku(request: web.Request) -> str:
    sku = request.match_info["sku"]
    if not _SKU.match(sku):
        raise no_product(sku)
    return sku


def _product_body(product: Product) -> bytes:
    return encode(ProductBody(product.sku, product.name, product.price, product.currency))
