"""What the order service keeps in the store: records as JSON, each with its format in `v`, and their keys.

| key | holds |
|---|---|
| `product/{sku}` | `Product` |
| `product-category/{category}/{sku}` | nothing: the products of a category |
| `product-word/{word}/{sku}` | nothing: the products by the words of their names and skus; see `products.py` |
| `stock/{sku}/on_hand` | a plain integer: what may still be sold |
| `stock/{sku}/reserved` | a plain integer: what placed orders hold until they are paid or end |
| `stock/{sku}/allocated` | a plain integer: what paid orders hold until it is shipped |
| `stock/{sku}/adjustment/{inverted id}` | `Adjustment`: why on_hand changed other than by orders; newest first |
| `order/{id}` | `Order` |
| `user-orders/{user}/{inverted time}/{order}` | nothing: the key is the index, newest first |
| `order-state/{state}/{inverted id}` | nothing: the index by state, newest first; every order stands under one |
| `order-attention/{inverted id}` | the codes of why staff have to look at an order, as they stand in it |
| `order-address/{order}` | `ShipTo` |
| `order-event/{order}/{seq}` | `EventRecord` |
| `payment/{order}/{attempt}`, `refund/{order}/{n}`, `shipment/{order}/{n}`, `return/{order}/{n}` | of an order |
| `inbox/{provider}/{event}` | `InboxMark`, under a lease |
| `step/…` | what is to be done for an order: see `services.work.steps` and `steps.py` |

Numbers within an order have six digits, so that they sort.

Money is an integer of minor units (cents) and a currency; there are no floats.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta, Struct

from services.orders.states import OrderState, PaymentState, RefundState, ReturnState, ShipmentState
from services.web.ids import ID_MAX

SKU_PATTERN: Final = r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z"
Sku = Annotated[str, Meta(pattern=SKU_PATTERN, examples=["mug-blue"])]
QUANTITY_MAX: Final = 1_000_000  # of one product, in a cart or an order
LINES_MAX: Final = 100  # 4 compares, writes and reads each: well within the store's 1,024 operations
AMOUNT_MAX: Final = 10**12  # minor units: ten thousand million euros
TOTAL_MAX: Final = 2**53 - 1  # exact in JavaScript
STOCK_MAX: Final = 2**53 - 1


PRODUCTS: Final = b"product/"


class Product(Struct, frozen=True, tag_field="v", tag=1):
    """`is_active` false: archived, so only staff see it, and nobody can order it. `category` empty: in none.
    `created_ms` 0: written before there were indexes, so it stands in none; the next change puts it there."""

    sku: str
    name: str
    price: int
    currency: str
    updated_ms: int
    description: str = ""
    category: str = ""
    is_active: bool = True
    created_ms: int = 0


class Adjustment(Struct, frozen=True, tag_field="v", tag=1):
    """`user_id` 0: by an operator's command."""

    id: int
    sku: str
    delta: int
    reason: str
    user_id: int
    created_ms: int


# --- an order and what belongs to it ----------------------------------------------------------------------------------


class StockHeld(StrEnum):
    """Under which number the stock of what is not yet shipped counts."""

    RESERVED = "reserved"
    ALLOCATED = "allocated"
    NONE = "none"


class OrderLine(Struct, frozen=True, gc=False):
    """One product in an order, as it was when the order was placed, and how far it got. `returned` counts what was
    received back, `returning` what is in a return that is still open."""

    sku: str
    name: str
    quantity: int
    unit_price: int
    total: int
    shipped: int = 0
    delivered: int = 0
    cancelled: int = 0
    returning: int = 0
    returned: int = 0

    @property
    def open(self) -> int:
        """Still to be shipped."""
        return self.quantity - self.cancelled - self.shipped


class Order(Struct, frozen=True, tag_field="v", tag=1):
    """The record by whose revision everything about the order is serialised: whatever changes an order, or a payment,
    refund, shipment or return of it, writes this too. `refunded` includes refunds that are pending. The counters are
    those of its payments and so on: numbers start at 1. `needs_attention` has the open codes, the oldest first, with
    blanks between them: older versions know one code there, and can read this as one. `forget_by_ms` is 0, unless its
    user's account is erased: then its address goes as soon as nothing is under way, and by that moment at the latest
    (`forgetting.py`)."""

    id: int
    number: str
    user_id: int
    state: OrderState
    currency: str
    lines: tuple[OrderLine, ...]
    total: int
    created_ms: int
    expires_ms: int = 0
    updated_ms: int = 0
    stock: StockHeld = StockHeld.RESERVED
    live_payment: int = 0
    payments: int = 0
    refunds: int = 0
    shipments: int = 0
    returns: int = 0
    events: int = 0
    authorised: int = 0
    captured: int = 0
    refunded: int = 0
    refunds_pending: int = 0
    return_status: ReturnState | None = None
    needs_attention: str = ""
    cancel_reason: str = ""
    cart_id: int = 0
    forget_by_ms: int = 0

    @property
    def is_under_way(self) -> bool:
        """Something of it may still have to be sent, or to arrive. Once it is not, it never is again."""
        if self.state is OrderState.CONFIRMED:
            return any(line.delivered + line.cancelled < line.quantity for line in self.lines)
        return self.state is OrderState.PENDING_PAYMENT

    @property
    def attention_codes(self) -> tuple[str, ...]:
        """Why staff have to look at it, the oldest first; each once."""
        return tuple(self.needs_attention.split())

    @property
    def owed(self) -> int:
        """What the goods that were not cancelled cost."""
        return self.total - sum(line.cancelled * line.unit_price for line in self.lines)


class ShipTo(Struct, frozen=True, tag_field="v", tag=1):
    """Where an order goes: a copy. When its user's account is erased it goes with the order's end (`forget_by_ms`)."""

    name: str
    line1: str
    postal_code: str
    city: str
    country: str
    line2: str = ""
    region: str = ""
    phone: str = ""


class CaptureMode(StrEnum):
    """When the money is taken: as soon as it is authorised, or when staff say so."""

    AUTOMATIC = "automatic"
    MANUAL = "manual"


class Payment(Struct, frozen=True, tag_field="v", tag=1):
    """One attempt to pay an order. `request_key` is that of the request that is under way, or was last: stored before
    the provider is called. `capture_amount` and `captures` are the amount and number of the newest capture.
    `is_unwanted`: the order has ended meanwhile, so what comes of this is given back. `poll_ms`: when the provider is
    asked next what its customer has decided."""

    order_id: int
    attempt: int
    state: PaymentState
    amount: int
    currency: str
    token: str
    capture: CaptureMode
    request_key: str
    created_ms: int
    updated_ms: int
    charge: str = ""
    action_url: str = ""
    return_url: str = ""
    authorised: int = 0
    captured: int = 0
    refunded: int = 0
    captures: int = 0
    capture_amount: int = 0
    is_unwanted: bool = False
    failure: str = ""
    detail: str = ""
    poll_ms: int = 0


class Refund(Struct, frozen=True, tag_field="v", tag=1):
    """`attempt` is the payment that it gives back from; `return_number` the return that it is for, or 0. `note` says
    how one that failed was given back outside of the provider."""

    order_id: int
    number: int
    attempt: int
    state: RefundState
    amount: int
    currency: str
    reason: str
    request_key: str
    created_ms: int
    updated_ms: int
    return_number: int = 0
    provider_id: str = ""
    failure: str = ""
    note: str = ""


class Quantity(Struct, frozen=True, gc=False):
    sku: str
    quantity: int


class Shipment(Struct, frozen=True, tag_field="v", tag=1):
    order_id: int
    number: int
    state: ShipmentState
    lines: tuple[Quantity, ...]
    carrier: str
    tracking: str
    created_ms: int
    updated_ms: int


class Return(Struct, frozen=True, tag_field="v", tag=1):
    """`restocked` is the part of its goods that can be sold again; the rest was scrapped."""

    order_id: int
    number: int
    state: ReturnState
    lines: tuple[Quantity, ...]
    reason: str
    created_ms: int
    updated_ms: int
    note: str = ""
    restocked: tuple[Quantity, ...] = ()
    refund_number: int = 0


class EventRecord(Struct, frozen=True, tag_field="v", tag=1):
    """Something that happened to an order, for its owner and for staff. `type` is `order.confirmed`, `payment.failed`
    and so on: what it happened to, and what that is now. `actor` is the user whose command it was, and is told to staff
    alone; 0 where a worker did it."""

    order_id: int
    seq: int
    type: str
    at_ms: int
    data: dict[str, Any] = {}
    actor: int = 0


class InboxMark(Struct, frozen=True, tag_field="v", tag=1):
    """A provider's event that was taken."""

    kind: str
    key: str
    at_ms: int


decode_product = msgspec.json.Decoder(Product).decode
decode_adjustment = msgspec.json.Decoder(Adjustment).decode
decode_order = msgspec.json.Decoder(Order).decode
decode_payment = msgspec.json.Decoder(Payment).decode
decode_refund = msgspec.json.Decoder(Refund).decode
decode_shipment = msgspec.json.Decoder(Shipment).decode
decode_return = msgspec.json.Decoder(Return).decode
decode_event = msgspec.json.Decoder(EventRecord).decode
decode_ship_to = msgspec.json.Decoder(ShipTo).decode
encode = msgspec.json.Encoder().encode


def product_key(sku: str) -> bytes:
    return PRODUCTS + sku.encode()


def on_hand_key(sku: str) -> bytes:
    return b"stock/" + sku.encode() + b"/on_hand"


def reserved_key(sku: str) -> bytes:
    return b"stock/" + sku.encode() + b"/reserved"


def adjustments_of(sku: str) -> bytes:
    return b"stock/%b/adjustment/" % sku.encode()


def adjustment_key(sku: str, adjustment_id: int) -> bytes:
    return b"%b%016d" % (adjustments_of(sku), ID_MAX - adjustment_id)


def order_key(order_id: int) -> bytes:
    return b"order/%d" % order_id


def user_order_key(user_id: int, order_id: int, created_ms: int) -> bytes:
    """Keys of one user's orders sort newest first: 16 digits hold the largest inverted time."""
    return b"%b%016d/%d" % (user_orders_of(user_id), ID_MAX - created_ms, order_id)


def user_orders_of(user_id: int) -> bytes:
    return b"user-orders/%d/" % user_id


def allocated_key(sku: str) -> bytes:
    return b"stock/" + sku.encode() + b"/allocated"


STATE_INDEX: Final = b"order-state/"
ATTENTION: Final = b"order-attention/"
EVENTS: Final = b"order-event/"


def inverted(number: int) -> bytes:
    """Sixteen digits that sort the other way round."""
    return b"%016d" % (ID_MAX - number)


def order_state_key(state: OrderState, order_id: int) -> bytes:
    return b"%b%b/%b" % (STATE_INDEX, state.encode(), inverted(order_id))


def attention_key(order_id: int) -> bytes:
    return ATTENTION + inverted(order_id)


def address_key(order_id: int) -> bytes:
    return b"order-address/%d" % order_id


def events_of(order_id: int) -> bytes:
    return b"%b%d/" % (EVENTS, order_id)


def event_key(order_id: int, seq: int) -> bytes:
    return b"%b%06d" % (events_of(order_id), seq)


def part_prefix(kind: str, order_id: int) -> bytes:
    """Of all payments (refunds, shipments, returns) of an order."""
    return b"%b/%d/" % (kind.encode(), order_id)


def part_key(kind: str, order_id: int, number: int) -> bytes:
    return b"%b%06d" % (part_prefix(kind, order_id), number)


def inbox_key(provider: str, event_id: str) -> bytes:
    return f"inbox/{provider}/{event_id}".encode()
