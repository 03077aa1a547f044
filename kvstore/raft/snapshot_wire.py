"""What sender and receiver of a snapshot say to each other, as bytes. Pure.

    sender    Offer     what it would send: the checkpoint, and each file's name, size and checksum
    receiver  Want      how many bytes of each file it has; also after End, where a file came out damaged
    sender    chunks    the rest of each file, in order, each with its own checksum
    sender    End       that was all you wanted
    receiver  Done      an error code and message, or none: it is installed

A stream that ends without Done may be tried again: Want then says what need not be sent twice. Done is final.

A chunk is a binary header and data; the others are msgpack arrays with a tag in front. They cannot be taken for each
other: a chunk begins with a zero byte, which begins no msgpack array.
"""

from __future__ import annotations

import struct
from typing import Annotated, NamedTuple, Union

import google_crc32c
import msgspec
from msgspec import Meta, Struct

from kvstore.errors import Refused
from kvstore.raft.fsm import Checkpoint

CHUNK_BYTES = 256 * 1024
# RocksDB makes files of 64 MiB; ten thousand of them are far more than a node is meant to hold.
FILES_MAX = 10_000
_NAME_BYTES_MAX = 255
_CHUNK = struct.Struct(">BIQI")
CHUNK_HEADER_BYTES = _CHUNK.size

_Count = Annotated[int, Meta(ge=0, le=2**62)]


class FileInfo(Struct, array_like=True, frozen=True, gc=False):
    name: str
    size_bytes: _Count
    crc32c: _Count


class Offer(Struct, array_like=True, frozen=True, tag=1):
    """`id` is random, drawn when the checkpoint was taken: the same id means the same bytes."""

    id: str
    index: _Count
    term: _Count
    members: bytes
    files: tuple[FileInfo, ...]

    @property
    def checkpoint(self) -> Checkpoint:
        return Checkpoint(self.index, self.term, self.members)

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


class Want(Struct, array_like=True, frozen=True, tag=2):
    """Per file of the offer, how many of its first bytes the receiver has."""

    positions: tuple[_Count, ...]


class End(Struct, array_like=True, frozen=True, tag=3):
    pass


class Done(Struct, array_like=True, frozen=True, tag=4):
    """An empty `code` means that the snapshot is installed, or was not needed any more."""

    code: str = ""
    message: str = ""


class Chunk(NamedTuple):
    file: int
    offset: int
    crc32c: int
    data: bytes


Words = Union[Offer, Want, End, Done]

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Words] = msgspec.msgpack.Decoder(Words)


def encode(words: Words) -> bytes:
    return _encoder.encode(words)


def encode_chunk(file: int, offset: int, data: bytes) -> bytes:
    return _CHUNK.pack(0, file, offset, google_crc32c.value(data)) + data


def decode(body: bytes) -> Words | Chunk:
    """Raises `Refused(malformed_frame)`. A chunk's checksum is not checked here: see `is_whole`."""
    if body[:1] == b"\0":
        if len(body) <= CHUNK_HEADER_BYTES:
            raise Refused("a snapshot chunk without data", code="malformed_frame")
        _, file, offset, crc32c = _CHUNK.unpack_from(body)
        return Chunk(file, offset, crc32c, body[CHUNK_HEADER_BYTES:])
    try:
        words = _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refused(f"not a valid snapshot message: {error}", code="malformed_frame") from None
    if isinstance(words, Offer):
        _check_offer(words)
    return words


def is_whole(chunk: Chunk) -> bool:
    return bool(google_crc32c.value(chunk.data) == chunk.crc32c)


def check_name(name: str) -> None:
    """A file's name becomes a path below the receiver's directory, so nothing but a plain name will do."""
    if not name or name in (".", "..") or "/" in name or "\0" in name or len(name.encode()) > _NAME_BYTES_MAX:
        raise Refused(f"a snapshot may not hold a file called {name[:300]!r}", code="malformed_frame")


def _check_offer(offer: Offer) -> None:
    if not offer.id or not offer.files or len(offer.files) > FILES_MAX:
        raise Refused(f"a snapshot of {len(offer.files)} files; 1 to {FILES_MAX} will do", code="malformed_frame")
    for file in offer.files:
        check_name(file.name)
    if len({file.name for file in offer.files}) != len(offer.files):
        raise Refused("a snapshot that names a file twice", code="malformed_frame")
