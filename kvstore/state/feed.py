"""What changed, in order of revisions: what watches are fed from.

New batches are served from memory (`Feed.fresh`), older ones from the history in the storage (`Feed.read`). Both give
the same changes; only the storage's leave it open what the record was, because most watches do not ask:
`Feed.event` looks it up.
"""

from __future__ import annotations

from collections import deque

from msgspec import Struct

from kvstore import codec, model
from kvstore.state import layout
from kvstore.state.layout import HISTORY, check_format, family_end, pack_u64, record_of
from kvstore.state.mvcc import Change, Overlay, Records
from kvstore.state.storage import Storage

# Batches that stay in memory after they were applied: a turn of the node applies a few at a time. Each holds the
# records of one log entry and those that they replaced, which the cache of hot records mostly holds as well.
_FRESH_BATCHES = 8


class Changed(Struct, gc=False):
    """What one transaction did to one key. `content` is the packed record, False for a deletion, None for a put whose
    record has to be looked up; `before` is the record that it replaced, where `before_known`."""

    key: bytes
    revision: int
    content: bytes | bool | None
    before: bytes | None = None
    before_known: bool = False

    @property
    def deleted(self) -> bool:
        return self.content is False


class _Batch(Struct):
    first_revision: int
    last_revision: int
    events: layout.Events
    changes: dict[bytes, Change]


class Feed:
    __slots__ = ("_fresh", "_records", "_storage")

    def __init__(self, storage: Storage, records: Records) -> None:
        self._storage = storage
        self._records = records
        self._fresh: deque[_Batch] = deque(maxlen=_FRESH_BATCHES)

    def committed(self, overlay: Overlay) -> None:
        """A batch was applied."""
        events = overlay.events
        if events:
            first, last = events[1], events[-2]
            assert isinstance(first, int)
            assert isinstance(last, int)
            self._fresh.append(_Batch(first, last, events, overlay.changes))

    def fresh(self, first: int) -> list[Changed] | None:
        """Every change from revision `first` on, or None where that is not in memory any more."""
        if not self._fresh or self._fresh[0].first_revision > first:
            return None
        return [changed for batch in self._fresh if batch.last_revision >= first for changed in _changes(batch, first)]

    def read(self, first: int, most: int) -> tuple[list[Changed], int]:
        """About `most` changes from revision `first` on, which is not compacted, and the last revision that they
        complete. Reads the storage: may raise `StorageFailed`."""
        changes: list[Changed] = []
        start = HISTORY + pack_u64(first)
        for batch_key, _ in self._storage.scan(HISTORY, HISTORY + pack_u64(first + 1), reverse=True):
            start = batch_key  # the batch that made `first` may have begun before it
            break
        through = first - 1
        for _, encoded in self._storage.scan(start, family_end(HISTORY)):
            batch = layout.decode_batch_record(encoded)
            check_format(batch.format)
            events = batch.events
            for at in range(0, len(events), 3):
                key, revision, content = events[at : at + 3]
                if revision >= first:  # type: ignore[operator]
                    changes.append(Changed(key, revision, content))  # type: ignore[arg-type]
            through = events[-2]  # type: ignore[assignment]
            if len(changes) >= most:
                break
        assert through >= first, f"no batch in history made revision {first}"
        return changes, through

    def event(self, changed: Changed, prev: bool) -> bytes:
        """The encoded `model.Event`, with the record before it where `prev`. May read the storage."""
        key, revision, content = changed.key, changed.revision, changed.content
        record = before = None
        if content is not False:
            packed = self._records.get_at(key, revision) if content is None else content
            assert isinstance(packed, bytes), f"history knows no record of {key!r} at revision {revision}"
            record = record_of(key, packed)
        if prev:
            packed_before = changed.before if changed.before_known else self._records.get_at(key, revision - 1)
            before = None if packed_before is None else record_of(key, packed_before)
        return codec.encode_event(model.Event(key, revision, record, before))


def _changes(batch: _Batch, first: int) -> list[Changed]:
    """Those of a batch from revision `first` on, with everything known."""
    before: dict[bytes, bytes | None] = {}
    changes: list[Changed] = []
    events = batch.events
    for at in range(0, len(events), 3):
        key, revision, content = events[at : at + 3]
        assert isinstance(key, bytes)
        assert isinstance(revision, int)
        change = batch.changes[key]
        packed = change.record if content is None else content
        if revision >= first:
            changes.append(Changed(key, revision, packed, before.get(key, change.before), True))  # type: ignore[arg-type]
        before[key] = packed if isinstance(packed, bytes) else None
    return changes
