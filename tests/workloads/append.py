"""Transactions over several keys that append to lists and read lists. Judged as strictly serializable.

Half of them are one `Txn` that compares what somebody last saw of its lists and writes the longer ones (and reads
them all where that has changed since); half are the client's optimistic transactions: read, append and read again.
Some append two elements to one list, so that a reader who sees one of them has looked into a transaction's midst.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from random import Random
from typing import NamedTuple

from kvstore import (
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
from tests.checkers.append import Append, Lists, Read, Steps, check_append
from tests.checkers.history import Entry, History
from tests.checkers.revisions import check_revisions
from tests.workloads.base import insist, noted, one_or_several

# A list is read whole each time; this many elements are enough for it to meet several faults.
ELEMENTS_PER_LIST = 40
# A transaction that keeps losing would hide behind its retries; a few of them are what a user has.
ATTEMPTS = 4


class _Known(NamedTuple):
    mod_revision: int
    elements: tuple[int, ...]


_ABSENT = _Known(0, ())


class AppendWorkload:
    name = "append"

    def __init__(self, history: History, *, timeout_s: float, hot_lists: int = 4, prefix: bytes = b"append/") -> None:
        self.history = history.part(self.name)
        self._timeout_s = timeout_s
        self._prefix = prefix
        self._elements = itertools.count(1)
        self._names = itertools.count(1)
        self._all: list[str] = []
        self._known: dict[str, _Known] = {}  # what somebody last saw of each hot list
        self._hot = [self._new_list() for _ in range(hot_lists)]

    def _new_list(self) -> str:
        name = f"l{next(self._names)}"
        self._all.append(name)
        self._known[name] = _ABSENT
        return name

    async def set_up(self, kv: Client) -> None:
        """Nothing: lists begin as absent."""

    async def step(self, kv: Client, worker: int, chance: Random) -> None:
        await one_or_several(lambda: self._step(kv, worker, chance), chance)

    async def _step(self, kv: Client, worker: int, chance: Random) -> None:
        lists = chance.sample(self._hot, chance.randint(1, min(3, len(self._hot))))
        if chance.random() < 0.5:
            await self._at_once(kv, worker, chance, lists)
        else:
            await self._optimistic(kv, worker, chance, lists)
        for place, name in enumerate(self._hot):
            if len(self._known[name].elements) >= ELEMENTS_PER_LIST:
                self._hot[place] = self._new_list()

    async def finish(self, kv: Client) -> None:
        async def read_all() -> None:
            entry = self.history.begin(-1, Steps(tuple(Read(name) for name in self._all)))
            pages = kv.scan(prefix=self._prefix, timeout=self._timeout_s)
            found = {record.key: _elements(record.value) async for record in pages}
            entry.ok(Lists(tuple(found.get(self._key(name), ()) for name in self._all)))

        await insist(read_all)

    def begin_reading(self, worker: int) -> tuple[Entry, Callable[[Sequence[Record]], Lists]]:
        """See `base.BackedUp`."""
        names = tuple(self._all)
        entry = self.history.begin(worker, Steps(tuple(Read(name) for name in names)))

        def made(records: Sequence[Record]) -> Lists:
            values = {record.key: record.value for record in records}
            return Lists(tuple(_elements(values.get(self._key(name), b"")) for name in names))

        return entry, made

    def check(self) -> None:
        check_revisions(self.history.root.entries)
        check_append(self.history.entries)

    # --- one Txn ------------------------------------------------------------------------------------------------------

    async def _at_once(self, kv: Client, worker: int, chance: Random, lists: list[str]) -> None:
        appended = [name for name in lists if chance.random() < 0.6]
        steps: list[Append | Read] = []
        success: list[Operation] = []
        for name in lists:
            if name not in appended or chance.random() < 0.3:
                steps.append(Read(name))
                success.append(Range(self._key(name)))
            if name in appended:
                # One Put appends all the elements, and answers for each of them.
                more = [Append(name, next(self._elements)) for _ in range(_how_many(chance))]
                steps += more
                longer = (*self._known[name].elements, *(append.element for append in more))
                success.append(Put(self._key(name), _value(longer)))
        compare = [
            Compare(self._key(name), Target.MOD_REVISION, Relation.EQUAL, self._known[name].mod_revision)
            for name in appended
        ]
        failure = [Range(self._key(name)) for name in lists] if appended else []
        entry = self.history.begin(worker, Steps(tuple(steps)))
        result = await noted(entry, kv.txn(compare, success, failure, timeout=self._timeout_s))
        if not isinstance(result, TxnResult):
            return
        for operation, answer in zip(success if result.succeeded else failure, result.results, strict=True):
            if isinstance(operation, Range):
                assert isinstance(answer, RangeResult)
                self._note(operation.start, answer)
            elif isinstance(operation, Put):
                self._known[self._name(operation.key)] = _Known(result.revision, _elements(operation.value))
        answers = iter(answer for answer in result.results if isinstance(answer, RangeResult))
        if not result.succeeded:
            entry.operation = Steps(tuple(Read(name) for name in lists))
        told = (_answered(next(answers)) if isinstance(step, Read) else None for step in entry.operation.steps)
        entry.ok(Lists(tuple(told)), revision=result.revision, changed=result.succeeded and bool(appended))

    # --- the client's transactions ------------------------------------------------------------------------------------

    async def _optimistic(self, kv: Client, worker: int, chance: Random, lists: list[str]) -> None:
        only_reads = chance.random() < 0.25
        steps: list[Append | Read] = []
        for name in lists:
            steps.append(Read(name))
            if not only_reads and chance.random() < 0.6:
                steps += [Append(name, next(self._elements)) for _ in range(_how_many(chance))]
        if chance.random() < 0.3:
            steps.append(Read(chance.choice(lists)))
        entry = self.history.begin(worker, Steps(tuple(steps)))
        told: list[tuple[int, ...] | None] = []
        used: list[Transaction] = []

        async def body(txn: Transaction) -> None:
            told.clear()
            used[:] = [txn]
            for step in steps:
                record = await txn.get(self._key(step.key))
                elements = _elements(record.value) if record is not None else ()
                if isinstance(step, Append):
                    txn.put(self._key(step.key), _value((*elements, step.element)))
                    told.append(None)
                else:
                    told.append(elements)

        async def once() -> bool:
            async with kv.transaction(timeout=self._timeout_s) as txn:
                await body(txn)
            return True

        async def with_retries() -> bool:
            await kv.run_transaction(body, attempts=ATTEMPTS, timeout=self._timeout_s)
            return True

        done = await noted(entry, once() if chance.random() < 0.3 else with_retries())
        if done is None or isinstance(done, Refused):
            return
        (txn,) = used
        changed = txn.result is not None
        revision = txn.result.revision if txn.result is not None else txn.revision
        entry.ok(Lists(tuple(told)), revision=revision or 0, changed=changed)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _key(self, name: str) -> bytes:
        return self._prefix + name.encode()

    def _name(self, key: bytes) -> str:
        return key[len(self._prefix) :].decode()

    def _note(self, key: bytes, answer: RangeResult) -> None:
        known = _ABSENT
        if answer.records:
            known = _Known(answer.records[0].mod_revision, _elements(answer.records[0].value))
        self._known[self._name(key)] = known


def _how_many(chance: Random) -> int:
    return 2 if chance.random() < 0.15 else 1


def _answered(answer: RangeResult) -> tuple[int, ...]:
    return _elements(answer.records[0].value) if answer.records else ()


def _elements(value: bytes) -> tuple[int, ...]:
    return tuple(map(int, value.split()))


def _value(elements: tuple[int, ...]) -> bytes:
    return b" ".join(b"%d" % element for element in elements)
