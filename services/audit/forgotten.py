"""Checks that nothing is forgotten: whatever has to go on by itself has a durable step that will do it, or one that was
given up for a listed reason. (A step that a worker is at is still there; its claim stands beside it.)"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from services.audit.findings import Difference, declare
from services.audit.view import View
from services.audit.whole import ORDER_CHECKS, Case, Work
from services.orders.steps import PARK_REASONS
from services.work.steps import decode_parked, decode_step

UNDER_WAY: Final = ("created", "authorising", "unknown", "requires_action", "capturing", "voiding")
UNDECIDED: Final = ("authorising", "unknown", "requires_action", "voiding")
STEPS: Final = b"step/"
PARKED: Final = b"parked/"

PARKED_REASON: Final = declare(
    "parked_reason", "Every step that was given up has a reason of the list that staff know, and none is `internal`."
)
STEP_KEY: Final = declare("step_key", "Every durable step stands at the key that its kind, subject and time say.")


@ORDER_CHECKS("forgotten_expiry")
def forgotten_expiry(case: Case) -> Iterator[Difference]:
    """Every order that waits to be paid has a step that will let it expire, or a payment of which the provider or the
    customer has not said yet what becomes of it: that one's own step lets it expire then."""
    if case.order.state != "pending_payment" or any(payment.state in UNDECIDED for payment in case.payments):
        return
    if not case.work.has("expire", str(case.order.id)):
        yield Difference(case.key, f"a step expire/{case.order.id}", "none")


@ORDER_CHECKS("forgotten_payment")
def forgotten_payment(case: Case) -> Iterator[Difference]:
    """Every payment that is under way has a step that will go on with it."""
    for payment in case.payments:
        subject = f"{case.order.id}-{payment.attempt}"
        if payment.state in UNDER_WAY and not case.work.has("payment", subject):
            yield Difference(case.part("payment", payment.attempt), f"a step payment/{subject}", "none")


@ORDER_CHECKS("forgotten_refund")
def forgotten_refund(case: Case) -> Iterator[Difference]:
    """Every refund that is pending has a step that will go on with it."""
    for refund in case.refunds:
        subject = f"{case.order.id}-{refund.number}"
        if refund.state == "pending" and not case.work.has("refund", subject):
            yield Difference(case.part("refund", refund.number), f"a step refund/{subject}", "none")


@ORDER_CHECKS("forgotten_cancellation")
def forgotten_cancellation(case: Case) -> Iterator[Difference]:
    """Every order that is being cancelled has a payment or a refund under way, or needs attention since a refund
    failed."""
    order = case.order
    if order.state != "cancelling":
        return
    waits = [payment.attempt for payment in case.payments if payment.state in UNDER_WAY]
    failed = any(refund.state == "failed" for refund in case.refunds)
    if not waits and not order.refunds_pending and not failed:
        yield Difference(case.key, "a payment or refund under way", "none")


async def read_work(view: View) -> Work:
    """All steps, each checked."""
    due: set[str] = set()
    async for record in view.scan(STEPS):
        step = view.decode(decode_step, record)
        if step is not None:
            due.add(f"{step.kind}/{step.subject}")
            expected = f"step/{step.due_ms:016d}/{step.kind}/{step.subject}"
            if record.key != expected.encode():
                view.findings.add(STEP_KEY, record.key, expected, record.key.decode(errors="replace"))
    parked: set[str] = set()
    async for record in view.scan(PARKED):
        given_up = view.decode(decode_parked, record)
        if given_up is not None:
            parked.add(f"{given_up.step.kind}/{given_up.step.subject}")
            if given_up.code not in PARK_REASONS:
                view.findings.add(PARKED_REASON, record.key, "a listed reason", f"{given_up.code}: {given_up.detail}")
    return Work(frozenset(due), frozenset(parked))
