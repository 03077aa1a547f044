"""What the order service answers with: an order and what belongs to it, as their owner and staff see them."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import msgspec
from msgspec import Struct

from services.orders.records import (
    CaptureMode,
    EventRecord,
    Order,
    OrderLine,
    Payment,
    Quantity,
    Refund,
    Return,
    Shipment,
    ShipTo,
    encode,
)
from services.orders.states import OrderState, PaymentState, RefundState, ReturnState, ShipmentState
from services.web.ids import Timestamp, timestamp


class PaymentStatus(StrEnum):
    """Derived from what was authorised, captured and refunded."""

    NONE = "none"
    AUTHORISED = "authorised"
    PARTIALLY_PAID = "partially_paid"
    PAID = "paid"
    PARTIALLY_REFUNDED = "partially_refunded"
    REFUNDED = "refunded"


class FulfilmentStatus(StrEnum):
    """Derived from what of the lines is shipped and delivered."""

    NONE = "none"
    PARTIAL = "partial"
    SHIPPED = "shipped"
    DELIVERED = "delivered"


class OrderLineBody(Struct, frozen=True):
    """One product, as it was when the order was placed. Quantities."""

    sku: str
    name: str
    quantity: int
    unit_price: int
    total: int
    shipped: int
    delivered: int
    cancelled: int
    returned: int


class OrderBody(Struct, frozen=True):
    """An order as its owner sees it. Amounts are minor units of `currency`; `refunded` counts what has been given back,
    not what is about to be. `return_status` is that of the newest return."""

    id: int
    number: str
    user_id: int
    state: OrderState
    payment_status: PaymentStatus
    fulfilment_status: FulfilmentStatus
    return_status: ReturnState | None
    currency: str
    lines: tuple[OrderLineBody, ...]
    total: int
    authorised: int
    captured: int
    refunded: int
    created_at: Timestamp
    expires_at: Timestamp | None
    cancel_reason: str | None
    cart_id: int | None


class OrderTotalBody(Struct, frozen=True):
    id: int
    user_id: int
    total: int


class ShipToBody(Struct, frozen=True):
    name: str
    line1: str
    line2: str
    postal_code: str
    city: str
    region: str
    country: str
    phone: str


class StaffOrderBody(Struct, frozen=True):
    """One of the orders that staff find. `attention_codes` says why they have to look at it, the oldest reason first;
    `needs_attention` is the newest of them."""

    order: OrderBody
    needs_attention: str | None
    attention_codes: tuple[str, ...]
    ship_to: ShipToBody | None


class PaymentBody(Struct, frozen=True):
    """An attempt to pay. With `requires_action` the customer has to open `action_url`. `failure` says why it failed."""

    order_id: int
    attempt: int
    state: PaymentState
    amount: int
    currency: str
    capture: CaptureMode
    authorised: int
    captured: int
    refunded: int
    action_url: str | None
    failure: str | None
    created_at: Timestamp
    updated_at: Timestamp


class RefundBody(Struct, frozen=True):
    """`note` says how one that failed was given back by other means."""

    order_id: int
    number: int
    state: RefundState
    amount: int
    currency: str
    reason: str
    payment: int
    return_number: int | None
    failure: str | None
    note: str | None
    created_at: Timestamp
    updated_at: Timestamp


class QuantityBody(Struct, frozen=True):
    sku: str
    quantity: int


class ShipmentBody(Struct, frozen=True):
    order_id: int
    number: int
    state: ShipmentState
    lines: tuple[QuantityBody, ...]
    carrier: str
    tracking: str
    created_at: Timestamp
    updated_at: Timestamp


class ReturnBody(Struct, frozen=True):
    """`restocked` is the part that can be sold again; the rest was scrapped."""

    order_id: int
    number: int
    state: ReturnState
    lines: tuple[QuantityBody, ...]
    reason: str
    note: str | None
    restocked: tuple[QuantityBody, ...]
    refund: int | None
    created_at: Timestamp
    updated_at: Timestamp


class EventBody(Struct, frozen=True):
    """`type` says what it happened to, and what that is now: `payment.authorised`. `actor` is the user whose command it
    was; in lists for staff alone."""

    seq: int
    type: str
    at: Timestamp
    data: dict[str, Any]
    actor: int | None = None


def payment_status(order: Order) -> PaymentStatus:
    given_back = order.refunded - order.refunds_pending
    if not order.captured:
        return PaymentStatus.AUTHORISED if order.authorised else PaymentStatus.NONE
    if given_back:
        return PaymentStatus.REFUNDED if given_back >= order.captured else PaymentStatus.PARTIALLY_REFUNDED
    return PaymentStatus.PAID if order.captured >= order.owed else PaymentStatus.PARTIALLY_PAID


def fulfilment_status(lines: tuple[OrderLine, ...]) -> FulfilmentStatus:
    shipped = sum(line.shipped for line in lines)
    if not shipped:
        return FulfilmentStatus.NONE
    if any(line.open for line in lines):
        return FulfilmentStatus.PARTIAL
    return FulfilmentStatus.DELIVERED if shipped == sum(line.delivered for line in lines) else FulfilmentStatus.SHIPPED


def order_of(order: Order) -> OrderBody:
    return OrderBody(
        id=order.id,
        number=order.number,
        user_id=order.user_id,
        state=order.state,
        payment_status=payment_status(order),
        fulfilment_status=fulfilment_status(order.lines),
        return_status=order.return_status,
        currency=order.currency,
        lines=tuple(
            OrderLineBody(
                line.sku,
                line.name,
                line.quantity,
                line.unit_price,
                line.total,
                line.shipped,
                line.delivered,
                line.cancelled,
                line.returned,
            )
            for line in order.lines
        ),
        total=order.total,
        authorised=order.authorised,
        captured=order.captured,
        refunded=order.refunded - order.refunds_pending,
        created_at=timestamp(order.created_ms),
        expires_at=timestamp(order.expires_ms) if order.state is OrderState.PENDING_PAYMENT else None,
        cancel_reason=order.cancel_reason or None,
        cart_id=order.cart_id or None,
    )


def order_body(order: Order) -> bytes:
    return encode(order_of(order))


def payment_of(payment: Payment) -> PaymentBody:
    return PaymentBody(
        order_id=payment.order_id,
        attempt=payment.attempt,
        state=payment.state,
        amount=payment.amount,
        currency=payment.currency,
        capture=payment.capture,
        authorised=payment.authorised,
        captured=payment.captured,
        refunded=payment.refunded,
        action_url=payment.action_url or None,
        failure=payment.failure or None,
        created_at=timestamp(payment.created_ms),
        updated_at=timestamp(payment.updated_ms),
    )


def refund_of(refund: Refund) -> RefundBody:
    return RefundBody(
        order_id=refund.order_id,
        number=refund.number,
        state=refund.state,
        amount=refund.amount,
        currency=refund.currency,
        reason=refund.reason,
        payment=refund.attempt,
        return_number=refund.return_number or None,
        failure=refund.failure or None,
        note=refund.note or None,
        created_at=timestamp(refund.created_ms),
        updated_at=timestamp(refund.updated_ms),
    )


def shipment_of(shipment: Shipment) -> ShipmentBody:
    return ShipmentBody(
        order_id=shipment.order_id,
        number=shipment.number,
        state=shipment.state,
        lines=_quantities(shipment.lines),
        carrier=shipment.carrier,
        tracking=shipment.tracking,
        created_at=timestamp(shipment.created_ms),
        updated_at=timestamp(shipment.updated_ms),
    )


def return_of(ret: Return) -> ReturnBody:
    return ReturnBody(
        order_id=ret.order_id,
        number=ret.number,
        state=ret.state,
        lines=_quantities(ret.lines),
        reason=ret.reason,
        note=ret.note or None,
        restocked=_quantities(ret.restocked),
        refund=ret.refund_number or None,
        created_at=timestamp(ret.created_ms),
        updated_at=timestamp(ret.updated_ms),
    )


def ship_to_of(ship_to: ShipTo) -> ShipToBody:
    return ShipToBody(**msgspec.structs.asdict(ship_to))


def event_of(event: EventRecord, *, for_staff: bool = False) -> EventBody:
    actor = event.actor or None if for_staff else None
    return EventBody(event.seq, event.type, timestamp(event.at_ms), event.data, actor)


def _quantities(lines: tuple[Quantity, ...]) -> tuple[QuantityBody, ...]:
    return tuple(QuantityBody(one.sku, one.quantity) for one in lines)
