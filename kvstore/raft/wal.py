"""The write-ahead log: Raft's entries, term and vote, durable before anything is promised.

The tail of the log is in memory (`entries`), because the engine reads it all the time; the disk is read only on
opening. How it looks there, and how a torn tail is told from damage, is in `wal_format.py`.

Rules it keeps:

- **Append, then sync.** Every change goes to a buffer and counts in `position` at once. A sync writes the buffer in
  one write and makes one `fdatasync`. What lies below `synced_position` survives power loss.
- **A sync that failed is never repeated.** The kernel may drop what it could not write and report success the next
  time (the "fsyncgate" of PostgreSQL, 2018). The first failure of any file operation stands in `failed`, and every
  later sync raises it. Only opening the log anew, which reads and rewrites what may not be on the disk, gets out.
- **One sync at a time, one batch in one segment.** So a batch is written only when all before it is synced.
- **No half-made segment.** A new one is written under a temporary name together with the batch that did not fit into
  the last, synced, renamed, and its directory synced. The same sync pays for both.
- **What is dropped stays droppable.** A segment is removed only after a record that says so is durable; a missing one
  that should be there is damage.

The layout reserves space by `allocate`, so that appending does not run out of disk in the middle of a segment, and
writes zeroes ahead of the records now and then: overwriting is synced without the file system's own journal.

It runs on the loop, but for removals and the function that `start_sync` returns, which may run in a thread. Entries are
not judged: whoever appends and truncates knows Raft's rules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from kvstore.env import File, Files
from kvstore.errors import StartupError
from kvstore.raft.wal_format import (
    FORMAT_VERSION,
    RECORD_HEADER_BYTES,
    RESET_PAYLOAD,
    Damaged,
    NewerFormat,
    Record,
    RecordKind,
    SegmentHeader,
    Tail,
    decode_segment_header,
    encode_record_header,
    encode_segment_header,
    read_records,
    seed_of,
)

SEGMENT_BYTES = 64 * 1024 * 1024
_SUFFIX = ".wal"
_TEMPORARY = "next.tmp"
# Zeroes are written up to the next multiple of this. Large enough that at 10 KiB a sync only one in 25 makes the file
# system write its own journal too; small enough to add little to that one.
_ZERO_AHEAD_BYTES = 256 * 1024
_ZEROES = bytes(_ZERO_AHEAD_BYTES)
_ADVICE = (
    "This had been synced, so the log may lack acknowledged writes and is not opened. Remove this member from the "
    "cluster (kvstore member remove), empty its data directory and join it again (kvstore join); a cluster of one is "
    "restored from a backup."
)


class _Segment(NamedTuple):
    start_position: int
    path: str


class _Batch:
    """A sync that is under way: what its thread works with. The loop touches none of it until the thread is done."""

    __slots__ = (
        "buffers",
        "end_offset",
        "end_position",
        "file",
        "header",
        "obsolete",
        "offset",
        "segment",
        "zeroed_until",
    )

    def __init__(self, buffers: list[bytes], end_position: int, obsolete: list[str]) -> None:
        self.buffers = buffers
        self.end_position = end_position
        self.obsolete = obsolete  # paths to remove once the batch is durable
        self.header: SegmentHeader | None = None  # if the batch begins a new segment
        self.segment: _Segment | None = None  # that one
        self.file: File | None = None  # where the batch goes; a new segment's is opened by the thread
        self.offset = self.end_offset = self.zeroed_until = 0


class Wal:
    """See the module's docstring. Made by `open`."""

    def __init__(self, files: Files, directory: str, node_id: str, segment_bytes: int) -> None:
        self._files = files
        self._directory = directory
        self._segment_bytes = segment_bytes
        self._seed = seed_of(node_id)
        self.node_id = node_id
        self.term = 0
        self.voted_for: str | None = None
        self.entries: list[tuple[bytes, int, int]] = []  # (payload, index, term), contiguous; always this same list
        self._positions: list[int] = []  # of each entry's record
        self.size_bytes = 0
        self.position = 0
        self.term_position = 0  # behind the last record of a term or a vote
        self.synced_position = 0
        self.durable_index = 0
        self.failed: OSError | None = None
        self._buffer: list[bytes] = []
        self._batch_start = 0  # position where the buffer begins
        self._batch: _Batch | None = None
        self._covered_index = 0  # what `durable_index` becomes when the batch under way is synced
        # Term, vote, last index and its term, as they were when the buffer began.
        self._before: tuple[int, str | None, int, int] = (0, None, 0, 0)
        self._segments: list[_Segment] = []  # oldest first; the last one is written to
        self._in_thread: Callable[[Callable[[], None]], None] = lambda work: work()
        self._obsolete: list[str] = []  # removed once a KEEP record that is in the buffer is durable
        self._file: File | None = None  # None once closed
        self._end_offset = 0
        self._body_start = 0  # offset of the first record in the last segment
        self._zeroed_until = 0

    # --- what it holds ------------------------------------------------------------------------------------------------

    @property
    def first_index(self) -> int:
        """0 when there are no entries."""
        return self.entries[0][1] if self.entries else 0

    @property
    def last_index(self) -> int:
        return self.entries[-1][1] if self.entries else 0

    @property
    def last_term(self) -> int:
        return self.entries[-1][2] if self.entries else 0

    def term_at(self, index: int) -> int | None:
        """The term of an entry; None where there is none in memory."""
        if not self.entries or not 0 <= (offset := index - self.entries[0][1]) < len(self.entries):
            return None
        return self.entries[offset][2]

    # --- changes: in memory at once, durable after a sync -------------------------------------------------------------

    def append(self, payload: bytes, index: int, term: int) -> None:
        """Add the entry after the last one; any index may start an empty log."""
        entries = self.entries
        assert index == entries[-1][1] + 1 if entries else index > 0, (index, self.last_index)
        self._positions.append(self.position)
        entries.append((payload, index, term))
        self.size_bytes += len(payload)
        self._write(RecordKind.ENTRY, index, term, payload)

    def truncate_from(self, index: int) -> None:
        """Remove the entry at `index` and everything after it; nothing happens if there is none."""
        if not self.entries or index > self.last_index:
            return
        keep = max(index - self.first_index, 0)
        self._truncate(keep)
        # Segments may still hold entries that were dropped from memory: an empty log must be empty after opening too.
        self._write(RecordKind.TRUNCATE, index if keep else 0, 0, b"")

    def set_term(self, term: int, voted_for: str | None) -> None:
        if (term, voted_for) == (self.term, self.voted_for):
            return
        self.term, self.voted_for = term, voted_for
        self._write(RecordKind.TERM, int(voted_for is not None), term, (voted_for or "").encode())
        self.term_position = self.position

    def reset(self, index: int, term: int) -> None:
        """The log becomes the single entry (b"\\x01", index, term); what precedes it is in the snapshot. A node that
        holds an entry of a term has reached that term: it is recorded, without a vote, where it was not known yet."""
        if term > self.term:
            self.set_term(term, None)
        self._truncate(0)
        self._positions.append(self.position)
        self.entries.append((RESET_PAYLOAD, index, term))
        self.size_bytes = len(RESET_PAYLOAD)
        self._write(RecordKind.RESET, index, term, b"")

    def drop_before(self, index: int, keep_bytes: int) -> None:
        """Forget entries below `index`, from the oldest on, while at least `keep_bytes` of entries remain; the last
        entry always stays. Segments that are no longer needed are removed after the next sync. Costs O(dropped)."""
        entries = self.entries
        if not entries:
            return
        most = min(index, self.last_index) - entries[0][1]
        count, left = 0, self.size_bytes
        while count < most and left - len(entries[count][0]) >= keep_bytes:
            left -= len(entries[count][0])
            count += 1
        del entries[:count], self._positions[:count]
        self.size_bytes = left
        segments, needed = self._segments, self._positions[0]
        obsolete = 0
        while obsolete + 1 < len(segments) and segments[obsolete + 1].start_position <= needed:
            obsolete += 1
        if obsolete:
            self._obsolete += [segment.path for segment in segments[:obsolete]]
            del segments[:obsolete]
            self._write(RecordKind.KEEP, segments[0].start_position, 0, b"")

    def _truncate(self, keep: int) -> None:
        """Leave the oldest `keep` entries in memory."""
        self.size_bytes -= sum(len(entry[0]) for entry in self.entries[keep:])
        del self.entries[keep:], self._positions[keep:]
        last = self.last_index
        self.durable_index = min(self.durable_index, last)
        self._covered_index = min(self._covered_index, last)

    def _write(self, kind: int, index: int, term: int, payload: bytes) -> None:
        """Put a record into the buffer, which the next sync writes."""
        position = self.position
        self.position = position + RECORD_HEADER_BYTES + len(payload)
        if self.failed is not None:
            return  # it will never be written; do not pile it up
        buffer = self._buffer
        buffer.append(encode_record_header(self._seed, kind, position, self._batch_start, index, term, payload))
        if payload:
            buffer.append(payload)

    # --- sync ---------------------------------------------------------------------------------------------------------

    def sync(self) -> None:
        """Make everything so far durable, inline. Raises OSError, and from then on always."""
        work = self.start_sync()
        if work is not None:
            work()
            self.finish_sync()

    def start_sync(self) -> Callable[[], None] | None:
        """Take everything so far as one batch. The function that is returned makes it durable: run it once, in a
        thread if you like, then call `finish_sync` on the loop. It raises OSError if that failed. None if there is
        nothing to do. Not to be called again before `finish_sync`; appends and all other changes may go on."""
        if self.failed is not None:
            raise OSError(self.failed.errno, f"the write-ahead log failed before: {self.failed.strerror}")
        assert self._batch is None, "one sync at a time"
        if not self._buffer:
            return None
        assert self._file is not None, "the log is closed"
        batch = _Batch(self._buffer, self.position, self._obsolete)
        self._buffer, self._obsolete = [], []
        batch_bytes = self.position - self._batch_start
        end_offset = self._end_offset + batch_bytes
        if end_offset > self._segment_bytes and self._end_offset > self._body_start:
            batch.header = self._header(batch_bytes)
            batch.segment = self._segment_at(self._batch_start)
        else:
            batch.file, batch.offset, batch.end_offset = self._file, self._end_offset, end_offset
            batch.zeroed_until = max(self._zeroed_until, self._zeroes_until(end_offset))
            if batch.zeroed_until > max(self._zeroed_until, end_offset):
                batch.buffers.append(_ZEROES[: batch.zeroed_until - end_offset])
        self._batch = batch
        self._batch_start = self.position
        self._covered_index = self.last_index
        self._before = (self.term, self.voted_for, self.last_index, self.last_term)
        return lambda: self._make_durable(batch)

    def finish_sync(self) -> None:
        """To be called on the loop after the function that `start_sync` gave has returned without raising."""
        batch, self._batch = self._batch, None
        assert batch is not None, "no sync is under way"
        assert self.failed is None, "the sync failed"
        if batch.segment is not None:
            self._adopt(batch)
        self._end_offset, self._zeroed_until = batch.end_offset, batch.zeroed_until
        self.synced_position = batch.end_position
        self.durable_index = self._covered_index
        if batch.obsolete:
            self._in_thread(lambda: self._remove(batch.obsolete))

    def _remove(self, paths: list[str]) -> None:
        """What a failure leaves behind is removed on opening."""
        try:
            for path in paths:
                self._files.remove(path)
        except OSError as error:
            self.failed = error
            raise

    def close(self) -> None:
        """Make everything durable, testify for it, and release the files. No sync may be under way. Raises OSError."""
        if self._file is None:
            return
        assert self._batch is None or self.failed is not None, "a sync is under way"
        try:
            if self.failed is None:
                self.sync()
                self._write(RecordKind.MARK, 0, 0, b"")
                self.sync()
        finally:
            self._file.close()
            self._file = None

    def release(self) -> None:
        """Release the files as they are: for who has only looked. After `close` nothing is left to do."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _make_durable(self, batch: _Batch) -> None:
        """Runs in a thread, or inline."""
        try:
            if batch.segment is not None:
                self._create_segment(batch)
            else:
                assert batch.file is not None
                batch.file.write_at(batch.offset, batch.buffers)
                batch.file.sync()
        except OSError as error:
            self.failed = error
            raise

    def _create_segment(self, batch: _Batch) -> None:
        """A new segment with its header and the batch; it has its name only once both are synced."""
        assert batch.header is not None
        assert batch.segment is not None
        head = encode_segment_header(batch.header)
        batch.offset = len(head)
        batch.end_offset = batch.offset + batch.header.first_batch_bytes
        batch.zeroed_until = max(batch.end_offset, self._zeroes_until(batch.end_offset))
        temporary = f"{self._directory}/{_TEMPORARY}"
        file = self._files.open(temporary, create=True)
        try:
            file.allocate(max(self._segment_bytes, batch.end_offset))
            file.write_at(0, [head, *batch.buffers, _ZEROES[: batch.zeroed_until - batch.end_offset]])
            file.sync()
            self._files.rename(temporary, batch.segment.path)
            self._files.sync_dir(self._directory)
        except OSError:
            file.close()
            raise
        batch.file = file

    def _zeroes_until(self, end_offset: int) -> int:
        """To where the file is to be overwritten with zeroes once records reach `end_offset`."""
        return min(-(-end_offset // _ZERO_AHEAD_BYTES) * _ZERO_AHEAD_BYTES, self._segment_bytes)

    def _segment_at(self, position: int) -> _Segment:
        return _Segment(position, f"{self._directory}/{position:020d}{_SUFFIX}")

    def _header(self, batch_bytes: int) -> SegmentHeader:
        """Of a segment that begins with the buffer."""
        term, voted_for, last_index, last_term = self._before
        kept = self._segments[0].start_position if self._segments else self._batch_start
        return SegmentHeader(self.node_id, self._batch_start, kept, term, voted_for, last_index, last_term, batch_bytes)

    def check_continues(self, applied_index: int) -> None:
        """Raises `StartupError(state_damaged)` where this log cannot lead on a state that ends at that entry (0: that
        is empty, or not there)."""
        if self.first_index > max(1, applied_index):
            raise StartupError(
                f"the state beside {self._directory} ends at entry {applied_index}, and the log begins at "
                f"{self.first_index}: entries between them are lost. Put the state back if it was moved; else remove "
                "this member, empty its data directory and join it again",
                code="state_damaged",
            )

    # --- opening ------------------------------------------------------------------------------------------------------

    @classmethod
    def open(
        cls,
        files: Files,
        directory: str,
        *,
        node_id: str,
        segment_bytes: int = SEGMENT_BYTES,
        log: Callable[[str], None] | None = None,
        in_thread: Callable[[Callable[[], None]], None] | None = None,
    ) -> Wal:
        """Open the log in `directory`, or create it there.

        `node_id` is stored when the log is created and ignored afterwards; `.node_id` tells the stored one. `log` gets
        a line for what was cut off. `in_thread` runs what is given to it beside the loop: the removal of old segments,
        which takes milliseconds, is handed to it; without it that is done inline. Raises StartupError (`wal_damaged`,
        `data_format_newer`), and OSError where the disk is full or failing.
        """
        files.make_dirs(directory)
        files.sync_dir(directory.rpartition("/")[0] or ".")
        segments = []
        for name in files.list_dir(directory):
            if name == _TEMPORARY:
                files.remove(f"{directory}/{name}")
            elif name.endswith(_SUFFIX) and (stem := name[: -len(_SUFFIX)]).isdecimal():
                segments.append(_Segment(int(stem), f"{directory}/{name}"))
        if segments:
            segments.sort()
            newest = _read_segment(files, segments[-1], None)
            wal = cls(files, directory, newest.header.node_id, segment_bytes)
            wal._load(segments, newest, log)
        else:
            wal = cls(files, directory, node_id, segment_bytes)
            wal._create()
        if in_thread is not None:
            wal._in_thread = in_thread
        return wal

    def _create(self) -> None:
        batch = _Batch([], 0, [])
        batch.header, batch.segment = self._header(0), self._segment_at(0)
        self._create_segment(batch)
        self._adopt(batch)

    def _adopt(self, batch: _Batch) -> None:
        """Write to the segment that the batch has begun."""
        assert batch.segment is not None
        if self._file is not None:
            self._file.close()
        self._file = batch.file
        self._segments.append(batch.segment)
        self._body_start = batch.offset
        self._end_offset, self._zeroed_until = batch.end_offset, batch.zeroed_until

    def _load(self, segments: list[_Segment], newest: _Loaded, log: Callable[[str], None] | None) -> None:
        kept = newest.header.kept_position
        for record in newest.records:
            if record.kind == RecordKind.KEEP:
                kept = record.index
        # Older ones are what a crash left of a removal.
        self._segments = [segment for segment in segments if segment.start_position >= kept]
        if not self._segments or self._segments[0].start_position != kept:
            raise StartupError(f"{self._segment_at(kept).path} is missing. {_ADVICE}", code="wal_damaged")
        for segment, following in zip(self._segments, self._segments[1:], strict=False):
            self._replay(segment, _read_segment(self._files, segment, following.start_position))
        self._replay(self._segments[-1], newest)

        tail = newest.tail
        self.position = self.synced_position = self._batch_start = tail.position
        self.durable_index = self.last_index
        self._before = (self.term, self.voted_for, self.last_index, self.last_term)
        self._body_start, self._end_offset, self._zeroed_until = newest.body_start, tail.offset_bytes, tail.offset_bytes
        self._file = self._files.open(self._segments[-1].path)
        try:
            self._mend(self._file, tail, log)
        except OSError:
            self._file.close()
            raise
        self._files.sync_dir(self._directory)
        for segment in segments[: -len(self._segments)]:
            self._files.remove(segment.path)

    def _mend(self, file: File, tail: Tail, log: Callable[[str], None] | None) -> None:
        """Make the last segment ready to be written to, and make sure that what was read from it is on the disk: a
        process that died left it in the kernel's memory, and one whose sync failed may have left it there marked as
        written. Only the last batch can be in doubt, so that is written again."""
        if tail.torn_bytes:
            if log is not None:
                log(
                    f"{self._segments[-1].path}: cut off at offset {tail.offset_bytes}: {tail.torn_bytes} bytes of a "
                    "batch that was not synced when the node stopped"
                )
            file.truncate(tail.offset_bytes)  # so that nothing of it can be taken for a record later on
        if file.size() < self._segment_bytes:
            file.allocate(self._segment_bytes)
        if batch_bytes := tail.position - tail.batch_start:
            offset = tail.offset_bytes - batch_bytes
            file.write_at(offset, [file.read_at(offset, batch_bytes)])
        file.sync()

    def _replay(self, segment: _Segment, loaded: _Loaded) -> None:
        header = loaded.header
        if segment is self._segments[0]:
            self.term, self.voted_for = header.term, header.voted_for
        before = (self.node_id, self.term, self.voted_for)
        if before != (header.node_id, header.term, header.voted_for) or (
            self.entries and (self.last_index, self.last_term) != (header.last_index, header.last_term)
        ):
            raise _damaged(segment.path, 0, "the segment does not continue the one before it")
        for record in loaded.records:
            if not self._replay_record(record):
                offset = loaded.body_start + record.position - segment.start_position
                raise _damaged(segment.path, offset, "the record does not continue the log before it")

    def _replay_record(self, record: Record) -> bool:
        """Do again what was done when the record was written. False if it makes no sense here."""
        kind, index, term, payload = record.kind, record.index, record.term, record.payload
        if kind == RecordKind.ENTRY:
            if index != self.last_index + 1 if self.entries else index < 1:
                return False
            self.entries.append((payload, index, term))
            self._positions.append(record.position)
            self.size_bytes += len(payload)
        elif kind == RecordKind.TERM:
            self.term, self.voted_for = term, payload.decode() if index else None
        elif kind == RecordKind.TRUNCATE:
            if index <= self.last_index:
                self._truncate(max(index - self.first_index, 0))
        elif kind == RecordKind.RESET:
            self._truncate(0)
            self.entries.append((RESET_PAYLOAD, index, term))
            self._positions.append(record.position)
            self.size_bytes = len(RESET_PAYLOAD)
        return True


class _Loaded(NamedTuple):
    """One segment as read from the disk."""

    header: SegmentHeader
    body_start: int
    records: list[Record]
    tail: Tail


def _read_segment(files: Files, segment: _Segment, end_position: int | None) -> _Loaded:
    path = segment.path
    try:
        data = files.read(path)
    except OSError as error:
        raise StartupError(f"{path} cannot be read: {error}. {_ADVICE}", code="wal_damaged") from error
    try:
        header, body_start = decode_segment_header(data)
        if header.start_position != segment.start_position:
            raise Damaged(0, f"the segment begins at position {header.start_position}, not where its name says")
        records, tail = read_records(data, body_start, header, end_position)
    except Damaged as error:
        raise _damaged(path, error.offset_bytes, error.reason) from error
    except NewerFormat as error:
        raise StartupError(
            f"{path} was written in format version {error.version}, and this kvstore knows versions up to "
            f"{FORMAT_VERSION}. Start a newer kvstore on this data directory.",
            code="data_format_newer",
        ) from error
    return _Loaded(header, body_start, records, tail)


def _damaged(path: str, offset_bytes: int, reason: str) -> StartupError:
    return StartupError(f"{path} is damaged at offset {offset_bytes}: {reason}. {_ADVICE}", code="wal_damaged")
