"""What is judged about backups: one that breaks each rule."""

from __future__ import annotations

import io

import pytest

from kvstore import Record
from kvstore.backup import FORMAT, BackupWriter, Header, SavedLease
from tests.checkers.backups import (
    Backup,
    Change,
    check_changes,
    check_digest,
    check_failed,
    check_same,
    read_whole,
)
from tests.checkers.history import Entry
from tests.checkers.scenario import failed, ok, unknown
from tests.checkers.verdict import Inconsistent

A, B = Record(b"a", b"1", 3, 3, 1), Record(b"b", b"2", 4, 6, 2, 7)


def whole(*records: Record) -> tuple[bytes, bytes]:
    file = io.BytesIO()
    writer = BackupWriter(file)
    writer.header(Header(FORMAT, "cluster", 6, 1, "1.0"))
    for record in records:
        writer.record(record)
    writer.leases((SavedLease(7, 1000, 1000),))
    end = writer.end()
    return file.getvalue(), end.digest


def backup(*records: Record) -> Backup:
    data, digest = whole(*records)
    return read_whole(data, 6, digest)


def bad(rule: str) -> pytest.RaisesExc[Inconsistent]:
    return pytest.raises(Inconsistent, match=f"^{rule}:")


def test_one_that_is_as_it_should_be() -> None:
    found = backup(A, B)
    assert (found.revision, found.records, found.leases) == (6, (A, B), frozenset({7}))
    check_same(found, [A, B], "a scan")
    check_digest(found, found.digest, "n1")


def test_one_that_is_damaged_or_of_another_revision() -> None:
    data, digest = whole(A, B)
    with bad("backup_damaged"):
        read_whole(data[:-1], 6, digest)
    with bad("backup_damaged"):
        read_whole(data, 5, digest)
    with bad("backup_damaged"):
        read_whole(data, 6, b"another")


def test_one_that_failed_and_is_taken_for_one() -> None:
    data, _ = whole(A, B)
    check_failed(data[:-1])
    check_failed(b"")
    with bad("backup_of_a_failure"):
        check_failed(data)


def test_a_record_from_later() -> None:
    with bad("backup_holds_later"):
        backup(Record(b"a", b"1", 3, 7, 2))
    with bad("backup_holds_later"):
        backup(Record(b"a", b"1", 3, 2, 1))


def test_a_record_without_its_lease() -> None:
    with bad("backup_lease"):
        backup(Record(b"a", b"1", 3, 3, 1, 8))


def test_other_records_than_a_replica_has() -> None:
    for others in ([A], [A, B, Record(b"c", b"3", 5, 5, 1)], [A, Record(b"b", b"9", 4, 6, 2, 7)]):
        with bad("backup_differs"):
            check_same(backup(A, B), others, "a scan")
    with bad("backup_differs"):
        check_digest(backup(A, B), b"another", "n1")


def changed(revision: int, writes: dict[bytes, bytes | None]) -> Entry:
    return ok(revision, revision, Change(writes), revision=revision, changed=True)


FIRST, SECOND = changed(3, {b"a": b"1"}), changed(4, {b"b": b"0"})
LATER = changed(8, {b"a": b"9", b"b": None})


def test_changes_that_are_there() -> None:
    lost = unknown(5, Change({b"b": b"2"}))
    check_changes(backup(A, B), [b"a", b"b", b"c"], [FIRST, SECOND, lost, LATER])
    check_changes(backup(B), [b"a"], [FIRST, changed(5, {b"a": None}), LATER])
    check_changes(backup(B), [b"a"], [FIRST, unknown(5, Change({b"a": None})), LATER])


@pytest.mark.parametrize(
    ("held", "entries"),
    [
        ([B], [FIRST]),
        ([A], [FIRST, changed(5, {b"a": b"2"})]),
        ([A], [changed(3, {b"a": b"2"})]),
        ([A], [FIRST, changed(5, {b"a": None})]),
        ([A], []),
        ([A], [failed(1, 2, Change({b"a": b"1"}))]),
        ([A], [unknown(1, Change({b"a": b"2"}))]),
    ],
)
def test_changes_that_are_not(held: list[Record], entries: list[Entry]) -> None:
    with bad("backup_misses"):
        check_changes(backup(*held), [b"a"], entries)
