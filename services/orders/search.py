"""Lists of products: by category, words, sku, price, stock.

One index drives and the other conditions filter, in this order: `sku_prefix` (the records themselves), `q` (the index
of its longest word), `category`, else all records. A page is in the order of the index that drives: skus, or words and
then skus. An index only proposes; the record that is read then decides, so that a product that changes meanwhile is
never shown for what it no longer is.

What one request may cost is bounded: a page that has looked at `EXAMINED_MAX` records ends there, with fewer products
than asked for or none, and its cursor goes on behind them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Final

from msgspec import Meta

import kvstore
from services.orders.products import category_of, product_words, words_from, words_of
from services.orders.records import (
    AMOUNT_MAX,
    PRODUCTS,
    SKU_PATTERN,
    Product,
    decode_product,
    on_hand_key,
    product_key,
)
from services.web.paging import Page, PageQuery, after_cursor, cursor_of

# Read at a time: 64 products of the largest kind (a description of 8 KB) are 600 KB of a result's 1 MiB.
_BATCH_RECORDS: Final = 64
EXAMINED_MAX: Final = 512  # records in one page: eight batches, 10 to 13 ms with a store on the same machine

Category = Annotated[str, Meta(max_length=64, pattern=r"\A[a-z0-9]+(-[a-z0-9]+)*\Z", examples=["kitchen"])]
Currency = Annotated[str, Meta(pattern=r"\A[A-Z]{3}\Z", examples=["EUR"])]
Price = Annotated[int, Meta(ge=0, le=AMOUNT_MAX)]
Words = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=100,
        examples=["blue mug"],
        description="Each word must be the beginning of a word of the name or the sku; case and accents do not matter.",
    ),
]
SkuPrefix = Annotated[str, Meta(pattern=SKU_PATTERN, description="What the skus begin with, in this case.")]
InStock = Annotated[bool, Meta(description="Whether any of it may be sold now.")]
IsActive = Annotated[bool, Meta(description="For staff: others see active products only.")]


class ProductsQuery(PageQuery, frozen=True):
    """All conditions that are given must hold. A price is a number of minor units: give the currency with it."""

    category: Category | None = None
    q: Words | None = None
    sku_prefix: SkuPrefix | None = None
    currency: Currency | None = None
    min_price: Price | None = None
    max_price: Price | None = None
    in_stock: InStock | None = None
    is_active: IsActive | None = None


class ProductSearch:
    """One per process."""

    def __init__(self, store: kvstore.Client) -> None:
        self._store = store

    async def page(self, query: ProductsQuery, *, is_staff: bool) -> Page[Product]:
        """Raises `Problem` `invalid_parameter` for a cursor that is none."""
        wanted = _Wanted(query, is_staff)
        if wanted.finds_nothing:
            return Page([], False, None)
        start = wanted.prefix + after_cursor(query.starting_after)
        end = kvstore.prefix_end(wanted.prefix)
        shown: list[Product] = []
        last_shown = b""
        examined = 0
        while True:
            # The first batch is often the page already: most products are active.
            room = _BATCH_RECORDS if examined else min(_BATCH_RECORDS, query.limit + 1)
            found = await self._store.range(
                start, end, limit=min(room, EXAMINED_MAX - examined), keys_only=not wanted.drives_by_records
            )
            products = await self._products(found.records, wanted)
            for record in found.records:
                product = products.get(wanted.sku(record.key))
                if product is None or not wanted.shows(product, record.key):
                    continue
                if len(shown) == query.limit:
                    return Page(shown, True, cursor_of(last_shown[len(wanted.prefix) :]))
                shown.append(product)
                last_shown = record.key
            if not found.more:
                return Page(shown, False, None)
            examined += len(found.records)
            last = found.records[-1].key
            if examined >= EXAMINED_MAX:
                return Page(shown, True, cursor_of(last[len(wanted.prefix) :]))
            start = last + b"\0"

    async def _products(self, records: tuple[kvstore.Record, ...], wanted: _Wanted) -> dict[str, Product]:
        """The products that the records stand for, by sku, without those that stock rules out."""
        if wanted.drives_by_records:
            products = [decode_product(record.value) for record in records]
        else:
            skus = dict.fromkeys(wanted.sku(record.key) for record in records)
            products = [decode_product(record.value) for record in await self._records(map(product_key, skus))]
        if wanted.in_stock is None:
            return {product.sku: product for product in products}
        levels = await self._records(on_hand_key(product.sku) for product in products)
        sold = {record.key for record in levels if int(record.value) > 0}
        return {
            product.sku: product
            for product in products
            if (on_hand_key(product.sku) in sold) is wanted.in_stock
        }  # fmt: skip

    async def _records(self, keys: Iterable[bytes]) -> list[kvstore.Record]:
        """Those that are there, a batch at most, in that order."""
        ranges = [kvstore.Range(key) for key in keys]
        if not ranges:
            return []
        found = await self._store.txn(success=ranges)
        return [record for one in found.results if isinstance(one, kvstore.RangeResult) for record in one.records]


class _Wanted:
    """A query, and which index drives it."""

    def __init__(self, query: ProductsQuery, is_staff: bool) -> None:
        self._query = query
        self._is_staff = is_staff
        self._words = words_of(query.q or "")
        self._word = ""
        self.finds_nothing = query.q is not None and not self._words  # nothing but signs
        self.in_stock = query.in_stock
        self.drives_by_records = False
        if query.sku_prefix is not None:
            self.prefix = PRODUCTS + query.sku_prefix.encode()
            self.drives_by_records = True
        elif self._words:
            self._word = max(self._words, key=len)  # the fewest products have it, as a rule
            self.prefix = words_from(self._word)
        elif query.category is not None:
            self.prefix = category_of(query.category)
        else:
            self.prefix = PRODUCTS
            self.drives_by_records = True

    def sku(self, key: bytes) -> str:
        """Of a record of the index that drives: its key ends with it."""
        return key.rpartition(b"/")[2].decode()

    def shows(self, product: Product, key: bytes) -> bool:
        """Whether the page shows this product where the index has this key."""
        query = self._query
        if not (product.is_active or self._is_staff):
            return False
        if query.is_active is not None and product.is_active is not query.is_active:
            return False
        if query.category is not None and product.category != query.category:
            return False
        if query.currency is not None and product.currency != query.currency:
            return False
        if query.min_price is not None and product.price < query.min_price:
            return False
        if query.max_price is not None and product.price > query.max_price:
            return False
        return not self._words or self._has_words(product, key)

    def _has_words(self, product: Product, key: bytes) -> bool:
        words = product_words(product)
        if not all(any(word.startswith(prefix) for word in words) for prefix in self._words):
            return False
        if not self._word:
            return True
        # Several words of a product may begin alike ("cup", "cupboard"): it is shown where the first of them stands.
        first = min((word for word in words if word.startswith(self._word)), key=str.encode)
        return key == words_from(first) + b"/" + product.sku.encode()
