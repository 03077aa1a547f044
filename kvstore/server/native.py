"""The native door: msgpack frames over TCP, many requests in flight on a connection, answers in any order.

Rules
- The first frame is `Hello`; a client of another protocol version or cluster is told so and closed.
- Junk closes its connection, with a `Failure` of id 0 that says why, and is counted by its code. Nobody else notices,
  and the log gets a line for it now and then.
- One write to the socket per connection and turn, whatever many answers there are.
- Every buffer is bounded. A connection with `IN_FLIGHT_MAX` requests or `IN_FLIGHT_BYTES_MAX` of them unanswered is
  not read; neither is one whose answers pile up, nor any while the node is under pressure. One that leaves
  `UNREAD_BYTES_MAX` unread, or reads nothing for `STUCK_S`, is closed.
- Where a rate is set, what a connection sends beyond it is read, and waits here for its turn (`Throttle`): so signs of
  life overtake the rest, and its client is answered all the time. What has waited too long is refused as `overloaded`.
- No task and no future per request.

It translates and counts; what a request means is the node's to know (`Handler`). TLS and authentication are to come
and belong in `_Connection.connection_made` and `_greet`.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable
from typing import Protocol, cast

from msgspec import Struct

from kvstore import codec
from kvstore.env import Environment, Listener, Timer
from kvstore.errors import Refused, Unavailable
from kvstore.seldom import SeldomLog
from kvstore.server.failures import shutting_down
from kvstore.server.ports import Gate, Log, Reply
from kvstore.server.throttle import HOLD_S, Throttle, is_sign_of_life

# Some 50 KiB each, idle; beyond it descriptors run out before memory does.
CONNECTIONS_MAX = 10_000
# Half a full entry: one client alone can keep the log busy, and cannot fill the batcher.
IN_FLIGHT_MAX = 4_096
IN_FLIGHT_BYTES_MAX = 8 * 1024 * 1024
# Above this, what a connection has not yet taken makes it congested: its reads are held back.
CONGESTED_BYTES = 1024 * 1024
UNREAD_BYTES_MAX = 32 * 1024 * 1024
STUCK_S = 30.0
HELLO_S = 10.0
_SWEEP_S = 1.0
# How long a closing door waits for its last answers to be taken.
_LINGER_S = 1.0
# Requests that waited too long for their turn and are refused in one go: a millisecond or two.
_LATE_AT_ONCE = 256


class Handler(Protocol):
    """The node, as a door sees it."""

    def handle(self, frame: codec.ClientFrame, reply: Reply, gate: Gate | None = None) -> None: ...

    def gone(self, gate: Gate) -> None: ...


class NativeStats(Struct, frozen=True):
    """Counted since start. `junk` is closed connections by the code of what was wrong; `answered` is requests by kind
    and outcome: ok, refused, or the code of a failure; `throttled` is how often a connection came to send more than its
    rate."""

    connections: int
    accepted: int
    refused_full: int
    requests: int
    throttled: int
    closed_slow: int
    junk: tuple[tuple[str, int], ...]
    answered: tuple[tuple[str, str, int], ...]


class NativeDoor:
    """Listens, and keeps its connections. One per node."""

    def __init__(self, env: Environment, handler: Handler, log: Log, rate: int = 0) -> None:
        """`rate`: requests a second of one connection; 0 is no limit."""
        self.rate = rate
        self.handle = handler.handle
        self._handler = handler
        self.call_soon = env.scheduler.call_soon
        self._env = env
        self._seldom = SeldomLog(log, env.clock)
        self._listener: Listener | None = None
        self._connections: dict[_Connection, None] = {}  # a set would forget the order
        self._sweep_timer: Timer | None = None
        self._pressed = False
        self._closing = False
        self._on_empty: Callable[[], None] | None = None
        self.accepted = 0
        self.refused_full = 0
        self.requests = 0
        self.throttled = 0
        self.closed_slow = 0
        self.junk: Counter[str] = Counter()
        self.answered: Counter[tuple[str, str]] = Counter()

    async def start(self, address: str) -> None:
        """Raises OSError where the address cannot be had."""
        self._listener = await self._env.network.listen(address, self._accept)
        self._sweep_timer = self._env.scheduler.call_later(_SWEEP_S, self._sweep)

    @property
    def address(self) -> str:
        assert self._listener is not None, "the door is not open"
        return self._listener.address

    def stats(self) -> NativeStats:
        return NativeStats(
            connections=len(self._connections),
            accepted=self.accepted,
            refused_full=self.refused_full,
            requests=self.requests,
            throttled=self.throttled,
            closed_slow=self.closed_slow,
            junk=tuple(sorted(self.junk.items())),
            answered=tuple((*key, count) for key, count in sorted(self.answered.items())),
        )

    def press(self, pressed: bool) -> None:
        """The node is (no longer) under pressure: stop reading, or go on."""
        self._pressed = pressed
        for connection in tuple(self._connections):
            connection.update_reading()

    def stop_accepting(self) -> None:
        """No new connection, and nothing more is read from those there are; answers still go out."""
        self._closing = True
        if self._listener is not None:
            self._listener.close()
        for connection in tuple(self._connections):
            connection.update_reading()
            connection.give_up_waiting(shutting_down())

    def close(self, on_empty: Callable[[], None]) -> None:
        """Close every connection once it has taken its answers, or after a second. Then `on_empty()`."""
        self._closing = True
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
            self._sweep_timer = None
        self._on_empty = on_empty
        for connection in tuple(self._connections):
            connection.finish()
        self._env.scheduler.call_later(_LINGER_S, self._abort_all)
        self._check_empty()

    # --- what connections ask of their door ---------------------------------------------------------------------------

    @property
    def reads_nothing(self) -> bool:
        return self._pressed or self._closing

    def now(self) -> float:
        return self._env.clock.monotonic()

    def later(self, delay_s: float, callback: Callable[[], object]) -> Timer:
        return self._env.scheduler.call_later(delay_s, callback)

    def closed_for_junk(self, peer: str, error: Refused) -> None:
        self.junk[error.code] += 1
        self._seldom.warning("connection_refused", error.code, peer=peer, message=error.message)

    def closed_for_slowness(self, peer: str, why: str) -> None:
        self.closed_slow += 1
        self._seldom.warning("slow_connection_closed", "slow", peer=peer, why=why)

    def opened(self, connection: _Connection) -> Unavailable | None:
        """Why there is no room for one more, if there is none. It is kept until it is closed in any case."""
        self._connections[connection] = None
        if self._closing:
            return shutting_down()
        if len(self._connections) > CONNECTIONS_MAX:
            self.refused_full += 1
            return Unavailable(f"{CONNECTIONS_MAX} connections are open here; use another node", code="overloaded")
        self.accepted += 1
        return None

    def lost(self, connection: _Connection) -> None:
        if connection in self._connections:
            del self._connections[connection]
            self._handler.gone(connection)
        self._check_empty()

    # --- inside -------------------------------------------------------------------------------------------------------

    def _accept(self) -> asyncio.Protocol:
        return _Connection(self)

    def _sweep(self) -> None:
        """One timer for all connections' deadlines."""
        self._sweep_timer = self._env.scheduler.call_later(_SWEEP_S, self._sweep)
        now = self.now()
        for connection in tuple(self._connections):
            connection.check_deadlines(now)

    def _abort_all(self) -> None:
        for connection in tuple(self._connections):
            connection.abort()

    def _check_empty(self) -> None:
        if self._on_empty is not None and not self._connections:
            on_empty, self._on_empty = self._on_empty, None
            on_empty()


class _Connection(asyncio.Protocol):
    """One client. Its own `Gate`."""

    __slots__ = (
        "_closing",
        "_door",
        "_flush_due",
        "_greeted",
        "_in_flight",
        "_in_flight_bytes",
        "_out",
        "_out_bytes",
        "_peer",
        "_postponed",
        "_progress_at",
        "_reader",
        "_reading",
        "_send_paused",
        "_sizes",
        "_throttle",
        "_transport",
        "_turn",
        "_unread_bytes",
    )

    def __init__(self, door: NativeDoor) -> None:
        self._door = door
        self._transport: asyncio.Transport | None = None
        self._reader = codec.FrameReader()
        self._greeted = False
        self._closing = False
        self._reading = True
        self._peer = ""
        self._in_flight = 0
        self._in_flight_bytes = 0
        self._sizes: dict[int, int] = {}
        self._out: list[bytes] = []
        self._out_bytes = 0
        self._flush_due = False
        self._send_paused = False
        self._unread_bytes = 0
        self._postponed: deque[Callable[[], object]] = deque()
        self._progress_at = door.now()
        self._throttle = Throttle(door.rate, self._progress_at) if door.rate else None
        self._turn: Timer | None = None  # set while somebody waits for it

    # --- asyncio.Protocol ---------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=CONGESTED_BYTES)
        address = transport.get_extra_info("peername")
        self._peer = f"{address[0]}:{address[1]}" if address else ""
        refused = self._door.opened(self)
        if refused is not None:
            self._fail(refused.code, refused.message)

    def connection_lost(self, exc: Exception | None) -> None:
        self._closing = True
        self._transport = None
        if self._turn is not None:
            self._turn.cancel()
        self._out.clear()
        self._postponed.clear()
        self._door.lost(self)

    def data_received(self, data: bytes) -> None:
        if self._closing:
            return
        if self._throttle is not None:
            self._line_up(self._throttle, data)
            return
        try:
            for body in self._reader.feed(data):
                if not self._receive(body):
                    return
        except Refused as error:
            self._refuse(error)
            return
        if self._in_flight >= IN_FLIGHT_MAX or self._in_flight_bytes >= IN_FLIGHT_BYTES_MAX:
            self.update_reading()

    def pause_writing(self) -> None:
        self._send_paused = True
        self._progress_at = self._door.now()
        self.update_reading()

    def resume_writing(self) -> None:
        self._send_paused = False
        self._run_postponed()
        self.update_reading()

    # --- Gate ---------------------------------------------------------------------------------------------------------

    @property
    def congested(self) -> bool:
        return self._send_paused or self._out_bytes > CONGESTED_BYTES

    def postpone(self, work: Callable[[], object]) -> None:
        # Bounded by what may be in flight on a connection. `resume_writing` or the next flush runs it.
        if self._transport is not None:
            self._postponed.append(work)

    def push(self, frame: codec.SentFrame) -> None:
        self._send(frame)

    def _run_postponed(self) -> None:
        postponed = self._postponed
        while postponed and not self.congested:
            postponed.popleft()()

    # --- requests and answers -----------------------------------------------------------------------------------------

    def _receive(self, body: bytes) -> bool:
        """Take one frame; False if the connection ends with it. Raises `Refused` for junk."""
        frame = codec.decode_client_frame(body)
        door = self._door
        if not self._greeted:
            if not isinstance(frame, codec.Hello):
                raise Refused("the first frame must be Hello", code="malformed_frame")
            door.handle(frame, self._welcome, self)
            return not self._closing
        if isinstance(frame, codec.Hello):
            raise Refused("Hello came twice", code="malformed_frame")
        if frame.id <= 0:
            raise Refused(f"request id {frame.id} is not positive", code="malformed_frame")
        door.requests += 1
        if isinstance(frame, (codec.WatchCredit, codec.WatchCancel)):
            door.handle(frame, self._send, self)  # these have no answer
            return True
        size = len(body)
        self._in_flight += 1
        if size > _SMALL_BYTES:
            if frame.id in self._sizes:
                raise Refused(f"request id {frame.id} is in flight already", code="malformed_frame")
            self._sizes[frame.id] = size
            self._in_flight_bytes += size
        kind = type(frame)
        if kind is codec.Write:
            door.handle(frame, self._answer_write, self)
        elif kind is codec.Read:
            door.handle(frame, self._answer_read, self)
        else:
            door.handle(frame, self._answer_other, self)
        return True

    def _welcome(self, answer: codec.ServerFrame) -> None:
        if isinstance(answer, codec.Failure):
            self._refuse(Refused(answer.message, code=answer.code))
            return
        self._greeted = True
        self._send(answer)

    def _answer_write(self, answer: codec.ServerFrame) -> None:
        self._answer("write", answer)

    def _answer_read(self, answer: codec.ServerFrame) -> None:
        self._answer("read", answer)

    def _answer_other(self, answer: codec.ServerFrame) -> None:
        self._answer("other", answer)

    def _answer(self, kind: str, answer: codec.ServerFrame) -> None:
        """What the `Reply` of every request on this connection ends in."""
        if type(answer) is codec.Answer:
            outcome = "refused" if codec.is_refusal(answer.result) else "ok"
        else:
            outcome = answer.code if type(answer) is codec.Failure else "ok"
        self._door.answered[kind, outcome] += 1
        self._in_flight -= 1
        if self._sizes:
            self._in_flight_bytes -= self._sizes.pop(answer.id, 0)
        self._send(answer)

    def _send(self, answer: codec.SentFrame) -> None:
        if self._transport is None:
            return
        data = codec.encode_frame(answer)
        self._out.append(data)
        self._out_bytes += len(data)
        if not self._flush_due:
            self._flush_due = True
            self._door.call_soon(self._flush)

    def _flush(self) -> None:
        """The turn's one write."""
        self._flush_due = False
        transport = self._transport
        if transport is None or transport.is_closing():
            self._out.clear()
            return
        out = self._out
        if out:
            transport.write(out[0] if len(out) == 1 else b"".join(out))
            out.clear()
            self._out_bytes = 0
            unread = transport.get_write_buffer_size()
            if unread > UNREAD_BYTES_MAX:
                self._close_slow(f"left {unread} bytes unread; the limit is {UNREAD_BYTES_MAX}")
                return
        if self._closing:
            transport.close()
            return
        if self._postponed:
            self._run_postponed()
        if not self._reading:
            self.update_reading()

    # --- its rate, where one is set -----------------------------------------------------------------------------------

    def _line_up(self, throttle: Throttle, data: bytes) -> None:
        """All but the first frame, and junk, wait for their turn; which may be now."""
        now = self._door.now()
        try:
            for body in self._reader.feed(data):
                frame = codec.decode_client_frame(body)
                if self._greeted and frame.id > 0:
                    throttle.add(body, is_sign_of_life(frame), now)
                elif not self._receive(body):
                    return
        except Refused as error:
            self._refuse(error)
            return
        if self._turn is None:
            self._take_turn()
            if throttle.waiting and self._has_room:
                self._door.throttled += 1
        elif throttle.full:
            self.update_reading()

    def _take_turn(self) -> None:
        """Handle whose turn it is, refuse who waited too long, and come back for the rest."""
        door, throttle = self._door, self._throttle
        self._turn = None
        if throttle is None or self._closing:
            return
        now = door.now()
        try:
            while self._has_room and (body := throttle.next(now)) is not None:
                self._receive(body)
            for _ in range(_LATE_AT_ONCE):
                if (body := throttle.late(now)) is None:
                    break
                message = f"waited {HOLD_S:g} s for its turn; a connection has {door.rate} requests a second here"
                self._give_up(body, Unavailable(message, code="overloaded"))
        except Refused as error:
            self._refuse(error)
            return
        if throttle.waiting:
            self._turn = door.later(throttle.turn_in_s(now), self._take_turn)
        self.update_reading()

    def give_up_waiting(self, error: Unavailable) -> None:
        """Refuse all that wait for their turn: it will not come."""
        if self._throttle is not None and not self._closing:
            for body in self._throttle.leave():
                self._give_up(body, error)

    def _give_up(self, body: bytes, error: Unavailable) -> None:
        frame = codec.decode_client_frame(body)
        if isinstance(frame, (codec.WatchCredit, codec.WatchCancel)):
            self._receive(body)  # without an answer there is no refusal, and a watch would miss it
            return
        kind = {codec.Write: "write", codec.Read: "read"}.get(type(frame), "other")
        self._door.answered[kind, error.code] += 1
        self._send(codec.Failure(frame.id, error.code, error.message))

    @property
    def _has_room(self) -> bool:
        """Whether one more of its requests may be under way."""
        return not (
            self._in_flight >= IN_FLIGHT_MAX
            or self._in_flight_bytes >= IN_FLIGHT_BYTES_MAX
            or self._send_paused
            or self._closing
            or self._door.reads_nothing
        )

    # --- flow, deadlines, the end -------------------------------------------------------------------------------------

    def update_reading(self) -> None:
        """Read from the socket, or not."""
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        wanted = self._has_room and (self._throttle is None or not self._throttle.full)
        if wanted and not self._reading:
            self._reading = True
            transport.resume_reading()
            if self._turn is not None:  # and what waited for the same reason goes on, too
                self._turn.cancel()
                self._turn = self._door.later(0.0, self._take_turn)
        elif not wanted and self._reading:
            self._reading = False
            transport.pause_reading()

    def check_deadlines(self, now: float) -> None:
        transport = self._transport
        if transport is None:
            return
        unread = transport.get_write_buffer_size()
        if self._closing:
            if unread >= self._unread_bytes:  # took nothing since the last look, or has nothing to take
                transport.abort()
        elif self._greeted and (unread < self._unread_bytes or not self._send_paused):
            self._progress_at = now
        self._unread_bytes = unread
        if self._closing:
            return
        if self._send_paused and now - self._progress_at > STUCK_S:
            self._close_slow(f"read nothing for {STUCK_S:g} s with {unread} bytes waiting for it")
        elif not self._greeted and now - self._progress_at > HELLO_S:
            self._refuse(Refused(f"no Hello within {HELLO_S:g} s", code="malformed_frame"))

    def finish(self) -> None:
        """Close once what is on its way has been taken."""
        self._closing = True
        if not self._flush_due:
            self._flush_due = True
            self._door.call_soon(self._flush)

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _refuse(self, error: Refused) -> None:
        """Junk: say so, close."""
        self._door.closed_for_junk(self._peer, error)
        self._fail(error.code, error.message)

    def _fail(self, code: str, message: str) -> None:
        self._send(codec.Failure(0, code, message))
        self.finish()

    def _close_slow(self, why: str) -> None:
        self._door.closed_for_slowness(self._peer, why)
        self._closing = True
        self.abort()


# Smaller frames are not worth counting one by one: IN_FLIGHT_MAX of them are within IN_FLIGHT_BYTES_MAX.
_SMALL_BYTES = IN_FLIGHT_BYTES_MAX // IN_FLIGHT_MAX
