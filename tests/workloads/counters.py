"""Exactly once: additions of 1, each with a receipt in the same transaction. The sum is the number of receipts.

An addition that a retry applied twice, or that was acknowledged and lost, or half a transaction, makes them differ; so
does a transaction that counted the receipts and missed one which appeared meanwhile: some of them go that way.
"""

from __future__ import annotations

import itertools
from random import Random

from kvstore import Add, Client
from tests.checkers.history import History
from tests.checkers.receipts import check_receipts
from tests.checkers.revisions import check_revisions
from tests.workloads.base import one_or_several
from tests.workloads.receipts import Receipts

# A reading brings all receipts along; after so many the counter is left for a new one.
RECEIPTS_PER_COUNTER = 60


class CounterWorkload:
    name = "counters"

    def __init__(self, history: History, *, timeout_s: float, hot: int = 2, prefix: bytes = b"counters/") -> None:
        self.history = history.part(self.name)
        self._receipts = Receipts(self.history, timeout_s, prefix)
        self._numbers = itertools.count(1)
        self._issued: dict[str, int] = {}
        self._hot = [self._new_counter() for _ in range(hot)]

    def _new_counter(self) -> str:
        name = f"c{next(self._numbers)}"
        self._issued[name] = 0
        return name

    async def set_up(self, kv: Client) -> None:
        """Nothing: an absent number is 0."""

    async def step(self, kv: Client, worker: int, chance: Random) -> None:
        await one_or_several(lambda: self._step(kv, worker, chance), chance)

    async def _step(self, kv: Client, worker: int, chance: Random) -> None:
        place = chance.randrange(len(self._hot))
        name = self._hot[place]
        kind = chance.random()
        if kind >= 0.8:
            await self._receipts.look(kv, worker, name, is_local=kind >= 0.9)
            return
        self._issued[name] += 1
        if self._issued[name] == RECEIPTS_PER_COUNTER:
            self._hot[place] = self._new_counter()
        if kind < 0.2:
            await self._receipts.issue_counted(kv, worker, name)
            return
        one = Add(self._receipts.number_key(name), 1)
        await self._receipts.issue(
            kv, worker, name, one, optimistic=chance.random() < 0.2, receipt_first=chance.random() < 0.5
        )

    async def finish(self, kv: Client) -> None:
        for name in self._issued:
            await self._receipts.last_look(kv, name)

    def check(self) -> None:
        check_revisions(self.history.root.entries)
        for name in self._issued:
            check_receipts(self._receipts.entries(name), 0, 1)
