"""Leases, one rule at a time."""

from __future__ import annotations

from typing import Any

import pytest

from kvstore import codec, model
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
from kvstore.state.machine import DATA, Machine
from kvstore.state.storage import MemoryDisk
from tests.state_model import Call, code_of, decoded, entry

TTL_MS = 10_000


class Node:
    def __init__(self) -> None:
        self.disk = MemoryDisk()
        self.machine = Machine(self.disk.open, "state")

    def apply(self, *calls: Any, at_ms: int = 0) -> list[Any]:
        return decoded(self.machine.apply(self.machine.applied_index + 1, 1, DATA, entry(at_ms, calls)))

    def do(self, request: Any, at_ms: int = 0) -> Any:
        return self.apply(request, at_ms=at_ms)[0]

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
