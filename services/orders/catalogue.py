"""Products and their stock: reading, putting, adjusting; and the cache of product records that placing orders uses.

The cache may be stale, and that does no harm: whoever decides by a cached record puts its revision as a compare into
the transaction that acts on it, and reads again where that fails. Stock is never cached and never compared; it only
moves by `Add`, so that buyers of one product do not get into each other's way.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from aiohttp import web
from msgspec import Struct

import kvstore
from services.orders.records import (
    STOCK_MAX,
    Adjustment,
    Product,
    adjustment_key,
    decode_product,
    encode,
    on_hand_key,
    product_key,
    reserved_key,
)
from services.web.answers import json_response
from services.web.idempotency import Idempotency, refuse_and_store
from services.web.ids import Ids, now_ms, timestamp
from services.web.problems import Problem, field_problem

_CACHED_MAX: Final = 10_000  # some 10 MB; a shop's hot products are fewer
_ADJUST_ATTEMPTS: Final = 8  # each fails only where two processes drew one id at the same time


class StoredProduct(Struct, frozen=True):
    """A product record and what placing an order needs beside it, made once per record instead of once per order."""

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
    created_at: str


class StockLevel(Struct, frozen=True):
    on_hand: int
    reserved: int


class Catalogue:
    """One per process."""

    def __init__(self, store: kvstore.Client) -> None:
        self._store = store
        self._cached: dict[str, StoredProduct] = {}
        self._ids = Ids()

    # --- products -----------------------------------------------------------------------------------------------------

    async def put(self, product: Product, condition: kvstore.Compare | None) -> tuple[StoredProduct, bool]:
        """Create or replace a product; the second value is True if it is new. Raises `Problem` `precondition_failed`
        where `condition` does not hold."""
        key = product_key(product.sku)
        result = await self._store.txn(
            compare=[] if condition is None else [condition],
            success=[kvstore.Put(key, encode(product), prev=True)],
        )
        if not result.succeeded:
            raise Problem("precondition_failed", "Read the product again, then decide")
        put = result.results[0]
        assert isinstance(put, kvstore.PutResult)
        return self._keep(product, put.revision), put.prev is None

    async def read(self, sku: str) -> StoredProduct | None:
        """The product as it is now."""
        await self.load([sku])
        return self._cached.get(sku)

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
        self._cached[product.sku] = stored
        return stored

    # --- stock --------------------------------------------------------------------------------------------------------

    async def stock(self, sku: str) -> StockLevel | None:
        """None if there is no such product."""
        product, on_hand, reserved = await self._read(product_key(sku), on_hand_key(sku), reserved_key(sku))
        return StockLevel(_number(on_hand), _number(reserved)) if product.records else None

    async def adjust(
        self, request: web.Request, idempotency: Idempotency, sku: str, delta: int, reason: str, user_id: int
    ) -> web.Response:
        """Add `delta` to what is on hand, and record why. Raises `Problem`: `not_found`, `insufficient_stock`,
        `stock_too_large`."""
        key = product_key(sku)
        for _ in range(_ADJUST_ATTEMPTS):
            adjustment = Adjustment(self._ids.next(), sku, delta, reason, user_id, now_ms())
            record_key = adjustment_key(sku, adjustment.id)
            body = adjustment_body(adjustment)
            try:
                result = await self._store.txn(
                    compare=[
                        idempotency.absent,
                        kvstore.Compare(key, kvstore.Target.VERSION, kvstore.Relation.GREATER, 0),
                        kvstore.Compare(record_key, kvstore.Target.VERSION, kvstore.Relation.EQUAL, 0),
                    ],
                    success=[
                        kvstore.Add(on_hand_key(sku), delta, min=0, max=STOCK_MAX),
                        kvstore.Put(record_key, encode(adjustment)),
                        idempotency.put(201, body),
                    ],
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
                raise no_product(sku)
        raise RuntimeError(f"no free adjustment id after {_ADJUST_ATTEMPTS} draws")

    async def _read(self, *keys: bytes) -> tuple[kvstore.RangeResult, ...]:
        """Single keys, all as of one moment."""
        result = await self._store.txn(success=[kvstore.Range(key) for key in keys])
        return result.results  # type: ignore[return-value]  # a range answers a range


def adjustment_body(adjustment: Adjustment) -> bytes:
    created_at = timestamp(adjustment.created_ms)
    return encode(
        AdjustmentBody(
            adjustment.id, adjustment.sku, adjustment.delta, adjustment.reason, adjustment.user_id, created_at
        )
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
