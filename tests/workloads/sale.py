"""The flash sale: everybody buys the same product until it is sold out, then the next one goes on sale.

An order is "take one from stock if there is one, and write the order" in one blind transaction: it reads nothing.
"""

from __future__ import annotations

from random import Random

from kvstore import Add, Client, Put
from tests.checkers.history import History
from tests.checkers.revisions import check_revisions
from tests.checkers.sale import SoldOut, check_sale
from tests.workloads.base import establish, one_or_several
from tests.workloads.receipts import Receipts

STOCK = 20
# Ordering goes on for a while after the last unit is gone, because that is when overselling would happen.
ORDERS_PER_PRODUCT = 30


class SaleWorkload:
    name = "sale"

    def __init__(self, history: History, *, timeout_s: float, products: int, prefix: bytes = b"sale/") -> None:
        """When all products are sold out, the last one goes on being ordered."""
        self.history = history.part(self.name)
        self._receipts = Receipts(self.history, timeout_s, prefix)
        self._products = [f"p{number}" for number in range(1, products + 1)]
        self._orders = 0

    async def set_up(self, kv: Client) -> None:
        puts = [Put(self._receipts.number_key(product), b"%d" % STOCK) for product in self._products]
        await establish(kv, puts, self._receipts.timeout_s)

    async def step(self, kv: Client, worker: int, chance: Random) -> None:
        await one_or_several(lambda: self._step(kv, worker, chance), chance)

    async def _step(self, kv: Client, worker: int, chance: Random) -> None:
        product = self._products[min(self._orders // ORDERS_PER_PRODUCT, len(self._products) - 1)]
        kind = chance.random()
        if kind >= 0.75:
            await self._receipts.look(kv, worker, product, is_local=kind >= 0.87)
            return
        self._orders += 1
        take = Add(self._receipts.number_key(product), -1, min=0)
        entry, refusal = await self._receipts.issue(
            kv,
            worker,
            product,
            take,
            optimistic=chance.random() < 0.3,
            receipt_first=chance.random() < 0.5,
            answers=("out_of_range",),
        )
        if refusal is not None:
            entry.ok(SoldOut())

    async def finish(self, kv: Client) -> None:
        for product in self._products:
            await self._receipts.last_look(kv, product)

    def check(self) -> None:
        check_revisions(self.history.root.entries)
        for product in self._products:
            check_sale(self._receipts.entries(product), STOCK)
