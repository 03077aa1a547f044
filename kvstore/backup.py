"""The file of a backup: what a store held at one revision. Written by `kvstore backup`, read by `kvstore restore`.

    magic                   b"kvstore backup 2\\n"
    chunk*                  length and CRC32C (4 bytes each, big-endian), then msgpack, compressed with zlib

Each chunk is one of the structs below: a `Header`, any number of `Records` in key order, the `Leases`, and an `End`,
which has the counts, the digest of the records, and a SHA-256 of all bytes before it. So a file that was cut, or
changed by a single byte anywhere, is refused as damaged, and nothing of it is believed before its end was seen.

Every later format, too, begins with such a line and such a chunk, a `Header` that begins with the same number: only
where both name it is a file of a newer format, and else a damaged one.

The digest is that of `kvstore verify`: hashes of pages, hashed. A page ends with the record that makes it
`DIGEST_RECORDS_MAX` records or `DIGEST_BYTES_MAX` bytes; in a file of format 1, which is read as well, records alone
ended it.
"""

from __future__ import annotations

import hashlib
import struct
import sys
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, TypeVar, Union

import google_crc32c
import msgspec
from msgspec import Struct

from kvstore.errors import Refused
from kvstore.model import DIGEST_BYTES_MAX, DIGEST_RECORDS_MAX, Record

T = TypeVar("T")

FORMAT = 2
_MAGIC_STEM = b"kvstore backup "
MAGIC = _MAGIC_STEM + b"%d\n" % FORMAT
_MAGIC_BYTES_MAX = 32  # whatever number a later format has
_FRAME = struct.Struct(">II")
# A chunk of records is closed at about this size; one record may be larger than that by itself.
CHUNK_BYTES = 1024 * 1024
# What a chunk may take, compressed or not: a page of records with the largest one as its last.
CHUNK_BYTES_MAX = 4 * 1024 * 1024
_LEASES_PER_CHUNK = 50_000
# What a record takes in a chunk beside its key and value, at most.
_RECORD_OVERHEAD_BYTES = 48
# Little work, and most of what text-like values give.
_COMPRESSION = 1


class Header(Struct, array_like=True, frozen=True, tag=0):
    """Where and when it was made. `made_ms`: milliseconds since 1970 by the clock of the machine that asked for it."""

    format: int
    cluster_id: str
    revision: int
    made_ms: int
    version: str


class _AnyHeader(Struct, array_like=True, frozen=True, tag=0):
    """What the header of every format begins with."""

    format: int


class SavedLease(Struct, array_like=True, frozen=True, gc=False):
    id: int
    ttl_ms: int
    remaining_ms: int


class Leases(Struct, array_like=True, frozen=True, tag=1):
    leases: tuple[SavedLease, ...]


class Records(Struct, array_like=True, frozen=True, tag=2):
    records: tuple[Record, ...]


class End(Struct, array_like=True, frozen=True, tag=3):
    leases: int
    records: int
    digest: bytes
    sha256: bytes


Chunk = Union[Header, Leases, Records, End]
_header_decoder = msgspec.msgpack.Decoder(_AnyHeader)
_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(Chunk)


def packed(record: Record) -> bytes:
    """A record as the state machine keeps it: what its hash is over."""
    return _RECORD.pack(1, record.create_revision, record.mod_revision, record.version, record.lease) + record.value


_RECORD = struct.Struct(">BQQQQ")


class RecordsHash:
    """A hash over records in key order; equal for equal records, whoever computes it. `size_bytes` is of those."""

    __slots__ = ("_hash", "size_bytes")

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        self.size_bytes = 0

    def add(self, key: bytes, packed: bytes) -> None:
        self.size_bytes += len(key) + len(packed)
        self._hash.update(_FRAME.pack(len(key), len(packed)))
        self._hash.update(key)
        self._hash.update(packed)

    def digest(self) -> bytes:
        return self._hash.digest()


class PagedHash:
    """The digest of a whole store, record by record or page by page. `format`: of the file that it is for."""

    def __init__(self, format: int = FORMAT) -> None:
        self._page_bytes_max = DIGEST_BYTES_MAX if format > 1 else sys.maxsize
        self._whole = RecordsHash()
        self._page = RecordsHash()
        self._in_page = 0
        self.count = 0

    def add(self, record: Record) -> None:
        self._page.add(record.key, packed(record))
        self._in_page += 1
        if self._in_page == DIGEST_RECORDS_MAX or self._page.size_bytes >= self._page_bytes_max:
            self._end_page()

    def add_page(self, digest: bytes, count: int) -> None:
        if not count:
            return  # the end of a store whose last page is full
        self._whole.add(b"", digest)
        self.count += count

    def digest(self) -> bytes:
        if self._in_page:
            self._end_page()
        return self._whole.digest()

    def _end_page(self) -> None:
        self.add_page(self._page.digest(), self._in_page)
        self._page, self._in_page = RecordsHash(), 0


class BackupWriter:
    """Writes one backup into an open file. `header`, `leases`, `record` as often as needed, `end`."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._sha = hashlib.sha256()
        self._hash = PagedHash()
        self._records: list[Record] = []
        self._records_bytes = 0
        self._leases = 0
        self._count = 0
        self.size_bytes = 0
        self._write(MAGIC)

    def header(self, header: Header) -> None:
        self._chunk(header)

    def leases(self, leases: tuple[SavedLease, ...]) -> None:
        """All of them, once, after the records."""
        if self._records:
            self._end_chunk()
        self._leases += len(leases)
        for at in range(0, len(leases), _LEASES_PER_CHUNK):
            self._chunk(Leases(leases[at : at + _LEASES_PER_CHUNK]))

    def record(self, record: Record) -> None:
        self._hash.add(record)
        self._count += 1
        self._records.append(record)
        self._records_bytes += len(record.key) + len(record.value) + _RECORD_OVERHEAD_BYTES
        if self._records_bytes >= CHUNK_BYTES:
            self._end_chunk()

    def end(self) -> End:
        """Write the end. Whoever opened the file still has to sync it."""
        end = End(self._leases, self._count, self._hash.digest(), self._sha.digest())
        self._chunk(end)
        return end

    def _end_chunk(self) -> None:
        self._chunk(Records(tuple(self._records)))
        self._records, self._records_bytes = [], 0

    def _chunk(self, chunk: Chunk) -> None:
        body = zlib.compress(msgspec.msgpack.encode(chunk), _COMPRESSION)
        length = len(body).to_bytes(4, "big")
        self._write(length + google_crc32c.value(length + body).to_bytes(4, "big") + body)

    def _write(self, data: bytes) -> None:
        self._sha.update(data)
        self._file.write(data)
        self.size_bytes += len(data)


def read_backup(file: BinaryIO) -> Iterator[Chunk]:
    """Every chunk, in order, each checked; the `End` comes last, and only if the file is whole. Raises
    `Refused`: `backup_damaged`, `backup_format_newer`."""
    sha = hashlib.sha256()
    magic = file.readline(_MAGIC_BYTES_MAX)
    format = _format_of(magic)
    if format > FORMAT:
        raise _newer_or_damaged(file, format, len(magic))
    if not format:
        raise Refused("this file is no backup of kvstore, or its beginning is damaged", code="backup_damaged")
    sha.update(magic)
    offset = len(magic)
    hashed = PagedHash(format)
    leases = records = 0
    last_key: bytes | None = None
    expected: tuple[type, ...] = (Header,)
    while True:
        frame, body = _framed(file, offset)
        chunk: Chunk = _decoded(_decoder, body, offset)
        if not isinstance(chunk, expected):
            raise _damaged(offset, f"a {type(chunk).__name__} stands where it cannot")
        if isinstance(chunk, Header):
            if chunk.format != format:
                raise _damaged(offset, f"it begins as one of format {format}, and its header is of {chunk.format}")
            expected = (Records, Leases, End)
        elif isinstance(chunk, Leases):
            expected = (Leases, End)
            leases += len(chunk.leases)
        elif isinstance(chunk, Records):
            for record in chunk.records:
                if last_key is not None and record.key <= last_key:
                    raise _damaged(offset, "its records are out of order")
                last_key = record.key
                hashed.add(record)
            records += len(chunk.records)
        elif (chunk.leases, chunk.records, chunk.digest) != (leases, records, hashed.digest()):
            raise _damaged(offset, "what it holds is not what its end says")
        elif chunk.sha256 != sha.digest() or file.read(1):
            raise _damaged(offset, "its end does not belong to it")
        yield chunk
        if isinstance(chunk, End):
            return
        sha.update(frame)
        sha.update(body)
        offset += len(frame) + len(body)


def _format_of(magic: bytes) -> int:
    """The format that the first line names; 0 where it is no such line."""
    number = magic.removeprefix(_MAGIC_STEM).removesuffix(b"\n")
    return int(number) if number.isdigit() and magic == _MAGIC_STEM + b"%d\n" % int(number) else 0


def _framed(file: BinaryIO, offset: int) -> tuple[bytes, bytes]:
    """The next chunk, compressed, behind what frames it."""
    frame = file.read(_FRAME.size)
    length, checksum = _FRAME.unpack(frame) if len(frame) == _FRAME.size else (CHUNK_BYTES_MAX + 1, 0)
    body = file.read(length) if length <= CHUNK_BYTES_MAX else b""
    if len(body) != length or google_crc32c.value(frame[:4] + body) != checksum:
        raise _damaged(offset, "a chunk is cut off or its checksum is wrong")
    return frame, body


def _decoded(decoder: msgspec.msgpack.Decoder[T], body: bytes, offset: int) -> T:
    try:
        inflated = zlib.decompressobj()
        data = inflated.decompress(body, CHUNK_BYTES_MAX)
        if inflated.unconsumed_tail or not inflated.eof or inflated.unused_data:
            raise _damaged(offset, "a chunk is larger than it can be, or not whole")
        return decoder.decode(data)
    except (zlib.error, msgspec.DecodeError) as error:
        raise _damaged(offset, str(error)) from error


def _newer_or_damaged(file: BinaryIO, format: int, offset: int) -> Refused:
    """A single byte of the first line may have been changed: the header has its own word on the format."""
    _, body = _framed(file, offset)
    named = _decoded(_header_decoder, body, offset).format
    if named != format:
        return _damaged(offset, f"it begins as one of format {format}, and its header is of {named}")
    return Refused(
        f"the backup is of format {format}; this version knows up to {FORMAT}: restore it with a newer one",
        code="backup_format_newer",
    )


def _damaged(offset: int, why: str) -> Refused:
    return Refused(f"the backup is damaged at offset {offset}: {why}; use another", code="backup_damaged")
