"""The order service over HTTP: products, their stock, carts, orders. `/docs` shows every endpoint.

An order for a product that does not exist is 422 with a pointer to its line, since the body is at fault and not the
path; a path that names an unknown product is 404.
"""

from __future__ import annotations

from aiohttp import web
from msgspec import Struct

import kvstore
from services.orders.api_carts import CartApi
from services.orders.api_products import ProductApi, StockApi
from services.orders.carts import Carts
from services.orders.catalogue import Catalogue
from services.orders.placing import OrderBody, Placement, Placing, order_body
from services.orders.records import Order, decode_order, encode, order_key
from services.orders.search import ProductSearch
from services.web.app import new_app
from services.web.endpoints import Access, Api, Call, get, post
from services.web.etags import tagged_response
from services.web.idempotency import IdempotencyKeys
from services.web.ids import Id
from services.web.limits import Limit
from services.web.logs import AccessLog
from services.web.problems import Problem
from services.web.tokens import SigningKeys, Tokens


class OrderTotalBody(Struct, frozen=True):
    id: int
    user_id: int
    total: int


def create_app(
    store: kvstore.Client, access_log: AccessLog | None = None, limit: Limit | None = None
) -> web.Application:
    catalogue, carts = Catalogue(store), Carts(store)
    api = Api(
        "Order service", "Products, stock, carts and orders.", Tokens(SigningKeys(store)), IdempotencyKeys(store), limit
    )
    api.add(ProductApi(catalogue, ProductSearch(store)), tag="Products")
    api.add(StockApi(catalogue), tag="Stock")
    api.add(CartApi(store, carts), tag="Carts")
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
