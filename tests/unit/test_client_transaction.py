"""Optimistic transactions by themselves: what they compare at the commit, and how they add up what was added."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.client.transaction import Transaction, _both, _sum, key_after
from kvstore.errors import Refused
from kvstore.model import (
    INT64_MAX,
    INT64_MIN,
    KEY_BYTES_MAX,
    Add,
    Compare,
    Delete,
    Mutation,
    Put,
    Range,
    RangeResult,
    Record,
    Relation,
    Target,
    Txn,
    TxnResult,
)
from tests.client_suite import refused
from tests.fake_server import FakeStore


class _Store:
    """A fake store that notes what was asked of it."""

    def __init__(self) -> None:
        self.store = FakeStore()
        self.reads: list[Range] = []
        self.commits: list[Txn] = []

    def put(self, key: bytes, value: bytes = b"") -> int:
        self.apply(Put(key, value))
        return self.store.revision

    def apply(self, request: Mutation) -> object:
        return self.store.apply(0, 0, 0, request)

    async def read(self, request: Range, timeout: float | None) -> RangeResult:
        self.reads.append(request)
        result = self.store.read(request)
        if not isinstance(result, RangeResult):
            raise Refused("refused", code=getattr(result, "code", "internal"))
        return result

    async def commit(self, request: Txn, timeout: float | None) -> TxnResult:
        self.commits.append(request)
        result = self.apply(request)
        if not isinstance(result, TxnResult):
            raise Refused("refused", code=getattr(result, "code", "internal"))
        return result

    def transaction(self) -> Transaction:
        return Transaction(self.read, self.commit, None)


@pytest.fixture
def store() -> _Store:
    return _Store()


async def test_a_point_is_compared_by_its_revision(store: _Store) -> None:
    seen = store.put(b"a", b"1")
    store.put(b"other")
    async with store.transaction() as txn:
        await txn.get(b"a")
        await txn.get(b"a")
        await txn.get(b"absent")
        txn.put(b"b", b"")
    (commit,) = store.commits
    assert commit.compare == (
        Compare(b"a", Target.MOD_REVISION, Relation.EQUAL, seen),
        Compare(b"absent", Target.MOD_REVISION, Relation.EQUAL, 0),
    )
    assert commit.success == (Put(b"b", b""),)
    assert commit.failure == ()
    assert [read.revision for read in store.reads] == [0, 2], "the second read of a key asks nobody"


async def test_a_range_is_compared_by_its_newest_and_its_count(store: _Store) -> None:
    for key in (b"a1", b"a2", b"a3", b"b"):
        store.put(key)
    async with store.transaction() as txn:
        await txn.range(prefix=b"a")
        await txn.range(prefix=b"a")
        assert (await txn.get(b"a2")) is not None, "known from the range: no read, no compare of its own"
        txn.put(b"x", b"")
    assert store.commits[0].compare == (
        Compare(b"a", Target.MOD_REVISION, Relation.LESS, 5, b"b"),
        Compare(b"a", Target.COUNT, Relation.EQUAL, 3, b"b"),
    )


@pytest.mark.parametrize(("reverse", "start", "end"), [(False, b"a", b"a2\0"), (True, b"a3", b"b")])
async def test_a_limited_range_is_compared_as_far_as_read(
    store: _Store, reverse: bool, start: bytes, end: bytes
) -> None:
    for key in (b"a1", b"a2", b"a3", b"a4"):
        store.put(key)
    async with store.transaction() as txn:
        found = await txn.range(prefix=b"a", limit=2, reverse=reverse)
        assert (found.count, found.more) == (2, True)
        txn.put(b"x", b"")
    assert store.commits[0].compare == (
        Compare(start, Target.MOD_REVISION, Relation.LESS, 5, end),
        Compare(start, Target.COUNT, Relation.EQUAL, 2, end),
    )


async def test_a_limit_that_reaches_the_end_compares_all(store: _Store) -> None:
    store.put(b"a1")
    async with store.transaction() as txn:
        found = await txn.range(prefix=b"a", limit=2)
        assert not found.more
        txn.put(b"x", b"")
    assert store.commits[0].compare[0].end == b"b"


async def test_deletions_of_its_own_do_not_use_up_a_limit(store: _Store) -> None:
    for key in (b"a1", b"a2", b"a3", b"a4"):
        store.put(key)
    async with store.transaction() as txn:
        txn.delete(b"a1")
        txn.delete(b"a2")
        found = await txn.range(prefix=b"a", limit=1)
        assert [record.key for record in found.records] == [b"a3"]
        assert found.more


async def test_an_empty_store_stays_empty_for_a_transaction_that_saw_it_so(store: _Store) -> None:
    """Revision 0 in a request would mean the newest."""
    async with refused("conflict"), store.transaction() as txn:
        assert await txn.get(b"a") is None
        store.put(b"b")
        assert await txn.get(b"b") is None
        assert (await txn.range(prefix=b"")).records == ()
        txn.put(b"c", b"")
    assert len(store.reads) == 1


async def test_nothing_to_write_sends_nothing(store: _Store) -> None:
    store.put(b"a")
    async with store.transaction() as txn:
        await txn.get(b"a")
        store.put(b"a")
    assert store.commits == []


async def test_blind_writes_compare_nothing(store: _Store) -> None:
    async with store.transaction() as txn:
        txn.put(b"a", b"1")
        txn.put(b"a", b"2")
        txn.add(b"n", 3)
        txn.add(b"n", 4, max=10)
        txn.delete(b"d")
    assert store.commits == [Txn((), (Put(b"a", b"2"), Add(b"n", 7, INT64_MIN + 4, 10), Delete(b"d")))]
    assert store.reads == []


async def test_adding_to_what_is_known_is_judged_at_once(store: _Store) -> None:
    store.put(b"n", b"5")
    async with store.transaction() as txn:
        await txn.get(b"n")
        with pytest.raises(Refused) as caught:
            txn.add(b"n", -6, min=0)
        assert caught.value.code == "out_of_range"
        txn.add(b"n", -5, min=0)
        record = await txn.get(b"n")
        assert record is not None
        assert record.value == b"0"
        txn.put(b"p", b"1")
        txn.add(b"p", 1)
        txn.delete(b"q")
        txn.add(b"q", 1)
    assert store.commits[0].success == (Add(b"n", -5, 0), Put(b"p", b"2"), Put(b"q", b"1"))


async def test_reading_a_blind_add_makes_it_a_checked_one(store: _Store) -> None:
    store.put(b"n", b"5")
    async with store.transaction() as txn:
        txn.add(b"n", 1)
        record = await txn.get(b"n")
        assert record is not None
        assert record.value == b"6"
    assert store.commits[0].compare == (Compare(b"n", Target.MOD_REVISION, Relation.EQUAL, 1),)


async def test_records_of_own_writes(store: _Store) -> None:
    store.put(b"a", b"1")
    async with store.transaction() as txn:
        await txn.get(b"a")
        txn.put(b"a", b"2")
        txn.put(b"new", b"3", lease=9)
        assert await txn.get(b"a") == Record(b"a", b"2", 1, 1, 1)
        assert await txn.get(b"new") == Record(b"new", b"3", 0, 0, 0, 9)
        keys = await txn.range(prefix=b"", keys_only=True)
        assert [(record.key, record.value) for record in keys.records] == [(b"a", b""), (b"new", b"")]


async def test_compaction_passing_the_snapshot_is_a_lost_race(store: _Store) -> None:
    store.put(b"a")
    txn = store.transaction()
    async with refused("revision_compacted"), txn:
        await txn.get(b"a")
        store.put(b"b")
        store.store.compacted = 2
        await txn.get(b"b")
    assert txn.conflicted


async def test_too_many_checks_are_refused_before_they_are_sent(store: _Store) -> None:
    store.put(b"a")
    async with refused("too_many_operations"), store.transaction() as txn:
        for number in range(1024):
            await txn.get(b"%d" % number)
        txn.put(b"x", b"")
    assert store.commits == []


@pytest.mark.parametrize(
    "use",
    [
        lambda txn: txn.get(b"a"),
        lambda txn: txn.range(prefix=b"a"),
        lambda txn: txn.delete_range(prefix=b"a"),
        lambda txn: txn.__aenter__(),
    ],
)
async def test_it_is_used_once_and_inside_its_block(
    store: _Store, use: Callable[[Transaction], Awaitable[object]]
) -> None:
    async with store.transaction() as txn:
        pass
    with pytest.raises(ValueError):
        await use(txn)
    fresh = store.transaction()
    with pytest.raises(ValueError):
        fresh.put(b"a", b"")
    with pytest.raises(ValueError):
        fresh.delete(b"a")
    with pytest.raises(ValueError):
        fresh.add(b"a", 1)


async def test_wrong_types(store: _Store) -> None:
    async with store.transaction() as txn:
        with pytest.raises(TypeError):
            txn.put("a", b"")  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            txn.put(b"a", "")  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            txn.add(b"a", 1.0)  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            await txn.get("a")  # type: ignore[arg-type]
        with pytest.raises(ValueError):
            await txn.range(b"a", prefix=b"b")
        with pytest.raises(ValueError):
            await txn.range(prefix=b"b", limit=-1)
        with pytest.raises(Refused):
            txn.add(b"a", 2**63)


numbers = st.one_of(st.integers(-20, 20), st.sampled_from([INT64_MIN, INT64_MIN + 1, INT64_MAX - 1, INT64_MAX]))
bounds = st.one_of(st.none(), numbers)


@given(value=numbers, one=st.tuples(numbers, bounds, bounds), two=st.tuples(numbers, bounds, bounds))
def test_two_additions_in_one_are_refused_exactly_when_one_of_them_is(
    value: int, one: tuple[int, int | None, int | None], two: tuple[int, int | None, int | None]
) -> None:
    """But for two deltas whose sum no single Add can carry."""
    first, second = Add(b"n", *one), Add(b"n", *two)
    if not INT64_MIN <= first.delta + second.delta <= INT64_MAX:
        with pytest.raises(Refused):
            _both(first, second)
        return
    text = str(value).encode()
    try:
        apart: bytes | None = _sum(second, _sum(first, text))
    except Refused:
        apart = None
    try:
        together: bytes | None = _sum(_both(first, second), text)
    except Refused:
        together = None
    assert together == apart


@pytest.mark.parametrize(
    "text", [b"", b"-", b"+1", b"01", b"1.0", b" 1", b"x", "١".encode(), b"9223372036854775808", b"1" * 5000]
)
def test_what_is_no_number(text: bytes) -> None:
    with pytest.raises(Refused) as caught:
        _sum(Add(b"n", 0), text)
    assert caught.value.code == "not_a_number"


@given(st.binary(min_size=1, max_size=6), st.binary(max_size=6))
def test_the_key_after(key: bytes, other: bytes) -> None:
    assert key < key_after(key)
    assert not key < other < key_after(key)


def test_the_key_after_the_longest() -> None:
    longest = b"k" * KEY_BYTES_MAX
    assert key_after(longest) == b"k" * (KEY_BYTES_MAX - 1) + b"l"
    assert key_after(b"a" + b"\xff" * (KEY_BYTES_MAX - 1)) == b"b"
