"""Transactions that move a number and write a receipt: the flash sale (`SaleWorkload`) and exactly-once counters
(`CounterWorkload`, in their own modules) do the same to their keys, and are judged by different rules.

The number of NAME is at PREFIX NAME `/number`, its receipts are below PREFIX NAME `/receipt/`.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from typing import Any

from kvstore import Add, AddResult, Client, Put, RangeResult, Refused, Transaction, TxnResult
from tests.checkers.history import Entry, History
from tests.checkers.receipts import Issue, Look, Reading
from tests.workloads.base import NOT_THERE_YET, insist, noted

# Of a transaction that loses against others.
ATTEMPTS = 4


class Receipts:
    """The calls of both workloads, each noted as one operation."""

    def __init__(self, history: History, timeout_s: float, prefix: bytes) -> None:
        self.history = history
        self.timeout_s = timeout_s
        self._prefix = prefix
        self._ids = itertools.count(1)

    def number_key(self, name: str) -> bytes:
        return self._prefix + name.encode() + b"/number"

    async def issue(
        self,
        kv: Client,
        worker: int,
        name: str,
        add: Add,
        *,
        optimistic: bool,
        receipt_first: bool,
        answers: Collection[str] = (),
    ) -> tuple[Entry, Refused | None]:
        """Do `add` and write a receipt, in either order: a refused addition must also undo what stands before it. A
        refusal whose code is among `answers` is left for the caller to note."""
        receipt = f"{worker}-{next(self._ids)}"
        put = Put(self._receipt_key(name, receipt), receipt.encode())
        entry = self.history.begin(worker, Issue(name, receipt))
        both: tuple[Put | Add, ...] = (put, add) if receipt_first else (add, put)
        call = self._optimistic(kv, both) if optimistic else kv.txn(success=both, timeout=self.timeout_s)
        result = await noted(entry, call, answers)
        if isinstance(result, Refused):
            return entry, result
        if result is not None:
            added = result.results[both.index(add)]
            assert isinstance(added, AddResult)
            entry.ok(added.value, revision=result.revision, changed=True)
        return entry, None

    async def _optimistic(self, kv: Client, both: Sequence[Put | Add]) -> TxnResult:
        async with kv.transaction(timeout=self.timeout_s) as txn:
            for operation in both:
                if isinstance(operation, Add):
                    txn.add(operation.key, operation.delta, min=operation.min, max=operation.max)
                else:
                    txn.put(operation.key, operation.value)
        assert txn.result is not None
        return txn.result

    async def issue_counted(self, kv: Client, worker: int, name: str) -> None:
        """Count the receipts, and write one more and their number. Nothing but the range that was read tells this
        transaction of another one: a receipt that appears in it meanwhile would be a phantom."""
        receipt = f"{worker}-{next(self._ids)}"
        entry = self.history.begin(worker, Issue(name, receipt))
        used: list[Transaction] = []

        async def body(txn: Transaction) -> int:
            used[:] = [txn]
            found = await txn.range(prefix=self._receipt_key(name, ""), keys_only=True)
            txn.put(self.number_key(name), b"%d" % (found.count + 1))
            txn.put(self._receipt_key(name, receipt), receipt.encode())
            return found.count + 1

        call = kv.run_transaction(body, attempts=ATTEMPTS, timeout=self.timeout_s)
        value = await noted(entry, call)
        if isinstance(value, int):
            result = used[0].result
            assert result is not None
            entry.ok(value, revision=result.revision, changed=True)

    async def look(self, kv: Client, worker: int, name: str, *, is_local: bool) -> None:
        entry = self.history.begin(worker, Look(name, is_local))
        level: Any = "local" if is_local else "linearizable"
        result = await noted(entry, kv.range(prefix=self._all(name), level=level, timeout=self.timeout_s))
        if isinstance(result, RangeResult):
            if is_local and not result.records:
                entry.failed(NOT_THERE_YET)
                return
            entry.ok(self._reading(name, result), revision=0 if is_local else result.revision)

    async def last_look(self, kv: Client, name: str) -> None:
        async def read() -> None:
            entry = self.history.begin(-1, Look(name))
            result = await kv.range(prefix=self._all(name), timeout=self.timeout_s)
            entry.ok(self._reading(name, result), revision=result.revision)

        await insist(read)

    def entries(self, name: str) -> list[Entry]:
        return [entry for entry in self.history.entries if entry.operation.number == name]

    def _all(self, name: str) -> bytes:
        return self._prefix + name.encode() + b"/"

    def _receipt_key(self, name: str, receipt: str) -> bytes:
        return self._all(name) + b"receipt/" + receipt.encode()

    def _reading(self, name: str, result: RangeResult) -> Reading:
        assert not result.more, "a number and its receipts fit one result"
        value = 0
        receipts: list[str] = []
        broken: list[str] = []
        skip = len(self._receipt_key(name, ""))
        for record in result.records:
            if record.key == self.number_key(name):
                value = int(record.value)
                continue
            receipts.append(record.key[skip:].decode())
            if record.value != record.key[skip:]:
                broken.append(receipts[-1])
        return Reading(value, frozenset(receipts), tuple(broken))
