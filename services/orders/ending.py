"""Rules of an order's end before its time: it expires, or it is cancelled, whole or in lines."""

from __future__ import annotations

import msgspec

from services.orders import paying
from services.orders.draft import EXPIRY_STEP, PAYMENT_STEP, Draft, payment_subject, settle
from services.orders.fulfilling import checked
from services.orders.records import Quantity, StockHeld
from services.orders.states import TAKEN, OrderEvent, OrderState, PaymentState
from services.web.problems import Problem


def cancel(draft: Draft, reason: str) -> None:
    """All of it. Raises `Problem` `order_state`, also where part of it is shipped."""
    if any(line.shipped for line in draft.order.lines):
        raise Problem("order_state", "Part of the order is shipped: cancel the lines that are not, or return it")
    draft.advance(OrderEvent.CANCEL, reason=reason)
    draft.set(cancel_reason=reason)
    payment = draft.live_payment
    if payment is not None:
        paying.withdraw(draft, payment)
    settle(draft)


def cancel_lines(draft: Draft, quantities: tuple[Quantity, ...], reason: str) -> None:
    """What is not shipped of some lines of a confirmed order: for what can't be delivered. What was paid for it goes
    back. Raises `Problem`: `order_state`, `not_in_order`, `invalid_body`."""
    if draft.order.state is not OrderState.CONFIRMED:
        raise Problem("order_state", f"Lines of an order that is {draft.order.state} cannot be cancelled")
    overpaid_before = paying.overpaid(draft.order)
    for line, quantity in checked(draft, quantities, lambda line: line.open, "are still to be shipped"):
        draft.give_back_stock(line.sku, quantity)
        draft.set_line(msgspec.structs.replace(line, cancelled=line.cancelled + quantity))
    if all(line.cancelled == line.quantity for line in draft.order.lines):
        raise Problem("order_state", "That is all of the order: cancel the order instead")
    draft.tell("order.lines_cancelled", lines=[msgspec.to_builtins(one) for one in quantities], reason=reason)
    excess = paying.to_give_back(draft.order, overpaid_before)
    if excess > 0:
        paying.refund(draft, excess, paying.REASON_CANCELLED)
    paying.release(draft)
    settle(draft)


def expire(draft: Draft) -> None:
    """Its time to be paid is over. While a payment is in flight nothing happens: when that has ended, and the order
    still waits to be paid, expiry is due again (`settle`). A payment that waits for the customer is asked about at
    once: who has said yes in time has paid; of one that still waits its own step makes an end."""
    order = draft.order
    if order.state is not OrderState.PENDING_PAYMENT:
        return
    if draft.now_ms < order.expires_ms:
        draft.due(EXPIRY_STEP, str(order.id), at_ms=order.expires_ms)
        return
    payment = draft.live_payment
    if payment is not None and payment.state is PaymentState.CREATED:
        paying.withdraw(draft, payment)
    elif payment is not None and payment.state is PaymentState.REQUIRES_ACTION:
        draft.due(PAYMENT_STEP, payment_subject(order.id, payment.attempt), once=True)
    if draft.live_payment is None or draft.live_payment.state in TAKEN:
        draft.hold_stock_as(StockHeld.NONE)
        draft.advance(OrderEvent.EXPIRE)
