"""Leases, one rule at a time."""

from __future__ import annotations

from typing import Any

import pytest

from kvstore import codec, model, versions
from kvstore.model import (
    Add,
    Delete,
    DescribeLease,
    DoneResult,
    ExpireLeases,
    GrantLease,
    KeepLease,
    LeaseList,
    LeaseResult,
    LeaseStatus,
    ListLeases,
    Put,
    Range,
    RevokeLease,
    Txn,
)
from kvstore.state import leases
from kvstore.state.layout import HEADER_BYTES
from kvstore.state.machine import DATA, SILENCE_MS, Machine
from kvstore.state.storage import MemoryDisk, StorageFailed
from tests.state_model import Call, code_of, decoded, entry

TTL_MS = 10_000


class Node:
    def __init__(self) -> None:
        self.disk = MemoryDisk()
        self.machine = Machine(self.disk.open, "state")

    def apply(self, *calls: Any, at_ms: int = 0, version: int = versions.VERSION) -> list[Any]:
        return decoded(self.machine.apply(self.machine.applied_index + 1, 1, DATA, entry(at_ms, calls, version)))

    def do(self, request: Any, at_ms: int = 0, version: int = versions.VERSION) -> Any:
        return self.apply(request, at_ms=at_ms, version=version)[0]

    def read(self, request: model.Read, at_ms: int = 0) -> Any:
        return codec.decode_result(self.machine.read(request, at_ms))

    def keys(self) -> list[bytes]:
        return [record.key for record in self.read(Range(b"", b"")).records]

    def restart(self) -> None:
        digest = self.machine.digest()
        self.machine.close()
        self.machine = Machine(self.disk.open, "state")
        assert self.machine.digest() == digest


@pytest.fixture
def node() -> Node:
    return Node()


# --- granting ---------------------------------------------------------------------------------------------------------


def test_an_id_is_where_it_was_granted_or_the_client_s_own(node: Node) -> None:
    assert node.apply(Put(b"a", b""), GrantLease(TTL_MS), GrantLease(TTL_MS, 7)) == [
        model.PutResult(1),
        LeaseResult(1, 1 << 16 | 1, TTL_MS),
        LeaseResult(1, 7, TTL_MS),
    ]
    assert code_of(node.do(GrantLease(5_000, 7))) == "lease_exists"
    assert node.read(ListLeases()) == LeaseList((7, 1 << 16 | 1))
    assert node.read(ListLeases(0, 1)) == LeaseList((7,), True)
    assert node.read(ListLeases(7)) == LeaseList((1 << 16 | 1,))


def test_a_repeated_grant_grants_one(node: Node) -> None:
    session = node.do(model.OpenSession()).session
    call = Call(GrantLease(TTL_MS), session, 1, 1)
    assert node.apply(call) == node.apply(call)
    assert len(node.read(ListLeases()).leases) == 1


def test_there_are_only_so_many(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "LEASES_MAX", 2)
    answers = node.apply(GrantLease(TTL_MS, 1), GrantLease(TTL_MS, 2), GrantLease(TTL_MS, 3))
    assert [code_of(answer) for answer in answers] == ["", "", "too_many_leases"]
    node.do(RevokeLease(1))
    assert code_of(node.do(GrantLease(TTL_MS, 3))) == ""


# --- records ----------------------------------------------------------------------------------------------------------


def test_a_record_goes_with_its_lease_in_one_revision(node: Node) -> None:
    node.apply(GrantLease(TTL_MS, 7), Put(b"a", b"1", 7), Put(b"b", b"2"), Put(b"c", b"3", 7))
    assert node.read(Range(b"a")).records[0].lease == 7
    assert node.read(DescribeLease(7, True)) == LeaseStatus(7, TTL_MS, TTL_MS, 2, (b"a", b"c"))
    assert node.do(RevokeLease(7)) == DoneResult(4, 2)
    assert node.keys() == [b"b"]
    assert code_of(node.read(DescribeLease(7))) == "lease_not_found"
    node.restart()
    assert node.keys() == [b"b"]


def test_a_put_moves_a_record_and_an_add_leaves_it(node: Node) -> None:
    node.apply(GrantLease(TTL_MS, 1), GrantLease(TTL_MS, 2), Put(b"a", b"1", 1), Put(b"b", b"1", 1), Put(b"c", b"1", 1))
    node.apply(Put(b"a", b"2", 2), Put(b"b", b"2"), Add(b"c", 1))
    assert node.read(DescribeLease(1, True)).keys == (b"c",)
    assert node.read(DescribeLease(2, True)).keys == (b"a",)
    node.restart()
    node.do(RevokeLease(1))
    assert node.keys() == [b"a", b"b"]


def test_what_was_deleted_is_under_no_lease(node: Node) -> None:
    node.apply(GrantLease(TTL_MS, 1), Put(b"a", b"1", 1), Put(b"b", b"1", 1))
    node.do(Delete(b"a", b""))
    node.do(Put(b"a", b"again"))
    assert node.read(DescribeLease(1)).key_count == 0
    node.do(RevokeLease(1))
    assert node.keys() == [b"a"]


def test_a_refused_transaction_attaches_nothing(node: Node) -> None:
    node.do(GrantLease(TTL_MS, 1))
    answer = node.do(Txn((), (Put(b"a", b"1", 1), Add(b"n", 1, max=0))))
    assert code_of(answer) == "out_of_range"
    assert node.read(DescribeLease(1)).key_count == 0
    assert code_of(node.do(Txn((), (Put(b"a", b"1", 2),)))) == "lease_not_found"


def test_a_lease_has_only_so_many_records(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "LEASE_KEYS_MAX", 2)
    node.apply(GrantLease(TTL_MS, 1), Put(b"a", b"1", 1))
    answer = node.do(Txn((), (Put(b"b", b"1", 1), Put(b"c", b"1", 1))))
    assert (code_of(answer), answer.operation) == ("lease_full", (1,))
    assert node.keys() == [b"a"]
    assert code_of(node.do(Put(b"b", b"1", 1))) == ""
    assert code_of(node.do(Put(b"c", b"1", 1))) == "lease_full"
    for version in (2, 3):
        in_a_txn = node.do(Txn((), (Put(b"d", b"1"), Put(b"c", b"1", 1))), version=version)
        assert (code_of(in_a_txn), in_a_txn.operation) == ("lease_full", (1,))


def test_a_full_lease_takes_the_records_that_it_has(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "LEASE_KEYS_MAX", 2)
    node.apply(GrantLease(TTL_MS, 1), GrantLease(TTL_MS, 2), Put(b"a", b"1", 1), Put(b"b", b"1", 1), Put(b"o", b"", 2))
    again = Put(b"a", b"2", 1)
    in_place = Txn((), (Put(b"x", b""), Put(b"y", b""), again))
    room_by_delete = Txn((), (Delete(b"a"), Put(b"o", b"", 1)))
    room_by_move = Txn((), (Put(b"b", b"", 2), Put(b"d", b"", 1)))
    room_by_range = Txn((), (Delete(b"c", b"z"), Put(b"a", b"", 1), Put(b"b", b"", 1)))
    room_too_late = Txn((), (Put(b"e", b"", 1), Delete(b"a")))
    for request in (again, in_place, room_by_delete, room_by_move, room_too_late):
        # In a log of before, who has applied it has refused it, and so does who applies it now.
        assert code_of(node.do(request, version=2)) == "lease_full"
    for request, keys in (
        (again, (b"a", b"b")),
        (in_place, (b"a", b"b")),
        (room_by_delete, (b"b", b"o")),
        (room_by_move, (b"d", b"o")),
        (room_by_range, (b"a", b"b")),
    ):
        assert code_of(node.do(request)) == ""
        assert node.read(DescribeLease(1, True)).keys == keys
        assert code_of(node.do(Put(b"new", b"1", 1))) == "lease_full"
    assert code_of(node.do(room_too_late)) == "lease_full"


def test_room_for_few_more_is_not_taken_by_what_is_under_no_lease(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "LEASE_KEYS_MAX", 30)
    node.apply(GrantLease(TTL_MS, 1), Txn((), tuple(Put(b"%d" % number, b"", 1) for number in range(6))))
    elsewhere = tuple(Put(b"x%d" % number, b"") for number in range(30))
    assert code_of(node.do(Txn((), (*elsewhere, Put(b"0", b"", 1))), version=2)) == "lease_full"
    assert code_of(node.do(Txn((), (*elsewhere, Put(b"0", b"", 1))))) == ""
    assert code_of(node.do(Txn((), (*elsewhere, Put(b"new", b"", 1))))) == ""
    assert node.read(DescribeLease(1)).key_count == 7


def record_bytes(key: bytes, value: bytes) -> int:
    return len(key) + HEADER_BYTES + len(value)


def test_a_lease_has_only_so_many_bytes(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """They all go in one entry, and lie in memory together until it is written."""
    small, large = bytes(10), bytes(1000)
    monkeypatch.setattr(model, "LEASE_BYTES_MAX", record_bytes(b"a", large) + 2 * record_bytes(b"b", small))
    node.apply(GrantLease(TTL_MS, 1), GrantLease(TTL_MS, 2))
    node.apply(Put(b"a", large, 1), Put(b"b", small, 1), Put(b"c", small, 1), Put(b"z", large, 2))
    assert code_of(node.do(Put(b"d", b"", 1))) == "lease_full"
    assert code_of(node.do(Put(b"b", small + b"x", 1))) == "lease_full"
    answer = node.do(Txn((), (Put(b"x", large), Put(b"z", large, 1))))
    assert (code_of(answer), answer.operation) == ("lease_full", (1,))
    node.restart()
    assert code_of(node.do(Put(b"b", small + b"x", 1))) == "lease_full"
    assert code_of(node.do(Put(b"b", bytes(10), 1))) == ""
    assert code_of(node.do(Txn((), (Put(b"a", small, 1), Put(b"z", small, 1))))) == ""
    free = record_bytes(b"a", large) - 2 * record_bytes(b"a", small)
    rest = Put(b"d", bytes(free - record_bytes(b"d", b"")), 1)
    assert code_of(node.do(rest)) == ""
    assert code_of(node.do(Put(b"e", b"", 1))) == "lease_full"
    assert code_of(node.do(Txn((), (Delete(b"d"), Put(b"e", rest.value, 1))))) == ""
    assert code_of(node.do(rest)) == "lease_full"
    assert code_of(node.do(Put(b"e", b"", 2))) == ""
    assert code_of(node.do(rest)) == ""
    assert node.read(DescribeLease(1, True)).keys == (b"a", b"b", b"c", b"d", b"z")


def test_what_an_addition_makes_longer_counts(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "LEASE_BYTES_MAX", record_bytes(b"n", b"99") + record_bytes(b"b", b"1"))
    node.apply(GrantLease(TTL_MS, 1), Put(b"n", b"99", 1))
    node.do(Add(b"n", 1))
    assert code_of(node.do(Put(b"b", b"1", 1))) == "lease_full"
    node.restart()
    node.do(Add(b"n", -1))
    assert code_of(node.do(Put(b"b", b"1", 1))) == ""


def test_a_lease_of_before_may_be_larger_and_shrink(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "LEASE_BYTES_MAX", 2000)
    node.do(GrantLease(TTL_MS, 1))
    for number in range(5):
        assert code_of(node.do(Put(b"%d" % number, bytes(1000), 1), version=2)) == ""
    assert code_of(node.do(Put(b"0", bytes(1001), 1))) == "lease_full"
    assert code_of(node.do(Put(b"0", bytes(1000), 1))) == ""
    assert code_of(node.do(Put(b"0", b"", 1))) == ""
    assert node.do(RevokeLease(1)).count == 5


def test_what_could_not_be_written_is_under_no_lease(node: Node) -> None:
    node.apply(GrantLease(TTL_MS, 1), Put(b"a", b"1", 1))
    node.disk.fail("full")
    with pytest.raises(StorageFailed):
        node.apply(Put(b"b", b"1", 1), Delete(b"a"))
    assert node.read(DescribeLease(1, True)).keys == (b"a",)


def test_keys_that_no_result_holds_are_refused(node: Node) -> None:
    keys = [b"%04d" % number + bytes(model.KEY_BYTES_MAX - 4) for number in range(256)]
    node.do(GrantLease(TTL_MS, 1))
    for key in keys[:-1]:
        node.do(Put(key, b"", 1))
    assert len(node.read(DescribeLease(1, True)).keys) == 255
    node.do(Put(keys[-1], b"", 1))
    assert code_of(node.read(DescribeLease(1, True))) == "result_too_large"
    assert node.read(DescribeLease(1)).key_count == 256


# --- time -------------------------------------------------------------------------------------------------------------


def test_it_expires_when_its_time_has_passed_in_log_time_and_someone_says_so(node: Node) -> None:
    node.apply(GrantLease(TTL_MS, 1), Put(b"a", b"1", 1), at_ms=1000)
    assert not node.machine.lease_expiry_due(999 + TTL_MS)
    assert node.machine.lease_expiry_due(1000 + TTL_MS)
    assert node.do(ExpireLeases(), at_ms=999 + TTL_MS) == DoneResult(1, 0)
    node.do(Put(b"b", b""), at_ms=5000 + TTL_MS)
    assert node.keys() == [b"a", b"b"], "nobody has said so yet"
    assert node.do(ExpireLeases(), at_ms=0) == DoneResult(3, 1)
    assert node.keys() == [b"b"]
    assert code_of(node.do(KeepLease(1))) == "lease_not_found"
    assert not node.machine.lease_expiry_due(10**12)


def test_a_keep_alive_gives_it_its_whole_time_again(node: Node) -> None:
    node.apply(GrantLease(TTL_MS, 1), Put(b"a", b"1", 1))
    assert node.do(KeepLease(1), at_ms=TTL_MS - 1) == LeaseResult(1, 1, TTL_MS)
    node.restart()
    assert node.read(DescribeLease(1)).remaining_ms == TTL_MS
    assert node.read(DescribeLease(1), at_ms=TTL_MS + 1999).remaining_ms == TTL_MS - 2000
    assert node.do(ExpireLeases(), at_ms=2 * TTL_MS - 2) == DoneResult(1, 0)
    assert node.do(ExpireLeases(), at_ms=2 * TTL_MS - 1) == DoneResult(2, 1)


def test_one_that_is_kept_alive_by_the_batch_that_would_end_it_stays(node: Node) -> None:
    node.apply(GrantLease(TTL_MS, 1), GrantLease(TTL_MS, 2))
    assert node.apply(KeepLease(1), ExpireLeases(), at_ms=TTL_MS)[1] == DoneResult(0, 1)
    assert node.read(ListLeases()).leases == (1,)
    assert node.do(ExpireLeases(), at_ms=2 * TTL_MS) == DoneResult(0, 1)


def test_an_id_that_is_granted_anew_has_its_own_time(node: Node) -> None:
    node.do(GrantLease(100 * TTL_MS, 1))
    node.apply(RevokeLease(1), GrantLease(TTL_MS, 1))
    assert node.machine.lease_expiry_due(TTL_MS)
    assert node.do(ExpireLeases(), at_ms=TTL_MS) == DoneResult(0, 1)
    assert not node.machine.lease_expiry_due(1000 * TTL_MS)


def test_where_nobody_writes_the_log_is_told_now_and_then_how_time_goes_on(node: Node) -> None:
    """Else a node that starts anew would give every lease all of its time again."""
    node.apply(Put(b"a", b""), at_ms=1000)
    assert not node.machine.stamp_due(10**12)
    node.apply(GrantLease(TTL_MS, 1), at_ms=1000)
    assert not node.machine.stamp_due(1000 + SILENCE_MS - 1)
    assert node.machine.stamp_due(1000 + SILENCE_MS)
    revision = node.machine.revision
    node.apply(ExpireLeases(), at_ms=1000 + SILENCE_MS)
    assert not node.machine.stamp_due(1000 + 2 * SILENCE_MS - 1)
    assert node.machine.revision == revision


def test_an_id_that_the_same_batch_ends_and_grants_ends_again(node: Node) -> None:
    node.do(GrantLease(TTL_MS, 1))
    assert node.apply(ExpireLeases(), GrantLease(TTL_MS, 1), at_ms=TTL_MS)[0] == DoneResult(0, 1)
    assert not node.machine.lease_expiry_due(2 * TTL_MS - 1)
    assert node.machine.lease_expiry_due(2 * TTL_MS)


def test_one_entry_deletes_only_so_many_records(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore.state.machine.EXPIRED_RECORDS_PER_ENTRY_MAX", 2)
    node.apply(*(GrantLease(TTL_MS + lease, lease) for lease in (1, 2, 3)))
    node.apply(*(Put(b"%d/%d" % (lease, number), b"", lease) for lease in (1, 2, 3) for number in range(2)))
    assert node.do(ExpireLeases(), at_ms=2 * TTL_MS) == DoneResult(7, 1)
    assert node.machine.lease_expiry_due(2 * TTL_MS)
    assert node.apply(ExpireLeases(), ExpireLeases(), at_ms=2 * TTL_MS) == [DoneResult(8, 1), DoneResult(9, 1)]
    assert node.keys() == []
    assert not node.machine.lease_expiry_due(2 * TTL_MS)


def test_leases_travel_in_a_checkpoint(node: Node) -> None:
    node.apply(GrantLease(TTL_MS, 1), Put(b"a", b"1", 1))
    digest = node.machine.digest()
    node.machine.checkpoint("copy")
    node.do(RevokeLease(1))
    node.machine.restore("copy")
    assert node.machine.digest() == digest
    assert node.read(DescribeLease(1, True)).keys == (b"a",)
    assert node.machine.lease_expiry_due(TTL_MS)
