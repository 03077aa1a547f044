"""Rules of shipments, deliveries and returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgspec

from services.orders import paying
from services.orders.draft import Draft, settle
from services.orders.records import OrderLine, Quantity, Return, Shipment, ShipTo
from services.orders.states import RETURN, SHIPMENT, OrderState, ReturnEvent, ReturnState, ShipmentEvent
from services.web.problems import FieldError, Problem

# Parts of an order are read with it, all of them, and each has up to a hundred lines, so 12 KB at worst, or 24 with
# what is restocked: with the order and its refunds they are meant to fit one result of the store, 1 MiB. No order is
# known that was sent in twenty parcels.
SHIPMENTS_MAX: Final = 20
RETURNS_MAX: Final = 20
# Whoever asks for more before anybody has looked is no customer who found another fault.
OPEN_RETURNS_MAX: Final = 5


def checked(
    draft: Draft, quantities: tuple[Quantity, ...], at_most: Callable[[OrderLine], int], what: str
) -> list[tuple[OrderLine, int]]:
    """The lines that are named, with how much of each. Raises `Problem` with a pointer: `not_in_order` where a line is
    not there or has less than that, `invalid_body` where it is named twice."""
    found: list[tuple[OrderLine, int]] = []
    for position, one in enumerate(quantities):
        line = draft.line(one.sku)
        if line is None:
            message = f"The order has no line of {one.sku}"
            raise _wrong(f"/lines/{position}/sku", "unknown_product", message, problem="not_in_order")
        if any(line.sku == other.sku for other, _ in found):
            raise _wrong(f"/lines/{position}/sku", "duplicate", f"{one.sku} is named twice")
        if one.quantity > at_most(line):
            message = f"{at_most(line)} of {one.sku} {what}"
            raise _wrong(f"/lines/{position}/quantity", "quantity_too_large", message, problem="not_in_order")
        found.append((line, one.quantity))
    return found


def ship(draft: Draft, quantities: tuple[Quantity, ...], carrier: str, tracking: str) -> Shipment:
    """Goods leave. Raises `Problem`: `order_state`, `not_paid`, `no_delivery_address`, `not_in_order`,
    `invalid_body`."""
    order = draft.order
    state = SHIPMENT.next(None, ShipmentEvent.SHIP)
    if order.state is not OrderState.CONFIRMED:
        raise Problem("order_state", f"An order that is {order.state} is not shipped")
    if order.captured < order.owed:
        raise Problem("not_paid", f"{order.captured} of {order.owed} {order.currency} are captured: capture the rest")
    if order.captured and order.refunded >= order.captured:
        raise Problem("not_paid", "Everything that was captured is refunded")
    if order.shipments >= SHIPMENTS_MAX:
        raise Problem("order_state", f"An order has {SHIPMENTS_MAX} shipments at most")
    if not draft.has_address:
        raise Problem("no_delivery_address", _what_to_do_next(draft))
    for line, quantity in checked(draft, quantities, lambda line: line.open, "are still to be shipped"):
        draft.take_from_stock(line.sku, quantity)
        draft.set_line(msgspec.structs.replace(line, shipped=line.shipped + quantity))
    number = order.shipments + 1
    draft.set(shipments=number)
    now_ms = draft.now_ms
    return draft.set_shipment(Shipment(order.id, number, state, quantities, carrier, tracking, now_ms, now_ms))


def send_to(draft: Draft, ship_to: ShipTo) -> None:
    """Where it goes to, from now on. An order that was shipped in part without an address, as older versions did, may
    still be given one for the rest. Raises `Problem` `order_state`."""
    order = draft.order
    if order.state not in (OrderState.PENDING_PAYMENT, OrderState.CONFIRMED):
        raise Problem("order_state", f"An order that is {order.state} goes nowhere else")
    if order.shipments and (draft.has_address or not order.is_under_way):
        raise Problem("order_state", "Part of the order is shipped")
    if _is_too_late(draft):
        raise Problem("order_state", _what_to_do_next(draft))
    draft.send_to(ship_to)


def _is_too_late(draft: Draft) -> bool:
    """The customer's account is erased, and was promised that by now nobody knows any more where the order goes to."""
    return 0 < draft.order.forget_by_ms <= draft.now_ms


def _what_to_do_next(draft: Draft) -> str:
    """Where there is no address."""
    if _is_too_late(draft):
        return "The customer's account is erased, and with it the order's address: cancel what is not shipped"
    return f"Say where the order goes to, by POST /v1/orders/{draft.order.id}/ship-to; then ship it"


def deliver(draft: Draft, number: int) -> Shipment:
    """Goods arrived. Raises `Problem`: `not_found`, `order_state`."""
    shipment = draft.shipments.get(number)
    if shipment is None:
        raise Problem("not_found", "The order has no such shipment")
    state = SHIPMENT.next(shipment.state, ShipmentEvent.DELIVER)
    for one in shipment.lines:
        line = draft.line(one.sku)
        assert line is not None, one
        draft.set_line(msgspec.structs.replace(line, delivered=line.delivered + one.quantity))
    shipment = draft.set_shipment(msgspec.structs.replace(shipment, state=state))
    settle(draft)
    return shipment


def request_return(draft: Draft, quantities: tuple[Quantity, ...], reason: str) -> Return:
    """A customer wants to give goods back. Raises `Problem`: `order_state`, `invalid_body`."""
    order = draft.order
    if order.state not in (OrderState.CONFIRMED, OrderState.COMPLETED):
        raise Problem("order_state", f"Nothing of an order that is {order.state} can be returned")
    if order.returns >= RETURNS_MAX:
        raise Problem("order_state", f"An order has {RETURNS_MAX} returns at most")
    if sum(one.state is ReturnState.REQUESTED for one in draft.returns.values()) >= OPEN_RETURNS_MAX:
        raise Problem("order_state", f"{OPEN_RETURNS_MAX} returns wait to be decided: ask again after that")
    state = RETURN.next(None, ReturnEvent.REQUEST)
    for line, quantity in checked(
        draft, quantities, lambda line: line.delivered - line.returning - line.returned, "can be returned"
    ):
        draft.set_line(msgspec.structs.replace(line, returning=line.returning + quantity))
    number = order.returns + 1
    draft.set(returns=number)
    return draft.set_return(Return(order.id, number, state, quantities, reason, draft.now_ms, draft.now_ms))


def approve_return(draft: Draft, number: int, note: str) -> Return:
    """Raises `Problem`: `not_found`, `order_state`."""
    asked = return_of(draft, number)
    state = RETURN.next(asked.state, ReturnEvent.APPROVE)
    return draft.set_return(msgspec.structs.replace(asked, state=state, note=note))


def reject_return(draft: Draft, number: int, note: str) -> Return:
    """Raises `Problem`: `not_found`, `order_state`."""
    asked = return_of(draft, number)
    state = RETURN.next(asked.state, ReturnEvent.REJECT)
    _close(draft, asked, received=False)
    return draft.set_return(msgspec.structs.replace(asked, state=state, note=note))


def receive_return(
    draft: Draft, number: int, restocked: tuple[Quantity, ...], refund_amount: int | None, note: str
) -> Return:
    """The goods are back: `restocked` of them can be sold again, the rest is scrapped. What they cost goes back, or
    `refund_amount`. Raises `Problem`: `not_found`, `order_state`, `invalid_body`, `amount_too_large`."""
    approved = return_of(draft, number)
    state = RETURN.next(approved.state, ReturnEvent.RECEIVE)
    returned = {one.sku: one.quantity for one in approved.lines}
    for line, quantity in checked(draft, restocked, lambda line: returned.get(line.sku, 0), "came back"):
        draft.restock(line.sku, quantity)
    _close(draft, approved, received=True)
    value = sum(line.unit_price * returned.get(line.sku, 0) for line in draft.order.lines)
    amount = min(value, draft.order.captured - draft.order.refunded) if refund_amount is None else refund_amount
    refund_number = 0
    if amount:
        refund_number = paying.refund(draft, amount, f"return {number}", number).number
    return draft.set_return(
        msgspec.structs.replace(approved, state=state, note=note, restocked=restocked, refund_number=refund_number)
    )


def return_of(draft: Draft, number: int) -> Return:
    """Raises `Problem` `not_found`."""
    found = draft.returns.get(number)
    if found is None:
        raise Problem("not_found", "The order has no such return")
    return found


def _close(draft: Draft, ret: Return, *, received: bool) -> None:
    for one in ret.lines:
        line = draft.line(one.sku)
        assert line is not None, one
        returned = line.returned + (one.quantity if received else 0)
        draft.set_line(msgspec.structs.replace(line, returning=line.returning - one.quantity, returned=returned))


def _wrong(pointer: str, code: str, message: str, *, problem: str = "invalid_body") -> Problem:
    return Problem(problem, message, errors=(FieldError(pointer, code, message),))
