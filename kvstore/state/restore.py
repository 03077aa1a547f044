"""A state made of a backup: its records, leases and revision; no history before it, and no session."""

from __future__ import annotations

from kvstore import versions
from kvstore.backup import SavedLease
from kvstore.model import GrantLease, Record
from kvstore.state import layout
from kvstore.state.layout import (
    ATTACHED,
    CURRENT,
    FORMAT,
    LEASE,
    M_FORMAT,
    M_MEMBERS,
    M_POSITION,
    Epoch,
    LeaseRecord,
    Position,
    pack_header,
    pack_u64,
)
from kvstore.state.storage import Storage

# Where the log of a restored store begins: its first entry stands for all that the backup holds. Not at 1, where every
# empty log begins: a node that joins must be sent a snapshot.
FIRST_INDEX, FIRST_TERM = 2, 1
_WITH_LEASES = versions.needed_by(GrantLease(0))
# What goes into one batch of the storage.
_BATCH_RECORDS = 1000


class Restoring:
    """Fills an empty storage. `records` and `leases` as often as needed, then `end`; without that it is no state."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._batch = storage.batch()
        self._in_batch = 0
        self._version = versions.FIRST

    def records(self, records: tuple[Record, ...]) -> None:
        put = self._batch.put
        for record in records:
            header = pack_header(FORMAT, record.create_revision, record.mod_revision, record.version, record.lease)
            put(CURRENT + record.key, header + record.value)
            if record.lease:
                put(ATTACHED + pack_u64(record.lease) + record.key, b"")
            self._in_batch += 1
            if self._in_batch >= _BATCH_RECORDS:
                self._write()
                put = self._batch.put

    def leases(self, leases: tuple[SavedLease, ...], log_time_ms: int) -> None:
        for lease in leases:
            self._version = _WITH_LEASES
            deadline_ms = log_time_ms + lease.remaining_ms
            self._batch.put(LEASE + pack_u64(lease.id), layout.encode(LeaseRecord(FORMAT, lease.ttl_ms, deadline_ms)))

    def end(self, revision: int, log_time_ms: int, members: bytes) -> None:
        """Make it a state at `revision`, and durable. `log_time_ms`: when the backup was made; leases go on from
        there. `members`: the configuration, as consensus encodes it. The cluster's version is what all this needs,
        whatever this program knows: each member may be restored by another one, and the leader raises it soon."""
        epoch = Epoch(0, revision + 1, log_time_ms)
        position = Position(FORMAT, FIRST_INDEX, FIRST_TERM, 0, revision, revision, log_time_ms, FIRST_INDEX + 1, epoch)
        self._batch.put(M_POSITION, layout.encode(position))
        self._batch.put(M_MEMBERS, members)
        self._batch.put(M_FORMAT, b"%d" % self._version)
        self._write()
        self._storage.flush()

    def _write(self) -> None:
        self._storage.write(self._batch)
        self._batch, self._in_batch = self._storage.batch(), 0
