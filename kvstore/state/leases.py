"""Leases: records that go when nobody keeps them (design section 5).

A lease is granted for a time to live, and lives that long in **log time** after its grant or its last keep-alive. A
record that is put under it is deleted with it, when it is revoked or has expired; all its records go in one revision.
It expires only when an `ExpireLeases` says so, at the same log index on every replica; so a leader change neither
shortens nor resets it, and a cluster that was down for a while shortens none.

- An id is (log index << 16) | position in the batch of the request that granted it, and so never reused, unless the
  client chose one of its own that is free.
- A record has one lease at most. A `Put` sets it (or none), an `Add` keeps it.
- What a batch does to leases lies in its `LeaseChanges`, and in `Leases` only once the storage has taken the batch.

Bounded: `LEASES_MAX` leases, `model.LEASE_KEYS_MAX` records and `model.LEASE_BYTES_MAX` each (they are all deleted in
one entry).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from msgspec import Struct

from kvstore import model
from kvstore.errors import Refused
from kvstore.state import layout
from kvstore.state.deadlines import Deadlines
from kvstore.state.layout import (
    ATTACHED,
    FORMAT,
    LEASE,
    NO_LEASE,
    RECORD_LEASE,
    LeaseRecord,
    check_format,
    family_end,
    pack_u64,
)
from kvstore.state.storage import Batch, Storage

# 100 MB of memory at most, without their records.
LEASES_MAX = 500_000
# One ExpireLeases ends leases until so many records are deleted, so that no entry takes long to apply; the leader
# proposes the next one at once.
EXPIRED_RECORDS_PER_ENTRY_MAX = 4096
EXPIRED_PER_ENTRY_MAX = 4096

# What a key takes in a result beside its bytes, at most.
_KEY_OVERHEAD_BYTES = 5

_Keys = dict[bytes, None]


class Lease(Struct, gc=False):
    """`keys` are those of its records, in the order in which they were put under it. `size_bytes` is what the records
    have together, with their keys; -1 where nobody had to know since the node started."""

    id: int
    ttl_ms: int
    deadline_ms: int
    keys: _Keys
    size_bytes: int = -1


class Leases:
    """All leases as of the last committed entry."""

    __slots__ = ("_deadlines", "by_id")

    def __init__(self) -> None:
        self.by_id: dict[int, Lease] = {}
        self._deadlines = Deadlines(self._deadline_of)

    @classmethod
    def load(cls, storage: Storage) -> Leases:
        leases = cls()
        for key, encoded in storage.scan(LEASE, family_end(LEASE)):
            record = layout.decode_lease_record(encoded)
            check_format(record.format)
            lease_id = int.from_bytes(key[1:], "big")
            leases.by_id[lease_id] = Lease(lease_id, record.ttl_ms, record.deadline_ms, {})
        for key, _ in storage.scan(ATTACHED, family_end(ATTACHED)):
            leases.by_id[int.from_bytes(key[1:9], "big")].keys[key[9:]] = None
        known = [(lease.deadline_ms, lease.id) for lease in leases.by_id.values()]
        leases._deadlines = Deadlines(leases._deadline_of, known)
        return leases

    def expiry_due(self, log_time_ms: int) -> bool:
        """True if some lease's time has passed."""
        return self._deadlines.due(log_time_ms) is not None

    def _deadline_of(self, lease_id: int) -> int | None:
        lease = self.by_id.get(lease_id)
        return None if lease is None else lease.deadline_ms

    def expired(self, log_time_ms: int, changes: LeaseChanges) -> Iterator[Lease]:
        """Those whose time has passed as the batch at work has left them, earliest deadline first. Each must be ended
        before the next is asked for."""
        while self.expiry_due(log_time_ms):
            lease = changes.find(self._deadlines.take())
            if lease is not None and lease.deadline_ms > log_time_ms:
                self._deadlines.add(lease.deadline_ms, lease.id)  # kept alive by this very batch
            elif lease is not None:
                yield lease

    def observable(self) -> list[tuple[int, int, int, list[bytes]]]:
        """(id, ttl, deadline, keys) of each, in order."""
        ordered = [lease for _, lease in sorted(self.by_id.items())]
        return [(lease.id, lease.ttl_ms, lease.deadline_ms, sorted(lease.keys)) for lease in ordered]

    def describe(self, request: model.DescribeLease, log_time_ms: int) -> model.LeaseStatus:
        """Raises `Refused`: `lease_not_found`, `result_too_large`."""
        lease = self.by_id.get(request.lease)
        if lease is None:
            raise not_found(request.lease)
        if request.keys and sum(map(len, lease.keys)) + _KEY_OVERHEAD_BYTES * len(lease.keys) > model.RESULT_BYTES_MAX:
            raise Refused(
                f"the keys under lease {lease.id} are over the limit of {model.RESULT_BYTES_MAX} bytes for a result; "
                "ask without them",
                code="result_too_large",
            )
        remaining_ms = max(0, lease.deadline_ms - log_time_ms)
        keys = tuple(sorted(lease.keys)) if request.keys else ()
        return model.LeaseStatus(lease.id, lease.ttl_ms, remaining_ms, len(lease.keys), keys)

    def committed(self, changes: LeaseChanges) -> None:
        """The storage has taken what `prepare` put into its batch."""
        for lease_id, lease in changes.changed.items():
            if lease is None:
                self.by_id.pop(lease_id, None)  # it may have been granted by this very batch
            else:
                if lease_id in changes.granted:
                    self._deadlines.add(lease.deadline_ms, lease_id)
                self.by_id[lease_id] = lease


class LeaseChanges:
    """What the batch at work does to leases, on top of `Leases`. Copies a lease before the first change to it, but
    its keys only where they change: a keep-alive costs the same whatever hangs on the lease."""

    __slots__ = ("_attached", "_base", "_own_keys", "changed", "count", "granted")

    def __init__(self, base: Leases) -> None:
        self._base = base
        self.changed: dict[int, Lease | None] = {}  # None: ended
        self.granted: set[int] = set()  # by this batch
        self._own_keys: set[int] = set()  # leases whose keys were copied
        self._attached: dict[tuple[int, bytes], bool] = {}
        self.count = len(base.by_id)

    def find(self, lease_id: int) -> Lease | None:
        if lease_id in self.changed:
            return self.changed[lease_id]
        return self._base.by_id.get(lease_id)

    def need(self, lease_id: int) -> Lease:
        """Raises `Refused(lease_not_found)`."""
        lease = self.find(lease_id)
        if lease is None:
            raise not_found(lease_id)
        return lease

    def check_room(self, lease_id: int, more: int) -> None:
        """May so many more records be put under this lease? Raises `Refused`: `lease_not_found`, `lease_full`."""
        if len(self.need(lease_id).keys) + more > model.LEASE_KEYS_MAX:
            raise Refused(
                f"lease {lease_id} would have more than {model.LEASE_KEYS_MAX} records; use another one",
                code="lease_full",
            )

    def check_bytes(self, lease_id: int, more_bytes: int, get: Callable[[bytes], bytes | None]) -> None:
        """May its records have so much more? `get` gives a packed record: the first time after a start it reads them
        all. Raises `Refused(lease_full)`."""
        if more_bytes <= 0:
            return
        if self.need(lease_id).size_bytes < 0:
            lease = self._own(lease_id)
            lease.size_bytes = sum(len(key) + len(get(key) or b"") for key in lease.keys)
        if self.need(lease_id).size_bytes + more_bytes > model.LEASE_BYTES_MAX:
            raise Refused(
                f"lease {lease_id} would have more than {model.LEASE_BYTES_MAX} bytes of records; use another one",
                code="lease_full",
            )

    def grant(self, lease_id: int, ttl_ms: int, now_ms: int) -> None:
        """Raises `Refused`: `lease_exists`, `too_many_leases`."""
        if self.find(lease_id) is not None:
            raise Refused(f"there is a lease {lease_id} already", code="lease_exists")
        if self.count >= LEASES_MAX:
            raise Refused(f"there are {LEASES_MAX} leases; let some expire first", code="too_many_leases")
        self.changed[lease_id] = Lease(lease_id, ttl_ms, now_ms + ttl_ms, {}, 0)
        self._own_keys.add(lease_id)
        self.granted.add(lease_id)
        self.count += 1

    def keep(self, lease_id: int, now_ms: int) -> Lease:
        """Raises `Refused(lease_not_found)`."""
        lease = self.need(lease_id)
        kept = Lease(lease_id, lease.ttl_ms, now_ms + lease.ttl_ms, lease.keys, lease.size_bytes)
        self.changed[lease_id] = kept
        return kept

    def end(self, lease_id: int) -> None:
        """Its records are deleted already, and so detached."""
        assert not self.need(lease_id).keys
        self.changed[lease_id] = None
        self.count -= 1

    def written(self, key: bytes, record: bytes | None, before: bytes | None) -> None:
        """A record was written, or deleted: is it under another lease now, or larger?"""
        old = NO_LEASE if before is None else before[RECORD_LEASE]
        new = NO_LEASE if record is None else record[RECORD_LEASE]
        if old == new:
            if record is not None and before is not None and new != NO_LEASE and len(record) != len(before):
                lease = self._own(int.from_bytes(new, "big"))
                if lease.size_bytes >= 0:
                    lease.size_bytes += len(record) - len(before)
            return
        if old != NO_LEASE:
            assert before is not None
            self._attach(int.from_bytes(old, "big"), key, -len(key) - len(before))
        if new != NO_LEASE:
            assert record is not None
            self._attach(int.from_bytes(new, "big"), key, len(key) + len(record))

    def _attach(self, lease_id: int, key: bytes, more_bytes: int) -> None:
        """A record comes under a lease, or leaves it, with so many bytes (below 0: it leaves)."""
        lease = self._own(lease_id)
        if lease_id not in self._own_keys:
            self._own_keys.add(lease_id)
            lease.keys = dict(lease.keys)
        if more_bytes > 0:
            lease.keys[key] = None
        else:
            del lease.keys[key]
        if lease.size_bytes >= 0:
            lease.size_bytes += more_bytes
        self._attached[lease_id, key] = more_bytes > 0

    def _own(self, lease_id: int) -> Lease:
        """A lease, to be changed; but its keys only where they are in `_own_keys`."""
        lease = self.changed.get(lease_id)
        if lease is None:
            lease = self.need(lease_id)
            lease = Lease(lease_id, lease.ttl_ms, lease.deadline_ms, lease.keys, lease.size_bytes)
            self.changed[lease_id] = lease
        return lease

    def prepare(self, batch: Batch) -> None:
        """Put all of it into the storage batch."""
        for lease_id, lease in self.changed.items():
            if lease is None:
                batch.delete(LEASE + pack_u64(lease_id))
            else:
                record = LeaseRecord(FORMAT, lease.ttl_ms, lease.deadline_ms)
                batch.put(LEASE + pack_u64(lease_id), layout.encode(record))
        for (lease_id, key), is_attached in self._attached.items():
            name = ATTACHED + pack_u64(lease_id) + key
            if is_attached:
                batch.put(name, b"")
            else:
                batch.delete(name)


class LeaseMoves:
    """What the writes of one request do to leases, before the view learns of them."""

    __slots__ = ("_changes", "_get", "_moved")

    def __init__(self, changes: LeaseChanges, get: Callable[[bytes], bytes | None]) -> None:
        """`get` gives a packed record as it is before the request."""
        self._changes = changes
        self._get = get
        self._moved: dict[int, tuple[int, int]] = {}  # lease -> how many records more it has, and bytes

    def write(self, key: bytes, before: bytes | None, lease: int, size_bytes: int) -> None:
        """A record, `before` until now, will be under a lease (0: none, also where it is deleted) and have so many
        bytes, packed. Raises `Refused`: `lease_not_found`, `lease_full`."""
        left = 0 if before is None else int.from_bytes(before[RECORD_LEASE], "big")
        if left and before is not None:
            self._move(left, -1, -len(key) - len(before))
        if lease:
            records, more_bytes = self._move(lease, 1, len(key) + size_bytes)
            if lease != left:
                self._changes.check_room(lease, records)
            self._changes.check_bytes(lease, more_bytes, self._get)

    def _move(self, lease: int, records: int, size_bytes: int) -> tuple[int, int]:
        known_records, known_bytes = self._moved.get(lease, (0, 0))
        moved = self._moved[lease] = known_records + records, known_bytes + size_bytes
        return moved


def listed(storage: Storage, request: model.ListLeases) -> model.LeaseList:
    """A page of ids. Costs O(page), however many there are."""
    limit = min(request.limit or model.LEASES_LISTED_MAX, model.LEASES_LISTED_MAX)
    ids: list[int] = []
    for key, _ in storage.scan(LEASE + pack_u64(request.after + 1), family_end(LEASE)):
        if len(ids) == limit:
            return model.LeaseList(tuple(ids), True)
        ids.append(int.from_bytes(key[1:], "big"))
    return model.LeaseList(tuple(ids))


def not_found(lease_id: int) -> Refused:
    message = f"there is no lease {lease_id}: it was never granted, was revoked, or has expired"
    return Refused(message, code="lease_not_found")
