"""Checks of goods: what an order's lines say against its shipments, returns and events."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Final

from services.audit.findings import Difference
from services.audit.whole import ORDER_CHECKS, Case
from services.orders.records import Quantity

# Under which numbers the stock of what is not yet shipped may count, by the order's state.
HELD_AS: Final = {
    "pending_payment": ("reserved",),
    "confirmed": ("allocated",),
    "completed": ("allocated",),
    "cancelling": ("reserved", "allocated"),
    "cancelled": ("none",),
    "expired": ("none",),
}


def summed(parts: Iterable[Iterable[Quantity]]) -> Counter[str]:
    """How much of each product, in all of them."""
    total: Counter[str] = Counter()
    for lines in parts:
        for one in lines:
            total[one.sku] += one.quantity
    return total


def _against(case: Case, field: str, expected: Counter[str]) -> Iterator[Difference]:
    found = Counter({line.sku: getattr(line, field) for line in case.order.lines})
    for sku in sorted(found.keys() | expected.keys()):
        if found[sku] != expected[sku]:
            yield Difference(case.key, f"{expected[sku]} of {sku} {field}", found[sku])


@ORDER_CHECKS("order_total")
def order_total(case: Case) -> Iterator[Difference]:
    """An order has lines, one for a product; each costs its quantity times its price, and the total is their sum."""
    order = case.order
    skus = [line.sku for line in order.lines]
    if not skus or len(skus) != len(set(skus)):
        yield Difference(case.key, "one line for each product", skus)
    for line in order.lines:
        if line.quantity < 1 or line.unit_price < 0 or line.total != line.quantity * line.unit_price:
            yield Difference(case.key, f"{line.quantity} × {line.unit_price} for {line.sku}", line.total)
    if order.total != sum(line.total for line in order.lines):
        yield Difference(case.key, sum(line.total for line in order.lines), order.total)


@ORDER_CHECKS("line_bounds")
def line_bounds(case: Case) -> Iterator[Difference]:
    """Of each line 0 ≤ returning + returned ≤ delivered ≤ shipped ≤ quantity − cancelled, and no number is below 0."""
    for line in case.order.lines:
        back = line.returning + line.returned
        numbers = (line.returning, line.returned, line.cancelled)
        if min(numbers) < 0 or not back <= line.delivered <= line.shipped <= line.quantity - line.cancelled:
            found = f"{back}, {line.delivered}, {line.shipped}, {line.quantity} − {line.cancelled} of {line.sku}"
            yield Difference(case.key, "returned ≤ delivered ≤ shipped ≤ quantity − cancelled", found)


@ORDER_CHECKS("line_shipped")
def line_shipped(case: Case) -> Iterator[Difference]:
    """What lines say is shipped is the sum of the order's shipments, and nothing is shipped of an order that is not
    confirmed or completed."""
    yield from _against(case, "shipped", summed(one.lines for one in case.shipments))
    if case.shipments and case.order.state not in ("confirmed", "completed"):
        yield Difference(case.key, "no shipments", f"{len(case.shipments)} of an order that is {case.order.state}")


@ORDER_CHECKS("line_delivered")
def line_delivered(case: Case) -> Iterator[Difference]:
    """What lines say is delivered is the sum of the shipments that are."""
    delivered = summed(one.lines for one in case.shipments if one.state == "delivered")
    yield from _against(case, "delivered", delivered)


@ORDER_CHECKS("line_returns")
def line_returns(case: Case) -> Iterator[Difference]:
    """What lines say is returning is the sum of the open returns, and what is returned that of those received."""
    returning = summed(one.lines for one in case.returns if one.state in ("requested", "approved"))
    yield from _against(case, "returning", returning)
    yield from _against(case, "returned", summed(one.lines for one in case.returns if one.state == "received"))


@ORDER_CHECKS("line_cancelled")
def line_cancelled(case: Case) -> Iterator[Difference]:
    """What lines say is cancelled is what the order's events told."""
    told: Counter[str] = Counter()
    for event in case.events:
        if event.type == "order.lines_cancelled":
            for one in event.data.get("lines", ()):
                told[one["sku"]] += one["quantity"]
    yield from _against(case, "cancelled", told)


@ORDER_CHECKS("return_restocked")
def return_restocked(case: Case) -> Iterator[Difference]:
    """No return puts back more than came back, or anything before it did."""
    for one in case.returns:
        came = summed([one.lines]) if one.state == "received" else Counter[str]()
        back = summed([one.restocked])
        if any(back[sku] > came[sku] for sku in back):
            yield Difference(case.part("return", one.number), f"at most {dict(came)}", dict(back))


@ORDER_CHECKS("order_complete")
def order_complete(case: Case) -> Iterator[Difference]:
    """Every line of a completed order is delivered or cancelled."""
    for line in case.order.lines:
        if case.order.state == "completed" and line.delivered + line.cancelled != line.quantity:
            yield Difference(case.key, f"{line.quantity} of {line.sku}", line.delivered + line.cancelled)


@ORDER_CHECKS("held_stock")
def held_stock(case: Case) -> Iterator[Difference]:
    """The stock of an order counts under the number that its state says: reserved, allocated or none."""
    expected = HELD_AS[case.order.state]
    if case.order.stock not in expected:
        yield Difference(case.key, " or ".join(expected), case.order.stock)
