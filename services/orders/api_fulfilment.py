"""Endpoints of shipments and returns."""

from __future__ import annotations

from typing import Annotated

from aiohttp import web
from msgspec import Meta

from services.orders import bodies, fulfilling
from services.orders.api_orders import Quantities, quantities
from services.orders.api_payments import Number
from services.orders.bodies import ReturnBody, ShipmentBody
from services.orders.book import OrderBook, Said
from services.orders.draft import Draft
from services.orders.placing import LineBody
from services.orders.records import LINES_MAX, decode_return, decode_shipment, encode
from services.payments.provider import AMOUNT_MAX
from services.web.answers import json_response
from services.web.bodies import Name, RequestBody, Text
from services.web.endpoints import Access, Call, get, post
from services.web.etags import tagged_response
from services.web.ids import Id


class ShipmentInput(RequestBody, frozen=True):
    lines: Quantities
    carrier: Name
    tracking: Name


class ReturnInput(RequestBody, frozen=True):
    lines: Quantities
    reason: Text


class DecisionInput(RequestBody, frozen=True):
    note: Text


class ReceiptInput(RequestBody, frozen=True):
    """`restocked`: what of it can be sold again; the rest is scrapped. `refund_amount`: what to give back, if not what
    the goods cost; 0 for nothing."""

    note: Text
    restocked: Annotated[tuple[LineBody, ...], Meta(max_length=LINES_MAX)] = ()
    refund_amount: Annotated[int, Meta(ge=0, le=AMOUNT_MAX)] | None = None


class FulfilmentEndpoints:
    def __init__(self, book: OrderBook) -> None:
        self._book = book

    @post(
        "/v1/orders/{id}/shipments",
        {201: ShipmentBody},
        access=Access.STAFF,
        idempotent=True,
        problems=("order_state", "not_in_order", "not_paid", "no_delivery_address"),
    )
    async def ship_order(self, call: Call, id: Id, body: ShipmentInput) -> web.Response:
        """Ship lines of an order, or parts of them

        Somebody has to have said where it goes to.
        """

        def decide(draft: Draft) -> Said:
            shipment = fulfilling.ship(draft, quantities(body.lines), body.carrier, body.tracking)
            return encode(bodies.shipment_of(shipment)), f"/v1/orders/{id}/shipments/{shipment.number}"

        return await self._book.change(call, id, decide)

    @get("/v1/orders/{id}/shipments", {200: list[ShipmentBody]}, access=Access.SIGNED_IN)
    async def list_shipments(self, call: Call, id: Id) -> web.Response:
        """List an order's shipments, the oldest first"""
        whole = await self._book.read_for(call, id)
        return json_response(encode([bodies.shipment_of(shipment) for shipment in whole.shipments.values()]))

    @get("/v1/orders/{id}/shipments/{number}", {200: ShipmentBody, 304: None}, access=Access.SIGNED_IN)
    async def read_shipment(self, call: Call, id: Id, number: Number) -> web.Response:
        """Read a shipment"""
        shipment, revision = await self._book.read_part_for(call, id, "shipment", number, decode_shipment)
        return tagged_response(call.request, encode(bodies.shipment_of(shipment)), revision)

    @post(
        "/v1/orders/{id}/shipments/{number}/deliver",
        {200: ShipmentBody},
        access=Access.STAFF,
        idempotent=True,
        problems=("order_state",),
    )
    async def deliver_shipment(self, call: Call, id: Id, number: Number) -> web.Response:
        """Say that a shipment has arrived"""

        def decide(draft: Draft) -> Said:
            return encode(bodies.shipment_of(fulfilling.deliver(draft, number))), ""

        return await self._book.change(call, id, decide)

    @post(
        "/v1/orders/{id}/returns",
        {201: ReturnBody},
        access=Access.SIGNED_IN,
        idempotent=True,
        problems=("order_state", "not_in_order"),
    )
    async def request_return(self, call: Call, id: Id, body: ReturnInput) -> web.Response:
        """Ask to return what was delivered"""

        def decide(draft: Draft) -> Said:
            asked = fulfilling.request_return(draft, quantities(body.lines), body.reason)
            return encode(bodies.return_of(asked)), f"/v1/orders/{id}/returns/{asked.number}"

        return await self._book.change(call, id, decide)

    @get("/v1/orders/{id}/returns", {200: list[ReturnBody]}, access=Access.SIGNED_IN)
    async def list_returns(self, call: Call, id: Id) -> web.Response:
        """List an order's returns, the oldest first"""
        whole = await self._book.read_for(call, id)
        return json_response(encode([bodies.return_of(one) for one in whole.returns.values()]))

    @get("/v1/orders/{id}/returns/{number}", {200: ReturnBody, 304: None}, access=Access.SIGNED_IN)
    async def read_return(self, call: Call, id: Id, number: Number) -> web.Response:
        """Read a return"""
        found, revision = await self._book.read_part_for(call, id, "return", number, decode_return)
        return tagged_response(call.request, encode(bodies.return_of(found)), revision)

    @post(
        "/v1/orders/{id}/returns/{number}/approve",
        {200: ReturnBody},
        access=Access.STAFF,
        idempotent=True,
        problems=("order_state",),
    )
    async def approve_return(self, call: Call, id: Id, number: Number, body: DecisionInput) -> web.Response:
        """Approve a return: the customer may send the goods"""

        def decide(draft: Draft) -> Said:
            return encode(bodies.return_of(fulfilling.approve_return(draft, number, body.note))), ""

        return await self._book.change(call, id, decide)

    @post(
        "/v1/orders/{id}/returns/{number}/reject",
        {200: ReturnBody},
        access=Access.STAFF,
        idempotent=True,
        problems=("order_state",),
    )
    async def reject_return(self, call: Call, id: Id, number: Number, body: DecisionInput) -> web.Response:
        """Reject a return"""

        def decide(draft: Draft) -> Said:
            return encode(bodies.return_of(fulfilling.reject_return(draft, number, body.note))), ""

        return await self._book.change(call, id, decide)

    @post(
        "/v1/orders/{id}/returns/{number}/receive",
        {200: ReturnBody},
        access=Access.STAFF,
        idempotent=True,
        problems=("order_state", "not_in_order", "amount_too_large", "too_many_refunds"),
    )
    async def receive_return(self, call: Call, id: Id, number: Number, body: ReceiptInput) -> web.Response:
        """Take in what came back, and refund it"""

        def decide(draft: Draft) -> Said:
            received = fulfilling.receive_return(
                draft, number, quantities(body.restocked), body.refund_amount, body.note
            )
            return encode(bodies.return_of(received)), ""

        return await self._book.change(call, id, decide)
