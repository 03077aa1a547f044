"""One stream between two nodes: frames, handshake, signs of life, bounds. Knows nothing of what the bodies mean.

A frame is a 4-byte big-endian body length, a kind byte, and the body. The node that dialled speaks first:

    dialler  -> HELLO    magic, protocol version, then who it is, whom it means to reach, and what for
    acceptor -> WELCOME  the same of itself, or REFUSE with an error code and a message; then it closes
    then       BODY      opaque; on a MESSAGES connection only the dialler sends them
               ALIVE     from either side when it had nothing else to send for a tick

The magic, the version and REFUSE keep their form for ever, so that two versions can tell each other what is wrong.

Rules
- Nothing but a handshake of at most 4 KiB is read before the other side is known, and that within 5 ticks.
- A frame over the cap, an unknown kind or a body that does not decode closes this connection; it never raises.
- Time is counted in ticks of one second that the owner gives (`tick`), not read from a clock: a process that was
  stopped for a minute sees one late tick and judges nobody by the time that it was away itself.
- What is queued is bounded by the owner's `queue_bytes_max`, and goes out in one write per `flush`.
- The owner is never called from inside a call into here, only from the event loop.

It does not dial, reconnect, or know who may connect: see `transport.py`.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from enum import IntEnum
from typing import Protocol, TypeVar, cast

import msgspec

from kvstore.errors import CODES, KvError, Refused, Unavailable, error_for

PROTOCOL_VERSION = 1
MAGIC = b"kvpeer"

# The largest append that the leader makes is 4 MiB, or one entry of about 1.6 MiB; twice that is never legitimate.
FRAME_BYTES_MAX = 8 * 1024 * 1024
# Names, ids and a cluster id; 4 KiB is many times what they need.
HANDSHAKE_BYTES_MAX = 4 * 1024
HANDSHAKE_TICKS_MAX = 5
# A peer that is there is heard from every second; three may be lost to a busy loop before it counts as gone.
SILENT_TICKS_MAX = 4
# It says that it is alive, but takes no byte of what waits for it: memory would be held for nothing.
STUCK_TICKS_MAX = 10
TICK_S = 1.0

_HEADER = struct.Struct(">IB")
_HEADER_BYTES = _HEADER.size
_PREFIX = struct.Struct(">6sH")


class _Kind(IntEnum):
    BODY = 0
    ALIVE = 1
    HELLO = 2
    WELCOME = 3
    REFUSE = 4


_BODY, _ALIVE = int(_Kind.BODY), int(_Kind.ALIVE)
_ALIVE_FRAME = _HEADER.pack(0, _ALIVE)


class Purpose(IntEnum):
    """What a connection is for. Each kind has its own connection, so that a snapshot holds up no heartbeat."""

    MESSAGES = 0
    SNAPSHOT = 1


class Identity(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Who a node is: the cluster's id, its name in it, the random id of its data directory, and where it is reached
    (by peers, and by clients): a node whose log is behind learns there how to answer a member that it does not know.
    `member_at` is a place (term, index) of the log at which it is a member under this name and id, as its own log or
    state says; (0, 0) where they do not. `version` is what its state machine understands."""

    cluster_id: str
    name: str
    node_id: str
    peer_address: str = ""
    client_address: str = ""
    member_at: tuple[int, int] = (0, 0)
    version: int = 1


class Hello(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """The handshake of either side. `to` is the name that the dialler means to reach; a new field goes to the end."""

    identity: Identity
    to: str
    purpose: Purpose


class _Refusal(msgspec.Struct, array_like=True, frozen=True, gc=False):
    code: str
    message: str


_T = TypeVar("_T")
_encoder = msgspec.msgpack.Encoder()
_hello_decoder = msgspec.msgpack.Decoder(Hello)
_refusal_decoder = msgspec.msgpack.Decoder(_Refusal)


class Owner(Protocol):
    """Who made a connection and decides about it. Called on the event loop."""

    def judge(self, connection: Connection, hello: Hello) -> tuple[str, str] | None:
        """The other side said who it is: None welcomes it, else (error code, message) refuses it."""

    def opened(self, connection: Connection) -> None:
        """The handshake is done, both ways. `connection.receive` must be set when this returns."""

    def drained(self, connection: Connection) -> None:
        """`send` returned False, or the queue went over its low mark; now it is below that mark again."""

    def closed(self, connection: Connection, error: KvError) -> None:
        """The connection is gone, for whatever reason. Called once, also when it never opened."""


def _nobody_listens(peer: str, body: bytes) -> None:
    raise AssertionError(f"the owner took a connection with {peer} and set no receiver ({len(body)} bytes)")


class Connection(asyncio.Protocol):
    """See the module. Public attributes: `peer` (the other side's name), `them` (its identity, once `was_open`),
    `purpose`, `dialled`, `is_open`, and `receive(peer, body)`, which the owner sets and which gets every body."""

    __slots__ = (
        "_buffered",
        "_buffered_bytes",
        "_error",
        "_frame_bytes_max",
        "_handshake_ticks",
        "_heard",
        "_identity",
        "_is_closed",
        "_is_reading",
        "_low_mark_bytes",
        "_need_bytes",
        "_owner",
        "_queue_bytes_max",
        "_queued",
        "_queued_bytes",
        "_silent_ticks",
        "_stream",
        "_stuck_ticks",
        "_taken_bytes",
        "_written_bytes",
        "_wrote",
        "dialled",
        "is_open",
        "peer",
        "purpose",
        "receive",
        "them",
        "was_open",
    )

    def __init__(
        self,
        owner: Owner,
        identity: Identity,
        *,
        queue_bytes_max: int,
        frame_bytes_max: int = FRAME_BYTES_MAX,
        dial: tuple[str, Purpose] | None = None,
    ) -> None:
        """`dial` is whom we call and what for; None for a connection that was accepted."""
        # Then a refused `send` means that more than half of the queue is taken, far above the low mark: `drained`
        # is sure to come.
        assert queue_bytes_max >= 2 * (frame_bytes_max + _HEADER_BYTES)
        self._owner = owner
        self._identity = identity
        self.dialled = dial is not None
        self.peer, self.purpose = dial if dial else ("", Purpose.MESSAGES)
        self.them: Identity | None = None
        self.is_open = self.was_open = False
        self.receive: Callable[[str, bytes], None] = _nobody_listens
        self._stream: asyncio.Transport | None = None
        self._error: KvError | None = None
        self._is_closed = False
        self._is_reading = True
        # in: pieces of frames that are not whole yet
        self._frame_bytes_max = frame_bytes_max
        self._buffered: list[bytes] = []
        self._buffered_bytes = 0
        self._need_bytes = _HEADER_BYTES
        # out: what waits for `flush`; the rest waits inside the stream
        self._queue_bytes_max = queue_bytes_max
        self._low_mark_bytes = queue_bytes_max // 4
        self._queued: list[bytes] = []
        self._queued_bytes = 0
        self._written_bytes = 0
        # what the ticks judge
        self._heard = self._wrote = False
        self._handshake_ticks = self._silent_ticks = self._stuck_ticks = 0
        self._taken_bytes = 0

    # --- sending ------------------------------------------------------------------------------------------------------

    def send(self, body: bytes) -> bool:
        """Queue one body for the next `flush`. False: not open, or no room; then nothing was queued, and `drained`
        will say when there is room again."""
        if not self.is_open:
            return False
        size = len(body)
        assert size <= self._frame_bytes_max, f"a body of {size} bytes is over the cap of {self._frame_bytes_max}"
        if self.waiting_bytes + size + _HEADER_BYTES > self._queue_bytes_max:
            self.flush()
            return False
        self._queued += (_HEADER.pack(size, _BODY), body)
        self._queued_bytes += size + _HEADER_BYTES
        return True

    @property
    def waiting_bytes(self) -> int:
        """What was sent and has not left this process yet."""
        stream = self._stream
        return self._queued_bytes + (stream.get_write_buffer_size() if stream is not None else 0)

    @property
    def has_room(self) -> bool:
        """False above the low mark: a sender with much to send then stops and waits for `drained`."""
        return self.waiting_bytes <= self._low_mark_bytes

    def flush(self) -> None:
        """Hand all that is queued to the stream, in one write."""
        if self._queued and self._stream is not None:
            queued, self._queued = self._queued, []
            self._written_bytes += self._queued_bytes
            self._queued_bytes = 0
            self._wrote = True
            self._stream.writelines(queued)

    def _write(self, kind: _Kind, body: bytes) -> None:
        self._queued += (_HEADER.pack(len(body), kind), body)
        self._queued_bytes += len(body) + _HEADER_BYTES
        self.flush()

    # --- closing ------------------------------------------------------------------------------------------------------

    def close(self, error: KvError | None = None, *, tell: bool = False) -> None:
        """Close after what is queued has left. `tell` sends the other side the error's code and message first."""
        if self._is_closed:
            return
        error = error or Unavailable("closed by this node", code="closed")
        if tell and self._stream is not None:
            # The message is cut so that the frame always fits into a handshake.
            self._write(_Kind.REFUSE, _encoder.encode(_Refusal(error.code, error.message[:1024])))
        self.flush()
        self._end(error)
        if self._stream is not None:
            self._stream.close()

    def abort(self, error: KvError) -> None:
        """Close at once; what is queued is lost."""
        if not self._is_closed:
            self._end(error)
            if self._stream is not None:
                self._stream.abort()

    def _end(self, error: KvError) -> None:
        self._is_closed = True
        self.is_open = False
        self._error = error
        self._buffered.clear()
        self._queued.clear()
        self._queued_bytes = 0

    # --- asyncio calls these ------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._stream = cast(asyncio.Transport, transport)
        if self._is_closed:  # while it was being dialled
            self._stream.abort()
            return
        self._stream.set_write_buffer_limits(high=self._low_mark_bytes, low=self._low_mark_bytes)
        if self.dialled:
            self._greet(_Kind.HELLO)

    def data_received(self, data: bytes) -> None:
        self._heard = True
        if self._buffered_bytes + len(data) < self._need_bytes or not self._is_reading:
            self._buffered.append(data)
            self._buffered_bytes += len(data)
            return
        if self._buffered:
            self._buffered.append(data)
            data = b"".join(self._buffered)
            self._buffered.clear()
        at, end, need = 0, len(data), _HEADER_BYTES
        while end - at >= _HEADER_BYTES and self._is_reading:
            size, kind = _HEADER.unpack_from(data, at)
            if size > (self._frame_bytes_max if self.is_open else HANDSHAKE_BYTES_MAX):
                self._malformed(f"a frame of {size} bytes is over the limit", "frame_too_large")
                return
            body_at = at + _HEADER_BYTES
            at_next = body_at + size
            if at_next > end:
                need = _HEADER_BYTES + size
                break
            at = at_next
            if kind == _BODY and self.is_open and not (self.dialled and self.purpose is Purpose.MESSAGES):
                self.receive(self.peer, data[body_at:at])
            elif kind != _ALIVE or size or not self.is_open:
                self._control(kind, data[body_at:at])
            if self._is_closed:
                return
        self._need_bytes = need
        self._buffered_bytes = end - at
        if at < end:
            self._buffered.append(data[at:])

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._is_closed:
            self._end(Unavailable(f"the connection was lost: {exc or 'closed by the other side'}", code="closed"))
        assert self._error is not None
        self._owner.closed(self, self._error)

    def pause_writing(self) -> None:
        """Nothing to do: `send` and `has_room` look at the sizes. asyncio must call it for `resume_writing` to come."""

    def resume_writing(self) -> None:
        if self.is_open:
            self._owner.drained(self)

    # --- reading at the receiver's pace -------------------------------------------------------------------------------

    def pause_reading(self) -> None:
        """No further body is delivered until `resume_reading`; at most one read's worth waits here, the rest with
        the sender. May be called from `receive`."""
        if self._is_reading and not self._is_closed:
            self._is_reading = False
            assert self._stream is not None
            self._stream.pause_reading()

    def resume_reading(self) -> None:
        """Not to be called from `receive`: bodies that wait here are delivered at once."""
        if self._is_reading or self._is_closed:
            return
        self._is_reading = True
        assert self._stream is not None
        self.data_received(b"")
        if self._is_reading and not self._is_closed:
            self._stream.resume_reading()

    # --- handshake ----------------------------------------------------------------------------------------------------

    def _greet(self, kind: _Kind) -> None:
        hello = Hello(self._identity, self.peer, self.purpose)
        self._write(kind, _PREFIX.pack(MAGIC, PROTOCOL_VERSION) + _encoder.encode(hello))

    def _control(self, kind: int, body: bytes) -> None:
        """Every frame that is neither a body nor a sign of life."""
        if kind == _Kind.REFUSE:
            refusal = self._decode(_refusal_decoder, body)
            if refusal is not None:
                # Counters are kept by code: a stranger must not be able to make up new ones.
                self._end(error_for(refusal.code if refusal.code in CODES else "invalid_request", refusal.message))
                assert self._stream is not None
                self._stream.close()
        elif kind == (_Kind.WELCOME if self.dialled else _Kind.HELLO) and not self.is_open:
            self._shake_hands(body)
        else:
            self._malformed(f"a frame of kind {kind} has no place here", "malformed_frame")

    def _shake_hands(self, body: bytes) -> None:
        if len(body) < _PREFIX.size or not body.startswith(MAGIC):
            self._malformed("no handshake of a kvstore node", "malformed_frame")
            return
        version = _PREFIX.unpack_from(body)[1]
        if version != PROTOCOL_VERSION:
            self.close(
                Refused(
                    f"peer protocol {version} met {PROTOCOL_VERSION}; run one version on all nodes",
                    code="version_mismatch",
                ),
                tell=True,
            )
            return
        hello = self._decode(_hello_decoder, memoryview(body)[_PREFIX.size :])
        if hello is None:
            return
        refusal = self._owner.judge(self, hello)
        if refusal is not None:
            self.close(error_for(*refusal), tell=True)
        if self._is_closed:  # also where the owner thought better of this peer while it judged
            return
        self.peer, self.them = hello.identity.name, hello.identity
        if not self.dialled:
            self.purpose = hello.purpose
            self._greet(_Kind.WELCOME)
        self.is_open = self.was_open = True
        self._owner.opened(self)

    def _decode(self, decoder: msgspec.msgpack.Decoder[_T], body: bytes | memoryview) -> _T | None:
        try:
            return decoder.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            self._malformed(f"a handshake that does not decode: {error}", "malformed_frame")
            return None

    def _malformed(self, message: str, code: str) -> None:
        self.close(Refused(message, code=code), tell=True)

    # --- time ---------------------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """To be called every `TICK_S`, also while the connection is being dialled: judges the other side's silence
        and says that we are alive."""
        if self._is_closed or self._stream is None:
            return  # a dial has a timeout of its own
        if not self.is_open:
            self._handshake_ticks += 1
            if self._handshake_ticks >= HANDSHAKE_TICKS_MAX:
                self.abort(Unavailable("no handshake in time", code="timeout"))
            return
        if self._heard or not self._is_reading:
            self._heard, self._silent_ticks = False, 0
        else:
            self._silent_ticks += 1
            if self._silent_ticks >= SILENT_TICKS_MAX:
                self.abort(Unavailable(f"nothing heard from {self.peer}", code="timeout"))
                return
        waiting = self._stream.get_write_buffer_size()
        taken = self._written_bytes - waiting
        self._stuck_ticks = self._stuck_ticks + 1 if waiting and taken == self._taken_bytes else 0
        self._taken_bytes = taken
        if self._stuck_ticks >= STUCK_TICKS_MAX:
            self.abort(Unavailable(f"{self.peer} takes nothing of what it is sent", code="overloaded"))
            return
        if not self._wrote and not waiting:
            self._written_bytes += _HEADER_BYTES
            self._stream.write(_ALIVE_FRAME)
        self._wrote = False
