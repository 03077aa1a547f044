"""The order service over HTTP: products, their stock, orders. `/docs` shows every endpoint.

An order for a product that does not exist is 422 with a pointer to its line, since the body is at fault and not the
path; a path that names an unknown product is 404.
"""

from __future__ import annotations

from typing import Annotated, Final

from aiohttp import web
from msgspec import Meta, Struct

import kvstore
from services.orders.catalogue import AdjustmentBody, Catalogue, no_product
from services.orders.placing import OrderBody, Placement, Placing, Sku, order_body
from services.orders.records import (
    AMOUNT_MAX,
    Order,
    Product,
    decode_order,
    encode,
    order_key,
    product_key,
)
from services.web.answers import json_response
from services.web.app import new_app
from services.web.bodies import Name, RequestBody, Text
from services.web.endpoints import Access, Api, Call, Condition, get, post, put
from services.web.etags import etag, precondition, tagged_response
from services.web.idempotency import IdempotencyKeys
from services.web.ids import Id, now_ms
from services.web.limits import Limit
from services.web.logs import AccessLog
from services.web.problems import Problem, field_problem
from services.web.tokens import SigningKeys, Tokens

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


def create_app(
    store: kvstore.Client, access_log: AccessLog | None = None, limit: Limit | None = None
) -> web.Application:
    catalogue = Catalogue(store)
    api = Api("Order service", "Products, stock and orders.", Tokens(SigningKeys(store)), IdempotencyKeys(store), limit)
    api.add(_Products(catalogue), tag="Products")
    api.add(_Orders(store, Placing(store, catalogue)), tag="Orders")
    return new_app(store, api, access_log)


class _Orders:
    def __init__(self, store: kvstore.Client, placing: Placing) -> None:
        self._store = store
        self._placing = placing

    @post(
        "/v1/orders",
        {201: OrderBody},
        access=Access.SIGNED_IN,
        idempotent=True,
        problems=("unknown_product", "insufficient_stock", "mixed_currencies", "total_too_large", "products_changing"),
    )
    async def place_order(self, call: Call, body: Placement) -> web.Response:
        """Place an order

        All of it or nothing: where one product is short, nothing is reserved.
        """
        return await self._placing.place(call.request, call.idempotency, call.caller.user_id, body)

    @get("/v1/orders/{id}", {200: OrderBody, 304: None}, access=Access.SIGNED_IN)
    async def read_order(self, call: Call, id: Id) -> web.Response:
        """Read an order

        The owner's own, or any for staff; for others there is nothing there.
        """
        order, revision = await self._order(call, id)
        return tagged_response(call.request, order_body(order), revision)

    @get("/order/{id}", {200: OrderTotalBody, 304: None}, access=Access.SIGNED_IN)
    async def read_order_total(self, call: Call, id: Id) -> web.Response:
        """Read an order's total"""
        order, revision = await self._order(call, id)
        body = encode(OrderTotalBody(order.id, order.user_id, order.total))
        return tagged_response(call.request, body, revision)

    async def _order(self, call: Call, order_id: int) -> tuple[Order, int]:
        record = await self._store.get(order_key(order_id))
        order = decode_order(record.value) if record is not None else None
        # Another's order and none at all look the same.
        if record is None or order is None or not (order.user_id == call.caller.user_id or call.caller.is_staff):
            raise Problem("not_found", "There is no such order, or none that you may read")
        return order, record.mod_revision


class _Products:
    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue

    @put("/v1/products/{sku}", {200: ProductBody, 201: ProductBody}, access=Access.STAFF, condition=Condition.OFFERED)
    async def put_product(self, call: Call, sku: Sku, body: ProductInput) -> web.Response:
        """Create or replace a product"""
        product = Product(sku, body.name, body.price, body.currency, now_ms())
        stored, created = await self._catalogue.put(product, precondition(call.request, product_key(sku)))
        response = json_response(_product_body(product), 201 if created else 200)
        response.headers["ETag"] = etag(stored.revision)
        if created:
            response.headers["Location"] = f"/v1/products/{sku}"
        return response

    @get("/v1/products/{sku}", {200: ProductBody, 304: None})
    async def read_product(self, call: Call, sku: Sku) -> web.Response:
        """Read a product"""
        stored = await self._catalogue.read(sku)
        if stored is None:
            raise no_product(sku)
        return tagged_response(call.request, _product_body(stored.product), stored.revision)

    @post(
        "/v1/products/{sku}/stock",
        {201: AdjustmentBody},
        access=Access.STAFF,
        idempotent=True,
        problems=("insufficient_stock", "stock_too_large"),
    )
    async def adjust_stock(self, call: Call, sku: Sku, body: AdjustmentInput) -> web.Response:
        """Adjust what is on hand, with a reason"""
        if body.delta == 0:
            raise field_problem("/delta", "invalid_value", "An adjustment by 0 adjusts nothing")
        return await self._catalogue.adjust(
            call.request, call.idempotency, sku, body.delta, body.reason, call.caller.user_id
        )

    @get("/v1/products/{sku}/stock", {200: (StockBody, AvailabilityBody)})
    async def read_stock(self, call: Call, sku: Sku) -> web.Response:
        """Read how much there is

        What is available; for staff also how much of it placed orders hold.
        """
        level = await self._catalogue.stock(sku)
        if level is None:
            raise no_product(sku)
        caller = call.caller_if_any
        if caller is not None and caller.is_staff:
            return json_response(encode(StockBody(sku, level.on_hand, level.reserved)))
        return json_response(encode(AvailabilityBody(sku, level.on_hand)))


def _product_body(product: Product) -> bytes:
    return encode(ProductBody(product.sku, product.name, product.price, product.currency))
