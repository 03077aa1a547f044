"""What the order service keeps in the store: records as JSON, each with its format in `v`, and their keys.

| key | holds |
|---|---|
| `product/{sku}` | `Product` |
| `product-category/{category}/{sku}` | nothing: the products of a category |
| `product-word/{word}/{sku}` | nothing: the products by the words of their names and skus; see `products.py` |
| `stock/{sku}/on_hand` | a plain integer: what may still be sold |
| `stock/{sku}/reserved` | a plain integer: what placed orders hold until they are paid or end |
| `stock/{sku}/adjustment/{inverted id}` | `Adjustment`: why on_hand changed other than by orders; newest first |
| `order/{id}` | `Order` |
| `user-orders/{user}/{inverted time}/{order}` | nothing: the key is the index, newest first |

Money is an integer of minor units (cents) and a currency; there are no floats.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from msgspec import Meta, Struct

from services.orders.states import OrderState
from services.web.ids import ID_MAX

SKU_PATTERN: Final = r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z"
Sku = Annotated[str, Meta(pattern=SKU_PATTERN)]
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
    id: int
    sku: str
    delta: int
    reason: str
    user_id: int
    created_ms: int


class OrderLine(Struct, frozen=True):
    """One product in an order, as it was when the order was placed."""

    sku: str
    name: str
    quantity: int
    unit_price: int
    total: int


class Order(Struct, frozen=True, tag_field="v", tag=1):
    id: int
    number: str
    user_id: int
    state: OrderState
    currency: str
    lines: tuple[OrderLine, ...]
    total: int
    created_ms: int


decode_product = msgspec.json.Decoder(Product).decode
decode_adjustment = msgspec.json.Decoder(Adjustment).decode
decode_order = msgspec.json.Decoder(Order).decode
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
    return b"user-orders/%d/%016d/%d" % (user_id, ID_MAX - created_ms, order_id)
