"""Products and their stock: reading, putting, adjusting; and the cache of product records that placing orders uses.

What a product's record and its indexes are is in `products.py`; lists of products are in `search.py`.

The cache may be stale, and that does no harm: whoever decides by a cached record puts its revision as a compare into
the transaction that acts on it, and reads again where that fails. Stock is never cached and never compared; it only
moves by `Add`, so that buyers of one product do not get into each other's way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

import msgspec
from aiohttp import web
from msgspec import Struct

import kvstore
from services.orders.products import product_operations
from services.orders.records import (
    STOCK_MAX,
    Adjustment,
    Product,
    adjustment_key,
    adjustments_of,
    allocated_key,
    decode_adjustment,
    decode_product,
    encode,
    on_hand_key,
    product_key,
    reserved_key,
)
from services.web.answers import json_response
from services.web.idempotency import Idempotency, refuse_and_store
from services.web.ids import Ids, Timestamp, now_ms, timestamp
from services.web.paging import Page, PageQuery, page_of
from services.web.problems import Problem, field_problem

_CACHED_MAX: Final = 10_000  # some 10 MB; a shop's hot products are fewer
# An attempt fails only where another one of the same product succeeded since; past so many there is a loop somewhere.
_PUT_ATTEMPTS: Final = 16
_ADJUST_ATTEMPTS: Final = 8  # each fails only where two processes drew one id at the same time


class StoredProduct(Struct, frozen=True):
    """A product record and what placing an order needs beside it, made once per record instead of once per order. In
    the cache the product has no description: that would be most of it, and no order needs it."""

    product: Product
    revision: int
    on_hand_key: bytes
    reserved_key: bytes
    unchanged: kvstore.Compare
    read: kvstore.Range


class AdjustmentBody(Struct, frozen=True):
    id: int
    sku: str
    delta: int
    reason: str
    user_id: int
    created_at: Timestamp


class StockLevel(Struct, frozen=True):
    """`is_active` is the product's. `revisions` are those of the three numbers, in this order."""

    on_hand: int
    reserved: int
    allocated: int
    is_active: bool
    revisions: tuple[int, int, int]


class Catalogue:
    """One per process."""

    def __init__(self, store: kvstore.Client) -> None:
        self._store = store
        self._cached: dict[str, StoredProduct] = {}
        self._ids = Ids()

    # --- products -----------------------------------------------------------------------------------------------------

    async def put(self, product: Product, check: Callable[[int], None]) -> tuple[StoredProduct, bool]:
        """Create or replace a product, and its places in the indexes; the second value is True if it is new. `check`
        refuses by the revision that the record has (0: there is none), and no other is replaced. When it was created
        is kept from before."""
        key = product_key(product.sku)
        found = await self._store.get(key)
        for _ in range(_PUT_ATTEMPTS):
            revision = found.mod_revision if found is not None else 0
            check(revision)
            before = decode_product(found.value) if found is not None else None
            if before is not None:
                product = msgspec.structs.replace(product, created_ms=before.created_ms or before.updated_ms)
            result = await self._store.txn(
                compare=[kvstore.Compare(key, kvstore.Target.MOD_REVISION, kvstore.Relation.EQUAL, revision)],
                success=product_operations(product, before),
                failure=[kvstore.Range(key)],
            )
            if result.succeeded:
                return self._keep(product, result.revision), before is None
            (newer,) = result.results
            assert isinstance(newer, kvstore.RangeResult)
            found = newer.records[0] if newer.records else None
        raise Problem("contended", "The product kept changing; try again")

    async def read(self, sku: str) -> StoredProduct | None:
        """The product as it is now, with all its fields."""
        (found,) = await self._read(product_key(sku))
        if not found.records:
            self._cached.pop(sku, None)
            return None
        return self._keep(decode_product(found.records[0].value), found.records[0].mod_revision)

    def cached(self, sku: str) -> StoredProduct | None:
        return self._cached.get(sku)

    def forget(self, skus: Iterable[str]) -> None:
        for sku in skus:
            self._cached.pop(sku, None)

    async def load(self, skus: list[str]) -> None:
        """Read products into the cache, all in one round trip; those that do not exist are then not in it."""
        for sku, found in zip(skus, await self._read(*map(product_key, skus)), strict=True):
            self.learn(sku, found)

    def learn(self, sku: str, found: kvstore.RangeResult) -> None:
        """Take over what a read of the product's record found."""
        if found.records:
            record = found.records[0]
            self._keep(decode_product(record.value), record.mod_revision)
        else:
            self._cached.pop(sku, None)

    def _keep(self, product: Product, revision: int) -> StoredProduct:
        """The product with all its fields; the cache has it without those that no order needs."""
        key = product_key(product.sku)
        stored = StoredProduct(
            product,
            revision,
            on_hand_key(product.sku),
            reserved_key(product.sku),
            kvstore.Compare(key, kvstore.Target.MOD_REVISION, kvstore.Relation.EQUAL, revision),
            kvstore.Range(key),
        )
        if len(self._cached) >= _CACHED_MAX and product.sku not in self._cached:
            del self._cached[next(iter(self._cached))]  # the oldest; a hot one is back with the next order
        kept = msgspec.structs.replace(product, description="") if product.description else product
        self._cached[product.sku] = msgspec.structs.replace(stored, product=kept)
        return stored

    # --- stock --------------------------------------------------------------------------------------------------------

    async def stock(self, sku: str) -> StockLevel | None:
        """None if there is no such product."""
        product, *numbers = await self._read(product_key(sku), on_hand_key(sku), reserved_key(sku), allocated_key(sku))
        if not product.records:
            return None
        on_hand, reserved, allocated = map(_number, numbers)
        is_active = decode_product(product.records[0].value).is_active
        first, second, third = (found.records[0].mod_revision if found.records else 0 for found in numbers)
        return StockLevel(on_hand, reserved, allocated, is_active, (first, second, third))

    async def adjust(
        self, request: web.Request, idempotency: Idempotency, sku: str, delta: int, reason: str, user_id: int
    ) -> web.Response:
        """Add `delta` to what is on hand, and record why. Raises `Problem`: `not_found`, `insufficient_stock`,
        `stock_too_large`."""
        key = product_key(sku)
        for _ in range(_ADJUST_ATTEMPTS):
            adjustment = Adjustment(self._ids.next(), sku, delta, reason, user_id, now_ms())
            record_key = adjustment_key(sku, adjustment.id)
            body = encode(adjustment_of(adjustment))
            try:
                result = await self._store.txn(
                    compare=[
                        idempotency.absent,
                        kvstore.Compare(key, kvstore.Target.VERSION, kvstore.Relation.GREATER, 0),
                        kvstore.Compare(record_key, kvstore.Target.VERSION, kvstore.Relation.EQUAL, 0),
                    ],
                    success=[*adjustment_operations(adjustment), idempotency.put(201, body)],
                    failure=[idempotency.read, kvstore.Range(key)],
                )
            except kvstore.Refused as refusal:
                if refusal.code != "out_of_range":
                    raise
                return await refuse_and_store(self._store, idempotency, _out_of_range(sku, delta), request)
            if result.succeeded:
                return json_response(body, 201)
            answered, product = result.results
            assert isinstance(answered, kvstore.RangeResult)
            assert isinstance(product, kvstore.RangeResult)
            if answered.records:
                return idempotency.replay(answered.records[0])
            if not product.records:
                return await refuse_and_store(self._store, idempotency, no_product(sku), request)
        raise RuntimeError(f"no free adjustment id after {_ADJUST_ATTEMPTS} draws")

    async def adjustments(self, sku: str, query: PageQuery) -> Page[AdjustmentBody] | None:
        """Newest first. None if there is no such product."""
        if await self._store.get(product_key(sku)) is None:
            return None

        async def read(records: list[kvstore.Record]) -> list[AdjustmentBody]:
            return [adjustment_of(decode_adjustment(record.value)) for record in records]

        return await page_of(self._store, adjustments_of(sku), query, read)

    async def _read(self, *keys: bytes) -> tuple[kvstore.RangeResult, ...]:
        """Single keys, all as of one moment."""
        result = await self._store.txn(success=[kvstore.Range(key) for key in keys])
        return result.results  # type: ignore[return-value]  # a range answers a range


def adjustment_operations(first: Adjustment, *more: Adjustment) -> list[kvstore.Operation]:
    """The writes of adjustments of one product, for the transaction that makes them. Refused as `out_of_range` where
    stock would fall below 0 or pass `STOCK_MAX`."""
    adjustments = (first, *more)
    assert all(one.sku == first.sku for one in adjustments)
    # One key is written once in a transaction.
    change = kvstore.Add(on_hand_key(first.sku), sum(one.delta for one in adjustments), min=0, max=STOCK_MAX)
    return [change, *(kvstore.Put(adjustment_key(one.sku, one.id), encode(one)) for one in adjustments)]


def adjustment_of(adjustment: Adjustment) -> AdjustmentBody:
    """As staff see it."""
    created_at = timestamp(adjustment.created_ms)
    return AdjustmentBody(
        adjustment.id, adjustment.sku, adjustment.delta, adjustment.reason, adjustment.user_id, created_at
    )


def no_product(sku: str) -> Problem:
    return Problem("not_found", f"There is no product {sku[:100]!r}")


def _number(found: kvstore.RangeResult) -> int:
    return int(found.records[0].value) if found.records else 0


def _out_of_range(sku: str, delta: int) -> Problem:
    if delta < 0:
        detail = f"There are not {-delta} of {sku} on hand"
        return field_problem("/delta", "insufficient_stock", detail, problem="insufficient_stock")
    detail = f"Stock of {sku} would pass {STOCK_MAX}"
    return field_problem("/delta", "stock_too_large", detail, problem="stock_too_large")
