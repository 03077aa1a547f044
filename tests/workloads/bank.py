"""Transfers between a few accounts, and readings of all of them. Judged by the money.

Transfers go three ways: one blind `Txn` of two bounded additions, one `Txn` that compares the balance first, and an
optimistic transaction that reads both accounts. Each writes a ledger entry. Readings go five ways: one range, one
read-only `Txn`, a read-only transaction of single gets, a replica's own state, and at the end a scan in pages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from kvstore import (
    Add,
    Client,
    Compare,
    Operation,
    Put,
    Range,
    RangeResult,
    Record,
    Refused,
    Relation,
    Target,
    Transaction,
    TxnResult,
)
from tests.checkers.bank import ReadAccounts, Statement, Transfer, check_bank
from tests.checkers.history import Entry, History
from tests.checkers.revisions import check_revisions
from tests.workloads.base import NOT_THERE_YET, establish, insist, noted, one_or_several

INITIAL = 50
# Large enough, beside what there is, that accounts run dry often.
AMOUNT_MAX = 30
ATTEMPTS = 4
# Readings in between bring the ledger along only while it is short: a long one would be all that is read.
LEDGER_MAX = 300


class BankWorkload:
    name = "bank"

    def __init__(self, history: History, *, timeout_s: float, accounts: int = 4, prefix: bytes = b"bank/") -> None:
        self.history = history.part(self.name)
        self._timeout_s = timeout_s
        self._prefix = prefix
        self._initial = {f"a{number}": INITIAL for number in range(1, accounts + 1)}
        self._names = list(self._initial)
        self._transfers = 0

    async def set_up(self, kv: Client) -> None:
        puts = [Put(self._account(name), b"%d" % amount) for name, amount in self._initial.items()]
        await establish(kv, puts, self._timeout_s)

    async def step(self, kv: Client, worker: int, chance: Random) -> None:
        await one_or_several(lambda: self._step(kv, worker, chance), chance)

    async def _step(self, kv: Client, worker: int, chance: Random) -> None:
        kind = chance.random()
        if kind < 0.65:
            source, target = chance.sample(self._names, 2)
            self._transfers += 1
            transfer = Transfer(f"t{self._transfers}", source, target, chance.randint(1, AMOUNT_MAX))
            entry = self.history.begin(worker, transfer)
            if kind < 0.25:
                await self._transfer_blind(kv, entry, transfer, chance)
            elif kind < 0.35:
                await self._transfer_compared(kv, entry, transfer)
            else:
                await self._transfer_optimistic(kv, entry, transfer)
        elif kind < 0.80:
            await self._read_range(kv, worker, with_ledger=chance.random() < 0.3, is_local=False)
        elif kind < 0.88:
            await self._read_range(kv, worker, with_ledger=chance.random() < 0.3, is_local=True)
        elif kind < 0.94:
            await self._read_txn(kv, worker)
        else:
            await self._read_optimistic(kv, worker)

    async def finish(self, kv: Client) -> None:
        async def read_all() -> None:
            entry = self.history.begin(-1, ReadAccounts(with_ledger=True, way="scan"))
            records = [record async for record in kv.scan(prefix=self._prefix, timeout=self._timeout_s)]
            entry.ok(self._statement(records, with_ledger=True))

        await insist(read_all)

    def begin_reading(self, worker: int) -> tuple[Entry, Callable[[Sequence[Record]], Statement]]:
        """See `base.BackedUp`."""
        entry = self.history.begin(worker, ReadAccounts(with_ledger=True, way="backup"))
        own = self._prefix

        def made(records: Sequence[Record]) -> Statement:
            return self._statement([record for record in records if record.key.startswith(own)], with_ledger=True)

        return entry, made

    def check(self) -> None:
        check_revisions(self.history.root.entries)
        check_bank(self.history.entries, self._initial)

    # --- transfers ----------------------------------------------------------------------------------------------------

    async def _transfer_blind(self, kv: Client, entry: Entry, transfer: Transfer, chance: Random) -> None:
        success: list[Operation] = [
            Add(self._account(transfer.source), -transfer.amount, min=0),
            Add(self._account(transfer.target), transfer.amount),
            Put(self._ledger(transfer.id), transfer.text()),
        ]
        chance.shuffle(success)  # a refused addition must also undo what stands before it
        result = await noted(entry, kv.txn(success=success, timeout=self._timeout_s))
        if isinstance(result, TxnResult):
            entry.ok(revision=result.revision, changed=True)

    async def _transfer_compared(self, kv: Client, entry: Entry, transfer: Transfer) -> None:
        compare = [Compare(self._account(transfer.source), Target.NUMBER, Relation.GREATER, transfer.amount - 1)]
        success: list[Operation] = [
            Put(self._ledger(transfer.id), transfer.text()),
            Add(self._account(transfer.target), transfer.amount),
            Add(self._account(transfer.source), -transfer.amount),
        ]
        result = await noted(entry, kv.txn(compare, success, timeout=self._timeout_s))
        if not isinstance(result, TxnResult):
            return
        if result.succeeded:
            entry.ok(revision=result.revision, changed=True)
        else:
            entry.failed("not enough money")

    async def _transfer_optimistic(self, kv: Client, entry: Entry, transfer: Transfer) -> None:
        used: list[Transaction] = []

        async def body(txn: Transaction) -> bool:
            used[:] = [txn]
            balance = {}
            for account in (transfer.source, transfer.target):
                record = await txn.get(self._account(account))
                balance[account] = int(record.value) if record is not None else 0
            if balance[transfer.source] < transfer.amount:
                return False
            txn.put(self._account(transfer.source), b"%d" % (balance[transfer.source] - transfer.amount))
            txn.put(self._account(transfer.target), b"%d" % (balance[transfer.target] + transfer.amount))
            txn.put(self._ledger(transfer.id), transfer.text())
            return True

        moved = await noted(entry, kv.run_transaction(body, attempts=ATTEMPTS, timeout=self._timeout_s))
        if moved is None or isinstance(moved, Refused):
            return
        if moved:
            assert used[0].result is not None
            entry.ok(revision=used[0].result.revision, changed=True)
        else:
            entry.failed("not enough money")

    # --- readings -----------------------------------------------------------------------------------------------------

    async def _read_range(self, kv: Client, worker: int, *, with_ledger: bool, is_local: bool) -> None:
        with_ledger = with_ledger and self._transfers < LEDGER_MAX
        entry = self.history.begin(worker, ReadAccounts(with_ledger, is_local, "range"))
        prefix = self._prefix if with_ledger else self._account("")
        level = "local" if is_local else "linearizable"
        call = kv.range(prefix=prefix, level=level, timeout=self._timeout_s)  # type: ignore[arg-type]
        result = await noted(entry, call)
        if isinstance(result, RangeResult):
            assert not result.more, "a short ledger fits one result"
            if is_local and not result.records:
                entry.failed(NOT_THERE_YET)
                return
            revision = 0 if is_local else result.revision
            entry.ok(self._statement(result.records, with_ledger=with_ledger), revision=revision)

    async def _read_txn(self, kv: Client, worker: int) -> None:
        entry = self.history.begin(worker, ReadAccounts(way="txn"))
        looks = [Range(self._account(name)) for name in self._names]
        result = await noted(entry, kv.txn(success=looks, timeout=self._timeout_s))
        if isinstance(result, TxnResult):
            balances: dict[str, int] = {}
            for name, answer in zip(self._names, result.results, strict=True):
                assert isinstance(answer, RangeResult)
                balances.update((name, int(record.value)) for record in answer.records)
            entry.ok(Statement(balances), revision=result.revision)

    async def _read_optimistic(self, kv: Client, worker: int) -> None:
        entry = self.history.begin(worker, ReadAccounts(way="transaction"))

        async def read() -> tuple[dict[str, int], int]:
            balances: dict[str, int] = {}
            async with kv.transaction(timeout=self._timeout_s) as txn:
                for name in self._names:
                    record = await txn.get(self._account(name))
                    if record is not None:
                        balances[name] = int(record.value)
            return balances, txn.revision or 0

        answer = await noted(entry, read())
        if isinstance(answer, tuple):
            entry.ok(Statement(answer[0]), revision=answer[1])

    # --- inside -------------------------------------------------------------------------------------------------------

    def _account(self, name: str) -> bytes:
        return self._prefix + b"account/" + name.encode()

    def _ledger(self, id: str) -> bytes:
        return self._prefix + b"ledger/" + id.encode()

    def _statement(self, records: Sequence[Record], *, with_ledger: bool) -> Statement:
        accounts, ledger = self._account(""), self._ledger("")
        balances: dict[str, int] = {}
        entries: dict[str, bytes] = {}
        for record in records:
            if record.key.startswith(accounts):
                balances[record.key[len(accounts) :].decode()] = int(record.value)
            else:
                entries[record.key[len(ledger) :].decode()] = record.value
        return Statement(balances, entries if with_ledger else None)
