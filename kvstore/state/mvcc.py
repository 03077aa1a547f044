"""Records and their history: what holds now, what held at an older revision, and how the past is forgotten.

Two classes. `Records` is the committed state in the storage, with a cache of hot records in front of it. `Overlay` is
one batch at work on top of it: requests read and write there, one after another, and `Records.commit` turns it into
storage operations at the end. `layout.py` says how it all lies in the storage, and why.

Rules:
- A packed record never changes; a write makes a new one. So the cache, the overlay and the storage share them freely.
- `Records` changes only in `committed`, after the storage has taken the batch: a failed write leaves reads as they
  were.
- What is forgotten, and when, is decided by revisions alone. Epochs are bookkeeping: they decide what a replica
  physically keeps, never what it answers.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable
from heapq import merge
from operator import itemgetter

from msgspec import Struct

from kvstore import versions
from kvstore.state import layout
from kvstore.state.layout import (
    AFTER_TERMINATOR,
    CURRENT,
    ENDED_BYTES,
    FORMAT,
    HISTORY,
    MOD_REVISION,
    REPLACED,
    REPLACED_PREFIX_BYTES,
    REPLACED_SUFFIX_BYTES,
    TERMINATOR,
    WHOLE_RECORD,
    WITHIN_BATCH,
    BatchRecord,
    Epoch,
    Position,
    check_format,
    escape,
    family_end,
    mod_revision_of,
    pack_ended,
    pack_u64,
    replaced_prefix,
    unescape,
    unpack_ended,
)
from kvstore.state.leases import LeaseChanges, Leases
from kvstore.state.storage import Batch, Storage
from kvstore.state.walk import EachByItself, Pairs, Walk

# Hot records are kept in two generations of this size each; a generation that is full becomes the older one.
CACHE_GENERATION_BYTES = 32 * 1024 * 1024
# What a cached record costs beside its key and value: two bytes objects and a slot in a dict.
_CACHE_ENTRY_BYTES = 160
# Keys that the storage is asked for at once. RocksDB works on 32 at a time, and all records come together: at their
# largest, some 50 MiB.
_PREFETCHED_TOGETHER = 32
# So much, and one time together more, is read ahead at most: it stays in the cache until it is asked for.
_PREFETCHED_BYTES_MAX = CACHE_GENERATION_BYTES
# Batches of history that reads looked into, decoded. One read at a revision looks into one batch, often again.
_BATCHES_CACHED = 4


class Retention(Struct, frozen=True):
    """How much history automatic compaction keeps: all that ended within `age_ms` of log time, as long as it is no
    more than `batches` log entries and `size_bytes` together. An hour is enough for any watcher to come back; the other
    two bound what a busy hour may cost. Each replica keeps its own, and the leader's is what compacts."""

    age_ms: int = 60 * 60 * 1000
    batches: int = 1_000_000
    size_bytes: int = 1024 * 1024 * 1024


# An epoch is a sixteenth of any of these, so that at most that much too much is kept, and a read at an old revision
# looks into a few dozen epochs at most.
_EPOCHS_KEPT = 16
# Entries of one key that a range read walks before it seeks instead. A seek costs about as much as eight steps.
_WALK_MAX = 8

_key_of = itemgetter(0)


class Change(Struct, gc=False):
    """What the batch at work did to one key: its record now (None: deleted) and before the batch, the first and the
    last revision at which it wrote it, and where the last event's content stands in the batch's events."""

    record: bytes | None
    before: bytes | None
    first_revision: int
    revision: int
    slot: int


class Records:
    __slots__ = (
        "_absent",
        "_batches",
        "_cold",
        "_first_revisions",
        "_get",
        "_get_many",
        "_hot",
        "_hot_bytes",
        "_retention",
        "_storage",
        "compacted_revision",
        "epochs",
        "records_bytes",
        "revision",
    )

    def __init__(self, storage: Storage, position: Position, epochs: list[Epoch], retention: Retention) -> None:
        """`epochs`: oldest first, the current one last."""
        self._storage = storage
        self._get = storage.get
        self._get_many = storage.get_many
        self._retention = retention
        self.revision = position.revision
        self.compacted_revision = position.compacted_revision
        self.epochs = epochs
        self._first_revisions = [epoch.first_revision for epoch in epochs]
        self._hot: dict[bytes, bytes] = {}
        self._cold: dict[bytes, bytes] = {}
        self._hot_bytes = 0
        self._absent: set[bytes] = set()  # keys that were prefetched and are not there; as of the last batch
        self._batches: dict[bytes, BatchRecord] = {}
        self.records_bytes = position.records_bytes
        if self.records_bytes < 0:
            self.records_bytes = sum(len(key) + len(packed) for key, packed in self.scan(b"", b""))

    @property
    def history_bytes(self) -> int:
        """What all that is kept of the past has together."""
        return sum(epoch.size_bytes for epoch in self.epochs)

    # --- reading what holds now -------------------------------------------------------------------------------------

    def get(self, key: bytes) -> bytes | None:
        """The packed record of `key`. A dict lookup when it is hot; else about 2 to 5 us."""
        packed = self._hot.get(key)
        if packed is not None:
            return packed
        packed = self._cold.get(key)
        if packed is None:
            if key in self._absent:
                return None
            packed = self._get(CURRENT + key)
            if packed is None:
                return None
            if packed[0] != FORMAT:
                check_format(packed[0])
        self._hot[key] = packed
        self._hot_bytes += len(key) + len(packed) + _CACHE_ENTRY_BYTES
        if self._hot_bytes > CACHE_GENERATION_BYTES:
            self._next_generation()
        return packed

    def prefetch(self, keys: Iterable[bytes]) -> None:
        """Have at hand what `get` is about to be asked for: many keys together cost about half of what each by itself
        does. Changes no answer. Raises `StorageFailed`."""
        hot, cold = self._hot, self._cold
        wanted = {key for key in keys if key not in hot and key not in cold}
        self._absent.clear()
        if len(wanted) < 2:
            return
        ordered = sorted(wanted)
        size_bytes = 0
        for at in range(0, len(ordered), _PREFETCHED_TOGETHER):
            if size_bytes > _PREFETCHED_BYTES_MAX:
                return
            together = ordered[at : at + _PREFETCHED_TOGETHER]
            for key, packed in zip(together, self._get_many([CURRENT + key for key in together]), strict=True):
                if packed is None:
                    self._absent.add(key)
                elif packed[0] == FORMAT:  # anything else is for `get` to judge
                    hot[key] = packed
                    size_bytes += len(key) + len(packed) + _CACHE_ENTRY_BYTES
        self._hot_bytes += size_bytes
        if self._hot_bytes > CACHE_GENERATION_BYTES:
            self._next_generation()

    def scan(self, start: bytes, end: bytes, reverse: bool = False) -> Pairs:
        """(key, packed record) in `[start, end)`; `end` b"" is no bound."""
        upper = CURRENT + end if end else family_end(CURRENT)
        for key, packed in self._storage.scan(CURRENT + start, upper, reverse):
            if packed[0] != FORMAT:
                check_format(packed[0])
            yield key[1:], packed

    def _next_generation(self) -> None:
        self._cold, self._hot, self._hot_bytes = self._hot, {}, 0

    # --- reading what held at an older revision ---------------------------------------------------------------------

    def get_at(self, key: bytes, revision: int) -> bytes | None:
        """The packed record of `key` as it was at `revision`, which is not compacted and not in the future."""
        packed = self.get(key)
        if packed is not None and mod_revision_of(packed) <= revision:
            return packed
        for epoch in self._epochs_ending_after(revision):
            packed = self._replaced_in(epoch, key, revision)
            if packed is not None:
                return packed
        return None

    def scan_at(self, start: bytes, end: bytes, revision: int, reverse: bool = False) -> Pairs:
        """As `scan`, at an older revision. Costs a walk over the range as it is now, and over the keys of the range
        that changed since."""
        streams: list[Iterable[tuple[bytes, bytes]]] = [
            (pair for pair in self.scan(start, end, reverse) if mod_revision_of(pair[1]) <= revision)
        ]
        for epoch in self._epochs_ending_after(revision):
            streams.append(self._replaced_scan(epoch, start, end, revision, reverse))
        # No key stands in two streams: only one of its records held at that revision.
        return merge(*streams, key=_key_of, reverse=reverse)

    def _epochs_ending_after(self, revision: int) -> list[Epoch]:
        """The epochs that may hold a record which ended after `revision`."""
        return self.epochs[max(0, bisect_right(self._first_revisions, revision + 1) - 1) :]

    def _replaced_in(self, epoch: Epoch, key: bytes, revision: int) -> bytes | None:
        prefix = replaced_prefix(epoch.id) + escape(key) + TERMINATOR
        for _, entry in self._storage.scan(prefix, prefix + pack_u64(revision + 1), reverse=True):
            return self._held(key, entry, revision)
        return None

    def _held(self, key: bytes, entry: bytes, revision: int) -> bytes | None:
        """What an `i` entry, begun at or before `revision`, says of it."""
        entry_format, kind, ended = unpack_ended(entry)
        check_format(entry_format)
        if ended <= revision:
            return None
        return entry[ENDED_BYTES:] if kind == WHOLE_RECORD else self._within_batch(key, revision)

    def _replaced_scan(self, epoch: Epoch, start: bytes, end: bytes, revision: int, reverse: bool) -> Pairs:
        prefix = replaced_prefix(epoch.id)
        low = prefix + escape(start)
        high = prefix + escape(end) if end else replaced_prefix(epoch.id + 1)
        while True:
            name, walked, held = b"", 0, False
            for entry_key, entry in self._storage.scan(low, high, reverse):
                entry_name = entry_key[REPLACED_PREFIX_BYTES:-REPLACED_SUFFIX_BYTES]
                if entry_name != name:
                    name, walked, held = entry_name, 0, False
                walked += 1
                if walked > _WALK_MAX:
                    break
                if not held and int.from_bytes(entry_key[-8:], "big") <= revision:
                    key = unescape(name)
                    packed = self._held(key, entry, revision)
                    if packed is not None:
                        held = True
                        yield key, packed
            else:
                return
            # A key with many entries: seek the one that matters, and go on behind the key.
            if not held:
                key = unescape(name)
                packed = self._replaced_in(epoch, key, revision)
                if packed is not None:
                    yield key, packed
            if reverse:
                high = prefix + name + TERMINATOR
            else:
                low = prefix + name + AFTER_TERMINATOR

    def _within_batch(self, key: bytes, revision: int) -> bytes | None:
        events = self._batch_at(revision).events
        found: bytes | None = None
        for at in range(0, len(events), 3):
            if events[at] == key:
                if events[at + 1] > revision:  # type: ignore[operator]
                    break
                content = events[at + 2]
                assert content is not None, "an event that a later one of its batch replaced has lost its record"
                found = content if isinstance(content, bytes) else None
        return found

    def _batch_at(self, revision: int) -> BatchRecord:
        """The batch that made `revision`."""
        for batch_key, encoded in self._storage.scan(HISTORY, HISTORY + pack_u64(revision + 1), reverse=True):
            batch = self._batches.get(batch_key)
            if batch is None:
                if len(self._batches) >= _BATCHES_CACHED:
                    self._batches.clear()
                batch = layout.decode_batch_record(encoded)
                check_format(batch.format)
                self._batches[batch_key] = batch
            return batch
        raise AssertionError(f"no batch in history made revision {revision}")

    # --- writing ----------------------------------------------------------------------------------------------------

    def prepare(self, overlay: Overlay, batch: Batch, log_time_ms: int) -> tuple[list[Epoch], int]:
        """Put what the overlay changed into the storage batch. Returns the epochs and the `records_bytes` as they will
        be: hand them to `committed` once the batch is written. Changes nothing here."""
        epochs, records_bytes = self.epochs, self.records_bytes
        first_revision = self.revision + 1
        if overlay.compacted_revision > self.compacted_revision:
            epochs = self._forget(overlay, batch, log_time_ms)
        events = overlay.events
        if not events:
            return epochs, records_bytes
        epoch, retention = epochs[-1], self._retention
        if (
            epoch.batches >= retention.batches // _EPOCHS_KEPT
            or epoch.size_bytes >= retention.size_bytes // _EPOCHS_KEPT
            or (log_time_ms - epoch.started_ms >= retention.age_ms // _EPOCHS_KEPT and epoch.batches)
        ):
            epochs = [*epochs, Epoch(epoch.id + 1, first_revision, log_time_ms)]
            epoch = epochs[-1]
        # One that was made by a compaction may have waited long for its first batch.
        started_ms = epoch.started_ms if epoch.batches else log_time_ms

        put = batch.put
        replaced = replaced_prefix(epoch.id)
        size_bytes = 0
        for key, change in overlay.changes.items():
            record, before, first = change.record, change.before, change.first_revision
            if record is not None:
                put(CURRENT + key, record)
                records_bytes += len(key) + len(record)
            elif before is not None:
                batch.delete(CURRENT + key)
            if before is not None:
                records_bytes -= len(key) + len(before)
                entry = replaced + escape(key) + TERMINATOR + before[MOD_REVISION]
                put(entry, pack_ended(FORMAT, WHOLE_RECORD, first) + before)
                size_bytes += len(entry) + len(before)
            if first != change.revision:
                entry = replaced + escape(key) + TERMINATOR + pack_u64(first)
                put(entry, pack_ended(FORMAT, WITHIN_BATCH, change.revision))
        encoded = layout.encode((FORMAT, log_time_ms, events))
        put(HISTORY + pack_u64(first_revision), encoded)
        grown = Epoch(
            epoch.id,
            epoch.first_revision,
            started_ms,
            epoch.batches + 1,
            epoch.size_bytes + size_bytes + len(encoded),
        )
        return [*epochs[:-1], grown], records_bytes

    def _forget(self, overlay: Overlay, batch: Batch, log_time_ms: int) -> list[Epoch]:
        """Range deletes for what no allowed read needs any more, before the batch's own writes. At most two."""
        compacted, first_revision = overlay.compacted_revision, self.revision + 1
        epochs = list(self.epochs)
        if epochs[-1].batches:
            epochs.append(Epoch(epochs[-1].id + 1, first_revision, log_time_ms))
        # A closed epoch holds only what ended before the next one's first revision.
        while len(epochs) > 1 and epochs[1].first_revision - 1 <= compacted:
            del epochs[0]
        batch.delete_range(REPLACED, replaced_prefix(epochs[0].id))
        # The batch that made the compacted revision stays: a read at that revision may have to look into it.
        if compacted >= first_revision:
            batch.delete_range(HISTORY, HISTORY + pack_u64(first_revision))
        else:
            for batch_key, _ in self._storage.scan(HISTORY, HISTORY + pack_u64(compacted + 1), reverse=True):
                batch.delete_range(HISTORY, batch_key)
                break
        return epochs

    def committed(self, overlay: Overlay, epochs: list[Epoch], records_bytes: int) -> None:
        """The storage has taken what `prepare` put into its batch."""
        self._absent.clear()
        self.records_bytes = records_bytes
        if epochs is not self.epochs:
            self.epochs = epochs
            self._first_revisions = [epoch.first_revision for epoch in epochs]
        if overlay.compacted_revision > self.compacted_revision:
            self._batches.clear()
        self.revision = overlay.revision
        self.compacted_revision = overlay.compacted_revision
        hot, cold = self._hot, self._cold
        size_bytes = self._hot_bytes
        for key, change in overlay.changes.items():
            record = change.record
            held = hot.get(key)
            if record is not None:
                hot[key] = record
                if held is None:
                    size_bytes += len(key) + len(record) + _CACHE_ENTRY_BYTES
                else:
                    size_bytes += len(record) - len(held)
            else:
                if held is not None:
                    del hot[key]
                    size_bytes -= len(key) + len(held) + _CACHE_ENTRY_BYTES
                cold.pop(key, None)
        self._hot_bytes = size_bytes
        if size_bytes > CACHE_GENERATION_BYTES:
            self._next_generation()

    def compaction_due(self, log_time_ms: int) -> int | None:
        """The revision that automatic compaction should name at `log_time_ms`, if any."""
        batches = size_bytes = 0
        retention = self._retention
        current = self.epochs[-1]
        # It took its last batch within a sixteenth of the age: where nobody writes any more, it goes as well.
        if current.batches and current.started_ms + retention.age_ms // _EPOCHS_KEPT + retention.age_ms < log_time_ms:
            return self.revision if self.revision > self.compacted_revision else None
        keep = len(self.epochs) - 1
        for at in range(len(self.epochs) - 1, -1, -1):
            epoch = self.epochs[at]
            ended_ms = self.epochs[at + 1].started_ms if at + 1 < len(self.epochs) else log_time_ms
            batches += epoch.batches
            size_bytes += epoch.size_bytes
            if (
                batches > retention.batches
                or size_bytes > retention.size_bytes
                or ended_ms + retention.age_ms < log_time_ms
            ):
                break
            keep = at
        revision = self.epochs[keep].first_revision - 1
        return revision if revision > self.compacted_revision else None


class Overlay:
    """One batch at work. `revision` and `compacted_revision` run ahead of what is committed. `rules` is the version of
    its entry: requests are judged by what held then. Reads between entries are judged by the newest rules."""

    __slots__ = (
        "_base",
        "_base_revision",
        "_sorted",
        "changes",
        "compacted_revision",
        "events",
        "leases",
        "revision",
        "rules",
        "version",
        "walk",
    )

    def __init__(self, base: Records, leases: Leases, version: int, rules: int | None = None) -> None:
        self._base = base
        self.leases = LeaseChanges(leases)
        self._base_revision = base.revision
        self.revision = base.revision
        self.version = version
        self.rules = versions.VERSION if rules is None else rules
        self.walk = (Walk if self.rules >= versions.WITH_BUDGETS else EachByItself)(is_entry=rules is not None)
        self.compacted_revision = base.compacted_revision
        self.changes: dict[bytes, Change] = {}
        self.events: layout.Events = []
        self._sorted: list[bytes] | None = None  # the changed keys in order, from the first scan on

    def get(self, key: bytes) -> bytes | None:
        change = self.changes.get(key)
        return self._base.get(key) if change is None else change.record

    def write(self, key: bytes, record: bytes | None, before: bytes | None, revision: int) -> None:
        """Set (or, with None, delete) a key. `before` is what `get` says of it now."""
        if self.leases.count:  # where there are none, no record is under one
            self.leases.written(key, record, before)
        events = self.events
        change = self.changes.get(key)
        if change is None:
            self.changes[key] = Change(record, before, revision, revision, len(events) + 2)
            if self._sorted is not None:
                insort(self._sorted, key)
        else:
            if change.record is not None:
                events[change.slot] = change.record
            change.record = record
            change.revision = revision
            change.slot = len(events) + 2
        events += (key, revision, None if record is not None else False)

    def scan(
        self, start: bytes, end: bytes, reverse: bool = False, pending: dict[bytes, bytes | None] | None = None
    ) -> Pairs:
        """(key, packed record) in `[start, end)`, with `pending` writes, which lie above the overlay's own. Raises
        `Refused(range_too_large)` if too much is hidden by what was written."""
        changed: dict[bytes, bytes | None] = {}
        if self.changes:
            if self._sorted is None:
                self._sorted = sorted(self.changes)
            low = bisect_left(self._sorted, start)
            high = bisect_left(self._sorted, end) if end else len(self._sorted)
            for key in self._sorted[low:high]:
                changed[key] = self.changes[key].record
        if pending:
            self.walk.take_written(len(pending))
            for key, record in pending.items():
                if start <= key and (not end or key < end):
                    changed[key] = record
        base = self._base.scan(start, end, reverse)
        if not changed:
            return base
        self.walk.take_written(len(changed))
        return _patched(base, changed, reverse, self.walk)

    def get_at(self, key: bytes, revision: int) -> bytes | None:
        if revision <= self._base_revision:
            return self._base.get_at(key, revision)
        changed = self._changed_by(revision)
        return changed[key] if key in changed else self._base.get(key)

    def scan_at(self, start: bytes, end: bytes, revision: int, reverse: bool = False) -> Pairs:
        if revision <= self._base_revision:
            return self._base.scan_at(start, end, revision, reverse)
        changed = {
            key: record for key, record in self._changed_by(revision).items() if start <= key and (not end or key < end)
        }
        return _patched(self._base.scan(start, end, reverse), changed, reverse, self.walk)

    def _changed_by(self, revision: int) -> dict[bytes, bytes | None]:
        """What this batch had made of each key when it was at `revision`."""
        changed: dict[bytes, bytes | None] = {}
        events = self.events
        for at in range(0, len(events), 3):
            if events[at + 1] > revision:  # type: ignore[operator]
                break
            key, content = events[at], events[at + 2]
            assert isinstance(key, bytes)
            if content is None:
                changed[key] = self.changes[key].record
            else:
                changed[key] = content if isinstance(content, bytes) else None
        return changed


def _patched(base: Pairs, changed: dict[bytes, bytes | None], reverse: bool, walk: Walk) -> Pairs:
    """`base` with `changed` laid over it, both in the same order of keys. What a deletion hides is counted here; the
    rest, where it is used."""
    keys = sorted(changed, reverse=reverse)
    at, count = 0, len(keys)
    for key, packed in base:
        while at < count and (keys[at] > key if reverse else keys[at] < key):
            record = changed[keys[at]]
            if record is not None:
                yield keys[at], record
            at += 1
        if at < count and keys[at] == key:
            record = changed[key]
            if record is not None:
                yield key, record
            else:
                walk.take(1, len(key) + len(packed))
            at += 1
        else:
            yield key, packed
    for key in keys[at:]:
        record = changed[key]
        if record is not None:
            yield key, record
