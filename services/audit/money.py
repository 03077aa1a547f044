"""Checks of money: of each payment and refund, of their sums in the order, and of what a state promises.

The states and their meaning are those of commerce.md, written down here once more: an error in the services' own tables
must not hide here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from services.audit.findings import Difference
from services.audit.whole import ORDER_CHECKS, Case, cancelled_worth
from services.orders.records import Payment, Refund

NOTHING_YET: Final = ("created", "authorising", "unknown", "requires_action", "failed")
ENDED: Final = ("voided", "failed")
# Nobody knows how these end, or money is held.
HOLDING: Final = (
    "created", "authorising", "unknown", "requires_action", "authorised", "capturing", "voiding",
)  # fmt: skip


def counts(refund: Refund) -> bool:
    """A refund that failed gave nothing back, unless somebody did it by other means."""
    return refund.state in ("pending", "succeeded", "settled_outside")


@ORDER_CHECKS("payment_amounts")
def payment_amounts(case: Case) -> Iterator[Difference]:
    """Of each payment 0 ≤ refunded ≤ captured ≤ authorised ≤ amount, and the amount is the order's total in its
    currency."""
    order = case.order
    for payment in case.payments:
        key = case.part("payment", payment.attempt)
        if not 0 <= payment.refunded <= payment.captured <= payment.authorised <= payment.amount:
            found = f"{payment.refunded}, {payment.captured}, {payment.authorised}, {payment.amount}"
            yield Difference(key, "0 ≤ refunded ≤ captured ≤ authorised ≤ amount", found)
        if (payment.amount, payment.currency) != (order.total, order.currency):
            expected = f"{order.total} {order.currency}"
            yield Difference(key, expected, f"{payment.amount} {payment.currency}")


@ORDER_CHECKS("payment_state")
def payment_state(case: Case) -> Iterator[Difference]:
    """A payment's state and its amounts say the same: what is not authorised holds nothing, what is authorised or
    given up has taken nothing, what is captured has taken all, or part."""
    for payment in case.payments:
        if not _fits(payment):
            amounts = f"authorised {payment.authorised}, captured {payment.captured}, in {payment.capture_amount}"
            yield Difference(case.part("payment", payment.attempt), f"amounts of {payment.state}", amounts)


def _fits(payment: Payment) -> bool:
    held, taken = payment.authorised, payment.captured
    match str(payment.state):
        case state if state in NOTHING_YET:
            return held == taken == 0
        case "authorised":
            return held > 0 and taken == 0
        case "voiding" | "voided":
            return taken == 0
        case "capturing":
            return 0 < payment.capture_amount <= held - taken
        case "partially_captured":
            return 0 < taken < held
        case _:
            return 0 < taken == held


@ORDER_CHECKS("request_keys")
def request_keys(case: Case) -> Iterator[Difference]:
    """The key of each payment's and refund's request is its own, `order:attempt:operation`, and no two refunds have
    the same one; a charge of the provider stands in one payment of the order."""
    order_id = case.order.id
    for payment in case.payments:
        begin = f"{order_id}:{payment.attempt}:"
        if not payment.request_key.startswith(begin):
            yield Difference(case.part("payment", payment.attempt), f"{begin}…", payment.request_key)
    for refund in case.refunds:
        expected = f"{order_id}:{refund.attempt}:refund" + (f"-{refund.number}" if refund.number > 1 else "")
        if refund.request_key != expected:
            yield Difference(case.part("refund", refund.number), expected, refund.request_key)
    charges = [payment.charge for payment in case.payments if payment.charge]
    if len(charges) != len(set(charges)):
        yield Difference(case.key, "each charge in one payment", ", ".join(charges))


@ORDER_CHECKS("refund_amounts")
def refund_amounts(case: Case) -> Iterator[Difference]:
    """Each refund gives back something of a payment of its order; those of a payment that are pending, succeeded or
    settled outside are, summed, what the payment says."""
    sums = {payment.attempt: 0 for payment in case.payments}
    for refund in case.refunds:
        key = case.part("refund", refund.number)
        if refund.amount <= 0 or refund.currency != case.order.currency:
            yield Difference(key, f"an amount in {case.order.currency}", f"{refund.amount} {refund.currency}")
        if refund.attempt not in sums:
            yield Difference(key, "a payment of this order", refund.attempt)
        elif counts(refund):
            sums[refund.attempt] += refund.amount
    for payment in case.payments:
        if payment.refunded != sums[payment.attempt]:
            yield Difference(case.part("payment", payment.attempt), sums[payment.attempt], payment.refunded)


@ORDER_CHECKS("order_authorised")
def order_authorised(case: Case) -> Iterator[Difference]:
    """What an order says is authorised is the sum of its payments that were not given up."""
    expected = sum(payment.authorised for payment in case.payments if payment.state not in ENDED)
    if case.order.authorised != expected:
        yield Difference(case.key, expected, case.order.authorised)


@ORDER_CHECKS("order_captured")
def order_captured(case: Case) -> Iterator[Difference]:
    """What an order says is captured is the sum of its payments."""
    expected = sum(payment.captured for payment in case.payments)
    if case.order.captured != expected:
        yield Difference(case.key, expected, case.order.captured)


@ORDER_CHECKS("order_refunded")
def order_refunded(case: Case) -> Iterator[Difference]:
    """What an order says is refunded is the sum of its refunds that are pending, succeeded or settled outside; what it
    says is pending, of those that are."""
    refunded = sum(refund.amount for refund in case.refunds if counts(refund))
    if case.order.refunded != refunded:
        yield Difference(case.key, refunded, case.order.refunded)
    pending = sum(refund.amount for refund in case.refunds if refund.state == "pending")
    if case.order.refunds_pending != pending:
        yield Difference(case.key, f"{pending} pending", f"{case.order.refunds_pending} pending")


@ORDER_CHECKS("order_money")
def order_money(case: Case) -> Iterator[Difference]:
    """Of an order 0 ≤ refunded ≤ captured ≤ authorised ≤ total: nobody pays twice, or gets back more than they
    paid."""
    order = case.order
    if not 0 <= order.refunds_pending <= order.refunded <= order.captured <= order.authorised <= order.total:
        found = f"{order.refunds_pending}, {order.refunded}, {order.captured}, {order.authorised}, {order.total}"
        yield Difference(case.key, "0 ≤ pending ≤ refunded ≤ captured ≤ authorised ≤ total", found)


@ORDER_CHECKS("live_payment")
def live_payment(case: Case) -> Iterator[Difference]:
    """An order has one payment at most that is not failed or voided, and names it."""
    live = [payment.attempt for payment in case.payments if payment.state not in ENDED]
    named = [case.order.live_payment] if case.order.live_payment else []
    if live != named or len(live) > 1:
        yield Difference(case.key, f"one live payment at most, and named: {named}", live)


@ORDER_CHECKS("confirmed_paid")
def confirmed_paid(case: Case) -> Iterator[Difference]:
    """The total of an order that is confirmed or completed is authorised or captured, unless its lines that cost
    anything are cancelled; one that is completed, or of which anything is shipped, has captured all that its goods
    cost."""
    order = case.order
    owed = order.total - sum(map(cancelled_worth, order.lines))
    if order.state in ("confirmed", "completed") and owed and max(order.authorised, order.captured) < order.total:
        yield Difference(case.key, f"{order.total} authorised", max(order.authorised, order.captured))
    is_shipped = any(line.shipped for line in order.lines)
    if (order.state == "completed" or is_shipped) and order.captured < owed:
        yield Difference(case.key, f"{owed} captured", order.captured)


@ORDER_CHECKS("ended_settled")
def ended_settled(case: Case) -> Iterator[Difference]:
    """Of an order that is cancelled or expired nothing is kept: what was captured is refunded, nothing is held, and no
    payment is under way."""
    order = case.order
    if order.state not in ("cancelled", "expired"):
        return
    if order.captured != order.refunded:
        yield Difference(case.key, f"{order.captured} refunded", order.refunded)
    if order.state == "cancelled" and order.refunds_pending:
        yield Difference(case.key, "no refund pending", order.refunds_pending)
    for payment in case.payments:
        if payment.state in HOLDING:
            yield Difference(case.part("payment", payment.attempt), "an end", payment.state)
