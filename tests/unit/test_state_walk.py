"""What one request may walk over and replace, one rule at a time."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from kvstore import codec, model, versions
from kvstore.model import (
    Add,
    Compare,
    Delete,
    DoneResult,
    ErrorResult,
    ExpireLeases,
    GrantLease,
    KeepLease,
    OpenSession,
    Put,
    Range,
    RangeResult,
    Record,
    Relation,
    RevokeLease,
    SortBy,
    Target,
    Txn,
)
from kvstore.state import feed, txn
from kvstore.state.layout import HEADER_BYTES
from kvstore.state.machine import DATA, HELD_UP_PER_ENTRY_MAX, Machine
from kvstore.state.storage import MemoryDisk
from kvstore.state.walk import LARGE_BYTES
from tests.state_model import Call, code_of, decoded, entry

BEFORE = 2
ALL = (b"", b"")
TTL_MS = 10_000


class Store:
    """Ten records, `0` to `9`, of 100 bytes each with their keys."""

    def __init__(self) -> None:
        self.disk = MemoryDisk()
        self.machine = Machine(self.disk.open, "state")
        self.apply(Txn((), tuple(Put(b"%d" % number, bytes(99 - HEADER_BYTES)) for number in range(10))))

    def apply(self, *calls: Any, version: int = versions.VERSION, at_ms: int = 1) -> list[Any]:
        return decoded(self.machine.apply(self.machine.applied_index + 1, 1, DATA, entry(at_ms, calls, version)))

    def do(self, request: Any, version: int = versions.VERSION) -> Any:
        return self.apply(request, version=version)[0]

    def txn(self, *operations: Any, compare: tuple[Compare, ...] = ()) -> Any:
        return self.do(Txn(compare, operations))

    def read(self, request: Any) -> Any:
        return codec.decode_result(self.machine.read(request))

    def restart(self) -> None:
        digest = self.machine.digest()
        self.machine.close()
        self.machine = Machine(self.disk.open, "state")
        assert self.machine.digest() == digest

    def keys(self) -> list[bytes]:
        return [record.key for record in self.read(Range(*ALL)).records]


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> Any:
    def set_limits(**limits: int) -> None:
        for name, limit in limits.items():
            assert hasattr(model, name)
            monkeypatch.setattr(model, name, limit)

    return set_limits


COUNT = Range(*ALL, count_only=True)
SORTED = Range(*ALL, sort=SortBy.VERSION, keys_only=True)
PAGE = Range(*ALL, keys_only=True)
OLD = Compare(b"", Target.MOD_REVISION, Relation.LESS, 1000, b"")
FEW = Compare(b"", Target.COUNT, Relation.LESS, 1000, b"")
TOGETHER = {
    "counts": (Txn((), (COUNT, COUNT)), 20),
    "sorted ranges": (Txn((), (SORTED, SORTED)), 20),
    "pages": (Txn((), (PAGE, PAGE)), 20),
    "compares": (Txn((OLD, FEW)), 20),
    "nested": (Txn((FEW,), (Txn((OLD,), (COUNT,)),)), 30),
    "deletes": (Txn((), (Delete(b"0", b"5"), Delete(b"5", b""))), 10),
    "what is deleted hides": (Txn((), (Delete(*ALL), COUNT)), 20),
}


@pytest.mark.parametrize("kind", TOGETHER)
def test_a_transaction_has_one_budget(store: Store, limits: Any, kind: str) -> None:
    request, walked = TOGETHER[kind]
    for name, needed in (("WALK_MAX", walked), ("WALK_BYTES_MAX", 100 * walked)):
        limits(**{name: needed - 1})
        refused = store.do(request)
        assert code_of(refused) == "range_too_large"
        assert "take smaller ranges" in refused.message
        limits(**{name: needed})
        assert (store.machine.revision, len(store.keys())) == (1, 10)
    assert code_of(store.do(request)) == ""


@pytest.mark.parametrize("kind", ["counts", "sorted ranges", "pages", "nested"])
def test_so_has_a_read(store: Store, limits: Any, kind: str) -> None:
    request, walked = TOGETHER[kind]
    limits(WALK_MAX=walked - 1)
    assert code_of(store.read(request)) == "range_too_large"
    limits(WALK_MAX=walked)
    assert code_of(store.read(request)) == ""
    assert code_of(store.read(request)) == "", "the next has its own"


@pytest.mark.parametrize("kind", TOGETHER)
def test_up_to_version_2_each_operation_has_its_own(store: Store, limits: Any, kind: str) -> None:
    """What was applied by that rule is so again, by whoever applies the log anew."""
    request, _ = TOGETHER[kind]
    limits(WALK_MAX=10, WALK_BYTES_MAX=1, REPLACED_MAX=1, REPLACED_BYTES_MAX=1)
    assert code_of(store.do(request)) == "range_too_large"
    assert code_of(store.do(request, BEFORE)) == ""


def test_the_words_of_version_2_stay(store: Store, limits: Any) -> None:
    """They are in the answers that are kept for sessions, and so in the state."""
    limits(WALK_MAX=9)
    for request in (Delete(*ALL), SORTED, Txn((FEW,))):
        assert store.do(request, BEFORE) == ErrorResult(
            "range_too_large", "there are more than 9 records in this range; do it in parts"
        )
    # Which of two refusals it is, too.
    limits(RESULT_BYTES_MAX=1)
    assert code_of(store.do(Delete(*ALL, prev=True), BEFORE)) == "range_too_large"
    assert store.do(COUNT, BEFORE) == store.do(Txn((), (COUNT,)), BEFORE).results[0]
    assert store.do(COUNT, BEFORE) == RangeResult(1, (Record(b"8", b"", 0, 0, 0),), 9, True)
    store.do(GrantLease(TTL_MS, 1))
    limits(LEASE_KEYS_MAX=0)
    assert store.do(Put(b"a", b"", 1), BEFORE) == ErrorResult(
        "lease_full", "lease 1 would have more than 0 records; use another one"
    )


# --- what a range by itself does --------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [{"WALK_MAX": 4}, {"WALK_BYTES_MAX": 499}])
def test_a_count_ends_and_says_where(store: Store, limits: Any, limit: dict[str, int]) -> None:
    limits(**limit)
    for part in (store.read(COUNT), store.do(COUNT)):
        assert (part.count, part.more, [record.key for record in part.records]) == (4, True, [b"3"])
    assert store.read(Range(b"6", b"", count_only=True)) == RangeResult(1, (), 4)


@pytest.mark.parametrize("limit", [{"WALK_MAX": 4}, {"WALK_BYTES_MAX": 499}])
def test_a_page_ends_where_enough_was_seen(store: Store, limits: Any, limit: dict[str, int]) -> None:
    limits(**limit)
    for page in (store.read(PAGE), store.do(PAGE)):
        assert ([record.key for record in page.records], page.count, page.more) == ([b"0", b"1", b"2", b"3"], 10, True)
    rest = store.read(Range(b"3\0", b"", keys_only=True, reverse=True))
    assert ([record.key for record in rest.records], rest.more) == ([b"9", b"8", b"7", b"6"], True)
    assert code_of(store.txn(PAGE)) == "range_too_large"
    assert len(store.do(PAGE, BEFORE).records) == 10


def test_a_transaction_looks_ahead_once(store: Store, limits: Any) -> None:
    limits(COUNT_AHEAD_MAX=4)
    page = Range(b"0", b"", limit=2)
    assert store.read(page).count == 6
    assert [result.count for result in store.txn(page, page, Range(b"0", b"", limit=9)).results] == [6, 3, 10]
    assert [result.count for result in store.do(Txn((), (page, page)), BEFORE).results] == [6, 6]


def test_it_looks_ahead_over_so_many_bytes(store: Store, limits: Any) -> None:
    limits(COUNT_AHEAD_BYTES_MAX=250)
    assert store.read(Range(*ALL, limit=2)).count == 5
    assert store.do(Range(*ALL, limit=2), BEFORE).count == 10


def test_what_it_looked_ahead_refuses_nothing(store: Store, limits: Any) -> None:
    limits(WALK_MAX=6)
    assert store.read(Range(*ALL, limit=5)).count == 10
    assert store.do(Range(*ALL, limit=6)).count == 10
    assert store.txn(Range(*ALL, limit=6)).results[0].count == 10
    for after in (COUNT, PAGE, SORTED, Range(b"9", b"")):
        assert code_of(store.txn(Range(*ALL, limit=1), after)) == "range_too_large"


# --- what is replaced -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "needed"), [("REPLACED_MAX", 6), ("REPLACED_BYTES_MAX", 600)])
def test_only_so_much_is_deleted_at_once(store: Store, limits: Any, name: str, needed: int) -> None:
    limits(**{name: needed - 1})
    for request in (Delete(b"0", b"6"), Txn((), (Delete(b"0", b"3"), Txn((), (Delete(b"3", b"6"),))))):
        refused = store.do(request)
        assert code_of(refused) == "range_too_large"
        assert "delete smaller ranges" in refused.message
        assert store.machine.revision == 1
    assert store.do(Delete(b"0", b"5")).deleted == 5
    limits(**{name: needed - 2})
    assert store.do(Delete(b"5", b""), BEFORE).deleted == 5


def test_large_records_count_wherever_they_are_replaced(store: Store, limits: Any) -> None:
    large = bytes(LARGE_BYTES - HEADER_BYTES)
    store.apply(*[Put(b"l%d" % number, large) for number in range(4)], Put(b"n", b"1"))
    limits(REPLACED_BYTES_MAX=3 * (LARGE_BYTES + 2))
    replacing = (Put(b"l0", b""), Delete(b"l1"), Put(b"l2", b""))
    refused = store.txn(*replacing, Delete(b"l3", b"m"))
    assert (code_of(refused), refused.operation) == ("range_too_large", (3,))
    assert code_of(store.txn(*replacing, Put(b"l3", b""))) == "range_too_large"
    assert code_of(store.txn(*replacing, Delete(b"l3"))) == "range_too_large"
    assert code_of(store.txn(*replacing, Add(b"l3", 1))) == "range_too_large"
    # What is smaller is bounded by how many operations there may be.
    assert code_of(store.txn(*replacing, *[Put(b"%d" % number, b"") for number in range(10)])) == ""


def test_large_records_count_wherever_they_are_read(store: Store, limits: Any) -> None:
    store.apply(*[Put(b"l%d" % number, bytes(LARGE_BYTES - HEADER_BYTES)) for number in range(4)])
    compares = tuple(Compare(b"l%d" % number, Target.VERSION, Relation.EQUAL, 1) for number in range(2))
    reads = tuple(Range(b"l%d" % number, keys_only=True) for number in (2, 3))
    small = tuple(Range(b"%d" % number) for number in range(9))
    limits(WALK_BYTES_MAX=4 * (LARGE_BYTES + 2) - 1)
    assert code_of(store.txn(*reads, compare=compares)) == "range_too_large"
    assert code_of(store.read(Txn(compares, reads))) == "range_too_large"
    limits(WALK_BYTES_MAX=4 * (LARGE_BYTES + 2))
    assert code_of(store.txn(*reads, *small, compare=compares)) == ""
    limits(WALK_BYTES_MAX=1)
    assert code_of(store.do(Txn(compares, reads), BEFORE)) == ""
    assert store.read(Range(b"l0")).count == 1


# --- an entry -------------------------------------------------------------------------------------------------------


SPENDING: dict[str, tuple[tuple[Any, ...], dict[str, int]]] = {
    "walked": ((COUNT, COUNT), {"WALK_MAX": 15}),
    "walked bytes": ((Txn((FEW,)), SORTED), {"WALK_BYTES_MAX": 1500}),
    "refused": ((Txn((), (COUNT, COUNT)),), {"WALK_MAX": 15}),
    "replaced": ((Delete(b"0", b"5"), Delete(b"5", b"9")), {"REPLACED_MAX": 6}),
    "replaced bytes": ((Delete(b"0", b"5"), Delete(b"5", b"9")), {"REPLACED_BYTES_MAX": 600}),
    "ended leases": ((RevokeLease(1),), {"REPLACED_MAX": 3}),
    "large records": ((Put(b"l0", b""), Put(b"l1", b"")), {"REPLACED_BYTES_MAX": LARGE_BYTES + 100}),
}
NEEDING = {
    "counting": COUNT,
    "deleting": Delete(b"9", b"a"),
    "comparing": Txn((FEW,), (Put(b"x", b""),)),
    "reading": Txn((), (Put(b"x", b""), Add(b"n", 1), Range(b"x", b"y"))),
    "replacing": Put(b"l2", b""),
    "adding": Txn((), (Put(b"x", b""), Delete(b"l2"))),
    "ending a lease": RevokeLease(2),
}


def filled(store: Store) -> int:
    """Leases 1 and 2, with three and no records; three large records; and a session, whose id this is."""
    store.apply(GrantLease(TTL_MS, 1), GrantLease(TTL_MS, 2), *[Put(b"u%d" % number, b"", 1) for number in range(3)])
    store.apply(*[Put(b"l%d" % number, bytes(LARGE_BYTES)) for number in range(3)])
    session = store.do(OpenSession()).session
    assert isinstance(session, int)
    return session


@pytest.mark.parametrize("how", SPENDING)
def test_an_entry_that_has_done_enough_sends_back_what_would_do_more(store: Store, limits: Any, how: str) -> None:
    spending, limit = SPENDING[how]
    if how in ("walked", "walked bytes", "refused"):
        session = store.do(OpenSession()).session
    else:
        session = filled(store)
    limits(**limit)
    answers = store.apply(*spending, Call(Delete(b"9", b"\xff"), session, 1, 1), Call(Put(b"a", b""), session, 2, 1))
    assert [code_of(answer) for answer in answers[-2:]] == ["overloaded", ""]
    assert "overloaded" not in [code_of(answer) for answer in answers[:-2]]
    assert store.read(Range(b"9")).records
    store.restart()
    # It was not taken, so it may be sent again.
    assert store.apply(Call(Delete(b"9", b"a"), session, 1, 1))[0].deleted == 1


@pytest.mark.parametrize("what", NEEDING)
def test_what_needs_more_is_sent_back_whole(store: Store, limits: Any, what: str) -> None:
    session = filled(store)
    request = NEEDING[what]
    limits(REPLACED_MAX=5)
    # It keeps its session alive all the same, also for who restarts.
    answers = store.apply(Delete(b"0", b"5"), Call(request, session, 1, 1), Put(b"l3", b""), KeepLease(2), at_ms=500)
    assert [code_of(answer) for answer in answers] == ["", "overloaded", "", ""]
    assert not store.read(Range(b"x")).records
    store.restart()
    assert code_of(store.apply(Call(request, session, 1, 1))[0]) == ""


def test_after_many_were_sent_back_nobody_tries(store: Store, limits: Any) -> None:
    limits(WALK_MAX=10)
    calls = [COUNT] * (HELD_UP_PER_ENTRY_MAX + 1)
    answers = store.apply(*calls, Put(b"a", b""))
    assert [code_of(answer) for answer in answers] == ["", *["overloaded"] * (HELD_UP_PER_ENTRY_MAX + 1)]
    answers = store.apply(*calls[1:], Put(b"a", b""))
    assert [code_of(answer) for answer in answers] == ["", *["overloaded"] * (HELD_UP_PER_ENTRY_MAX - 1), ""]


def test_an_expiry_that_is_sent_back_forgets_none(store: Store, limits: Any) -> None:
    filled(store)
    limits(WALK_MAX=10)
    answers = store.apply(COUNT, ExpireLeases(), at_ms=10**6)
    assert [code_of(answer) for answer in answers] == ["", "overloaded"]
    assert store.machine.lease_expiry_due(10**6)
    assert store.apply(ExpireLeases(), at_ms=10**6)[0].count == 2


def test_up_to_version_2_an_entry_took_all(store: Store, limits: Any) -> None:
    limits(WALK_MAX=10, REPLACED_MAX=1)
    answers = store.apply(COUNT, COUNT, Delete(*ALL), Put(b"a", b""), version=BEFORE)
    assert [code_of(answer) for answer in answers] == ["", "", "", ""]


def test_one_entry_ends_leases_until_enough_is_replaced(store: Store, limits: Any) -> None:
    for lease in (1, 2, 3):
        store.apply(GrantLease(TTL_MS, lease), Put(b"under/%d" % lease, b"", lease))
    limits(REPLACED_MAX=2)
    assert store.apply(ExpireLeases(), at_ms=10**6) == [DoneResult(6, 2)]
    assert store.machine.lease_expiry_due(10**6)
    assert store.apply(ExpireLeases(), at_ms=10**6) == [DoneResult(7, 1)]


# --- what a range costs besides ---------------------------------------------------------------------------------------


def test_what_the_entry_deleted_before_is_walked_over_all_the_same(store: Store, limits: Any) -> None:
    limits(WALK_MAX=29)
    in_one_entry = (Delete(*ALL), Put(b"a", b""), Txn((), (COUNT, COUNT)))
    assert [code_of(answer) for answer in store.apply(*in_one_entry)] == ["", "", ""]
    store.apply(*[Put(b"%d" % number, b"") for number in range(10)])
    limits(WALK_MAX=21)
    assert code_of(store.apply(*in_one_entry)[2]) == "range_too_large"


def test_ranges_look_through_what_was_written(store: Store, limits: Any) -> None:
    writes = [Put(b"w%02d" % number, b"") for number in range(32)]
    ranges = [Range(b"x", b"y")] * 10
    limits(WALK_MAX=19)
    assert code_of(store.txn(*writes, *ranges)) == "range_too_large"
    limits(WALK_MAX=20)
    assert code_of(store.txn(*writes, *ranges)) == ""
    more = [Put(b"x%02d" % number, b"") for number in range(32)]
    page = Txn((), (Range(b"x", b"y", limit=1),) * 10)
    limits(WALK_MAX=38, COUNT_AHEAD_MAX=0)
    assert code_of(store.apply(*more, page)[-1]) == "range_too_large"
    limits(WALK_MAX=39)
    assert code_of(store.apply(*more, page)[-1]) == ""


def test_ranges_of_the_past_have_a_price_in_a_transaction(store: Store, limits: Any) -> None:
    store.do(Put(b"x", b""))
    past = Range(b"x", b"y", revision=1)
    limits(WALK_MAX=160)
    assert code_of(store.txn(*[past] * 16)) == ""
    assert code_of(store.txn(*[past] * 17)) == "range_too_large"
    assert code_of(store.read(Txn((), (past,) * 17))) == "range_too_large"
    assert code_of(store.do(Txn((), (past,) * 17), BEFORE)) == ""
    assert code_of(store.txn(*[Range(b"x", revision=1)] * 17)) == ""
    limits(WALK_MAX=1)
    assert store.read(past) == RangeResult(2, (), 0)


# --- sorted ranges ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_sorted_ranges_are_the_first_of_all_in_order(limits: Any, seed: int) -> None:
    chance = Random(seed)
    store = Store()
    limits(RESULT_BYTES_MAX=3000)
    for _ in range(chance.choice([3, 40, 120])):
        key, size = b"%d" % chance.randrange(100), chance.choice([0, 1, 50, 1000, 3500])
        store.do(Put(key, chance.randbytes(size)))
    records = [store.read(Range(key)).records[0] for key in _all_keys(store)]
    for _ in range(30):
        sort = chance.choice([SortBy.VERSION, SortBy.CREATE_REVISION, SortBy.MOD_REVISION, SortBy.VALUE])
        reverse, keys_only = chance.random() < 0.5, chance.random() < 0.5
        limit = chance.choice([0, 1, 2, 7, 100])
        request = Range(*ALL, limit, 0, keys_only, False, reverse, sort)
        records.sort(key=lambda record: (_aspect(record, sort), record.key), reverse=reverse)
        expected, size_bytes = [], 0
        for record in records[: limit or None]:
            size_bytes += len(record.key) + (0 if keys_only else len(record.value)) + 48
            if size_bytes > 3000 and expected:
                break
            expected.append(record.key)
        for version in (BEFORE, versions.VERSION):
            result = store.do(request, version)
            assert [record.key for record in result.records] == expected
            assert (result.count, result.more) == (len(records), len(expected) < len(records))
        assert store.read(request) == result


def _all_keys(store: Store) -> list[bytes]:
    keys: list[bytes] = []
    while True:
        page = store.read(Range(keys[-1] + b"\0" if keys else b"", b"", keys_only=True))
        keys += [record.key for record in page.records]
        if not page.more:
            return keys


def _aspect(record: Record, sort: SortBy) -> Any:
    return {
        SortBy.VERSION: record.version,
        SortBy.CREATE_REVISION: record.create_revision,
        SortBy.MOD_REVISION: record.mod_revision,
        SortBy.VALUE: record.value,
    }[sort]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("limit", [0, 1])
def test_a_sorted_range_keeps_little_more_than_its_result(limit: int, reverse: bool) -> None:
    chosen = txn._Chosen(Range(*ALL, limit, reverse=reverse, sort=SortBy.CREATE_REVISION))
    packed = bytes(HEADER_BYTES + model.VALUE_BYTES_MAX // 2)
    for number in range(64):
        chosen.add((number, b"%03d" % number), packed)
        assert len(chosen._first) <= 8
    assert len(list(chosen.pairs())) == (limit or 2)


# --- watches ----------------------------------------------------------------------------------------------------------


def test_what_was_replaced_is_not_all_kept_for_watches(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    value = bytes(10_000)
    monkeypatch.setattr(feed, "_FRESH_BYTES", 5 * len(value))

    def oldest() -> int:
        return store.machine._feed._fresh[0].first_revision

    store.apply(*[Put(b"l%d" % number, value) for number in range(6)])
    assert oldest() == 1
    store.do(Delete(b"l0", b"l3"))
    assert oldest() == 1
    store.do(Delete(b"l3", b"m"))
    assert oldest() == store.machine.revision, "the last one always stays"
    for number in range(feed._FRESH_BATCHES - 1):
        store.do(Put(b"a", b"%d" % number))
    assert oldest() == store.machine.revision - feed._FRESH_BATCHES + 1
    store.do(Put(b"a", b""))
    assert oldest() == store.machine.revision - feed._FRESH_BATCHES + 1
    assert store.machine._feed._fresh_bytes < 1000
