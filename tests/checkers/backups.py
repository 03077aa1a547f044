"""Backups: a file that was reported done is whole, and holds what the store held at its revision. No other file is.

Rules:

- `backup_damaged`: what was reported done is accepted by the reader that `kvstore restore` has, and says what was said;
- `backup_of_a_failure`: what was written before a backup failed is refused by it;
- `backup_holds_later`: no record is newer than the backup's revision, nor older than itself;
- `backup_lease`: every lease that a record is under is in the file;
- `backup_differs`: a replica that is asked for its records at that revision, by another way, has the same ones;
- `backup_misses`: of keys whose changes are known, each record is the newest one at that revision.

That a backup is of one moment, and of none before it was asked for, is left to the judges of what it holds: to them it
is one more reading (`workloads/backups.py`).
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

from msgspec import Struct

from kvstore import Record, Refused
from kvstore.backup import End, Header, Leases, Records, read_backup
from tests.checkers.history import Entry, told
from tests.checkers.verdict import Inconsistent


class TakeBackup(Struct, frozen=True):
    number: int

    def __str__(self) -> str:
        return f"take backup {self.number}"


class Change(Struct, frozen=True):
    """One transaction: values by key, None for a deletion. A value is written by one change only."""

    writes: dict[bytes, bytes | None]


class Backup(Struct):
    """What a file holds."""

    revision: int
    records: tuple[Record, ...]
    leases: frozenset[int]
    digest: bytes


def read_whole(data: bytes, revision: int, digest: bytes) -> Backup:
    """A backup that was reported done, at this revision and with this digest. Raises `Inconsistent`."""
    header: Header | None = None
    records: list[Record] = []
    leases: set[int] = set()
    end: End | None = None
    try:
        for chunk in read_backup(io.BytesIO(data)):
            if isinstance(chunk, Header):
                header = chunk
            elif isinstance(chunk, Records):
                records += chunk.records
            elif isinstance(chunk, Leases):
                leases.update(lease.id for lease in chunk.leases)
            else:
                end = chunk
    except Refused as refusal:
        raise Inconsistent("backup_damaged", f"a backup that was reported done is refused: {refusal}") from refusal
    assert header is not None
    assert end is not None
    if (header.revision, end.digest) != (revision, digest):
        raise Inconsistent("backup_damaged", f"it is of revision {header.revision}, and was said to be of {revision}")
    for record in records:
        if not 0 < record.create_revision <= record.mod_revision <= revision:
            raise Inconsistent("backup_holds_later", f"a backup of revision {revision} has {record}")
        if record.lease and record.lease not in leases:
            raise Inconsistent("backup_lease", f"the lease of {record} is not in the backup")
    return Backup(revision, tuple(records), frozenset(leases), digest)


def check_failed(data: bytes) -> None:
    """What a backup left that failed. Raises `Inconsistent`."""
    try:
        for _ in read_backup(io.BytesIO(data)):
            pass
    except Refused:
        return
    raise Inconsistent("backup_of_a_failure", f"a backup failed, and left {len(data)} bytes that are taken for one")


def check_same(backup: Backup, records: Sequence[Record], where: str) -> None:
    """`records`: all of the store's at the backup's revision, read another way. Raises `Inconsistent`."""
    if backup.records == tuple(records):
        return
    ours, theirs = ({record.key: record for record in found} for found in (backup.records, records))
    key = min(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    raise Inconsistent(
        "backup_differs",
        f"at revision {backup.revision} the backup has {ours.get(key)}, and {where} has {theirs.get(key)}",
    )


def check_digest(backup: Backup, digest: bytes, where: str) -> None:
    """`digest`: of all of a replica's records at the backup's revision. Raises `Inconsistent`."""
    if backup.digest != digest:
        raise Inconsistent("backup_differs", f"at revision {backup.revision} {where} holds other records")


def check_changes(backup: Backup, keys: Iterable[bytes], entries: Sequence[Entry]) -> None:
    """`keys` are changed by `entries` alone. Raises `Inconsistent`."""
    found = {record.key: record for record in backup.records}
    for key in keys:
        record = found.get(key)
        touching = [entry for entry in entries if key in entry.operation.writes and not entry.is_failed]
        known = [entry for entry in touching if entry.is_ok and entry.changed and entry.revision <= backup.revision]
        newest = max(known, key=lambda entry: entry.revision, default=None)
        since, value = 0, None
        if newest is not None:
            since, value = newest.revision, newest.operation.writes[key]
        if record is None:
            is_good = value is None or _unknown(touching, key, None)
        elif record.mod_revision == since:
            is_good = record.value == value
        else:  # by one whose answer was lost, or is on its way
            is_good = record.mod_revision > since and _unknown(touching, key, record.value)
        if not is_good:
            why = f"at revision {backup.revision} {key!r} is {record}"
            raise Inconsistent("backup_misses", f"{why}:\n{told(touching[-10:])}")


def _unknown(entries: Iterable[Entry], key: bytes, value: bytes | None) -> bool:
    return any(entry.is_unknown and entry.operation.writes[key] == value for entry in entries)
