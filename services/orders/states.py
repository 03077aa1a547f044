"""The order's state machine, as a table: what is not in it cannot happen.

It holds the transitions that the service performs today. Payment, cancelling, expiry and completion add rows to it
(see the order life in the specification of the services), not code paths around it.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final, NamedTuple

from services.web.problems import Problem


class OrderState(StrEnum):
    PENDING_PAYMENT = "pending_payment"


class OrderEvent(StrEnum):
    PLACE = "place"


class Transition(NamedTuple):
    """`guard` and `effects` are for people: they say what the transaction that makes this step checks and writes."""

    source: OrderState | None
    event: OrderEvent
    target: OrderState
    guard: str
    effects: str


TRANSITIONS: Final = (
    Transition(
        None,
        OrderEvent.PLACE,
        OrderState.PENDING_PAYMENT,
        guard="the products are as they were priced, and stock suffices",
        effects="stock moves from on hand to reserved; prices are frozen; the order, its number, the user's index and "
        "the idempotency record are written",
    ),
)

_TARGETS: Final = {(transition.source, transition.event): transition.target for transition in TRANSITIONS}
assert len(_TARGETS) == len(TRANSITIONS)


def next_state(source: OrderState | None, event: OrderEvent) -> OrderState:
    """Where `event` leads from `source` (None: there is no order yet). Raises `Problem` `order_state` if nowhere."""
    target = _TARGETS.get((source, event))
    if target is None:
        raise Problem("order_state", f"An order that is {source or 'not placed'} cannot {event.value}")
    return target
