"""The budget of a request against a plain account of what it walks over and replaces; and that all replicas find the
same, whatever else they did: one of the two here restarts, flushes and compacts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from hypothesis import event, given, settings
from hypothesis import strategies as st

from kvstore import codec, model, versions
from kvstore.errors import Refused
from kvstore.model import Compare, Delete, Put, Range, Relation, SortBy, Target, Txn
from kvstore.state import mvcc, txn
from kvstore.state.layout import HEADER_BYTES
from kvstore.state.machine import DATA, Machine
from kvstore.state.storage import MemoryDisk
from tests.state_model import bare, code_of, decoded, entry, in_range

LARGE_BYTES = HEADER_BYTES + 20
KEYS = [b"%02d" % number for number in range(24)]
Sizes = dict[bytes, int]  # of the records, with their keys

keys = st.sampled_from(KEYS)
ends = keys | st.just(b"")
puts = st.builds(Put, keys, st.sampled_from([b"", b"x" * 10, b"x" * 30]))
deletes = st.builds(Delete, keys, st.none() | ends)
counts = st.builds(lambda start, end: Range(start, end, count_only=True), keys, ends)
sorted_ranges = st.builds(
    lambda start, end, sort: Range(start, end, keys_only=True, sort=sort),
    keys,
    ends,
    st.sampled_from([SortBy.VERSION, SortBy.VALUE]),
)
pages = st.builds(lambda start, end: Range(start, end, keys_only=True), keys, ends)
compares = st.builds(lambda start, end: Compare(start, Target.VERSION, Relation.GREATER, 0, end), keys, ends)
operations = puts | deletes | counts | sorted_ranges | pages


def transactions(operations: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.builds(
        Txn, st.lists(compares, max_size=2).map(tuple), st.lists(operations, max_size=6).map(tuple), st.just(())
    )


requests = transactions(operations | transactions(operations))
FILLING = Txn((), tuple(Put(key, b"x" * 30) for key in KEYS))
filling = st.just(FILLING)


class PastBudget(Exception):
    pass


class Account:
    """What an entry's requests cost, and what they leave: `before` the entry, and `now`."""

    def __init__(self, before: Sizes, limits: dict[str, int]) -> None:
        self.before = before
        self.now = dict(before)
        self.changed: set[bytes] = set()
        self.limits = limits
        self.is_spent = False
        self.entry = dict.fromkeys(limits, 0)
        self.request = dict.fromkeys(limits, 0)

    def answer(self, request: Txn) -> str:
        """The code of its refusal, or none."""
        self.is_spent = any(self.entry[name] >= limit for name, limit in self.limits.items())
        try:
            txn.check_written_once(request)
        except Refused as refusal:
            return refusal.code
        self.request = dict.fromkeys(self.limits, 0)
        pending: dict[bytes, int | None] = {}
        try:
            self._transaction(request, pending)
        except PastBudget:
            return "overloaded" if self.is_spent else "range_too_large"
        finally:
            for name, used in self.request.items():
                self.entry[name] += 0 if self.is_spent else used
        for key, size in pending.items():
            self.changed.add(key)
            if size is None:
                self.now.pop(key, None)
            else:
                self.now[key] = size
        return ""

    def _use(self, what: str, records: int, size_bytes: int) -> None:
        for name, used in ((f"{what}_MAX", records), (f"{what}_BYTES_MAX", size_bytes)):
            self.request[name] += used
        if self.is_spent or any(self.request[name] > limit for name, limit in self.limits.items()):
            raise PastBudget

    def _transaction(self, request: Txn, pending: dict[bytes, int | None]) -> None:
        for compare in request.compare:
            self._range(compare.key, compare.end, {}, deleted=False)
        for operation in request.success:
            if isinstance(operation, Txn):
                self._transaction(operation, pending)
            elif isinstance(operation, Put):
                self._replace_one(operation.key)
                pending[operation.key] = len(operation.key) + HEADER_BYTES + len(operation.value)
            elif isinstance(operation, Range):
                self._range(operation.start, operation.end, pending, deleted=False)
            elif isinstance(operation, Delete) and operation.end is not None:
                self._range(operation.start, operation.end, pending, deleted=True)
            elif isinstance(operation, Delete) and operation.start in self.now:
                self._replace_one(operation.start)
                pending[operation.start] = None

    def _replace_one(self, key: bytes) -> None:
        size = self.now.get(key, 0)
        if size - len(key) >= LARGE_BYTES:
            self._use("REPLACED", 1, size)

    def _range(self, start: bytes, end: bytes | None, pending: dict[bytes, int | None], *, deleted: bool) -> None:
        changed = {key for key in self.changed | set(pending) if in_range(key, start, end)}
        self._use("WALK", len(pending) // 16, 0)
        self._use("WALK", len(changed) // 16, 0)
        seen = {**self.now, **pending}
        for key in KEYS:
            if not in_range(key, start, end):
                continue
            size = seen.get(key)
            if size is not None:
                self._use("WALK", 1, size)
                if deleted:
                    self._use("REPLACED", 1, size)
                    pending[key] = None
            elif key in self.before:
                self._use("WALK", 1, self.before[key])


limits = st.fixed_dictionaries(
    {
        "WALK_MAX": st.sampled_from([10, 24, 40, 1000]),
        "WALK_BYTES_MAX": st.sampled_from([600, 1500, 100_000]),
        "REPLACED_MAX": st.sampled_from([5, 12, 1000]),
        "REPLACED_BYTES_MAX": st.sampled_from([300, 700, 100_000]),
    }
)


@contextmanager
def small(limits: dict[str, int]) -> Iterator[None]:
    with ExitStack() as stack:
        for name, limit in limits.items():
            stack.enter_context(patch.object(model, name, limit))
        stack.enter_context(patch.object(txn, "LARGE_BYTES", LARGE_BYTES))
        yield


@settings(max_examples=300, deadline=None)
@given(limits, st.lists(st.lists(requests | filling, min_size=1, max_size=4), min_size=1, max_size=5), st.data())
def test_requests_are_refused_past_their_budget_on_every_replica(
    limits: dict[str, int], entries: list[list[Txn]], data: st.DataObject
) -> None:
    disk = MemoryDisk()
    steady = Machine(disk.open, "steady")
    restless = Machine(disk.open, "restless", mvcc.Retention(batches=16))
    now: Sizes = {}
    for machine in (steady, restless):
        machine.apply(1, 1, DATA, entry(1, [FILLING]))
    now = {key: len(key) + HEADER_BYTES + 30 for key in KEYS}
    with small(limits):
        for index, calls in enumerate(entries, 2):
            payload = entry(index, calls)
            results = steady.apply(index, 1, DATA, payload)
            assert restless.apply(index, 1, DATA, payload) == results
            account = Account(now, limits)
            expected = [account.answer(request) for request in calls]
            assert [code_of(answer) for answer in decoded(results)] == expected
            for code in expected:
                event(code or "done")
            now = account.now
            assert steady.digest() == restless.digest()
            if data.draw(st.booleans()):
                restless.close()
                restless = Machine(disk.open, "restless", mvcc.Retention(batches=16))
    found = codec.decode_result(steady.read(Range(b"", b"")))
    assert isinstance(found, model.RangeResult)
    assert {record.key: len(record.key) + HEADER_BYTES + len(record.value) for record in found.records} == now


@settings(max_examples=100, deadline=None)
@given(limits, st.lists(requests | filling, min_size=1, max_size=6))
def test_entries_of_before_are_judged_as_before(limits: dict[str, int], calls: list[Txn]) -> None:
    """Only `WALK_MAX` counts in them, for each operation: an ample one leaves nothing to refuse."""
    machine, ample = Machine(MemoryDisk().open, "state"), Machine(MemoryDisk().open, "state")
    for each in (machine, ample):
        each.apply(1, 1, DATA, entry(1, [FILLING]))
    payload = entry(2, calls, versions.WITH_BUDGETS - 1)
    with small({**limits, "WALK_MAX": len(KEYS)}):
        results = machine.apply(2, 1, DATA, payload)
    assert [bare(answer) for answer in decoded(results)] == [
        bare(answer) for answer in decoded(ample.apply(2, 1, DATA, payload))
    ]
    assert machine.digest() == ample.digest()
