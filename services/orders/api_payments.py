"""Endpoints of payments and refunds, and where the provider's webhooks come in.

No endpoint calls the provider: each writes down what is to be done, and answers; a worker does it. What becomes of it
is read here, or followed in the order's events. The webhook and a customer who comes back from the bank give the same
command: look at this payment now.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Annotated, Final

import aiohttp
from aiohttp import web
from msgspec import Meta

import kvstore
from services.orders import bodies, paying
from services.orders.bodies import PaymentBody, RefundBody
from services.orders.book import OrderBook, Said
from services.orders.draft import PAYMENT_STEP, REFUND_STEP, Draft, payment_subject
from services.orders.records import CaptureMode, InboxMark, decode_payment, decode_refund, encode, inbox_key
from services.payments.loading import OpenProvider
from services.payments.provider import AMOUNT_MAX, InvalidWebhook, Operation, Provider
from services.web.answers import json_response
from services.web.bodies import BODY_TIMEOUT_S, RequestBody, Text
from services.web.endpoints import Access, Call, get, post
from services.web.etags import tagged_response
from services.web.ids import Id, now_ms
from services.web.leases import SharedLease
from services.web.problems import Problem
from services.work import steps

# Webhooks are sent for three days at most; a month is what a late dispute about one takes to come up.
INBOX_KEPT_S: Final = 30 * 24 * 3600.0
_INBOX_LEASE_FILLS_S: Final = 24 * 3600.0

Number = Annotated[int, Meta(ge=1, le=999_999)]
Amount = Annotated[int, Meta(ge=1, le=AMOUNT_MAX)]
ReturnUrl = Annotated[
    str,
    Meta(max_length=500, pattern=r"\Ahttps?://[!-~]+\Z", description="Where the provider sends the customer back to."),
]


class PaymentInput(RequestBody, frozen=True):
    """`token` stands for what the customer pays with; the provider gave it to the customer's browser."""

    token: Annotated[str, Meta(min_length=1, max_length=200, pattern=r"\A[!-~]+\Z", examples=["tok_ok"])]
    capture: CaptureMode = CaptureMode.AUTOMATIC
    return_url: ReturnUrl | None = None


class CaptureInput(RequestBody, frozen=True):
    """Without `amount`: all that is authorised and owed."""

    amount: Amount | None = None


class RefundInput(RequestBody, frozen=True):
    """Without `amount`: all that is captured and not refunded."""

    reason: Text
    amount: Amount | None = None


class SettlementInput(RequestBody, frozen=True):
    """How it was given back."""

    note: Text


class PaymentEndpoints:
    def __init__(self, book: OrderBook) -> None:
        self._book = book

    @post(
        "/v1/orders/{id}/payments",
        {201: PaymentBody},
        access=Access.SIGNED_IN,
        idempotent=True,
        problems=("forbidden", "order_state", "payment_in_progress", "too_many_payments"),
    )
    async def pay_order(self, call: Call, id: Id, body: PaymentInput) -> web.Response:
        """Pay an order

        It begins an attempt to pay the whole: read it, or follow the order's events, to learn what becomes of it. After
        one that failed another may be made. With `capture` `manual`, which is for staff, the money is only held until
        staff take it.
        """

        def decide(draft: Draft) -> Said:
            if body.capture is CaptureMode.MANUAL and not call.caller.is_staff:
                raise Problem("forbidden", "Only staff decide that money is taken later")
            payment = paying.pay(draft, body.token, body.capture, body.return_url or "")
            return encode(bodies.payment_of(payment)), f"/v1/orders/{id}/payments/{payment.attempt}"

        return await self._book.change(call, id, decide)

    @get("/v1/orders/{id}/payments", {200: list[PaymentBody]}, access=Access.SIGNED_IN)
    async def list_payments(self, call: Call, id: Id) -> web.Response:
        """List the attempts to pay an order, the oldest first"""
        whole = await self._book.read_for(call, id)
        return json_response(encode([bodies.payment_of(payment) for payment in whole.payments.values()]))

    @get("/v1/orders/{id}/payments/{attempt}", {200: PaymentBody, 304: None}, access=Access.SIGNED_IN)
    async def read_payment(self, call: Call, id: Id, attempt: Number) -> web.Response:
        """Read an attempt to pay"""
        payment, revision = await self._book.read_part_for(call, id, "payment", attempt, decode_payment)
        return tagged_response(call.request, encode(bodies.payment_of(payment)), revision)

    @post("/v1/orders/{id}/payments/{attempt}/complete", {200: PaymentBody}, access=Access.SIGNED_IN, idempotent=True)
    async def complete_payment(self, call: Call, id: Id, attempt: Number) -> web.Response:
        """Say that the customer is back from the bank

        The provider is asked at once what became of the payment. It would be asked anyhow, somewhat later.
        """

        def decide(draft: Draft) -> Said:
            payment = paying.payment_of(draft, attempt)
            draft.due(PAYMENT_STEP, payment_subject(id, attempt), once=True)
            return encode(bodies.payment_of(payment)), ""

        return await self._book.change(call, id, decide)

    @post(
        "/v1/orders/{id}/payments/{attempt}/capture",
        {200: PaymentBody},
        access=Access.STAFF,
        idempotent=True,
        problems=("order_state", "amount_too_large"),
    )
    async def capture_payment(self, call: Call, id: Id, attempt: Number, body: CaptureInput) -> web.Response:
        """Take what a payment holds, or part of it"""

        def decide(draft: Draft) -> Said:
            return encode(bodies.payment_of(paying.capture(draft, attempt, body.amount))), ""

        return await self._book.change(call, id, decide)

    @post(
        "/v1/orders/{id}/refunds",
        {201: RefundBody},
        access=Access.STAFF,
        idempotent=True,
        problems=("order_state", "amount_too_large", "too_many_refunds"),
    )
    async def refund_order(self, call: Call, id: Id, body: RefundInput) -> web.Response:
        """Give back what was captured, or part of it"""

        def decide(draft: Draft) -> Said:
            refund = paying.refund(draft, body.amount, body.reason)
            return encode(bodies.refund_of(refund)), f"/v1/orders/{id}/refunds/{refund.number}"

        return await self._book.change(call, id, decide)

    @post(
        "/v1/orders/{id}/refunds/{number}/settle-outside",
        {200: RefundBody},
        access=Access.STAFF,
        idempotent=True,
        problems=("order_state",),
    )
    async def settle_refund_outside(self, call: Call, id: Id, number: Number, body: SettlementInput) -> web.Response:
        """Say that a refund that failed was given back by other means

        It counts as refunded then; an order that was being cancelled is.
        """

        def decide(draft: Draft) -> Said:
            return encode(bodies.refund_of(paying.settle_outside(draft, number, body.note))), ""

        return await self._book.change(call, id, decide)

    @get("/v1/orders/{id}/refunds", {200: list[RefundBody]}, access=Access.SIGNED_IN)
    async def list_refunds(self, call: Call, id: Id) -> web.Response:
        """List an order's refunds, the oldest first"""
        whole = await self._book.read_for(call, id)
        return json_response(encode([bodies.refund_of(refund) for refund in whole.refunds.values()]))

    @get("/v1/orders/{id}/refunds/{number}", {200: RefundBody, 304: None}, access=Access.SIGNED_IN)
    async def read_refund(self, call: Call, id: Id, number: Number) -> web.Response:
        """Read a refund"""
        refund, revision = await self._book.read_part_for(call, id, "refund", number, decode_refund)
        return tagged_response(call.request, encode(bodies.refund_of(refund)), revision)


class WebhookEndpoints:
    def __init__(self, store: kvstore.Client, open_provider: OpenProvider) -> None:
        self._store = store
        self._open_provider = open_provider
        self._provider: Provider
        self._lease = SharedLease(store, INBOX_KEPT_S, _INBOX_LEASE_FILLS_S)

    async def running(self, _: web.Application) -> AsyncIterator[None]:
        """For `cleanup_ctx`: a provider has an HTTP client, which is of one loop."""
        async with aiohttp.ClientSession() as session:
            self._provider = self._open_provider(session)
            yield

    @post(
        "/v1/webhooks/{provider}",
        {204: None},
        reads_token=False,
        signed=True,
        problems=("invalid_webhook", "body_timeout"),
    )
    async def take_webhook(self, call: Call, provider: Annotated[str, Meta(max_length=40)]) -> web.Response:
        """Take a payment provider's webhook

        For the provider alone, whose signature it must bear. An event that came before changes nothing.
        """
        if provider != self._provider.name:
            raise Problem("not_found", "There is no provider of this name")
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                body = await call.request.read()
        except TimeoutError:
            raise Problem("body_timeout", f"The body did not arrive within {BODY_TIMEOUT_S:g} s") from None
        try:
            event = self._provider.verify(call.request.headers, body, time.time())
        except InvalidWebhook as error:
            raise Problem("invalid_webhook", str(error)) from None
        if event is not None:
            order, attempt, operation = event.key.split(":")
            name, _, number = operation.partition("-")
            if name == Operation.REFUND:
                step = steps.put(REFUND_STEP, payment_subject(int(order), int(number or 1)), once=True)
            else:
                step = steps.put(PAYMENT_STEP, payment_subject(int(order), int(attempt)), once=True)
            key = inbox_key(provider, event.id)
            mark = encode(InboxMark(event.kind, event.key, now_ms()))
            await self._store.txn(
                compare=[kvstore.Compare(key, kvstore.Target.VERSION, kvstore.Relation.EQUAL, 0)],
                success=[kvstore.Put(key, mark, lease=await self._lease.take()), step],
            )
        return web.Response(status=204)
