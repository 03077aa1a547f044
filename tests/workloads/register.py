"""Single keys: put, get, delete, compare-and-put, addition, and reads of replicas. Judged by linearizability.

A few keys are hot at a time, some of them registers (every value is written once) and some numbers. A key is left
after so many operations, because the judge searches an order of all operations on a key. Every operation shows what was
there before it, or does not depend on it, which is what makes that search short (see `RegisterModel.useful`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from random import Random

from kvstore import (
    Client,
    Compare,
    Put,
    Range,
    RangeResult,
    Record,
    Refused,
    Relation,
    Target,
    TxnResult,
)
from tests.checkers import models
from tests.checkers.history import History
from tests.checkers.linearizability import check
from tests.checkers.local import LocalGet, LocalSeen, check_reads
from tests.checkers.models import RegisterModel, Seen, Sum, Swapped, Wrote
from tests.checkers.revisions import check_revisions
from tests.workloads.base import insist, noted, one_or_several

# Long enough that a key meets several faults, short enough that its order is found in milliseconds.
OPERATIONS_PER_KEY = 80
# Few different ones, so that many unknown ones make few different sums; those that take away meet their bound often.
DELTAS = (1, 1, -1, 10, -10)
_REFUSALS = ("out_of_range", "overflow", "not_a_number")


class _Slot:
    """A hot key, and what somebody last saw there: compare-and-put expects it."""

    def __init__(self, key: bytes, *, is_number: bool) -> None:
        self.key = key
        self.is_number = is_number
        self.operations = 0
        self.last = Seen(None, 0)


class RegisterWorkload:
    name = "register"

    def __init__(
        self,
        history: History,
        *,
        timeout_s: float,
        hot_registers: int = 2,
        hot_numbers: int = 1,
        prefix: bytes = b"register/",
    ) -> None:
        self.history = history.part(self.name)
        self._timeout_s = timeout_s
        self._prefix = prefix
        self._values = itertools.count(1)
        self._numbers = itertools.count(1)
        self._keys: list[bytes] = []
        self._slots = [self._new_slot(is_number=place >= hot_registers) for place in range(hot_registers + hot_numbers)]

    def _new_slot(self, *, is_number: bool) -> _Slot:
        key = b"%s%s%d" % (self._prefix, b"n" if is_number else b"r", next(self._numbers))
        self._keys.append(key)
        return _Slot(key, is_number=is_number)

    async def set_up(self, kv: Client) -> None:
        """Nothing: keys begin as absent."""

    async def step(self, kv: Client, worker: int, chance: Random) -> None:
        await one_or_several(lambda: self._step(kv, worker, chance), chance)

    async def _step(self, kv: Client, worker: int, chance: Random) -> None:
        place = chance.randrange(len(self._slots))
        slot = self._slots[place]
        if slot.operations >= OPERATIONS_PER_KEY:
            slot = self._slots[place] = self._new_slot(is_number=slot.is_number)
        slot.operations += 1
        kind = chance.random()
        if kind < 0.30:
            await self._get(kv, worker, slot, shows_revision=chance.random() < 0.8)
        elif kind < 0.45:
            await self._local_get(kv, worker, slot)
        elif kind < 0.52:
            await self._delete(kv, worker, slot, shows_before=chance.random() < 0.9)
        elif slot.is_number:
            await self._add(kv, worker, slot, chance.choice(DELTAS))
        elif kind < 0.76:
            await self._put(kv, worker, slot, shows_before=chance.random() < 0.5)
        else:
            await self._swap(kv, worker, slot, by_value=chance.random() < 0.5)

    async def finish(self, kv: Client) -> None:
        for key in self._keys:
            await insist(partial(self._last_get, kv, key))

    def check(self) -> None:
        check_revisions(self.history.root.entries)
        check_reads(self.history.entries)
        check(RegisterModel(), (entry for entry in self.history.entries if not isinstance(entry.operation, LocalGet)))

    # --- operations ---------------------------------------------------------------------------------------------------

    async def _get(self, kv: Client, worker: int, slot: _Slot, *, shows_revision: bool) -> None:
        entry = self.history.begin(worker, models.Get(slot.key))
        if shows_revision:
            result = await noted(entry, kv.range(slot.key, timeout=self._timeout_s))
            if isinstance(result, RangeResult):
                slot.last = _seen(result.records)
                entry.ok(slot.last, revision=result.revision)
            return
        record = await noted(entry, kv.get(slot.key, timeout=self._timeout_s))
        assert not isinstance(record, Refused)
        if not entry.is_failed and not entry.reason:  # None is an answer, too
            slot.last = _seen((record,) if record is not None else ())
            entry.ok(slot.last)

    async def _last_get(self, kv: Client, key: bytes) -> None:
        entry = self.history.begin(-1, models.Get(key))
        result = await kv.range(key, timeout=self._timeout_s)
        entry.ok(_seen(result.records), revision=result.revision)

    async def _local_get(self, kv: Client, worker: int, slot: _Slot) -> None:
        entry = self.history.begin(worker, LocalGet(slot.key, kv.revision))
        result = await noted(entry, kv.range(slot.key, level="local", timeout=self._timeout_s))
        if isinstance(result, RangeResult):
            entry.ok(LocalSeen(_seen(result.records), result.revision))

    async def _put(self, kv: Client, worker: int, slot: _Slot, *, shows_before: bool) -> None:
        value = self._value(worker)
        entry = self.history.begin(worker, models.Put(slot.key, value))
        result = await noted(entry, kv.put(slot.key, value, prev=shows_before, timeout=self._timeout_s))
        if result is not None and not isinstance(result, Refused):
            before = _seen((result.prev,) if result.prev is not None else ()) if shows_before else None
            entry.ok(Wrote(result.revision, before), revision=result.revision, changed=True)
            slot.last = Seen(value, result.revision)

    async def _delete(self, kv: Client, worker: int, slot: _Slot, *, shows_before: bool) -> None:
        entry = self.history.begin(worker, models.Delete(slot.key))
        result = await noted(entry, kv.delete(slot.key, prev=shows_before, timeout=self._timeout_s))
        if result is None or isinstance(result, Refused):
            return
        if not result.deleted:
            entry.ok(Wrote(before=Seen(None, 0)), revision=result.revision)
        else:
            before = _seen(result.prev) if shows_before else None
            entry.ok(Wrote(result.revision, before), revision=result.revision, changed=True)
        slot.last = Seen(None, 0)

    async def _swap(self, kv: Client, worker: int, slot: _Slot, *, by_value: bool) -> None:
        value, last = self._value(worker), slot.last
        if by_value and last.value is not None:
            compare = Compare(slot.key, Target.VALUE, Relation.EQUAL, last.value)
            operation = models.Swap(slot.key, value, last.value)
        else:
            compare = Compare(slot.key, Target.MOD_REVISION, Relation.EQUAL, last.revision)
            operation = models.Swap(slot.key, value, None, last.revision)
        entry = self.history.begin(worker, operation)
        look = Range(slot.key)
        result = await noted(entry, kv.txn([compare], [look, Put(slot.key, value)], [look], timeout=self._timeout_s))
        if isinstance(result, TxnResult):
            before = result.results[0]
            assert isinstance(before, RangeResult)
            seen = _seen(before.records)
            if result.succeeded:
                entry.ok(Swapped(True, seen, result.revision), revision=result.revision, changed=True)
                slot.last = Seen(value, result.revision)
            else:
                entry.ok(Swapped(False, seen), revision=result.revision)
                slot.last = seen

    async def _add(self, kv: Client, worker: int, slot: _Slot, delta: int) -> None:
        least = 0 if delta < 0 else None
        entry = self.history.begin(worker, models.Add(slot.key, delta, least))
        result = await noted(entry, kv.add(slot.key, delta, min=least, timeout=self._timeout_s), _REFUSALS)
        if isinstance(result, Refused):
            entry.ok(models.Refusal(result.code))
        elif result is not None:
            entry.ok(Sum(result.value, result.revision), revision=result.revision, changed=True)

    def _value(self, worker: int) -> bytes:
        return b"%d.%d" % (worker, next(self._values))


def _seen(records: Sequence[Record]) -> Seen:
    return Seen(records[0].value, records[0].mod_revision) if records else Seen(None, 0)
