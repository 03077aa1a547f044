"""Optimistic transactions: read at one revision, remember what was read, write everything in one `Txn` that checks it.

Rules
- The first read is linearizable and fixes the snapshot's revision R; every later read is at R.
- Own writes are seen by own reads, points and ranges alike.
- The commit is one `Txn`. Its compares say that nothing which was read has changed since R: for a key, that its
  mod_revision is the one seen (0: still absent); for a range, that no record in it is newer than R and that there are
  as many as were seen. A record that appeared, vanished or changed breaks one of the two, so there are no phantoms;
  a limited range is checked only as far as it was read. This makes committed transactions serializable, and strictly
  so: they take effect at their commit.
- Read-only transactions are consistent as they are (one snapshot, linearizable at its first read) and commit without
  a round trip; so do those that neither read nor wrote.
- Nothing is sent before the commit, so an abandoned transaction leaves no trace.

The scheme is backward validation, as in Kung and Robinson, "On Optimistic Methods for Concurrency Control" (1981), with
the read set checked in the same atomic step that writes, as FoundationDB's resolvers do it.

Cost: one compare per key read, two per range read, one operation per key written, 1,024 of them in all; the server
walks over a checked range once for each of its two, within what a request may (`model.WALK_MAX`): so a transaction may
read ranges of 50,000 records or 32 MiB in all, and is refused at its commit past that (`range_too_large`). Contended
counters belong into `add` on keys that the transaction does not read: such an `add` compares nothing and never
conflicts.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import NamedTuple

from kvstore.errors import InternalError, Refused
from kvstore.model import (
    INT64_MAX,
    INT64_MIN,
    KEY_BYTES_MAX,
    TXN_OPERATIONS_MAX,
    Add,
    Compare,
    Delete,
    Operation,
    Put,
    Range,
    RangeResult,
    Record,
    Relation,
    Target,
    Txn,
    TxnResult,
    prefix_end,
)

Read = Callable[[Range, "float | None"], Awaitable[RangeResult]]
Commit = Callable[[Txn, "float | None"], Awaitable[TxnResult]]


class _RangeSeen(NamedTuple):
    """A stretch of keys that was read, and how many records it held at R."""

    start: bytes
    end: bytes
    held: int


class Transaction:
    """One attempt at an optimistic transaction. Made by `Client.transaction` and used as `async with`, whose end raises
    `Refused(conflict)` when another writer was faster; `Client.run_transaction` is the one that tries again.

    Not for concurrent use by several tasks. After its block it raises ValueError on every use but that of
    `revision`, `result` and `conflicted`.
    """

    __slots__ = (
        "_commit",
        "_covered",
        "_points",
        "_ranges",
        "_read",
        "_snapshot",
        "_state",
        "_timeout",
        "_writes",
        "conflicted",
        "result",
    )

    def __init__(self, read: Read, commit: Commit, timeout: float | None) -> None:
        self._read = read
        self._commit = commit
        self._timeout = timeout
        self._snapshot: int | None = None
        self._state = "new"
        self._points: dict[bytes, Record | None] = {}  # keys read, to be compared at the commit
        self._covered: dict[bytes, Record] = {}  # records that a range read brought along; their range is compared
        self._ranges: list[_RangeSeen] = []
        self._writes: dict[bytes, Put | Add | Delete] = {}
        self.conflicted = False
        """True after this attempt lost against other writers; a new one may succeed."""
        self.result: TxnResult | None = None
        """What the commit answered: one result per key written, in the order of first writing; None before it, and
        for a transaction that wrote nothing."""

    @property
    def revision(self) -> int | None:
        """The revision that all reads see; None before the first."""
        return self._snapshot

    # --- reads --------------------------------------------------------------------------------------------------------

    async def get(self, key: bytes) -> Record | None:
        """The record of one key as this transaction sees it, or None. A record that it wrote itself and has not
        committed yet has its old create_revision, mod_revision and version (0 where it is new or was not read)."""
        self._check_open()
        _check_bytes("key", key)
        write = self._writes.get(key)
        if isinstance(write, Delete):
            return None
        if isinstance(write, Put):
            return _as_written(write, self._known(key))
        base = await self._base(key)
        write = self._writes.get(key)
        return base if not isinstance(write, Add) else _as_added(write, base)

    async def range(
        self,
        start: bytes = b"",
        end: bytes | None = None,
        *,
        prefix: bytes | None = None,
        limit: int = 0,
        keys_only: bool = False,
        reverse: bool = False,
    ) -> RangeResult:
        """All records of a range or prefix as this transaction sees them, own writes merged in, in key order; at
        most `limit` (0: all, however many pages that takes).

        `count` is the number of records returned, and `more` says that `limit` cut the range: what lies beyond was
        not read, so the commit does not check it.
        """
        self._check_open()
        if prefix is not None:
            if start or end is not None:
                raise ValueError("give either prefix, or start and end")
            start, end = prefix, prefix_end(prefix)
        _check_bytes("start", start)
        if end is None:
            end = key_after(start)
        _check_bytes("end", end)
        if limit < 0:
            raise ValueError("limit must not be negative")
        base, rest = await self._read_range(start, end, limit, keys_only, reverse)
        if rest is not None:
            start, end = (rest, end) if reverse else (start, rest)
        merged = self._merged(base, start, end, keys_only, reverse)
        more = rest is not None
        if limit and len(merged) > limit:
            del merged[limit:]
            more = True
        if keys_only:
            merged = [_without_value(record) for record in merged]
        return RangeResult(self._snapshot or 0, tuple(merged), len(merged), more)

    # --- writes: kept here until the commit ---------------------------------------------------------------------------

    def put(self, key: bytes, value: bytes, *, lease: int = 0) -> None:
        """Set `key` to `value` at the commit."""
        self._check_open()
        _check_bytes("key", key)
        _check_bytes("value", value)
        self._write(Put(key, value, lease))

    def delete(self, key: bytes) -> None:
        """Delete one key at the commit; nothing happens if it is not there."""
        self._check_open()
        _check_bytes("key", key)
        self._write(Delete(key))

    async def delete_range(self, start: bytes = b"", end: bytes | None = None, *, prefix: bytes | None = None) -> int:
        """Delete every key of a range or prefix that this transaction sees. Returns how many.

        Reads the keys first (hence it is awaited, and the commit checks the range); each costs one operation.
        """
        found = await self.range(start, end, prefix=prefix, keys_only=True)
        for record in found.records:
            self._write(Delete(record.key))
        return found.count

    def add(self, key: bytes, delta: int, *, min: int | None = None, max: int | None = None) -> None:
        """Add to a signed 64-bit decimal (absent is 0) at the commit.

        On a key that the transaction has not read, this compares nothing: it never conflicts, and whether the sum
        stays in `[min, max]` is decided at the commit (`Refused(out_of_range)`, nothing written). On a key whose
        value is known here it is refused at once. Several on one key become one.
        """
        self._check_open()
        _check_bytes("key", key)
        for name, number in (("delta", delta), ("min", min), ("max", max)):
            if number is None:
                continue
            if type(number) is not int:
                raise TypeError(f"{name} must be an int, not {type(number).__name__}")
            if not INT64_MIN <= number <= INT64_MAX:
                raise Refused(f"{name} of Add is no signed 64-bit number", code="invalid_request")
        added = Add(key, delta, min, max)
        earlier = self._writes.get(key)
        if isinstance(earlier, Put):
            self._writes[key] = Put(key, _sum(added, earlier.value), earlier.lease)
        elif isinstance(earlier, Delete):
            self._writes[key] = Put(key, _sum(added, b"0"))
        else:
            if isinstance(earlier, Add):
                added = _both(earlier, added)
            if self._is_known(key):
                _as_added(added, self._known(key))
            self._write(added)

    # --- life ---------------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Transaction:
        if self._state != "new":
            raise ValueError("a transaction is used once; make a new one")
        self._state = "open"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._state = "ended"
        if error is None and self._writes:
            await self._try_commit()

    async def _try_commit(self) -> None:
        compares: list[Compare] = []
        for key, record in self._points.items():
            seen = record.mod_revision if record is not None else 0
            compares.append(Compare(key, Target.MOD_REVISION, Relation.EQUAL, seen))
        for start, end, held in self._ranges:
            newest = (self._snapshot or 0) + 1
            compares.append(Compare(start, Target.MOD_REVISION, Relation.LESS, newest, end))
            compares.append(Compare(start, Target.COUNT, Relation.EQUAL, held, end))
        writes: tuple[Operation, ...] = tuple(self._writes.values())
        if len(compares) + len(writes) > TXN_OPERATIONS_MAX:
            raise Refused(
                f"this transaction has {len(writes)} writes and {len(compares)} checks of what it read; the limit is "
                f"{TXN_OPERATIONS_MAX} together: do it in parts",
                code="too_many_operations",
            )
        result = await self._commit(Txn(tuple(compares), writes), self._timeout)
        if not result.succeeded:
            self.conflicted = True
            raise Refused(
                "what this transaction read has changed since; nothing was written: run it again "
                "(run_transaction does so by itself)",
                code="conflict",
            )
        self.result = result

    # --- inside -------------------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._state != "open":
            raise ValueError("this transaction is not open: use it inside its `async with` block")

    def _write(self, operation: Put | Add | Delete) -> None:
        key = operation.start if isinstance(operation, Delete) else operation.key
        if key not in self._writes and len(self._writes) == TXN_OPERATIONS_MAX:
            raise Refused(
                f"a transaction writes at most {TXN_OPERATIONS_MAX} keys: do it in parts", code="too_many_operations"
            )
        self._writes[key] = operation

    def _is_known(self, key: bytes) -> bool:
        return key in self._points or key in self._covered

    def _known(self, key: bytes) -> Record | None:
        """The record at R if this transaction has read it."""
        return self._points.get(key) or self._covered.get(key)

    async def _base(self, key: bytes) -> Record | None:
        """The record of a key at R; from then on the commit compares it."""
        if self._is_known(key):
            return self._known(key)
        found = await self._fetch(Range(key))
        record = found.records[0] if found.records else None
        self._points[key] = record
        return record

    async def _fetch(self, request: Range) -> RangeResult:
        """Read at R; the first one decides R."""
        if self._snapshot == 0:
            # The store was empty at R, and revision 0 in a request would mean the newest instead.
            return RangeResult(0, (), 0)
        revision = self._snapshot or 0
        at = Range(request.start, request.end, request.limit, revision, request.keys_only, False, request.reverse)
        try:
            found = await self._read(at, self._timeout)
        except Refused as refusal:
            # Compaction has passed R while the transaction ran: a lost race, too.
            self.conflicted = revision > 0 and refusal.code == "revision_compacted"
            raise
        if self._snapshot is None:
            self._snapshot = found.revision
        return found

    async def _read_range(
        self, start: bytes, end: bytes, limit: int, keys_only: bool, reverse: bool
    ) -> tuple[list[Record], bytes | None]:
        """Records of a range at R, enough that `limit` remain after own deletions, and the stretch of it to compare.

        The second value is None if the range was read to its end; else the bound of what was read: `[start, bound)`,
        or `[bound, end)` in reverse.
        """
        # Own writes can only hide records (deletions), so that many more are enough to fill the limit.
        hidden = sum(1 for write in self._writes.values() if isinstance(write, Delete)) if limit else 0
        wanted = limit + hidden if limit else 0
        records: list[Record] = []
        at_start, at_end, more = start, end, True
        while more and (not wanted or len(records) < wanted):
            page_limit = wanted - len(records) if wanted else 0
            page = await self._fetch(Range(at_start, at_end, page_limit, keys_only=keys_only, reverse=reverse))
            records.extend(page.records)
            more = page.more
            if more and not page.records:
                raise InternalError("the server left out every record of a page")
            if more and reverse:
                at_end = page.records[-1].key
            elif more:
                at_start = key_after(page.records[-1].key)
        rest: bytes | None = None
        if more:
            rest = at_end if reverse else at_start
        if rest is None:
            seen = _RangeSeen(start, end, len(records))
        elif reverse:
            seen = _RangeSeen(rest, end, len(records))
        else:
            seen = _RangeSeen(start, rest, len(records))
        if seen not in self._ranges:
            self._ranges.append(seen)
        if not keys_only:
            for record in records:
                self._covered.setdefault(record.key, record)
        return records, rest

    def _merged(self, base: list[Record], start: bytes, end: bytes, keys_only: bool, reverse: bool) -> list[Record]:
        """`base`, the records of `[start, end)` at R, with own writes in that stretch laid over it."""
        if not self._writes:
            return base
        by_key = {record.key: record for record in base}
        for key, write in self._writes.items():
            if key < start or (end and key >= end):
                continue
            if isinstance(write, Delete):
                by_key.pop(key, None)
            elif isinstance(write, Put):
                by_key[key] = _as_written(write, by_key.get(key))
            else:
                old = by_key.get(key)
                # With keys_only the value is not here, and the sum is not asked for either.
                by_key[key] = old if old is not None and keys_only else _as_added(write, old)
        return [by_key[key] for key in sorted(by_key, reverse=reverse)]


def key_after(key: bytes) -> bytes:
    """The smallest key that sorts after `key`: as a start, or as an end that leaves `key` inside (then `b""`, no
    bound, is right for the largest key of all)."""
    return key + b"\0" if len(key) < KEY_BYTES_MAX else prefix_end(key)


def _check_bytes(name: str, value: object) -> None:
    if not isinstance(value, bytes):
        raise TypeError(f"{name} must be bytes, not {type(value).__name__}")


def _as_written(write: Put, old: Record | None) -> Record:
    if old is None:
        return Record(write.key, write.value, 0, 0, 0, write.lease)
    return Record(write.key, write.value, old.create_revision, old.mod_revision, old.version, write.lease)


def _as_added(write: Add, old: Record | None) -> Record:
    if old is None:
        return Record(write.key, _sum(write, b"0"), 0, 0, 0)
    value = _sum(write, old.value)
    return Record(write.key, value, old.create_revision, old.mod_revision, old.version, old.lease)


def _without_value(record: Record) -> Record:
    if not record.value:
        return record
    return Record(record.key, b"", record.create_revision, record.mod_revision, record.version, record.lease)


def _sum(add: Add, value: bytes) -> bytes:
    """The value after `add`, by the store's own rules. Raises `Refused` as the store would."""
    digits = value[1:] if value.startswith(b"-") else value
    if not digits.isdigit() or (len(digits) > 1 and digits.startswith(b"0")) or len(digits) > 19:
        raise Refused("the value is no signed 64-bit decimal, so it cannot be added to", code="not_a_number")
    total = int(value) + add.delta
    if not INT64_MIN <= int(value) <= INT64_MAX:
        raise Refused("the value is no signed 64-bit decimal, so it cannot be added to", code="not_a_number")
    if not INT64_MIN <= total <= INT64_MAX:
        raise Refused("the sum is no signed 64-bit number", code="overflow")
    if (add.min is not None and total < add.min) or (add.max is not None and total > add.max):
        raise Refused(f"{total} would leave the bounds [{add.min}, {add.max}]", code="out_of_range")
    return str(total).encode()


def _both(first: Add, second: Add) -> Add:
    """One Add that does both, and is refused exactly where one of them would be. Raises `Refused` where no value
    passes, or where no Add can carry the sum of both deltas.

    With v the value before: the first wants min1 <= v + d1 <= max1, the second min2 <= v + d1 + d2 <= max2. Adding d2
    to the first says both of the sum v + d1 + d2. An absent bound is that of 64 bits.
    """
    delta = first.delta + second.delta
    low1 = INT64_MIN if first.min is None else first.min
    high1 = INT64_MAX if first.max is None else first.max
    low2 = INT64_MIN if second.min is None else second.min
    high2 = INT64_MAX if second.max is None else second.max
    low, high = max(low1 + second.delta, low2), min(high1 + second.delta, high2)
    if low > high:
        raise Refused("no value satisfies the bounds of both additions", code="out_of_range")
    if not INT64_MIN <= delta <= INT64_MAX:
        raise Refused("both additions together are no signed 64-bit number", code="overflow")
    return Add(first.key, delta, low if low > INT64_MIN else None, high if high < INT64_MAX else None)
