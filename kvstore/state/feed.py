"""What changed, in order of revisions: what watches are fed from.

New batches are served from memory (`Feed.fresh`), older ones from the history in the storage (`Feed.read`). Both give
the same changes; only the storage's leave it open what the record was, because most watches do not ask:
`Feed.event` looks it up.

One revision may have tens of thousands of changes. Where it has more than a reader wants at once, memory only names its
keys, and history is read in parts: a `Place` says where the next one begins.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterator, Sequence

from msgspec import Struct

from kvstore import codec, model
from kvstore.state import layout
from kvstore.state.layout import HISTORY, check_format, family_end, pack_u64, record_of
from kvstore.state.mvcc import Change, Overlay, Records
from kvstore.state.storage import Storage

# Batches that stay in memory after they were applied: a turn of the node applies a few at a time. Each holds the
# records of one log entry and those that they replaced, which the cache of hot records mostly holds as well; but what
# large ranges replaced, when they were deleted, lies only here.
_FRESH_BATCHES = 8
_FRESH_BYTES = 48 * 1024 * 1024
# A batch with more changes is kept decoded while readers are within it: else each slice would cost a decoding of all of
# it (5 ms for 50,000 changes). Beyond so many bytes together, as stored, the one that was begun first goes; decoded,
# short keys take four times as much.
_LARGE_BATCH_CHANGES = 256
_HALF_READ_BYTES = 16 * 1024 * 1024

_AT_BITS = 32
Place = int
"""A revision, and how many of that revision's changes lie behind, with all of those before it. As one number, places
compare as they follow each other, and the collector of garbage has nothing to do with the thousands in a batch."""

_NO_EARLIER: dict[int, int] = {}


def place_of(revision: int, at: int = 0) -> Place:
    return revision << _AT_BITS | at


def revision_of(place: Place) -> int:
    return place >> _AT_BITS


class Changed(Struct, gc=False):
    """What one transaction did to one key, and the places before and behind it. `content` is the packed record, False
    for a deletion, None for a put whose record has to be looked up; `before` is the record that it replaced, where
    `before_known`."""

    key: bytes
    revision: int
    place: Place
    after: Place
    content: bytes | bool | None
    before: bytes | None = None
    before_known: bool = False

    @property
    def deleted(self) -> bool:
        return self.content is False


class LargeRevision(Struct):
    """What stands for the changes of a revision that has very many: it changed these keys. Read it from history."""

    revision: int
    keys: list[bytes]


class _Batch(Struct):
    first_revision: int
    last_revision: int
    events: layout.Events
    changes: dict[bytes, Change]
    replaced_bytes: int


class _LargeBatch:
    """A stored batch for those who read it in parts. Making it costs a walk over all its events."""

    __slots__ = ("earlier", "events", "first_revision", "last_revision", "revisions", "size_bytes")

    def __init__(self, events: layout.Events, size_bytes: int) -> None:
        self.events = events
        self.size_bytes = size_bytes
        self.revisions: list[int] = events[1::3]  # type: ignore[assignment]
        self.first_revision, self.last_revision = self.revisions[0], self.revisions[-1]
        # Of each event whose key the batch had changed before: that earlier one. Else each would have to look for it.
        self.earlier: dict[int, int] = {}
        keys = events[::3]
        if len(set(keys)) < len(keys):
            newest: dict[object, int] = {}
            for slot in range(0, len(events), 3):
                key = events[slot]
                if key in newest:
                    self.earlier[slot] = newest[key]
                newest[key] = slot


class Feed:
    __slots__ = ("_fresh", "_fresh_bytes", "_half_read", "_records", "_storage")

    def __init__(self, storage: Storage, records: Records) -> None:
        self._storage = storage
        self._records = records
        self._fresh: deque[_Batch] = deque()
        self._fresh_bytes = 0
        self._half_read: dict[int, _LargeBatch] = {}  # by first revision

    def committed(self, overlay: Overlay, replaced_bytes: int) -> None:
        """A batch was applied. `replaced_bytes`: about what it replaced."""
        events = overlay.events
        if events:
            first, last = events[1], events[-2]
            assert isinstance(first, int)
            assert isinstance(last, int)
            fresh = self._fresh
            fresh.append(_Batch(first, last, events, overlay.changes, replaced_bytes))
            self._fresh_bytes += replaced_bytes
            while len(fresh) > _FRESH_BATCHES or (self._fresh_bytes > _FRESH_BYTES and len(fresh) > 1):
                self._fresh_bytes -= fresh.popleft().replaced_bytes

    def fresh(self, first: int, most: int) -> list[Changed | LargeRevision] | None:
        """Every change from revision `first` on, or None where that is not in memory any more. A revision with more
        than `most` changes comes as one `LargeRevision`."""
        if not self._fresh or self._fresh[0].first_revision > first:
            return None
        return [part for batch in self._fresh if batch.last_revision >= first for part in _parts(batch, first, most)]

    def read(self, place: Place) -> Iterator[Changed]:
        """Every change from `place` on, whose revision is not compacted. Reads the storage: each step may raise
        `StorageFailed`, and the iterator must be let go of before the storage is closed."""
        first = revision_of(place)
        start = HISTORY + pack_u64(first)
        half_read = self._half_read_with(first)
        if half_read is not None:
            yield from self._through(half_read, place)
            start = HISTORY + pack_u64(half_read.last_revision + 1)
        else:
            for batch_key, _ in self._storage.scan(HISTORY, HISTORY + pack_u64(first + 1), reverse=True):
                start = batch_key  # the batch that made `first` may have begun before it
                break
        for _, encoded in self._storage.scan(start, family_end(HISTORY)):
            batch = layout.decode_batch_record(encoded)
            check_format(batch.format)
            events = batch.events
            if len(events) > 3 * _LARGE_BATCH_CHANGES:
                yield from self._through(_LargeBatch(events, len(encoded)), place)
            else:
                yield from _stored_changes(events, events[1::3], _NO_EARLIER, place)  # type: ignore[arg-type]

    def _through(self, batch: _LargeBatch, place: Place) -> Iterator[Changed]:
        """Its changes from `place` on. It is kept until somebody has read it to its end."""
        half_read, name = self._half_read, batch.first_revision
        if name not in half_read:
            half_read[name] = batch
            while len(half_read) > 1 and sum(held.size_bytes for held in half_read.values()) > _HALF_READ_BYTES:
                del half_read[next(iter(half_read))]
        yield from _stored_changes(batch.events, batch.revisions, batch.earlier, place)
        half_read.pop(name, None)

    def _half_read_with(self, revision: int) -> _LargeBatch | None:
        for batch in self._half_read.values():
            if batch.first_revision <= revision <= batch.last_revision:
                return batch
        return None

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


def _stored_changes(
    events: layout.Events, revisions: list[int], earlier: dict[int, int], place: Place
) -> Iterator[Changed]:
    """Those of a batch from `place` on, which lies before it or within. Found in O(log n)."""
    end, begin = len(events), revisions[0] << _AT_BITS
    slot = 0
    if place > begin:
        first = revision_of(place)
        slot = 3 * (bisect_left(revisions, first) + place - place_of(first))
    else:
        place = begin
    for at in range(slot, end, 3):
        key, revision, content = events[at : at + 3]
        is_last = at + 3 == end or events[at + 4] != revision
        after = (revision + 1) << _AT_BITS if is_last else place + 1  # type: ignore[operator]
        if at in earlier:
            replaced = events[earlier[at] + 2] or None
            yield Changed(key, revision, place, after, content, replaced, True)  # type: ignore[arg-type]
        else:
            yield Changed(key, revision, place, after, content)  # type: ignore[arg-type]
        place = after


def _parts(batch: _Batch, first: int, most: int) -> Sequence[Changed | LargeRevision]:
    """Those of a batch from revision `first` on, as `Feed.fresh` has them."""
    events = batch.events
    count = len(events) // 3
    before: dict[bytes, bytes | None] = {}
    if count - (batch.last_revision - batch.first_revision) <= most:
        return _changes(batch, first, before, 0, count)
    revisions: list[int] = events[1::3]  # type: ignore[assignment]
    parts: list[Changed | LargeRevision] = []
    done = begin = 0
    while begin < count:
        revision = revisions[begin]
        end = bisect_right(revisions, revision, begin)
        if end - begin > most:
            parts += _changes(batch, first, before, done, begin)
            keys: list[bytes] = events[3 * begin : 3 * end : 3]  # type: ignore[assignment]
            if revision >= first:
                parts.append(LargeRevision(revision, keys))
            if end < count:
                contents = events[3 * begin + 2 : 3 * end : 3]
                before.update({key: content or None for key, content in zip(keys, contents, strict=True)})  # type: ignore[misc]
            done = end
        begin = end
    parts += _changes(batch, first, before, done, count)
    return parts


def _changes(batch: _Batch, first: int, before: dict[bytes, bytes | None], begin: int, end: int) -> list[Changed]:
    """Those from `begin` to `end` that are of revision `first` or later, with everything known. `before` is what the
    batch had made of its keys by then, and afterwards what it has made of them."""
    changes: list[Changed] = []
    events = batch.events
    place = current = 0
    for slot in range(3 * begin, 3 * end, 3):
        key, revision, content = events[slot : slot + 3]
        assert isinstance(key, bytes)
        assert isinstance(revision, int)
        change = batch.changes[key]
        packed = change.record if content is None else content
        if revision >= first:
            if revision != current:
                current, place = revision, revision << _AT_BITS
            is_last = slot + 3 == 3 * end or events[slot + 4] != revision
            after = (revision + 1) << _AT_BITS if is_last else place + 1
            changes.append(Changed(key, revision, place, after, packed, before.get(key, change.before), True))  # type: ignore[arg-type]
            place = after
        before[key] = packed if isinstance(packed, bytes) else None
    return changes
