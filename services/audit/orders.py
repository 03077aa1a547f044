"""The pass over all orders: each is put together with its parts, its events and its places, and checked.

Orders and their parts are read by scans that run side by side in the order of their keys, so that a batch of orders is
all that is held.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import kvstore
from services.audit import answers, erased, forgotten, goods, history, money  # noqa: F401  they declare the checks
from services.audit.findings import declare
from services.audit.places import attention_place, state_place, user_place
from services.audit.stock import Promised
from services.audit.view import RECORD_KEY, Grouped, View, batched
from services.audit.whole import ORDER_CHECKS, Case, Work
from services.orders.carts import decode_cart
from services.orders.records import (
    Order,
    decode_event,
    decode_order,
    decode_payment,
    decode_refund,
    decode_return,
    decode_shipment,
)

ORDERS: Final = b"order/"
ADDRESSES: Final = b"order-address/"
PARTS: Final[dict[str, tuple[bytes, Callable[[bytes], Any]]]] = {
    "payment": (b"payment/", decode_payment),
    "refund": (b"refund/", decode_refund),
    "shipment": (b"shipment/", decode_shipment),
    "return": (b"return/", decode_return),
    "event": (b"order-event/", decode_event),
}
ORPHAN: Final = declare("orphan", "Everything that belongs to an order belongs to one that is there.")
# Orders that are put together at once: with a hundred lines, and a hundred parts each, some 50 MB.
_BATCH: Final = 64


class OrderPass:
    """One run over all orders of a view. `counts` says how many of each kind there are, `charged` which payments have
    authorised something and `refunded` which refunds succeeded, where that is asked for."""

    def __init__(self, view: View, work: Work, *, for_books: bool) -> None:
        self._view = view
        self._work = work
        self._for_books = for_books
        self.promised = Promised()
        self.counts = dict.fromkeys(["order", *PARTS], 0)
        self.charged: set[str] = set()
        self.refunded: set[str] = set()

    async def run(self) -> None:
        groups = {kind: Grouped(self._view, prefix, self._orphan) for kind, (prefix, _) in PARTS.items()}
        addresses = Grouped(self._view, ADDRESSES, self._orphan)
        async for batch in batched(self._view.scan(ORDERS), _BATCH):
            orders: list[tuple[bytes, Order, dict[str, list[Any]]]] = []
            with_address: set[int] = set()
            for record in batch:
                name = record.key[len(ORDERS) :]
                taken = {kind: await group.take(name) for kind, group in groups.items()}
                address = await addresses.take(name)
                order = self._view.decode(decode_order, record)
                if order is None:
                    continue
                if name != b"%d" % order.id:
                    self._view.findings.add(RECORD_KEY, record.key, f"order/{order.id}", record.key.decode())
                if address:
                    with_address.add(order.id)
                parts = {kind: self._decoded(kind, order.id, found) for kind, found in taken.items()}
                orders.append((record.key, order, parts))
            await self._check(orders, with_address)
        for group in (*groups.values(), addresses):
            await group.finish()

    def _orphan(self, record: kvstore.Record) -> None:
        self._view.findings.add(ORPHAN, record.key, "an order that it belongs to", "there is none")

    def _decoded(self, kind: str, order_id: int, records: list[kvstore.Record]) -> list[Any]:
        prefix, decoder = PARTS[kind]
        found: list[Any] = []
        for record in records:
            part = self._view.decode(decoder, record)
            if part is not None:
                number = part.attempt if kind == "payment" else part.seq if kind == "event" else part.number
                expected = b"%b%d/%06d" % (prefix, part.order_id, number)
                if record.key != expected:
                    self._view.findings.add(RECORD_KEY, record.key, expected.decode(), record.key.decode())
                found.append(part)
        return found

    async def _check(self, orders: list[tuple[bytes, Order, dict[str, list[Any]]]], with_address: set[int]) -> None:
        view = self._view
        state_places = await view.get([state_place(order) for _, order, _ in orders], keys_only=True)
        user_places = await view.get([user_place(order) for _, order, _ in orders], keys_only=True)
        attention = await view.get([attention_place(order) for _, order, _ in orders])
        carts = await view.get([b"cart/%d" % order.cart_id for _, order, _ in orders])
        for at, (key, order, parts) in enumerate(orders):
            why, cart = attention[at], carts[at]
            case = Case(
                key=key,
                order=order,
                payments=tuple(parts["payment"]),
                refunds=tuple(parts["refund"]),
                shipments=tuple(parts["shipment"]),
                returns=tuple(parts["return"]),
                events=tuple(parts["event"]),
                work=self._work,
                in_state_index=state_places[at] is not None,
                in_user_index=user_places[at] is not None,
                attention=why.value.decode(errors="replace") if why is not None else None,
                cart=view.decode(decode_cart, cart) if cart is not None and order.cart_id else None,
                has_address=order.id in with_address,
            )
            ORDER_CHECKS.run(case, view.findings)
            self._count(case)

    def _count(self, case: Case) -> None:
        self.promised.add(case)
        counts = self.counts
        counts["order"] += 1
        counts["payment"] += len(case.payments)
        counts["refund"] += len(case.refunds)
        counts["shipment"] += len(case.shipments)
        counts["return"] += len(case.returns)
        counts["event"] += len(case.events)
        if self._for_books:
            order_id = case.order.id
            self.charged.update(f"{order_id}:{one.attempt}" for one in case.payments if one.authorised)
            self.refunded.update(f"{order_id}:{one.number}" for one in case.refunds if one.state == "succeeded")
