"""A cart as its owner sees it: its lines at the prices and with the stock of this moment, and what is wrong with them.

Nothing here is promised: the order's transaction checks all of it again.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from msgspec import Struct

import kvstore
from services.orders.carts import Cart, CartLine, CartState
from services.orders.records import TOTAL_MAX, Product, decode_product, on_hand_key, product_key
from services.web.ids import Timestamp, timestamp


class LineProblem(StrEnum):
    """Why a line cannot be ordered as it is; the codes with which an order would be refused."""

    PRODUCT_UNAVAILABLE = "product_unavailable"
    MIXED_CURRENCIES = "mixed_currencies"
    TOTAL_TOO_LARGE = "total_too_large"
    INSUFFICIENT_STOCK = "insufficient_stock"


class CartLineBody(Struct, frozen=True):
    """`name`, `unit_price` and `currency` are today's. `total` is null where the line has no price in the cart's
    currency. `available` is how many could be ordered now."""

    sku: str
    quantity: int
    name: str
    unit_price: int | None
    currency: str | None
    total: int | None
    available: int
    problem: LineProblem | None


class CartBody(Struct, frozen=True):
    """`total` is the sum of the lines' totals; null if it is too large for an order. `can_be_ordered`: it is active,
    has lines, and nothing is wrong with them at this moment. `currency` is null while there are no lines."""

    id: int
    user_id: int
    state: CartState
    version: int
    currency: str | None
    lines: tuple[CartLineBody, ...]
    total: int | None
    can_be_ordered: bool
    order_id: int | None
    created_at: Timestamp
    updated_at: Timestamp


class CartItemBody(Struct, frozen=True):
    """A cart in a list: without prices, which are each product's own."""

    id: int
    state: CartState
    version: int
    currency: str | None
    line_count: int
    order_id: int | None
    created_at: Timestamp
    updated_at: Timestamp


def cart_item(cart: Cart) -> CartItemBody:
    return CartItemBody(
        cart.id,
        cart.state,
        cart.version,
        cart.currency or None,
        len(cart.lines),
        cart.order_id or None,
        timestamp(cart.created_ms),
        timestamp(cart.updated_ms),
    )


async def priced(store: kvstore.Client, cart: Cart) -> CartBody:
    """The cart at the prices and with the stock of one moment."""
    products: dict[str, Product] = {}
    on_hand: dict[str, int] = {}
    if cart.lines:
        # 100 products of the largest kind are 930 KB, within a result's 1 MiB.
        keys = [key for line in cart.lines for key in (product_key(line.sku), on_hand_key(line.sku))]
        found = await store.txn(success=[kvstore.Range(key) for key in keys])
        values = [one.records for one in found.results if isinstance(one, kvstore.RangeResult)]
        for line, product, number in zip(cart.lines, values[::2], values[1::2], strict=True):
            if product:
                products[line.sku] = decode_product(product[0].value)
            on_hand[line.sku] = int(number[0].value) if number else 0
    return cart_body(cart, products, on_hand)


def cart_body(cart: Cart, products: Mapping[str, Product], on_hand: Mapping[str, int]) -> CartBody:
    lines = tuple(_line(cart, line, products.get(line.sku), on_hand.get(line.sku, 0)) for line in cart.lines)
    total: int | None = sum(line.total or 0 for line in lines)
    assert total is not None
    if total > TOTAL_MAX or any(line.problem is LineProblem.TOTAL_TOO_LARGE for line in lines):
        total = None
    is_fine = total is not None and all(line.problem is None for line in lines)
    return CartBody(
        cart.id,
        cart.user_id,
        cart.state,
        cart.version,
        cart.currency or None,
        lines,
        total,
        is_fine and bool(lines) and cart.state is CartState.ACTIVE,
        cart.order_id or None,
        timestamp(cart.created_ms),
        timestamp(cart.updated_ms),
    )


def _line(cart: Cart, line: CartLine, product: Product | None, available: int) -> CartLineBody:
    if product is None or not product.is_active:  # what it would cost is not for everyone any more
        name = line.sku if product is None else product.name
        problem = LineProblem.PRODUCT_UNAVAILABLE
        return CartLineBody(line.sku, line.quantity, name, None, None, None, 0, problem)
    total: int | None = line.quantity * product.price
    assert total is not None
    wrong: LineProblem | None = None
    if product.currency != cart.currency:
        total, wrong = None, LineProblem.MIXED_CURRENCIES
    elif total > TOTAL_MAX:
        total, wrong = None, LineProblem.TOTAL_TOO_LARGE
    elif line.quantity > available:
        wrong = LineProblem.INSUFFICIENT_STOCK
    return CartLineBody(line.sku, line.quantity, product.name, product.price, product.currency, total, available, wrong)
