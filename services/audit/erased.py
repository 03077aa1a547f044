"""The check of what is kept of people whose accounts are erased."""

from __future__ import annotations

from collections.abc import Iterator

from services.audit.findings import Difference
from services.audit.whole import ORDER_CHECKS, Case
from services.work.kinds import FORGET_CUSTOMER


@ORDER_CHECKS("erased_address")
def erased_address(case: Case) -> Iterator[Difference]:
    """An order of an erased customer has an address only while something of it is under way, and then a step that will
    take it."""
    order = case.order
    if not (order.forget_by_ms and case.has_address):
        return
    if not order.is_under_way:
        yield Difference(case.key, "no address", f"one of an order that is {order.state}")
    elif not case.work.has(FORGET_CUSTOMER, str(order.user_id)):
        yield Difference(case.key, f"a step {FORGET_CUSTOMER}/{order.user_id}", "none")
