"""Checks of history: events are complete, and tell how everything came to be what it is.

Events are written with each new state, so those of one thing are the path that it took. A path is possible if each of
its steps is one of commerce.md's table, which is written down here once more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from services.audit.findings import Difference
from services.audit.whole import ORDER_CHECKS, Case

Paths = Mapping[str, tuple[str, ...]]  # from each state to which; "" is the beginning

ORDER_PATHS: Final[Paths] = {
    "": ("pending_payment",),
    "pending_payment": ("confirmed", "expired", "cancelling"),
    "confirmed": ("cancelling", "completed"),
    "cancelling": ("cancelled",),
}
# An order that costs nothing needs no payment: it is confirmed by the transaction that places it.
FREE_ORDER_PATHS: Final[Paths] = {**ORDER_PATHS, "": ("confirmed",)}
PART_PATHS: Final[Mapping[str, Paths]] = {
    "payment": {
        "": ("created",),
        "created": ("authorising", "failed"),
        "authorising": ("unknown", "requires_action", "authorised", "failed"),
        "unknown": ("requires_action", "authorised", "failed"),
        "requires_action": ("authorised", "failed", "voiding"),
        "authorised": ("capturing", "voiding"),
        "partially_captured": ("capturing",),
        "capturing": ("partially_captured", "captured", "authorised"),  # the last where it is refused
        "voiding": ("voided", "captured", "partially_captured"),  # the others where somebody else took it
    },
    "refund": {"": ("pending",), "pending": ("succeeded", "failed"), "failed": ("settled_outside",)},
    "shipment": {"": ("shipped",), "shipped": ("delivered",)},
    "return": {"": ("requested",), "requested": ("approved", "rejected"), "approved": ("received",)},
}
# Events of an order that tell of no new state.
_REMARKS: Final = ("order.lines_cancelled", "order.needs_attention", "order.attended", "order.address_changed")


def _is_path(states: list[str], paths: Paths) -> bool:
    return all(after in paths.get(before, ()) for before, after in zip(["", *states], states, strict=False))


@ORDER_CHECKS("event_numbers")
def event_numbers(case: Case) -> Iterator[Difference]:
    """The events of an order are numbered from 1 to as many as it says, without a gap."""
    numbers = [event.seq for event in case.events]
    if numbers != list(range(1, case.order.events + 1)):
        missing = sorted(set(range(1, case.order.events + 1)) - set(numbers))[:10]
        yield Difference(case.key, f"events 1 to {case.order.events}", f"{len(numbers)} events, without {missing}")


@ORDER_CHECKS("order_history")
def order_history(case: Case) -> Iterator[Difference]:
    """The states that an order's events tell are a path through the table, and end in the state that it has."""
    told = [
        event.type.removeprefix("order.")
        for event in case.events
        if event.type.startswith("order.") and event.type not in _REMARKS
    ]
    paths = ORDER_PATHS if case.order.total else FREE_ORDER_PATHS
    if not _is_path(told, paths):
        yield Difference(case.key, "a path through the table", " → ".join(told))
    if told[-1:] != [case.order.state]:
        yield Difference(case.key, f"events that end in {case.order.state}", " → ".join(told))


@ORDER_CHECKS("part_history")
def part_history(case: Case) -> Iterator[Difference]:
    """The states that events tell of each payment, refund, shipment and return are a path through its table, and end
    in the state that it has."""
    told: dict[tuple[str, int], list[str]] = {}
    for event in case.events:
        kind, _, state = event.type.partition(".")
        if kind != "order":
            number = event.data.get("attempt", event.data.get("number", 0))
            told.setdefault((kind, number), []).append(state)
    for kind, number, state in _parts(case):
        states = told.pop((kind, number), [])
        if not _is_path(states, PART_PATHS[kind]) or states[-1:] != [state]:
            expected = f"a path through the table that ends in {state}"
            yield Difference(case.part(kind, number), expected, " → ".join(states) or "no events")
    for (kind, number), states in told.items():
        yield Difference(case.part(kind, number), "no events, as there is none", " → ".join(states))


@ORDER_CHECKS("part_numbers")
def part_numbers(case: Case) -> Iterator[Difference]:
    """An order's payments, refunds, shipments and returns are numbered from 1 to as many as it says."""
    order = case.order
    counters = {
        "payment": order.payments, "refund": order.refunds, "shipment": order.shipments, "return": order.returns,
    }  # fmt: skip
    parts = list(_parts(case))
    for kind, count in counters.items():
        numbers = [number for other, number, _ in parts if other == kind]
        if numbers != list(range(1, count + 1)):
            yield Difference(case.key, f"{kind}s 1 to {count}", numbers)


def _parts(case: Case) -> Iterator[tuple[str, int, str]]:
    for payment in case.payments:
        yield "payment", payment.attempt, payment.state
    for refund in case.refunds:
        yield "refund", refund.number, refund.state
    for shipment in case.shipments:
        yield "shipment", shipment.number, shipment.state
    for one in case.returns:
        yield "return", one.number, one.state
