"""Single operations and transactions, one behaviour at a time; the property tests hold them to the model in bulk."""

from __future__ import annotations

from typing import Any

import pytest

from kvstore import codec, model
from kvstore.model import (
    INT64_MAX,
    INT64_MIN,
    RESULT_BYTES_MAX,
    VALUE_BYTES_MAX,
    Add,
    AddResult,
    Compare,
    Delete,
    DeleteResult,
    ErrorResult,
    Put,
    PutResult,
    Range,
    RangeResult,
    Record,
    Relation,
    SortBy,
    Target,
    Txn,
    TxnResult,
)
from kvstore.state.machine import DATA, Machine
from kvstore.state.storage import MemoryDisk
from tests.state_model import code_of, decoded, entry


class Store:
    def __init__(self) -> None:
        self.machine = Machine(MemoryDisk().open, "state")

    def all(self, *requests: Any) -> list[Any]:
        return decoded(self.machine.apply(self.machine.applied_index + 1, 1, DATA, entry(1, requests)))

    def do(self, request: Any) -> Any:
        return self.all(request)[0]

    def txn(self, *success: Any, compare: tuple[Compare, ...] = (), failure: tuple[Any, ...] = ()) -> Any:
        return self.do(Txn(compare, success, failure))

    def read(self, request: Any) -> Any:
        return codec.decode_result(self.machine.read(request))

    def value(self, key: bytes) -> bytes | None:
        records = self.read(Range(key)).records
        return records[0].value if records else None


@pytest.fixture
def store() -> Store:
    return Store()


# --- operations by themselves ---------------------------------------------------------------------------------------


def test_put_counts_versions(store: Store) -> None:
    assert store.do(Put(b"a", b"1", prev=True)) == PutResult(1)
    assert store.do(Put(b"b", b"1")) == PutResult(2)
    assert store.do(Put(b"a", b"2", prev=True)) == PutResult(3, Record(b"a", b"1", 1, 1, 1))
    assert store.read(Range(b"a")) == RangeResult(3, (Record(b"a", b"2", 1, 3, 2),), 1)


def test_a_deleted_key_starts_anew(store: Store) -> None:
    store.all(Put(b"a", b"1"), Put(b"a", b"2"))
    assert store.do(Delete(b"a", prev=True)) == DeleteResult(3, 1, (Record(b"a", b"2", 1, 2, 2),))
    assert store.do(Delete(b"a", prev=True)) == DeleteResult(3, 0)
    assert store.do(Put(b"a", b"3")) == PutResult(4)
    assert store.read(Range(b"a")).records == (Record(b"a", b"3", 4, 4, 1),)


def test_delete_of_a_range_is_one_change(store: Store) -> None:
    store.all(*[Put(key, b"") for key in (b"a", b"b", b"b\x00", b"c")])
    assert store.do(Delete(b"a", b"c")) == DeleteResult(5, 3)
    assert [record.key for record in store.read(Range(b"", b"")).records] == [b"c"]
    assert store.do(Delete(b"c", b"a")) == DeleteResult(5, 0)


def test_a_lease_must_exist(store: Store) -> None:
    assert code_of(store.do(Put(b"a", b"1", lease=7))) == "lease_not_found"
    assert store.txn(Put(b"b", b""), Put(b"a", b"1", lease=7)).operation == (1,)
    assert store.machine.revision == 0


@pytest.mark.parametrize(
    ("value", "delta", "expected"),
    [
        (None, 5, 5),
        (b"0", 0, 0),
        (b"-0", -3, -3),
        (b"41", 1, 42),
        (b"-1", 1, 0),
        (b"%d" % INT64_MAX, INT64_MIN, -1),
        (b"%d" % INT64_MIN, 0, INT64_MIN),
    ],
)
def test_add(store: Store, value: bytes | None, delta: int, expected: int) -> None:
    if value is not None:
        store.do(Put(b"n", value))
    assert store.do(Add(b"n", delta)) == AddResult(store.machine.revision, expected)
    assert store.value(b"n") == b"%d" % expected


@pytest.mark.parametrize(
    "value",
    [
        *(
            b"",
            b" 1",
            b"1 ",
            b"+1",
            b"01",
            b"-01",
            b"--1",
            b"1_0",
            b"1.0",
            b"1e3",
            b"x",
            b"\xd9\xa1",
            b"-",
            b"9" * 5000,
        ),
        *(b"%d" % (INT64_MAX + 1), b"%d" % (INT64_MIN - 1)),
    ],
)
def test_add_to_what_is_no_number(store: Store, value: bytes) -> None:
    store.do(Put(b"n", value))
    assert code_of(store.do(Add(b"n", 1))) == "not_a_number"
    assert store.value(b"n") == value


@pytest.mark.parametrize(
    ("add", "code"),
    [
        (Add(b"n", 1, max=10), "out_of_range"),
        (Add(b"n", -11, min=0), "out_of_range"),
        (Add(b"n", 0, min=11), "out_of_range"),
        (Add(b"n", INT64_MAX), "overflow"),
        (Add(b"n", -10, min=0, max=0), ""),
    ],
)
def test_add_within_bounds(store: Store, add: Add, code: str) -> None:
    store.do(Put(b"n", b"10"))
    assert code_of(store.do(add)) == code
    assert store.machine.revision == (1 if code else 2)


# --- transactions ---------------------------------------------------------------------------------------------------


def test_an_order_is_one_change_or_none(store: Store) -> None:
    store.do(Put(b"stock/1", b"1"))
    order = (Add(b"stock/1", -1, min=0), Put(b"order/1", b"x"), Put(b"user/7/order/1", b""))
    assert store.txn(*order) == TxnResult(2, True, (AddResult(2, 0), PutResult(2), PutResult(2)))
    refused = store.txn(Put(b"order/2", b"x"), Add(b"stock/1", -1, min=0))
    assert (refused.code, refused.operation) == ("out_of_range", (1,))
    assert store.value(b"order/2") is None
    assert store.machine.revision == 2


def test_a_transaction_that_changes_nothing_takes_no_revision(store: Store) -> None:
    store.do(Put(b"a", b"1"))
    assert store.txn() == TxnResult(1, True, ())
    assert store.txn(Range(b"a"), Delete(b"x")).revision == 1
    assert store.machine.revision == 1


def test_ranges_see_what_their_transaction_wrote_before(store: Store) -> None:
    store.all(Put(b"a", b"1"), Put(b"b", b"1"))
    answer = store.txn(
        Range(b"", b"", keys_only=True),
        Put(b"ab", b"2"),
        Delete(b"b"),
        Range(b"", b"", keys_only=True),
        Range(b"", b"", keys_only=True, reverse=True, limit=1),
        Range(b"ab"),
        Range(b"b"),
        Range(b"", b"", revision=2, count_only=True),
    )
    seen = [
        (result.revision, [record.key for record in result.records], result.count, result.more)
        for result in answer.results
        if isinstance(result, RangeResult)
    ]
    assert seen == [
        (2, [b"a", b"b"], 2, False),
        (3, [b"a", b"ab"], 2, False),
        (3, [b"ab"], 2, True),
        (3, [b"ab"], 1, False),
        (3, [], 0, False),
        (3, [], 2, False),
    ]


def test_compares_look_at_the_state_before(store: Store) -> None:
    absent = (Compare(b"a", Target.VERSION, Relation.EQUAL, 0),)
    nested = Txn(absent, (Put(b"c", b"absent"),), (Put(b"c", b"there"),))
    assert store.txn(Put(b"a", b"1"), nested, compare=absent).succeeded
    assert store.value(b"c") == b"absent"
    assert not store.txn(compare=absent, failure=(Put(b"b", b"1"),)).succeeded
    assert store.value(b"b") == b"1"


@pytest.mark.parametrize(
    ("compare", "expected"),
    [
        (Compare(b"a", Target.VALUE, Relation.EQUAL, b"12"), True),
        (Compare(b"a", Target.VALUE, Relation.LESS, b"2"), True),
        (Compare(b"a", Target.NUMBER, Relation.LESS, 2), False),
        (Compare(b"a", Target.NUMBER, Relation.GREATER, 11), True),
        (Compare(b"x", Target.NUMBER, Relation.NOT_EQUAL, 11), False),  # no number
        (Compare(b"a", Target.VERSION, Relation.EQUAL, 1), True),
        (Compare(b"a", Target.CREATE_REVISION, Relation.LESS, 2), True),
        (Compare(b"a", Target.MOD_REVISION, Relation.NOT_EQUAL, 1), False),
        (Compare(b"a", Target.LEASE, Relation.EQUAL, 0), True),
        (Compare(b"q", Target.VALUE, Relation.NOT_EQUAL, b"1"), False),  # absent
        (Compare(b"q", Target.NUMBER, Relation.EQUAL, 0), True),
        (Compare(b"q", Target.MOD_REVISION, Relation.EQUAL, 0), True),
        (Compare(b"q", Target.COUNT, Relation.EQUAL, 0), True),
        (Compare(b"a", Target.COUNT, Relation.EQUAL, 1), True),
        (Compare(b"", Target.COUNT, Relation.EQUAL, 2, b""), True),
        (Compare(b"", Target.VERSION, Relation.EQUAL, 1, b""), True),
        (Compare(b"", Target.VALUE, Relation.EQUAL, b"12", b""), False),
        (Compare(b"p", Target.VALUE, Relation.EQUAL, b"12", b"q"), True),  # an empty range
    ],
)
def test_compare(store: Store, compare: Compare, expected: bool) -> None:
    store.txn(Put(b"a", b"12"), Put(b"x", b"y"))
    assert store.txn(compare=(compare,)).succeeded is expected
    assert store.read(Txn((compare,))).succeeded is expected


@pytest.mark.parametrize(
    "compare",
    [Compare(b"a", Target.VALUE, Relation.LESS, 1), Compare(b"a", Target.VERSION, Relation.LESS, b"1")],
)
def test_a_compare_with_an_operand_of_the_wrong_type_is_refused(store: Store, compare: Compare) -> None:
    assert code_of(store.txn(compare=(compare,))) == "invalid_request"


A, B = Put(b"a", b""), Put(b"b", b"")
ALL = Delete(b"", b"")


@pytest.mark.parametrize(
    "operations",
    [
        (A, A),
        (A, Add(b"a", 1)),
        (A, Delete(b"a")),
        (Delete(b"a"), A),
        (ALL, A),
        (B, Delete(b"b", b"c")),
        (A, Txn(success=(A,))),
        (A, Txn(failure=(A,))),
        (Txn(success=(A,)), Txn(failure=(A,))),
        (Txn(success=(A,)), ALL),
        (ALL, Txn(failure=(A,))),
        (Txn(success=(A, A)),),
        (Txn(success=(B, Txn(failure=(A,)))), A),
    ],
)
def test_a_key_is_written_once(store: Store, operations: tuple[Any, ...]) -> None:
    assert code_of(store.txn(*operations)) == "duplicate_key"
    # Also in the branch that does not run.
    assert code_of(store.txn(failure=operations)) == "duplicate_key"
    # And where the other branch is the usual one, which reads.
    assert code_of(store.txn(*operations, failure=(Range(b"a"),))) == "duplicate_key"
    assert store.machine.revision == 0


def test_a_refusal_says_the_same_on_every_replica(store: Store) -> None:
    """It is part of the state where the answer is kept, and each process has its own order of sets."""
    puts = tuple(Put(b"%02d" % number, b"") for number in range(40))
    for operations in ((Txn(success=puts), Txn(success=puts)), (*reversed(puts), Txn(failure=puts))):
        refused = store.txn(*operations)
        assert (refused.code, refused.operation) == ("duplicate_key", (len(operations) - 1,))
        assert refused.message == "b'00' is written twice in one transaction"


@pytest.mark.parametrize(
    "operations",
    [
        (A, B),
        (A, Delete(b"b")),
        (A, Range(b"a"), Range(b"a")),
        (Delete(b"a"), Delete(b"a"), ALL),
        (ALL, ALL),
        (Txn(success=(A,), failure=(A,)),),
        (Txn(success=(A,), failure=(ALL,)),),
        (A, Delete(b"b", b"a")),
    ],
)
def test_what_is_no_second_write(store: Store, operations: tuple[Any, ...]) -> None:
    assert code_of(store.txn(*operations)) == ""


def test_a_deleted_key_is_deleted_once(store: Store) -> None:
    store.all(Put(b"a", b"1"), Put(b"b", b"1"))
    results = store.txn(Delete(b"a"), Delete(b"a"), ALL, ALL, Delete(b"b", prev=True)).results
    assert [result.deleted for result in results] == [1, 0, 1, 0, 0]
    assert store.machine.revision == 3


def test_the_path_names_the_operation(store: Store) -> None:
    store.do(Put(b"a", b"x"))
    nested = Txn(success=(Put(b"b", b""), Txn(success=(Range(b"a"), Range(b"a"), Add(b"a", 1)))))
    refused = store.txn(Put(b"c", b""), nested)
    assert refused == ErrorResult("not_a_number", refused.message, (1, 1, 2))
    assert store.machine.revision == 1


def test_transactions_nest_only_so_deep(store: Store) -> None:
    txn = Txn(success=(A,))
    for _ in range(model.TXN_DEPTH_MAX - 1):
        txn = Txn(success=(txn,))
    assert code_of(store.do(txn)) == ""
    assert code_of(store.do(Txn(success=(txn,)))) == "too_many_operations"


# --- ranges ---------------------------------------------------------------------------------------------------------


def test_pages(store: Store) -> None:
    store.all(*[Put(b"%d" % number, b"v%d" % (9 - number)) for number in range(10)])
    page = store.read(Range(b"2", b"8", limit=2))
    assert ([record.key for record in page.records], page.count, page.more) == ([b"2", b"3"], 6, True)
    page = store.read(Range(b"2", b"8", limit=6, reverse=True, keys_only=True))
    assert ([record.key for record in page.records], page.count, page.more) == (
        [b"7", b"6", b"5", b"4", b"3", b"2"],
        6,
        False,
    )
    assert {record.value for record in page.records} == {b""}
    page = store.read(Range(b"2", b"8", limit=2, sort=SortBy.VALUE))
    assert ([record.key for record in page.records], page.count, page.more) == ([b"7", b"6"], 6, True)
    assert store.read(Range(b"2", b"8", count_only=True)) == RangeResult(10, (), 6)


def test_ranges_that_make_no_sense_are_refused(store: Store) -> None:
    for request in (Range(b"a", limit=-1), Range(b"a", b"", revision=-1)):
        assert code_of(store.read(request)) == "invalid_range"
        assert code_of(store.do(request)) == "invalid_range"
    assert store.read(Range(b"b", b"a")).count == 0


def test_a_range_leaves_out_what_does_not_fit(store: Store) -> None:
    big = bytes(VALUE_BYTES_MAX // 4)
    for number in range(6):
        store.do(Put(b"big/%d" % number, big))
    whole = Range(b"big/", b"big0")
    for page in (store.read(whole), store.do(whole)):
        assert ([record.key for record in page.records], page.count, page.more) == (
            [b"big/0", b"big/1", b"big/2"],
            6,
            True,
        )
    page = store.read(Range(b"big/", b"big0", sort=SortBy.MOD_REVISION, reverse=True))
    assert ([record.key for record in page.records], page.count, page.more) == (
        [b"big/5", b"big/4", b"big/3"],
        6,
        True,
    )
    assert code_of(store.txn(whole)) == "result_too_large"
    assert code_of(store.read(Txn(success=(whole,)))) == "result_too_large"
    halves = (Range(b"big/", b"big/2"), Range(b"big/2", b"big/4"))
    assert code_of(store.txn(halves[0])) == ""
    assert code_of(store.txn(*halves)) == "result_too_large"
    assert code_of(store.do(Delete(b"big/", b"big0", prev=True))) == "result_too_large"
    assert store.do(Delete(b"big/", b"big0")).deleted == 6


def test_one_operation_walks_only_so_far(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "WALK_MAX", 5)
    store.all(*[Put(b"%d" % number, b"") for number in range(6)])
    everything = (b"", b"")
    for request in (
        Range(*everything, sort=SortBy.VERSION),
        Delete(*everything),
        Txn(compare=(Compare(b"", Target.VERSION, Relation.EQUAL, 1, b""),)),
    ):
        assert code_of(store.do(request)) == "range_too_large"
    counted = store.read(Range(*everything, count_only=True))
    assert (counted.count, counted.more, [record.key for record in counted.records]) == (5, True, [b"4"])
    assert store.do(Delete(b"0")).deleted == 1
    assert store.read(Range(*everything, count_only=True)) == RangeResult(7, (), 5)
    assert store.do(Delete(*everything)).deleted == 5


def test_one_record_fits_always(store: Store) -> None:
    key = bytes(model.KEY_BYTES_MAX)
    store.do(Put(key, bytes(VALUE_BYTES_MAX)))
    assert len(store.read(Range(b"", b"")).records) == 1
    assert len(store.read(Txn(success=(Range(b"", b""),))).results[0].records) == 1
    encoded = store.machine.apply(
        store.machine.applied_index + 1,
        1,
        DATA,
        entry(1, [Put(key, bytes(VALUE_BYTES_MAX), prev=True), Delete(key, prev=True)]),
    )
    assert all(RESULT_BYTES_MAX < len(result) < codec.FRAME_BYTES_MAX - 1024 for result in encoded)


def test_many_small_records_stay_within_a_frame(store: Store) -> None:
    for start in range(0, 40_000, 1000):
        store.txn(*[Put(b"%05d" % number, b"") for number in range(start, start + 1000)])
    encoded = store.machine.read(Range(b"", b""))
    assert len(encoded) <= RESULT_BYTES_MAX
    result = codec.decode_result(encoded)
    assert isinstance(result, RangeResult)
    assert (result.count, result.more) == (len(result.records) + model.COUNT_AHEAD_MAX, True)
    assert len(result.records) > 15_000
    assert store.read(Range(b"", b"", count_only=True)).count == 40_000
    sorted_result = store.read(Range(b"", b"", sort=SortBy.VERSION))
    assert sorted_result.records == result.records
