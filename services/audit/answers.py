"""Checks of what customers were told: each answer that is kept for a repeated request names something that is there;
and carts and orders name each other."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

import msgspec
from msgspec import Struct

from services.audit.findings import Difference, declare
from services.audit.view import READS_AT_ONCE, RECORD_KEY, View, batched
from services.audit.whole import ORDER_CHECKS, Case
from services.orders.carts import Cart, CartState, decode_cart
from services.orders.records import decode_order

ANSWERS: Final = b"idem/"
CARTS: Final = b"cart/"
ANSWER: Final = declare(
    "answered_order",
    "Every answer that is kept of an order that was placed, or of a payment, refund, shipment or return, names one that"
    " is there; and an order that it placed is the caller's.",
)
_PLACE: Final = re.compile(r"/v1/orders/(\d+)(?:/(payment|refund|shipment|return)s/(\d+))?")


class _Answer(Struct, frozen=True):
    """What the auditor reads of an idempotency record."""

    status: int
    location: str


_decode_answer = msgspec.json.Decoder(_Answer).decode


async def check_answers(view: View) -> int:
    """Returns how many answers were looked at."""
    answers = 0
    async for batch in batched(view.scan(ANSWERS), READS_AT_ONCE):
        named: dict[bytes, tuple[bytes, bool]] = {}
        for record in batch:
            answer = view.decode(_decode_answer, record)
            match = _PLACE.fullmatch(answer.location) if answer is not None else None
            if match is None:
                continue
            order, kind, number = match.groups()
            place = f"order/{order}" if kind is None else f"{kind}/{order}/{int(number):06d}"
            named[record.key] = (place.encode(), kind is None)
        answers += len(batch)
        found = await view.get([key for key, _ in named.values()])
        for (name, (key, is_order)), there in zip(named.items(), found, strict=True):
            if there is None:
                view.findings.add(ANSWER, name, key.decode(), "nothing there")
            elif is_order:
                caller = name[len(ANSWERS) :].partition(b" ")[0].decode()
                placed = view.decode(decode_order, there)
                if placed is not None and str(placed.user_id) != caller:
                    view.findings.add(ANSWER, name, f"an order of user {caller}", f"one of {placed.user_id}")
    return answers


@ORDER_CHECKS("ordered_cart")
def ordered_cart(case: Case) -> Iterator[Difference]:
    """A cart that was ordered names an order of its user that names it, and an order's cart, while it is kept, names
    that order."""
    cart, order = case.cart, case.order
    if cart is not None and (cart.state is not CartState.ORDERED or cart.order_id != order.id):
        yield Difference(b"cart/%d" % cart.id, f"ordered as {order.id}", f"{cart.state}, order {cart.order_id}")


@ORDER_CHECKS("cart_lines")
def cart_lines(case: Case) -> Iterator[Difference]:
    """An order from a cart has the cart's products, and as many of each."""
    if case.cart is not None:
        expected = {line.sku: line.quantity for line in case.cart.lines}
        found = {line.sku: line.quantity for line in case.order.lines}
        if expected != found:
            yield Difference(case.key, expected, found)


async def check_carts(view: View) -> int:
    """From each cart to its order. Returns how many carts there are."""
    carts = 0
    async for batch in batched(view.scan(CARTS), READS_AT_ONCE):
        carts += len(batch)
        ordered: list[Cart] = []
        for record in batch:
            cart = view.decode(decode_cart, record)
            if cart is None:
                continue
            if record.key != b"cart/%d" % cart.id:
                view.findings.add(RECORD_KEY, record.key, f"cart/{cart.id}", record.key.decode(errors="replace"))
            if cart.state is CartState.ORDERED:
                ordered.append(cart)
            elif cart.order_id:
                view.findings.add("ordered_cart", record.key, "no order", cart.order_id)
        found = await view.get([b"order/%d" % cart.order_id for cart in ordered])
        for cart, order_record in zip(ordered, found, strict=True):
            order = view.decode(decode_order, order_record) if order_record is not None else None
            if order is None or (order.cart_id, order.user_id) != (cart.id, cart.user_id):
                named = "none" if order is None else f"one of cart {order.cart_id} and user {order.user_id}"
                expected = f"an order of this cart and user {cart.user_id}"
                view.findings.add("ordered_cart", b"cart/%d" % cart.id, expected, named)
    return carts
