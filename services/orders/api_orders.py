"""Endpoints of orders: place, read, find, cancel; their events; and what of them staff have to look at."""

from __future__ import annotations

from typing import Annotated

import msgspec
from aiohttp import web
from msgspec import Meta

import kvstore
from services.orders import ending, fulfilling
from services.orders.bodies import (
    EventBody,
    OrderBody,
    OrderTotalBody,
    ShipToBody,
    StaffOrderBody,
    event_of,
    order_body,
    order_of,
    ship_to_of,
)
from services.orders.book import OrderBook, Said, may_see, no_order
from services.orders.draft import Draft
from services.orders.feed import EventFeed
from services.orders.order_search import AttentionCode, OrderQuery, OrderSearch
from services.orders.placing import LineBody, Placement, Placing
from services.orders.records import (
    LINES_MAX,
    Order,
    Quantity,
    ShipTo,
    address_key,
    decode_event,
    decode_order,
    decode_ship_to,
    encode,
    events_of,
    order_key,
)
from services.web.addresses import AddressInput, check_country
from services.web.answers import json_response
from services.web.bodies import RequestBody, Text
from services.web.endpoints import Access, Call, EventStream, get, post
from services.web.etags import tagged_response
from services.web.ids import Id
from services.web.paging import Page, PageQuery, page_of
from services.web.problems import Problem

Quantities = Annotated[tuple[LineBody, ...], Meta(min_length=1, max_length=LINES_MAX)]


class CancelInput(RequestBody, frozen=True):
    reason: Text


class CancelLinesInput(RequestBody, frozen=True):
    lines: Quantities
    reason: Text


def quantities(lines: tuple[LineBody, ...]) -> tuple[Quantity, ...]:
    return tuple(Quantity(line.sku, line.quantity) for line in lines)


class OrderEndpoints:
    def __init__(self, store: kvstore.Client, placing: Placing, book: OrderBook, feed: EventFeed) -> None:
        self._store = store
        self._placing = placing
        self._book = book
        self._search = OrderSearch(store)
        self._feed = feed

    @post(
        "/v1/orders",
        {201: OrderBody},
        access=Access.SIGNED_IN,
        idempotent=True,
        problems=(
            "unknown_product", "product_unavailable", "insufficient_stock", "mixed_currencies", "total_too_large",
            "total_changed", "not_found", "cart_ordered", "cart_changed", "cart_empty", "products_changing",
        ),
    )  # fmt: skip
    async def place_order(self, call: Call, body: Placement) -> web.Response:
        """Place an order

        All of it or nothing: where one product is short, nothing is reserved. It has to be paid until `expires_at`;
        after that its goods are sold to others. One that costs nothing is confirmed at once.
        """
        return await self._placing.place(call.request, call.idempotency, call.caller.user_id, body)

    @get("/v1/orders", {200: Page[OrderBody]}, access=Access.SIGNED_IN, problems=("forbidden",))
    async def list_orders(self, call: Call, query: OrderQuery) -> web.Response:
        """List orders, the newest first

        One's own; for staff those of all, or of one customer. A page that had to look at very many orders may hold
        fewer than `limit`, or none, and yet have a `next_cursor`: go on with it.
        """
        return json_response(encode(await self._search.page(call.caller, query)))

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

    @get("/v1/orders/{id}/details", {200: StaffOrderBody, 304: None}, access=Access.STAFF)
    async def read_order_details(self, call: Call, id: Id) -> web.Response:
        """Read an order as staff: where it goes to, and whether it needs attention"""
        result = await self._store.txn(success=[kvstore.Range(order_key(id)), kvstore.Range(address_key(id))])
        orders, addresses = (found.records for found in result.results if isinstance(found, kvstore.RangeResult))
        if not orders:
            raise no_order()
        order = decode_order(orders[0].value)
        ship_to = ship_to_of(decode_ship_to(addresses[0].value)) if addresses else None
        codes = order.attention_codes
        body = encode(StaffOrderBody(order_of(order), codes[-1] if codes else None, codes, ship_to))
        # Where it goes to is a record of its own, which goes when its customer's account is erased.
        revisions = (orders[0].mod_revision, addresses[0].mod_revision if addresses else 0)
        return tagged_response(call.request, body, *revisions)

    @post(
        "/v1/orders/{id}/cancel", {200: OrderBody}, access=Access.SIGNED_IN, idempotent=True, problems=("order_state",)
    )
    async def cancel_order(self, call: Call, id: Id, body: CancelInput) -> web.Response:
        """Cancel an order of which nothing is shipped

        What is held for it is given up and what was paid goes back; until that is done it is `cancelling`.
        """

        def decide(draft: Draft) -> Said:
            ending.cancel(draft, body.reason)
            return order_body(draft.order), ""

        return await self._book.change(call, id, decide)

    @post(
        "/v1/orders/{id}/cancel-lines",
        {200: OrderBody},
        access=Access.STAFF,
        idempotent=True,
        problems=("order_state", "not_in_order", "too_many_refunds"),
    )
    async def cancel_lines(self, call: Call, id: Id, body: CancelLinesInput) -> web.Response:
        """Cancel what cannot be shipped of a confirmed order

        What was paid for it goes back.
        """

        def decide(draft: Draft) -> Said:
            ending.cancel_lines(draft, quantities(body.lines), body.reason)
            return order_body(draft.order), ""

        return await self._book.change(call, id, decide)

    @get("/v1/orders/{id}/ship-to", {200: ShipToBody, 304: None}, access=Access.SIGNED_IN)
    async def read_ship_to(self, call: Call, id: Id) -> web.Response:
        """Read where an order goes to"""
        await self._order(call, id)
        record = await self._store.get(address_key(id))
        if record is None:
            raise Problem("not_found", "Nobody has said where the order goes to")
        return tagged_response(call.request, encode(ship_to_of(decode_ship_to(record.value))), record.mod_revision)

    @post(
        "/v1/orders/{id}/ship-to",
        {200: ShipToBody},
        access=Access.SIGNED_IN,
        idempotent=True,
        problems=("order_state",),
    )
    async def change_ship_to(self, call: Call, id: Id, body: AddressInput) -> web.Response:
        """Say where an order goes to, while nothing of it is shipped"""
        check_country(body)
        ship_to = ShipTo(**msgspec.structs.asdict(body))

        def decide(draft: Draft) -> Said:
            fulfilling.send_to(draft, ship_to)
            return encode(ship_to_of(ship_to)), ""

        return await self._book.change(call, id, decide)

    @post("/v1/orders/{id}/attended", {200: OrderBody}, access=Access.STAFF, idempotent=True)
    async def attend_order(self, call: Call, id: Id) -> web.Response:
        """Say that an order needs no more attention

        For whatever reason it did, also one that came a moment ago.
        """

        def decide(draft: Draft) -> Said:
            draft.attended(*draft.order.attention_codes)
            return order_body(draft.order), ""

        return await self._book.change(call, id, decide)

    @post("/v1/orders/{id}/attended/{code}", {200: OrderBody}, access=Access.STAFF, idempotent=True)
    async def attend_order_code(self, call: Call, id: Id, code: AttentionCode) -> web.Response:
        """Say that an order needs no more attention for one reason

        It still does for the others. One that is not open (any more) changes nothing.
        """

        def decide(draft: Draft) -> Said:
            draft.attended(code)
            return order_body(draft.order), ""

        return await self._book.change(call, id, decide)

    @get("/v1/orders/{id}/events", {200: Page[EventBody]}, access=Access.SIGNED_IN)
    async def list_events(self, call: Call, id: Id, query: PageQuery) -> web.Response:
        """List what happened to an order, the newest first"""
        await self._order(call, id)

        async def read(records: list[kvstore.Record]) -> list[EventBody]:
            return [event_of(decode_event(record.value), for_staff=call.caller.is_staff) for record in records]

        return json_response(encode(await page_of(self._store, events_of(id), query, read, reverse=True)))

    @get(
        "/v1/orders/{id}/events/stream",
        {200: EventStream},
        access=Access.SIGNED_IN,
        problems=("malformed_request", "too_many_streams"),
    )
    async def stream_events(self, call: Call, id: Id) -> web.StreamResponse:
        """Follow what happens to an order

        Server-sent events: each with its `seq` as the id, its type as the event, and an `EventBody` as the data. Send
        the last id as `Last-Event-ID` to go on where a stream ended; without it, it begins with the first event.

        It ends when its token expires, or its session ends: come again with a new one.
        """
        await self._order(call, id)
        return await self._feed.stream(call.request, call.caller, id)

    async def _order(self, call: Call, order_id: int) -> tuple[Order, int]:
        record = await self._store.get(order_key(order_id))
        order = decode_order(record.value) if record is not None else None
        # Another's order and none at all look the same.
        if record is None or order is None or not may_see(call, order.user_id):
            raise no_order()
        return order, record.mod_revision
