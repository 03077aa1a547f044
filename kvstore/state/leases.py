"""Leases: records that go when nobody keeps them (design section 5).

A lease is granted for a time to live, and lives that long in **log time** after its grant or its last keep-alive. A
record that is put under it is deleted with it, when it is revoked or has expired; all its records go in one revision.
It expires only when an `ExpireLeases` says so, at the same log index on every replica; so a leader change neither
shortens nor resets it, and a cluster that was down for a while shortens none.

- An id is (log index << 16) | position in the batch of the request that granted it, and so never reused, unless the
  client chose one of its own that is free.
- A record has one lease at most. A `Put` sets it (or none), an `Add` keeps it.
- What a batch does to leases lies in its `LeaseChanges`, and in `Leases` only once the storage has taken the batch.

Bounded: `LEASES_MAX` leases, `model.LEASE_KEYS_MAX` records each (they are all deleted in one entry).
"""

from __future__ import annotations

from collections.abc import Iterator

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
    """`keys` are those of its records, in the order in which they were put under it."""

    id: int
    ttl_ms: int
    deadline_ms: int
    keys: _Keys


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

    def grant(self, lease_id: int, ttl_ms: int, now_ms: int) -> None:
        """Raises `Refused`: `lease_exists`, `too_many_leases`."""
        if self.find(lease_id) is not None:
            raise Refused(f"there is a lease {lease_id} already", code="lease_exists")
        if self.count >= LEASES_MAX:
            raise Refused(f"there are {LEASES_MAX} leases; let some expire first", code="too_many_leases")
        self.changed[lease_id] = Lease(lease_id, ttl_ms, now_ms + ttl_ms, {})
        self._own_keys.add(lease_id)
        self.granted.add(lease_id)
        self.count += 1

    def keep(self, lease_id: int, now_ms: int) -> Lease:
        """Raises `Refused(lease_not_found)`."""
        lease = self.need(lease_id)
        kept = Lease(lease_id, lease.ttl_ms, now_ms + lease.ttl_ms, lease.keys)
        self.changed[lease_id] = kept
        return kept

    def end(self, lease_id: int) -> None:
        """Its records are deleted already, and so detached."""
        assert not self.need(lease_id).keys
        self.changed[lease_id] = None
        self.count -= 1

    def written(self, key: bytes, record: bytes | None, before: bytes | None) -> None:
        """A record was written, or deleted: is it under another lease now?"""
        old = NO_LEASE if before is None else before[RECORD_LEASE]
        new = NO_LEASE if record is None else record[RECORD_LEASE]
        if old == new:
            return
        if old != NO_LEASE:
            lease_id = int.from_bytes(old, "big")
            del self._keys_of(lease_id)[key]
            self._attached[lease_id, key] = False
        if new != NO_LEASE:
            lease_id = int.from_bytes(new, "big")
            self._keys_of(lease_id)[key] = None
            self._attached[lease_id, key] = True

    def _keys_of(self, lease_id: int) -> _Keys:
        """Its keys, to be changed."""
        lease = self.need(lease_id)
        if lease_id not in self._own_keys:
            self._own_keys.add(lease_id)
            lease = Lease(lease_id, lease.ttl_ms, lease.deadline_ms, dict(lease.keys))
            self.changed[lease_id] = lease
        return lease.keys

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
