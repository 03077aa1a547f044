"""Endpoints of carts. Another's cart is not there, but for staff, who may read it."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from aiohttp import web
from msgspec import Meta

import kvstore
from services.orders.cart_bodies import CartBody, CartItemBody, cart_body, cart_item, priced
from services.orders.carts import Carts, StoredCart, read_cart
from services.orders.records import QUANTITY_MAX, Sku, encode
from services.web.answers import json_response
from services.web.bodies import RequestBody
from services.web.endpoints import Access, Call, Condition, delete, get, post, put
from services.web.etags import check_match, etag
from services.web.ids import Id
from services.web.paging import Page, PageQuery


class QuantityInput(RequestBody, frozen=True):
    quantity: Annotated[int, Meta(ge=1, le=QUANTITY_MAX, examples=[2])]


class CartApi:
    def __init__(self, store: kvstore.Client, carts: Carts) -> None:
        self._store = store
        self._carts = carts

    @post(
        "/v1/carts", {201: CartBody}, access=Access.SIGNED_IN, idempotent=True, problems=("too_many_carts",)
    )  # fmt: skip
    async def create_cart(self, call: Call) -> web.Response:
        """Begin a cart

        At most 20 at a time; one that was not changed for 30 days ends.
        """
        user_id = call.caller.user_id
        return await self._carts.create(
            call.request, call.idempotency, user_id, lambda cart: encode(cart_body(cart, {}, {}))
        )

    @get("/v1/carts", {200: Page[CartItemBody]}, access=Access.SIGNED_IN)
    async def list_carts(self, call: Call, query: PageQuery) -> web.Response:
        """List one's carts

        Newest first; also those that were ordered, for 30 days.
        """
        page = await self._carts.page(call.caller.user_id, query)
        return json_response(encode(Page([cart_item(cart) for cart in page.data], page.has_more, page.next_cursor)))

    @get("/v1/carts/{id}", {200: CartBody}, access=Access.SIGNED_IN)
    async def read_cart(self, call: Call, id: Id) -> web.Response:
        """Read a cart

        With today's prices and stock, and with what keeps a line from being ordered. Its ETag is for `If-Match`, and
        stays the same while only prices and stock change; so `If-None-Match` is not heeded.
        """
        owner = None if call.caller.is_staff else call.caller.user_id
        return await self._response(await read_cart(self._store, owner, id))

    @put(
        "/v1/carts/{id}/lines/{sku}",
        {200: CartBody},
        access=Access.SIGNED_IN,
        condition=Condition.OFFERED,
        problems=("cart_ordered", "product_unavailable", "mixed_currencies", "too_many_lines"),
    )
    async def put_cart_line(self, call: Call, id: Id, sku: Sku, body: QuantityInput) -> web.Response:
        """Have so many of a product in a cart

        All products of a cart have one currency. There may be more in a cart than there are: it reserves nothing.
        """
        check = partial(check_match, call.request)
        return await self._response(await self._carts.put_line(call.caller.user_id, id, sku, body.quantity, check))

    @delete(
        "/v1/carts/{id}/lines/{sku}",
        {200: CartBody},
        access=Access.SIGNED_IN,
        condition=Condition.OFFERED,
        problems=("cart_ordered",),
    )
    async def delete_cart_line(self, call: Call, id: Id, sku: Sku) -> web.Response:
        """Take a product out of a cart"""
        check = partial(check_match, call.request)
        return await self._response(await self._carts.delete_line(call.caller.user_id, id, sku, check))

    @delete(
        "/v1/carts/{id}",
        {204: None},
        access=Access.SIGNED_IN,
        condition=Condition.OFFERED,
        problems=("cart_ordered",),
    )
    async def delete_cart(self, call: Call, id: Id) -> web.Response:
        """Delete a cart"""
        await self._carts.delete(call.caller.user_id, id, partial(check_match, call.request))
        return web.Response(status=204)

    async def _response(self, stored: StoredCart) -> web.Response:
        body = encode(await priced(self._store, stored.cart))
        return json_response(body, headers={"ETag": etag(stored.revision)})
