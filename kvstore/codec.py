"""Bytes <-> model types. The only place where the two meet; everything is msgpack, typed and checked by msgspec.

Three formats:

1. **Requests and results** (`encode_request`, `decode_mutation`, `encode_result`, …).
2. **Batches**: the payload of a log entry, `[format, log_time_ms, [[session, seq, acked_below, request], …]]`.
3. **Frames** of the native protocol: a 4-byte big-endian length, then one of the frame structs below as a msgpack
   array whose first item is the struct's tag. A frame carries the request still encoded (`Raw`), so that a server
   passes it on into its batch without encoding it again. Answers come in any order and are matched by `id`.

A wrong byte raises `errors.Refused` with code `malformed_frame`, `unknown_request` or `invalid_request`: never
anything else.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, TypeVar, Union

import msgspec
from msgspec import Raw, Struct

from kvstore import model
from kvstore.errors import Refused

PROTOCOL_VERSION = 1
# An event with the largest record there is and the one that it replaced, their keys, and what a frame adds: nothing
# that either side sends is larger.
FRAME_BYTES_MAX = 2 * 1024 * 1024 + 64 * 1024
_LENGTH = struct.Struct(">I")


# --- batches: what a log entry holds ---------------------------------------------------------------------------------


class BatchItem(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False):
    """One request in a batch. `session` 0 is none (the request is then not protected against being sent twice)."""

    session: int
    seq: int
    acked_below: int
    request: model.Mutation


class Batch(Struct, array_like=True, forbid_unknown_fields=True, frozen=True):
    """`version`: who knows less cannot apply it (see `versions.py`)."""

    version: int
    log_time_ms: int
    items: tuple[BatchItem, ...]


class RawBatchItem(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False):
    """A `BatchItem` whose request is still encoded: what the batcher writes."""

    session: int
    seq: int
    acked_below: int
    request: Raw


class RawBatch(Struct, array_like=True, forbid_unknown_fields=True, frozen=True):
    version: int
    log_time_ms: int
    items: list[RawBatchItem]


# --- frames, client to server ----------------------------------------------------------------------------------------


class Hello(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False, tag=1):
    """First frame on a connection. An empty `cluster_id` accepts any cluster; the answer (`Welcome`) names it."""

    id: int
    protocol: int
    cluster_id: str = ""


class Write(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False, tag=2):
    """A mutation under a session. `acked_below`: the client needs no answer to any lower `seq` again."""

    id: int
    session: int
    seq: int
    acked_below: int
    request: Raw


class ReadLevel:
    LINEARIZABLE = 0
    LOCAL = 1


class Read(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False, tag=3):
    """What only reads. A `local` read answers only from a revision of at least `min_revision`."""

    id: int
    level: int
    min_revision: int
    request: Raw


class StatusRequest(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False, tag=4):
    """Asks for a `NodeStatus`. With `digest`, the node also hashes its whole state at its applied index."""

    id: int
    digest: bool = False


class MemberAdd(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False, tag=5):
    """Add a learner. Carries the cluster token's proof: the cluster id that the joining node computed or was told."""

    id: int
    cluster_id: str
    name: str
    peer_address: str
    client_address: str
    node_id: str


class MemberPromote(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False, tag=6):
    id: int
    name: str


class MemberRemove(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False, tag=7):
    """`force`: also where the members that the leader hears would be no quorum of the rest."""

    id: int
    name: str
    force: bool = False


class TransferLeader(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False, tag=8):
    """Hand leadership to `name`; empty lets the leader choose."""

    id: int
    name: str = ""


class Watch(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False, tag=9):
    """Asks for the events of a key or range from a revision on (0: from now on). Answered by `Watching`; its events
    then come in frames of the same id, until a `Failure` of that id or a `WatchCancel` ends it.

    `future` allows a `from_revision` that the store has yet to reach. `window_bytes`: how many bytes of events may be
    under way until a `WatchCredit` gives some back.
    """

    id: int
    start: bytes
    end: bytes | None
    from_revision: int
    prev: bool
    puts: bool
    deletes: bool
    future: bool
    window_bytes: int


class WatchCredit(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False, tag=10):
    """So many bytes of the events of watch `id` have been consumed. Has no answer."""

    id: int
    size_bytes: int


class WatchCancel(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False, tag=11):
    """Ends watch `id`. Has no answer, and frames that are on their way may still come."""

    id: int


ClientFrame = Union[
    Hello,
    Write,
    Read,
    StatusRequest,
    MemberAdd,
    MemberPromote,
    MemberRemove,
    TransferLeader,
    Watch,
    WatchCredit,
    WatchCancel,
]


# --- frames, server to client ----------------------------------------------------------------------------------------


class Welcome(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False, tag=1):
    id: int
    protocol: int
    cluster_id: str
    name: str
    leader_client_address: str


class Answer(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False, tag=2):
    """The encoded `model.Result` of a request (an `ErrorResult` is one of them)."""

    id: int
    result: Raw


class Failure(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False, tag=3):
    """No result: the request was not taken, or its outcome is unknown. `leader` helps where code is `not_leader`.
    Id 0 speaks of the connection, which the server then closes."""

    id: int
    code: str
    message: str
    leader: str = ""


class StatusAnswer(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False, tag=4):
    id: int
    status: model.NodeStatus


class AdminAnswer(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False, tag=5):
    """A membership change or a hand-over is done. `members` is the configuration after it."""

    id: int
    members: tuple[model.Member, ...] = ()


class Watching(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False, tag=6):
    """The watch stands. Its first event is of `from_revision` or later."""

    id: int
    from_revision: int


class WatchEvents(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False, tag=7):
    """Events of watch `id`, in order. With these it has every event up to `revision`; but with `more`, the events of
    that revision itself go on in the next frame, which may only say that there are none left. `size_bytes` is what they
    take of the window."""

    id: int
    revision: int
    events: tuple[model.Event, ...]
    size_bytes: int
    more: bool = False


class WatchProgress(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False, tag=8):
    """Every watch on this connection has its events up to `revision`, except those of `behind`. Its id is 0."""

    id: int
    revision: int
    behind: tuple[int, ...] = ()


ServerFrame = Union[Welcome, Answer, Failure, StatusAnswer, AdminAnswer, Watching, WatchEvents, WatchProgress]


class RawWatchEvents(Struct, array_like=True, frozen=True, gc=False, tag=7):
    """A `WatchEvents` whose events are encoded already: what the watch hub sends."""

    id: int
    revision: int
    events: list[Raw]
    size_bytes: int
    more: bool = False


SentFrame = Union[ServerFrame, RawWatchEvents]
"""What a server may send."""
Frame = Union[ClientFrame, SentFrame]

# The second byte of a small array whose first item is the tag of `model.ErrorResult`.
_ERROR_TAG = 127
# … and of the mutations that change nothing but how long something lives.
_KEEP_TAGS = (18, 23)

_encoder = msgspec.msgpack.Encoder()
_mutation_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(model.Mutation)
_read_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(model.Read)
_result_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(model.Result)
_event_decoder: msgspec.msgpack.Decoder[model.Event] = msgspec.msgpack.Decoder(model.Event)
_batch_decoder: msgspec.msgpack.Decoder[Batch] = msgspec.msgpack.Decoder(Batch)
_client_frame_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(ClientFrame)
_server_frame_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(ServerFrame)

Buffer = Union[bytes, bytearray, memoryview, Raw]
_T = TypeVar("_T")


def _decode(decoder: msgspec.msgpack.Decoder[_T], data: Buffer, what: str, code: str) -> _T:
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise Refused(f"not a valid {what}: {error}", code=code) from None


def encode_request(request: model.Mutation | model.Read) -> bytes:
    return _encoder.encode(request)


def decode_mutation(data: Buffer) -> model.Mutation:
    """Raises `Refused(invalid_request)`."""
    mutation: model.Mutation = _decode(_mutation_decoder, data, "request", "invalid_request")
    return mutation


def decode_read(data: Buffer) -> model.Read:
    """Raises `Refused(invalid_request)`."""
    read: model.Read = _decode(_read_decoder, data, "read", "invalid_request")
    return read


def encode_result(result: model.Result) -> bytes:
    return _encoder.encode(result)


def decode_result(data: Buffer) -> model.Result:
    """Raises `Refused(malformed_frame)`."""
    result: model.Result = _decode(_result_decoder, data, "result", "malformed_frame")
    return result


def is_refusal(result: Raw) -> bool:
    """Whether an encoded result is an `ErrorResult`, by its tag alone."""
    return memoryview(result)[1] == _ERROR_TAG


def is_keep_alive(request: Buffer) -> bool:
    """Whether an encoded mutation is a `KeepSession` or a `KeepLease`, by its tag alone."""
    view = memoryview(request)
    return len(view) > 1 and view[1] in _KEEP_TAGS


def encode_event(event: model.Event) -> bytes:
    return _encoder.encode(event)


def decode_events(events: list[Raw]) -> tuple[model.Event, ...]:
    """Raises `Refused(malformed_frame)`."""
    return tuple(_decode(_event_decoder, event, "event", "malformed_frame") for event in events)


def encode_batch(log_time_ms: int, items: list[RawBatchItem], version: int = 1) -> bytes:
    return _encoder.encode(RawBatch(version, log_time_ms, items))


def decode_batch(data: Buffer) -> Batch:
    """Decode a log entry's payload. Raises `Refused`: `invalid_request` for bytes that are no batch."""
    return _decode(_batch_decoder, data, "batch", "invalid_request")


def encode_frame(frame: Frame) -> bytes:
    """A whole frame: length and body."""
    body = _encoder.encode(frame)
    return _LENGTH.pack(len(body)) + body


def decode_client_frame(body: Buffer) -> ClientFrame:
    """Raises `Refused`: `unknown_request` for a kind that we do not have, else `malformed_frame`."""
    try:
        frame: ClientFrame = _client_frame_decoder.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        code = "unknown_request" if "Invalid value" in str(error) and "`$[0]`" in str(error) else "malformed_frame"
        raise Refused(f"not a valid frame: {error}", code=code) from None
    return frame


def decode_server_frame(body: Buffer) -> ServerFrame:
    """Raises `Refused(malformed_frame)`."""
    frame: ServerFrame = _decode(_server_frame_decoder, body, "frame", "malformed_frame")
    return frame


class FrameReader:
    """Cuts a byte stream into frame bodies. Sans-IO; each body is a `bytes` of its own.

    Bounded: holds at most one frame of `FRAME_BYTES_MAX` and what the last `feed` brought.
    """

    __slots__ = ("_buffer", "_max")

    def __init__(self, frame_bytes_max: int = FRAME_BYTES_MAX) -> None:
        self._buffer = b""
        self._max = frame_bytes_max

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Every body that is now complete. Raises `Refused(frame_too_large)` for an announced length over the cap."""
        buffer = self._buffer + data if self._buffer else data
        at, end = 0, len(buffer)
        try:
            while end - at >= 4:
                (size,) = _LENGTH.unpack_from(buffer, at)
                if size > self._max:
                    raise Refused(f"frame of {size} bytes is over the limit of {self._max}", code="frame_too_large")
                if end - at - 4 < size:
                    break
                body = buffer[at + 4 : at + 4 + size]
                at += 4 + size
                yield body
        finally:
            self._buffer = buffer[at:]
