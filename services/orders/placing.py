"""Placing an order: one transaction, one round trip to the store, no retries against other buyers.

The transaction compares
- the idempotency record: absent
- the cart, where it is placed from one: as it was read
- each product's record: as it was when it was priced (the cache may be stale; the failure branch reads the new ones)
- the order's record: absent
and writes
- of each product: `Add(on_hand, -quantity, min=0)` and `Add(reserved, +quantity)`. Demand is summed per product first;
  products are in order of their sku. Where stock does not suffice the store refuses the whole.
- the order, with its prices frozen; where it goes to; its entries in the user's index and the index by state; its first
  event; the step that lets it expire; the cart, ordered; the idempotency record with the answer. An order that costs
  nothing is confirmed at once, and its stock allocated.

Stock is not compared, so any number of orders for one product follow each other in one entry of the store's log. The
same idempotency key in two places at once: the compares let one pass, and the other answers from its record.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Final

import msgspec
from aiohttp import web
from msgspec import UNSET, Meta, Struct, UnsetType

import kvstore
from services.orders.bodies import order_body
from services.orders.carts import (
    CartLine,
    Carts,
    StoredCart,
    cart_key,
    cart_operations,
    check_active,
    ordered,
    read_cart,
)
from services.orders.catalogue import Catalogue, StoredProduct
from services.orders.draft import EXPIRY_STEP
from services.orders.records import (
    LINES_MAX,
    QUANTITY_MAX,
    TOTAL_MAX,
    EventRecord,
    Order,
    OrderLine,
    ShipTo,
    Sku,
    StockHeld,
    address_key,
    allocated_key,
    encode,
    event_key,
    order_key,
    order_state_key,
    user_order_key,
)
from services.orders.states import ORDER, OrderEvent
from services.web.addresses import AddressInput, check_country
from services.web.answers import json_response
from services.web.bodies import RequestBody
from services.web.idempotency import Idempotency, refuse_and_store
from services.web.ids import ID_MAX, Id, Ids, now_ms, order_number
from services.web.problems import FieldError, Problem, field_problem
from services.work import steps

# An attempt fails only where staff put one of its products, or another process drew the same id, in the milliseconds
# since it was priced.
_ATTEMPTS_MAX: Final = 8


class LineBody(RequestBody, frozen=True):
    sku: Sku
    quantity: Annotated[int, Meta(ge=1, le=QUANTITY_MAX, examples=[1])]


class Placement(RequestBody, frozen=True):
    """The body of an order to place: `lines`, or `cart_id`. A product may stand in several lines; the order will have
    one for it. `cart_version` and `expected_total` are what the customer was shown: if the cart or the total is not
    that any more, nothing is ordered."""

    schema_adds: ClassVar[dict[str, Any]] = {
        "oneOf": [{"required": ["lines"]}, {"required": ["cart_id"]}],
        "dependentRequired": {"cart_version": ["cart_id"]},
        "examples": [{"lines": [{"sku": "mug-blue", "quantity": 1}]}],
    }

    lines: Annotated[tuple[LineBody, ...], Meta(min_length=1, max_length=LINES_MAX)] | UnsetType = UNSET
    cart_id: Id | UnsetType = UNSET
    cart_version: Annotated[int, Meta(ge=1, le=ID_MAX)] | UnsetType = UNSET
    ship_to: AddressInput | UnsetType = UNSET
    expected_total: Annotated[int, Meta(ge=0, le=TOTAL_MAX)] | UnsetType = UNSET


class Wanted(Struct, frozen=True):
    """What to order, by its source: the body, or a cart with the lease that it stays under."""

    lines: Sequence[LineBody | CartLine]
    cart: StoredCart | None = None
    lease: int = 0

    def pointer(self, position: int, field: str) -> str:
        return "/cart_id" if self.cart is not None else f"/lines/{position}/{field}"


class Placing:
    """One per process."""

    def __init__(self, store: kvstore.Client, catalogue: Catalogue, carts: Carts, pay_within_ms: int) -> None:
        self._store = store
        self._catalogue = catalogue
        self._carts = carts
        self._pay_within_ms = pay_within_ms
        self._ids = Ids()

    async def place(
        self, request: web.Request, idempotency: Idempotency, user_id: int, placement: Placement
    ) -> web.Response:
        """The answer to a placement: a new order, or what was answered before. Raises `Problem`: `invalid_body`,
        `not_found`, `cart_ordered`, `cart_changed`, `cart_empty`, `unknown_product`, `product_unavailable`,
        `insufficient_stock`, `mixed_currencies`, `total_too_large`, `total_changed`, `idempotency_key_reused`,
        `products_changing`."""
        if (placement.lines is UNSET) is (placement.cart_id is UNSET):
            raise field_problem("", "invalid_value", "Send lines, or the cart_id of a cart")
        if placement.cart_id is UNSET and placement.cart_version is not UNSET:
            raise field_problem("/cart_version", "invalid_value", "There is a cart_version, and no cart_id")
        if placement.ship_to is not UNSET:
            check_country(placement.ship_to, "/ship_to")
        for attempt in range(_ATTEMPTS_MAX):
            skus: list[str] = []
            try:
                wanted = await self._wanted(placement, user_id)
                demand: dict[str, int] = {}
                for line in wanted.lines:
                    demand[line.sku] = demand.get(line.sku, 0) + line.quantity
                skus = sorted(demand)
                products = await self._products(skus, wanted)
                order = self._price(products, demand, user_id, wanted.cart)
                if placement.expected_total is not UNSET and placement.expected_total != order.total:
                    raise _total_changed(order)
            except Problem as problem:
                if attempt == 0:  # decided by what the cache held, or had just dropped: decide again by what is true
                    self._catalogue.forget(skus)
                    continue
                return await refuse_and_store(self._store, idempotency, problem, request)
            answer = await self._attempt(request, idempotency, placement, wanted, products, order)
            if answer is not None:
                return answer
        raise Problem("products_changing", "Their prices changed again and again while the order was placed; try again")

    async def _wanted(self, placement: Placement, user_id: int) -> Wanted:
        if placement.lines is not UNSET:
            return Wanted(placement.lines)
        assert placement.cart_id is not UNSET
        stored = await read_cart(self._store, user_id, placement.cart_id)
        cart = stored.cart
        check_active(cart)
        if placement.cart_version not in (UNSET, cart.version):
            detail = f"The cart has version {cart.version} now"
            raise field_problem("/cart_version", "cart_changed", detail, problem="cart_changed")
        if not cart.lines:
            raise field_problem("/cart_id", "cart_empty", "Put something into the cart first", problem="cart_empty")
        return Wanted(cart.lines, stored, await self._carts.lease())

    async def _products(self, skus: list[str], wanted: Wanted) -> list[StoredProduct]:
        missing = [sku for sku in skus if self._catalogue.cached(sku) is None]
        if missing:
            await self._catalogue.load(missing)
        products = [stored for sku in skus if (stored := self._catalogue.cached(sku)) is not None]
        if len(products) < len(skus):
            unknown = set(skus) - {stored.product.sku for stored in products}
            raise _not_to_be_had("unknown_product", "There is no product {}", unknown, wanted)
        archived = {stored.product.sku for stored in products if not stored.product.is_active}
        if archived:
            raise _not_to_be_had("product_unavailable", "{} is not sold any more", archived, wanted)
        return products

    def _price(
        self, products: Sequence[StoredProduct], demand: dict[str, int], user_id: int, cart: StoredCart | None
    ) -> Order:
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
        order_id, now = self._ids.next(), now_ms()
        state = ORDER.next(None, OrderEvent.PLACE)
        if total == 0:
            state = ORDER.next(state, OrderEvent.PAY)
        return Order(
            id=order_id,
            number=order_number(order_id),
            user_id=user_id,
            state=state,
            currency=currency,
            lines=tuple(lines),
            total=total,
            created_ms=now,
            expires_ms=now + self._pay_within_ms,
            updated_ms=now,
            stock=StockHeld.RESERVED if total else StockHeld.ALLOCATED,
            events=1,
            cart_id=0 if cart is None else cart.cart.id,
        )

    async def _attempt(
        self,
        request: web.Request,
        idempotency: Idempotency,
        placement: Placement,
        wanted: Wanted,
        products: list[StoredProduct],
        order: Order,
    ) -> web.Response | None:
        """One transaction. None if it met newer products (which are then in the cache), a cart that has changed, or a
        taken id."""
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
            held_key = stored.reserved_key if order.total else allocated_key(line.sku)
            success.append(kvstore.Add(held_key, line.quantity))
            failure.append(stored.read)
        success.append(kvstore.Put(key, encode(order)))
        success.append(kvstore.Put(user_order_key(order.user_id, order.id, order.created_ms), b""))
        success.append(kvstore.Put(order_state_key(order.state, order.id), b""))
        event = EventRecord(order.id, 1, f"order.{order.state}", order.created_ms)
        success.append(kvstore.Put(event_key(order.id, 1), encode(event)))
        if order.total:
            success.append(steps.put(EXPIRY_STEP, str(order.id), due_ms=order.expires_ms))
        if placement.ship_to is not UNSET:
            success.append(
                kvstore.Put(address_key(order.id), encode(ShipTo(**msgspec.structs.asdict(placement.ship_to))))
            )
        if wanted.cart is not None:
            compare.append(
                kvstore.Compare(
                    cart_key(order.cart_id), kvstore.Target.MOD_REVISION, kvstore.Relation.EQUAL, wanted.cart.revision
                )
            )
            success += cart_operations(ordered(wanted.cart.cart, order.id), wanted.lease)
        success.append(idempotency.put(201, body, location))
        try:
            result = await self._store.txn(compare, success, failure)
        except kvstore.Refused as refusal:
            if refusal.code != "out_of_range":
                raise
            problem = _insufficient(order.lines[refusal.operation[0] // 2], wanted)
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


def _total_changed(order: Order) -> Problem:
    detail = f"The total is {order.total} {order.currency} now"
    return Problem("total_changed", detail, errors=(FieldError("/expected_total", "total_changed", detail),))


def _not_to_be_had(code: str, detail: str, skus: set[str], wanted: Wanted) -> Problem:
    return Problem(
        code,
        detail.format(min(skus)),
        errors=tuple(
            FieldError(wanted.pointer(position, "sku"), code, detail.format(line.sku))
            for position, line in enumerate(wanted.lines)
            if line.sku in skus
        ),
    )


def _insufficient(short: OrderLine, wanted: Wanted) -> Problem:
    detail = f"There are not {short.quantity} of {short.sku}"
    return Problem(
        "insufficient_stock",
        detail,
        errors=tuple(
            FieldError(wanted.pointer(position, "quantity"), "insufficient_stock", detail)
            for position, line in enumerate(wanted.lines)
            if line.sku == short.sku
        ),
    )
