"""One order with everything that the store holds about it: what the checks of orders are given."""

from __future__ import annotations

from typing import Final

from msgspec import Struct

from services.audit.findings import Checks
from services.orders.carts import Cart
from services.orders.records import EventRecord, Order, OrderLine, Payment, Refund, Return, Shipment


class Work(Struct, frozen=True):
    """Durable steps by `kind/subject`: those that are to be done, and those that were given up. They are as many as
    orders that wait to be paid, and payments and refunds that are under way: some 100 bytes each."""

    due: frozenset[str]
    parked: frozenset[str]

    def has(self, kind: str, subject: str) -> bool:
        name = f"{kind}/{subject}"
        return name in self.due or name in self.parked


class Case(Struct, frozen=True):
    """Parts are as they come, in the order of their keys. `attention` is what the index of attention says (None: it
    has no entry); `cart` that which the order names, if it is still there."""

    key: bytes
    order: Order
    payments: tuple[Payment, ...]
    refunds: tuple[Refund, ...]
    shipments: tuple[Shipment, ...]
    returns: tuple[Return, ...]
    events: tuple[EventRecord, ...]
    work: Work
    in_state_index: bool
    in_user_index: bool
    attention: str | None
    cart: Cart | None
    has_address: bool

    def part(self, kind: str, number: int) -> bytes:
        """The key of a part."""
        return b"%b/%d/%06d" % (kind.encode(), self.order.id, number)


def cancelled_worth(line: OrderLine) -> int:
    return line.cancelled * line.unit_price


ORDER_CHECKS: Final = Checks[Case]()
