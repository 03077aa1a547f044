"""How the write-ahead log looks on disk. Pure: bytes in, records out; no files.

A log is a row of **segments**. A segment is a header, then records, then zeroes up to its allocated size.

Positions. Every byte of every record has a **position**: a count of record bytes since the log was created, running on
through all segments. It never goes back (but where an unsynced tail is cut on opening). Segment headers do not count.

A record is a 36-byte header and a payload. The header's checksum covers the header, **the record's position and the
log's node id**, and the payload's checksum stands in the header. So no stale or misplaced byte, of this log or of
another, can pass for a record.

Batches. Records are written and synced in batches, and a batch is written only once all before it is synced. Each
record says how far back its batch began, and thereby **testifies that everything before its batch had been synced**.
That tells damage from a torn tail when a record is unreadable (in the last segment; in any other, all was synced):

- some later record's batch began after the unreadable one: it had been synced. Damage; the log must not be opened.
- none did: it belongs to the last batch, whose sync may never have returned. After a power loss any of its sectors may
  be missing, whatever the order, so readable records behind it prove nothing. It is cut off there.

The limits of this rule: a byte that flips inside the *last* batch, after its sync returned and with nothing written
since, looks like a tail torn by power loss, and is cut (a clean close therefore writes a MARK batch, which testifies
for all). And a log whose whole end, from some point on, reads as zeroes looks as if it had never been written. A disk
that writes whole sectors is assumed, as by every log that overwrites the sector where its last record ended.

A segment appears under its name only once its header and first batch are synced, so the header testifies for the
first batch, and a later segment for the whole of an earlier one.

What it does not do: judge whether records make sense one after the other (`wal.py`), or touch a disk.
"""

from __future__ import annotations

import re
import struct
from enum import IntEnum
from typing import NamedTuple

import msgspec
from google_crc32c import extend as crc32c

FORMAT_VERSION = 1


class RecordKind(IntEnum):
    """Numbers on disk: never changed, never used again."""

    ENTRY = 1  # index, term, payload
    TERM = 2  # term; payload: the name voted for; index: 1 if there is a vote, 0 if not
    TRUNCATE = 3  # index: it and all after it are gone; 0 empties the log
    RESET = 4  # the log becomes the single entry (RESET_PAYLOAD, index, term)
    KEEP = 5  # index: a position; all segments before it are no longer needed
    MARK = 6  # nothing but its testimony; written by a clean close


RESET_PAYLOAD = b"\x01"
_ZEROES = bytes(64 * 1024)  # compared as one, which is a hundred times faster than looking byte by byte


class Record(msgspec.Struct, frozen=True, gc=False):
    position: int
    kind: int
    index: int
    term: int
    payload: bytes


class SegmentHeader(msgspec.Struct, array_like=True, frozen=True):
    """The log as it stood when the segment began, so that dropping earlier ones loses nothing."""

    node_id: str
    start_position: int
    kept_position: int  # start of the oldest segment that is still needed
    term: int
    voted_for: str | None
    last_index: int
    last_term: int
    first_batch_bytes: int  # of the records that were synced before the segment got its name


class Damaged(Exception):
    """Bytes that had been synced are not what was written. `offset_bytes` is where in the segment."""

    def __init__(self, offset_bytes: int, reason: str) -> None:
        super().__init__(reason)
        self.offset_bytes = offset_bytes
        self.reason = reason


class NewerFormat(Exception):
    """A segment of a format version that this code does not know."""

    def __init__(self, version: int) -> None:
        super().__init__(f"format version {version}")
        self.version = version


# --- records ----------------------------------------------------------------------------------------------------------

_MAGIC = b"\xd7\x1e"
_LIKELY = re.compile(rb"\xd7\x1e[\x01-\x06]\x00")  # how a record of a known kind begins
# magic, kind, unused, payload length, bytes since the batch began, index, term, payload checksum; then the position,
# which is covered by the checksum but not stored.
_RECORD = struct.Struct("<2sBxIIQQIQ")
_STORED_BYTES = _RECORD.size - 8
_CHECKSUM = struct.Struct("<I")
RECORD_HEADER_BYTES = _STORED_BYTES + _CHECKSUM.size
_POSITION = struct.Struct("<Q")
_KINDS = frozenset(RecordKind)


def seed_of(node_id: str) -> int:
    """What the log's record checksums start from."""
    return int(crc32c(0, node_id.encode()))


def encode_record_header(
    seed: int, kind: int, position: int, batch_start: int, index: int, term: int, payload: bytes
) -> bytes:
    """The 36 bytes that stand before `payload`."""
    covered = _RECORD.pack(
        _MAGIC, kind, len(payload), position - batch_start, index, term, crc32c(0, payload), position
    )
    return covered[:_STORED_BYTES] + _CHECKSUM.pack(crc32c(seed, covered))


class _RecordHeader(msgspec.Struct, frozen=True, gc=False):
    kind: int
    payload_bytes: int
    batch_start: int
    index: int
    term: int
    payload_checksum: int


def _read_header(seed: int, data: bytes, offset: int, position: int) -> _RecordHeader | None:
    """The record header at `offset`, if one that belongs exactly there is intact."""
    end = offset + RECORD_HEADER_BYTES
    if end > len(data) or not data.startswith(_MAGIC, offset):
        return None
    covered = data[offset : end - _CHECKSUM.size] + _POSITION.pack(position)
    if crc32c(seed, covered) != _CHECKSUM.unpack_from(data, end - _CHECKSUM.size)[0]:
        return None
    _, kind, payload_bytes, since_batch_start, index, term, payload_checksum, _ = _RECORD.unpack(covered)
    return _RecordHeader(kind, payload_bytes, position - since_batch_start, index, term, payload_checksum)


class Tail(NamedTuple):
    """Where a segment's readable records end."""

    offset_bytes: int
    position: int
    batch_start: int  # position where the last readable record's batch began
    torn_bytes: int  # of an unsynced batch that is to be cut off behind it; 0 after a clean end


def read_records(
    data: bytes, offset: int, header: SegmentHeader, end_position: int | None
) -> tuple[list[Record], Tail]:
    """All records of a segment whose bytes are `data` and whose records begin at `offset`. `end_position` is where
    the next segment begins; None for the last one. Raises `Damaged`."""
    seed = seed_of(header.node_id)
    to_position = header.start_position - offset
    synced_until = header.start_position + header.first_batch_bytes if end_position is None else end_position
    records: list[Record] = []
    position = batch_start = header.start_position
    while end_position is None or position < end_position:
        offset = position - to_position
        found = _read_header(seed, data, offset, position)
        if found is None:
            reason = "no intact record header"
            break
        payload_start = offset + RECORD_HEADER_BYTES
        payload = data[payload_start : payload_start + found.payload_bytes]
        if len(payload) < found.payload_bytes or crc32c(0, payload) != found.payload_checksum:
            reason = f"the payload of record {found.index} in term {found.term} fails its checksum"
            break
        if found.kind not in _KINDS:
            raise Damaged(offset, f"unknown record kind {found.kind}")
        records.append(Record(position, found.kind, found.index, found.term, payload))
        position += RECORD_HEADER_BYTES + found.payload_bytes
        batch_start = found.batch_start
    else:
        if position > synced_until:
            raise Damaged(position - to_position, "the segment is longer than the next one's header says")
        return records, Tail(position - to_position, position, batch_start, 0)
    offset = position - to_position
    used_bytes = _used_bytes(data)
    if position < synced_until:
        if used_bytes <= offset:
            reason = f"the records end here, {synced_until - position} bytes before what had been synced"
        raise Damaged(offset, reason)
    if used_bytes <= offset:
        return records, Tail(offset, position, batch_start, 0)
    if (witness := _find_witness(seed, data, offset, position)) is not None:
        raise Damaged(offset, f"{reason}, and the record at offset {witness} proves that it had been synced")
    return records, Tail(offset, position, batch_start, used_bytes - offset)


def _used_bytes(data: bytes) -> int:
    """How long `data` is without the zeroes at its end, of which a segment that was just begun has 64 MiB."""
    end = len(data)
    while end >= len(_ZEROES) and data[end - len(_ZEROES) : end] == _ZEROES:
        end -= len(_ZEROES)
    last = data[max(0, end - len(_ZEROES)) : end]
    return end - len(last) + len(last.rstrip(b"\0"))


def _find_witness(seed: int, data: bytes, offset: int, position: int) -> int | None:
    """Offset of the first record header behind `offset` that says that what stands at `position` was synced. Costs
    a search through the bytes of the unreadable tail, and a checksum for each place that looks like a header."""
    to_position = position - offset
    for likely in _LIKELY.finditer(data, offset + 1):
        candidate = likely.start()
        found = _read_header(seed, data, candidate, candidate + to_position)
        if found is not None and found.batch_start > position:
            return candidate
    return None


# --- segment headers --------------------------------------------------------------------------------------------------

_SEGMENT_MAGIC = b"kvstore\x17"
# magic, format version, header length, checksum of these three and the header. This much never changes with the
# version, so that any version can tell a newer one from damage.
_PREAMBLE = struct.Struct("<8sII")
SEGMENT_PREAMBLE_BYTES = _PREAMBLE.size + _CHECKSUM.size


def encode_segment_header(header: SegmentHeader, version: int = FORMAT_VERSION) -> bytes:
    body = msgspec.msgpack.encode(header)
    preamble = _PREAMBLE.pack(_SEGMENT_MAGIC, version, len(body))
    return preamble + _CHECKSUM.pack(crc32c(crc32c(0, preamble), body)) + body


def decode_segment_header(data: bytes) -> tuple[SegmentHeader, int]:
    """The header, and the offset of the first record. Raises `Damaged` and `NewerFormat`."""
    if len(data) < SEGMENT_PREAMBLE_BYTES:
        raise Damaged(0, "the file is too short for a segment header")
    magic, version, body_bytes = _PREAMBLE.unpack_from(data)
    end = SEGMENT_PREAMBLE_BYTES + body_bytes
    body = data[SEGMENT_PREAMBLE_BYTES:end]
    checksum = crc32c(crc32c(0, data[: _PREAMBLE.size]), body)
    if magic != _SEGMENT_MAGIC or checksum != _CHECKSUM.unpack_from(data, _PREAMBLE.size)[0]:
        raise Damaged(0, "the segment header fails its checksum")
    if version > FORMAT_VERSION:
        raise NewerFormat(version)
    try:
        return msgspec.msgpack.decode(body, type=SegmentHeader), end
    except msgspec.MsgspecError as error:
        raise Damaged(0, f"the segment header is malformed ({error})") from error
