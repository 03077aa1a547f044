"""Carts: what a customer means to buy. A cart reserves nothing and freezes no price; placing an order does both.

| key | holds |
|---|---|
| `cart/{id}` | `Cart` |
| `user-carts/{user}/{inverted id}` | nothing: the list of a user's carts, newest first |
| `user-active-carts/{user}/{inverted id}` | nothing: those that are not ordered, so that they can be counted |

Rules
1. Every change compares the record that it was made from, so none is lost, and `version` grows by one with each.
2. A cart that was ordered does not change any more.
3. A cart, ordered or not, and its places in the lists end `KEPT_S` after its last change, together: with the lease that
   all three are under. A change puts them under a newer one. So do those of an account that was erased: nothing in
   them names a person.

**For who places an order from a cart**: `read_cart`, then in the order's transaction compare `stored.unchanged`, and
write `cart_operations(ordered(stored.cart, order_id), await carts.lease())`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from enum import StrEnum
from typing import Final

import msgspec
from aiohttp import web
from msgspec import Struct

import kvstore
from services.orders.catalogue import no_product
from services.orders.records import LINES_MAX, decode_product, encode, product_key
from services.web.answers import json_response
from services.web.idempotency import Idempotency, refuse_and_store
from services.web.ids import ID_MAX, Ids, now_ms
from services.web.leases import SharedLease
from services.web.paging import Page, PageQuery, page_of
from services.web.problems import Problem
from services.web.reading import read_ranges

CARTS_MAX: Final = 20  # active ones of a user: one for each device and a few wish lists
KEPT_S: Final = 30 * 24 * 3600.0
_LEASE_FILLS_S: Final = 24 * 3600.0
_RECORDS_EACH: Final = 3
_CREATE_ATTEMPTS: Final = 8  # each fails only where two processes drew one id at the same time


class CartState(StrEnum):
    ACTIVE = "active"
    ORDERED = "ordered"


class CartLine(Struct, frozen=True):
    sku: str
    quantity: int


class Cart(Struct, frozen=True, tag_field="v", tag=1):
    """Lines are in the order in which they were added, one for a product. `currency` is that of all of them, empty
    while there are none. `order_id` 0: not ordered."""

    id: int
    user_id: int
    state: CartState
    version: int
    lines: tuple[CartLine, ...]
    created_ms: int
    updated_ms: int
    currency: str = ""
    order_id: int = 0


class StoredCart(Struct, frozen=True):
    cart: Cart
    revision: int

    @property
    def unchanged(self) -> kvstore.Compare:
        key = cart_key(self.cart.id)
        return kvstore.Compare(key, kvstore.Target.MOD_REVISION, kvstore.Relation.EQUAL, self.revision)


decode_cart = msgspec.json.Decoder(Cart).decode


def cart_key(cart_id: int) -> bytes:
    return b"cart/%d" % cart_id


def carts_of(user_id: int) -> bytes:
    return b"user-carts/%d/" % user_id


def active_carts_of(user_id: int) -> bytes:
    return b"user-active-carts/%d/" % user_id


def places_of(cart: Cart) -> tuple[bytes, bytes]:
    """Its keys in the list of all, and in that of active ones."""
    place = b"%016d" % (ID_MAX - cart.id)
    return carts_of(cart.user_id) + place, active_carts_of(cart.user_id) + place


def cart_operations(cart: Cart, lease: int) -> list[kvstore.Put | kvstore.Delete]:
    """The writes that make the cart what it is now, with its places in the lists. For a transaction that compares what
    it was before."""
    own, active = places_of(cart)
    return [
        kvstore.Put(cart_key(cart.id), encode(cart), lease=lease),
        kvstore.Put(own, b"", lease=lease),
        kvstore.Put(active, b"", lease=lease) if cart.state is CartState.ACTIVE else kvstore.Delete(active),
    ]


def ordered(cart: Cart, order_id: int) -> Cart:
    """The cart once it is an order."""
    return _changed(cart, state=CartState.ORDERED, order_id=order_id)


async def read_cart(store: kvstore.Client, user_id: int | None, cart_id: int) -> StoredCart:
    """That user's cart, or with None anyone's (for staff). Raises `Problem` `not_found`, also for another's."""
    return _stored(await store.get(cart_key(cart_id)), user_id)


def check_active(cart: Cart) -> None:
    """Raises `Problem` `cart_ordered`."""
    if cart.state is not CartState.ACTIVE:
        raise Problem("cart_ordered", f"It is order {cart.order_id} now; begin a new cart")


class Carts:
    """One per process."""

    def __init__(self, store: kvstore.Client) -> None:
        self._store = store
        self._ids = Ids()
        self._lease = SharedLease(store, KEPT_S, _LEASE_FILLS_S)

    async def lease(self) -> int:
        """The lease for one cart and its places in the lists."""
        return await self._lease.take(_RECORDS_EACH)

    async def create(
        self, request: web.Request, idempotency: Idempotency, user_id: int, answer: Callable[[Cart], bytes]
    ) -> web.Response:
        """A new cart without lines, or what was answered before; of two at once for the last place one is refused.
        Raises `Problem` `too_many_carts`."""
        active = active_carts_of(user_id)
        end = kvstore.prefix_end(active)
        lease = await self.lease()
        for _ in range(_CREATE_ATTEMPTS):
            now = now_ms()
            cart = Cart(self._ids.next(), user_id, CartState.ACTIVE, 1, (), now, now)
            body, location = answer(cart), f"/v1/carts/{cart.id}"
            result = await self._store.txn(
                compare=[
                    idempotency.absent,
                    kvstore.Compare(cart_key(cart.id), kvstore.Target.VERSION, kvstore.Relation.EQUAL, 0),
                    kvstore.Compare(active, kvstore.Target.COUNT, kvstore.Relation.LESS, CARTS_MAX, end),
                ],
                success=[*cart_operations(cart, lease), idempotency.put(201, body, location)],
                failure=[idempotency.read, kvstore.Range(active, end, keys_only=True)],
            )
            if result.succeeded:
                return json_response(body, 201, {"Location": location})
            answered, found = result.results
            assert isinstance(answered, kvstore.RangeResult)
            assert isinstance(found, kvstore.RangeResult)
            if answered.records:
                return idempotency.replay(answered.records[0])
            if found.count >= CARTS_MAX:
                problem = Problem("too_many_carts", f"You have {CARTS_MAX} carts; order or delete one")
                return await refuse_and_store(self._store, idempotency, problem, request)
        raise RuntimeError(f"no free cart id after {_CREATE_ATTEMPTS} draws")

    async def page(self, user_id: int, query: PageQuery) -> Page[Cart]:
        """Newest first."""
        prefix = carts_of(user_id)

        async def read(records: list[kvstore.Record]) -> list[Cart]:
            if not records:
                return []
            ids = [ID_MAX - int(record.key[len(prefix) :]) for record in records]
            carts = await read_ranges(self._store, [kvstore.Range(cart_key(cart_id)) for cart_id in ids])
            return [decode_cart(record.value) for records in carts for record in records]

        return await page_of(self._store, prefix, query, read)

    async def put_line(
        self, user_id: int, cart_id: int, sku: str, quantity: int, check: Callable[[int], None]
    ) -> StoredCart:
        """Have so many of a product in the cart. `check` refuses by the revision that the cart has. Raises `Problem`:
        `not_found` (cart or product), `cart_ordered`, `product_unavailable`, `mixed_currencies`, `too_many_lines`."""
        line = CartLine(sku, quantity)

        async def change(txn: kvstore.Transaction, cart: Cart) -> Cart:
            currency = await _currency_of(txn, sku)
            others = [one for one in cart.lines if one.sku != sku]
            if others and currency != cart.currency:
                raise Problem("mixed_currencies", f"The cart is in {cart.currency}, {sku} is sold in {currency}")
            if len(others) == len(cart.lines):
                if len(cart.lines) >= LINES_MAX:
                    raise Problem("too_many_lines", f"A cart has {LINES_MAX} products at most")
                lines = (*cart.lines, line)
            else:
                lines = tuple(line if one.sku == sku else one for one in cart.lines)
            if lines == cart.lines and currency == cart.currency:
                return cart
            return _changed(cart, lines=lines, currency=currency)

        return await self._change(user_id, cart_id, check, change)

    async def delete_line(self, user_id: int, cart_id: int, sku: str, check: Callable[[int], None]) -> StoredCart:
        """Raises `Problem`: `not_found` (cart or line), `cart_ordered`."""

        async def change(txn: kvstore.Transaction, cart: Cart) -> Cart:
            lines = tuple(one for one in cart.lines if one.sku != sku)
            if len(lines) == len(cart.lines):
                raise Problem("not_found", f"{sku[:100]} is not in this cart")
            return _changed(cart, lines=lines, currency=cart.currency if lines else "")

        return await self._change(user_id, cart_id, check, change)

    async def delete(self, user_id: int, cart_id: int, check: Callable[[int], None]) -> None:
        """Raises `Problem`: `not_found`, `cart_ordered`."""

        async def body(txn: kvstore.Transaction) -> None:
            stored = _stored(await txn.get(cart_key(cart_id)), user_id)
            check(stored.revision)
            check_active(stored.cart)
            for key in (cart_key(cart_id), *places_of(stored.cart)):
                txn.delete(key)

        await self._store.run_transaction(body)

    async def _change(
        self,
        user_id: int,
        cart_id: int,
        check: Callable[[int], None],
        change: Callable[[kvstore.Transaction, Cart], Awaitable[Cart]],
    ) -> StoredCart:
        lease = await self.lease()

        async def body(txn: kvstore.Transaction) -> tuple[StoredCart, kvstore.Transaction]:
            stored = _stored(await txn.get(cart_key(cart_id)), user_id)
            check(stored.revision)
            check_active(stored.cart)
            cart = await change(txn, stored.cart)
            if cart is not stored.cart:
                for operation in cart_operations(cart, lease):
                    assert isinstance(operation, kvstore.Put)  # an active one has nothing to delete
                    txn.put(operation.key, operation.value, lease=operation.lease)
            return StoredCart(cart, stored.revision), txn

        stored, txn = await self._store.run_transaction(body)
        return StoredCart(stored.cart, txn.result.revision if txn.result is not None else stored.revision)


def _changed(cart: Cart, **fields: object) -> Cart:
    return msgspec.structs.replace(cart, version=cart.version + 1, updated_ms=now_ms(), **fields)


def _stored(record: kvstore.Record | None, user_id: int | None) -> StoredCart:
    cart = decode_cart(record.value) if record is not None else None
    # Another's cart and none at all look the same.
    if record is None or cart is None or user_id not in (None, cart.user_id):
        raise Problem("not_found", "There is no such cart, or none that you may read")
    return StoredCart(cart, record.mod_revision)


async def _currency_of(txn: kvstore.Transaction, sku: str) -> str:
    """The currency of a product that can be ordered. Raises `Problem`: `not_found`, `product_unavailable`."""
    record = await txn.get(product_key(sku))
    if record is None:
        raise no_product(sku)
    product = decode_product(record.value)
    if not product.is_active:
        raise Problem("product_unavailable", f"{sku} is not sold any more")
    return product.currency
