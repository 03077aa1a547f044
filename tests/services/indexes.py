"""What must hold of the catalogue's indexes, whatever happened."""

from __future__ import annotations

import kvstore
from services.orders.products import CATEGORIES, WORDS, index_keys
from services.orders.records import PRODUCTS, decode_product


async def check_indexes(store: kvstore.Client) -> int:
    """The indexes hold what follows from the products, no more and no less. Returns how many entries."""
    products = [decode_product(record.value) async for record in store.scan(prefix=PRODUCTS)]
    wanted = {key for product in products for key in index_keys(product)}
    held: set[bytes] = set()
    for prefix in (CATEGORIES, WORDS):
        held |= {record.key async for record in store.scan(prefix=prefix, keys_only=True)}
    assert held == wanted
    return len(held)
