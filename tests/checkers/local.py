"""Reads of a replica's own state: they may be old, but they must be true.

A local read names the revision R that its replica was at. Then, for every key:

- R is not older than what that client had seen when it asked (`floor`): it never goes back.
- The record is the one that the key had at R: no change that is known to have happened lies after the record's
  mod_revision and not after R. (A replica at R without that change has lost it, or applied something else.)
- One mod_revision of a key has one value, whoever shows it.
- The value was written by somebody who had begun before the read ended, and did not surely fail.

The same holds for linearizable reads, so all reads that show R are judged. Cost: O(n log n).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable

from msgspec import Struct

from tests.checkers.history import Entry, told
from tests.checkers.models import UNSEEN, Add, Delete, Get, Put, Seen, Sum, Swap, Swapped, Wrote
from tests.checkers.verdict import Inconsistent


class LocalGet(Struct, frozen=True, gc=False):
    """`floor` is the newest revision that the client had seen when it asked."""

    key: bytes
    floor: int

    def __str__(self) -> str:
        return f"local get {self.key.decode(errors='backslashreplace')} (at {self.floor} or later)"


class LocalSeen(Struct, frozen=True, gc=False):
    """`at` is the revision that the replica was at."""

    seen: Seen
    at: int

    def __str__(self) -> str:
        return f"{self.seen} (the replica is at {self.at})"


class _Key:
    def __init__(self) -> None:
        self.changes: dict[int, tuple[bytes | None, Entry]] = {}  # revision -> value, and who showed it first
        self.attempts: dict[bytes, Entry] = {}  # value -> the first that tried to write it
        self.reads: list[tuple[Seen, int, Entry]] = []
        self.has_sums = False  # additions: not every value was named by its writer
        self.has_unknown_deletes = False


def check_reads(entries: Iterable[Entry]) -> int:
    """Judge local and linearizable reads of single keys. Returns how many reads were judged. Raises `Inconsistent` with
    the rule `local_read_went_back`, `two_values_of_one_revision`, `replica_lacks_a_change` or `unwritten_value`."""
    keys: dict[bytes, _Key] = {}
    for entry in entries:
        if not entry.is_failed:
            _note(keys, entry)
    count = 0
    for key in keys.values():
        revisions = sorted(key.changes)
        for seen, at, entry in key.reads:
            count += 1
            _judge(key, revisions, seen, at, entry)
    return count


def _note(keys: dict[bytes, _Key], entry: Entry) -> None:
    operation, result = entry.operation, entry.result
    if operation.key not in keys:
        keys[operation.key] = _Key()
    key = keys[operation.key]
    if isinstance(operation, (Put, Swap)):
        first = key.attempts.setdefault(operation.value, entry)
        if entry.called < first.called:
            key.attempts[operation.value] = entry
    elif isinstance(operation, Add):
        key.has_sums = True
    elif isinstance(operation, Delete) and not entry.is_ok:
        key.has_unknown_deletes = True
    if not entry.is_ok:
        return
    shown: Seen | None = None
    if isinstance(operation, LocalGet):
        assert isinstance(result, LocalSeen)
        if result.at < operation.floor:
            raise Inconsistent(
                "local_read_went_back", f"revision {result.at} after {operation.floor} was seen:\n{told([entry])}"
            )
        shown = result.seen
        key.reads.append((shown, result.at, entry))
    elif isinstance(operation, Get):
        shown = result
        if entry.revision:
            key.reads.append((result, entry.revision, entry))
    elif isinstance(result, Wrote):
        shown = result.before
        _change(key, result.revision, operation.value if isinstance(operation, Put) else None, entry)
    elif isinstance(result, Swapped):
        shown = result.seen
        if result.succeeded:
            _change(key, result.revision, operation.value, entry)
    elif isinstance(result, Sum):
        _change(key, result.revision, b"%d" % result.value, entry)
    if shown is not None and shown.value is not None:
        _change(key, shown.revision, shown.value, entry)


def _change(key: _Key, revision: int, value: bytes | None, entry: Entry) -> None:
    if revision == UNSEEN:
        return
    known, first = key.changes.setdefault(revision, (value, entry))
    if known != value:
        raise Inconsistent("two_values_of_one_revision", f"revision {revision} has two values:\n{told([first, entry])}")


def _judge(key: _Key, revisions: list[int], seen: Seen, at: int, entry: Entry) -> None:
    newest = bisect_right(revisions, at) - 1
    if newest >= 0:
        value, writer = key.changes[revisions[newest]]
        if seen.value is None:
            lacks = value is not None and not key.has_unknown_deletes
        else:
            lacks = UNSEEN != seen.revision < revisions[newest]
        if lacks:
            raise Inconsistent(
                "replica_lacks_a_change",
                f"a read at revision {at} does not know of the change of revision {revisions[newest]}:\n"
                f"{told([writer, entry] if writer is not entry else [entry])}",
            )
    if seen.value is None or key.has_sums:
        return
    attempt = key.attempts.get(seen.value)
    if attempt is None:
        raise Inconsistent("unwritten_value", f"nobody can have written what this read shows:\n{told([entry])}")
    if attempt.called > entry.returned:
        raise Inconsistent("unwritten_value", f"read before it was written:\n{told([entry, attempt])}")
