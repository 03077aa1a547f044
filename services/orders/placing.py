"""Placing an order: one transaction, one round trip to the store, no retries against other buyers.

The transaction compares
- the idempotency record: absent
- each product's record: as it was when it was priced (the cache may be stale; the failure branch reads the new ones)
- the order's record: absent
and writes
- of each product: `Add(on_hand, -quantity, min=0)` and `Add(reserved, +quantity)`. Demand is summed per product first;
  products are in order of their sku. Where stock does not suffice the store refuses the whole.
- the order, with its prices frozen; the user's index of orders; the idempotency record with the answer.

Stock is not compared, so any number of orders for one product follow each other in one entry of the store's log. The
same idempotency key in two places at once: the compares let one pass, and the other answers from its record.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Final

from aiohttp import web
from msgspec import Meta, Struct

import kvstore
from services.orders.catalogue import Catalogue, StoredProduct
from services.orders.records import (
    SKU_PATTERN,
    TOTAL_MAX,
    Order,
    OrderLine,
    encode,
    order_key,
    user_order_key,
)
from services.orders.states import OrderEvent, OrderState, next_state
from services.web.answers import json_response
from services.web.bodies import RequestBody
from services.web.idempotency import Idempotency, refuse_and_store
from services.web.ids import Ids, now_ms, order_number, timestamp
from services.web.problems import FieldError, Problem

LINES_MAX: Final = 100  # 4 compares, writes and reads each: well within the store's 1,024 operations
QUANTITY_MAX: Final = 1_000_000
# An attempt fails only where staff put one of its products, or another process drew the same id, in the milliseconds
# since it was priced.
_ATTEMPTS_MAX: Final = 8

Sku = Annotated[str, Meta(pattern=SKU_PATTERN)]


class LineBody(RequestBody, frozen=True):
    sku: Sku
    quantity: Annotated[int, Meta(ge=1, le=QUANTITY_MAX)]


class Placement(RequestBody, frozen=True):
    """The body of an order to place. A product may stand in several lines; the order will have one for it."""

    lines: Annotated[tuple[LineBody, ...], Meta(min_length=1, max_length=LINES_MAX)]


class OrderBody(Struct, frozen=True):
    """An order as its owner sees it."""

    id: int
    number: str
    user_id: int
    state: OrderState
    currency: str
    lines: tuple[OrderLine, ...]
    total: int
    created_at: str


def order_body(order: Order) -> bytes:
    return encode(
        OrderBody(
            order.id,
            order.number,
            order.user_id,
            order.state,
            order.currency,
            order.lines,
            order.total,
            timestamp(order.created_ms),
        )
    )


class Placing:
    """One per process."""

    def __init__(self, store: kvstore.Client, catalogue: Catalogue) -> None:
        self._store = store
        self._catalogue = catalogue
        self._ids = Ids()

    async def place(
        self, request: web.Request, idempotency: Idempotency, user_id: int, placement: Placement
    ) -> web.Response:
        """The answer to a placement: a new order, or what was answered before. Raises `Problem`: `unknown_product`,
        `insufficient_stock`, `mixed_currencies`, `total_too_large`, `idempotency_key_reused`, `products_changing`."""
        demand: dict[str, int] = {}
        for line in placement.lines:
            demand[line.sku] = demand.get(line.sku, 0) + line.quantity
        skus = sorted(demand)
        for attempt in range(_ATTEMPTS_MAX):
            try:
                products = await self._products(skus, placement)
                order = self._price(products, demand, user_id)
            except Problem as problem:
                if attempt == 0:  # decided by what the cache held, or had just dropped: decide again by what is true
                    self._catalogue.forget(skus)
                    continue
                return await refuse_and_store(self._store, idempotency, problem, request)
            answer = await self._attempt(request, idempotency, placement, products, order)
            if answer is not None:
                return answer
        raise Problem("products_changing", "Their prices changed again and again while the order was placed; try again")

    async def _products(self, skus: list[str], placement: Placement) -> list[StoredProduct]:
        missing = [sku for sku in skus if self._catalogue.cached(sku) is None]
        if missing:
            await self._catalogue.load(missing)
        products = [self._catalogue.cached(sku) for sku in skus]
        unknown = {sku for sku, product in zip(skus, products, strict=True) if product is None}
        if unknown:
            raise Problem(
                "unknown_product",
                f"There is no product {min(unknown)}",
                errors=tuple(
                    FieldError(f"/lines/{position}/sku", "unknown_product", f"There is no product {line.sku}")
                    for position, line in enumerate(placement.lines)
                    if line.sku in unknown
                ),
            )
        return [product for product in products if product is not None]

    def _price(self, products: Sequence[StoredProduct], demand: dict[str, int], user_id: int) -> Order:
        """The order that would be placed, at these products' prices."""
        currency = products[0].product.currency
        lines: list[OrderLine] = []
        total = 0
        for stored in products:
            product = stored.product
            if product.currency != currency:
                raise Problem(
                    "mixed_currencies", f"{lines[0].sku} is sold in {currency}, {product.sku} in {product.currency}"
                )
            quantity = demand[product.sku]
            amount = quantity * product.price
            total += amount
            lines.append(OrderLine(product.sku, product.name, quantity, product.price, amount))
        if total > TOTAL_MAX:
            raise Problem("total_too_large", f"An order's total is at most {TOTAL_MAX} minor units")
        order_id = self._ids.next()
        state = next_state(None, OrderEvent.PLACE)
        return Order(order_id, order_number(order_id), user_id, state, currency, tuple(lines), total, now_ms())

    async def _attempt(
        self,
        request: web.Request,
        idempotency: Idempotency,
        placement: Placement,
        products: list[StoredProduct],
        order: Order,
    ) -> web.Response | None:
        """One transaction. None if it met newer products (which are then in the cache) or a taken id."""
        key = order_key(order.id)
        location = f"/v1/orders/{order.id}"
        body = order_body(order)
        compare = [
            idempotency.absent,
            kvstore.Compare(key, kvstore.Target.VERSION, kvstore.Relation.EQUAL, 0),
        ]
        success: list[kvstore.Operation] = []
        failure: list[kvstore.Operation] = [idempotency.read]
        for stored, line in zip(products, order.lines, strict=True):
            compare.append(stored.unchanged)
            success.append(kvstore.Add(stored.on_hand_key, -line.quantity, min=0))
            success.append(kvstore.Add(stored.reserved_key, line.quantity))
            failure.append(stored.read)
        success.append(kvstore.Put(key, encode(order)))
        success.append(kvstore.Put(user_order_key(order.user_id, order.id, order.created_ms), b""))
        success.append(idempotency.put(201, body, location))
        try:
            result = await self._store.txn(compare, success, failure)
        except kvstore.Refused as refusal:
            if refusal.code != "out_of_range":
                raise
            problem = _insufficient(order.lines[refusal.operation[0] // 2], placement)
            return await refuse_and_store(self._store, idempotency, problem, request)
        if result.succeeded:
            return json_response(body, 201, {"Location": location})
        answered, *found = result.results
        assert isinstance(answered, kvstore.RangeResult)
        if answered.records:
            return idempotency.replay(answered.records[0])
        for stored, record in zip(products, found, strict=True):
            assert isinstance(record, kvstore.RangeResult)
            self._catalogue.learn(stored.product.sku, record)
        return None


def _insufficient(short: OrderLine, placement: Placement) -> Problem:
    detail = f"There are not {short.quantity} of {short.sku}"
    return Problem(
        "insufficient_stock",
        detail,
        errors=tuple(
            FieldError(f"/lines/{position}/quantity", "insufficient_stock", detail)
            for position, line in enumerate(placement.lines)
            if line.sku == short.sku
        ),
    )
