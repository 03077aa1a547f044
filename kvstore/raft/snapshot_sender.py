"""Sends one snapshot to one peer: from a checkpoint that lies on the disk to the peer's word that it is installed.

The attempt's states, each with what it waits for:

    opening     a stream to the peer
    offered     the peer's Want
    streaming   the next piece from the disk, room in the stream, or the rate that is allowed
    ended       the peer's Done (or another Want, for what came out damaged)
    pausing     the time until the next attempt

A stream that is lost, or that says nothing for too long, ends the attempt; the next one goes on where the peer stands.
Attempts that bring the peer no further are counted, and it gives up after `ATTEMPTS_MAX` of them.

Memory: one piece of `PIECE_BYTES` and what waits in the stream, which is kept below its low mark.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

from kvstore.env import Environment, Timer
from kvstore.errors import InternalError, KvError, Unavailable, error_for
from kvstore.raft import snapshot_wire as wire
from kvstore.raft.snapshot_files import PIECE_BYTES
from kvstore.raft.snapshot_wire import CHUNK_BYTES, Done, End, Offer, Want
from kvstore.raft.transport import Connection, Purpose, Transport

# 0.1, 0.2, 0.4 … 5 s of pauses: about 20 s without any progress, in which a peer may restart.
ATTEMPTS_MAX = 8
PAUSE_MIN_S, PAUSE_MAX_S = 0.1, 5.0
# Damage on the way is caught by each chunk's checksum; a file that is damaged again and again is damaged here.
REFETCHES_MAX = 3
# A living peer answers an offer at once, unless it still writes what an earlier attempt brought.
WANT_TIMEOUT_S = 60.0
# It syncs, reads and checks every file, and installs: at 50 MB/s this is enough for 30 GB.
DONE_TIMEOUT_S = 600.0


class Pace:
    """Spreads what all snapshots send together over time, at `bytes_per_s`, so that they leave the disk, the network
    and the loop to those who wait for an answer."""

    __slots__ = ("_bytes_per_s", "_env", "_free_at_s")

    def __init__(self, env: Environment, bytes_per_s: int) -> None:
        assert bytes_per_s > 0
        self._env = env
        self._bytes_per_s = bytes_per_s
        self._free_at_s = 0.0

    def wait_s(self) -> float:
        """How long until something may be sent."""
        return max(0.0, self._free_at_s - self._env.clock.monotonic())

    def sent(self, size_bytes: int) -> None:
        now_s = self._env.clock.monotonic()
        self._free_at_s = max(now_s, self._free_at_s) + size_bytes / self._bytes_per_s


class _State(Enum):
    OPENING = "opening"
    OFFERED = "offered"
    STREAMING = "streaming"
    ENDED = "ended"
    PAUSING = "pausing"
    OVER = "over"


class Sending:
    """One snapshot on its way to one peer. `finished(error)` is called once, when nothing reads the checkpoint any
    more."""

    __slots__ = (
        "_attempt",
        "_attempts",
        "_best_bytes",
        "_env",
        "_finished",
        "_next_file",
        "_offer",
        "_outcome",
        "_pace",
        "_path",
        "_peer",
        "_positions",
        "_reading",
        "_refetches",
        "_state",
        "_timer",
        "_transport",
    )

    def __init__(
        self,
        env: Environment,
        transport: Transport,
        pace: Pace,
        peer: str,
        path: str,
        offer: Offer,
        finished: Callable[[KvError | None], None],
    ) -> None:
        self._env = env
        self._transport = transport
        self._pace = pace
        self._peer = peer
        self._path = path
        self._offer = offer
        self._finished = finished
        self._state = _State.OPENING
        self._attempt: _Attempt | None = None
        self._timer: Timer | None = None
        self._positions: list[int] = []
        self._next_file = 0  # the first that may not be sent whole yet
        self._reading = False
        self._attempts = 0
        self._refetches = 0
        self._best_bytes = 0
        self._outcome: KvError | None = None

    def start(self) -> None:
        self._become(_State.OPENING)
        self._attempts += 1
        self._attempt = _Attempt(self)
        self._transport.open_stream(self._peer, Purpose.SNAPSHOT, self._attempt)

    def cancel(self, error: KvError) -> None:
        """Stop at once, with this error. `finished` may be called before this returns."""
        if self._state is not _State.OVER:
            self._finish(error)

    # --- states -------------------------------------------------------------------------------------------------------

    def _become(self, state: _State, timeout_s: float | None = None) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._state = state
        if timeout_s is not None:
            self._timer = self._env.scheduler.call_later(timeout_s, self._timed_out)

    def _timed_out(self) -> None:
        self._timer = None
        if self._state is _State.PAUSING:
            self.start()
        elif self._state is _State.STREAMING:
            self._pump()
        else:
            error = Unavailable(f"{self._peer} said nothing for too long ({self._state.value})", code="timeout")
            self._end_attempt(error)
            self._try_again(error)

    def _end_attempt(self, error: KvError) -> None:
        attempt, self._attempt = self._attempt, None
        if attempt is not None:
            attempt.detach(error)

    def _try_again(self, error: KvError) -> None:
        if self._attempts >= ATTEMPTS_MAX:
            self._finish(error)
            return
        pause_s = min(PAUSE_MAX_S, PAUSE_MIN_S * 2 ** (self._attempts - 1))
        self._become(_State.PAUSING, pause_s * (0.5 + 0.5 * self._env.chance.random()))

    def _finish(self, error: KvError | None) -> None:
        self._end_attempt(error or Unavailable("the snapshot is installed", code="closed"))
        self._become(_State.OVER)
        self._outcome = error
        if not self._reading:
            self._finished(error)

    # --- the stream ---------------------------------------------------------------------------------------------------

    def opened(self) -> None:
        self._become(_State.OFFERED, WANT_TIMEOUT_S)
        self._say(self._offer)

    def closed(self, error: KvError) -> None:
        self._attempt = None
        self._try_again(error)

    def received(self, body: bytes) -> None:
        try:
            words = wire.decode(body)
        except KvError as error:
            self._finish(error)
            return
        if isinstance(words, Want) and self._state in (_State.OFFERED, _State.ENDED):
            self._wanted(words)
        elif isinstance(words, Done) and self._state is not _State.OPENING:
            # Words to and fro may cross, so an answer that refuses may come at any moment.
            self._finish(error_for(words.code, words.message) if words.code else None)
        else:
            self._finish(InternalError(f"{self._peer} answered a snapshot out of turn ({type(words).__name__})"))

    def _wanted(self, want: Want) -> None:
        sizes = [file.size_bytes for file in self._offer.files]
        if len(want.positions) != len(sizes) or any(at > size for at, size in zip(want.positions, sizes, strict=True)):
            self._finish(InternalError(f"{self._peer} wants what this snapshot does not hold"))
            return
        if self._state is _State.ENDED:
            self._refetches += 1
            if self._refetches > REFETCHES_MAX:
                self._finish(InternalError(f"{self._peer} found the same snapshot damaged {self._refetches} times"))
                return
        has_bytes = sum(want.positions)
        if has_bytes > self._best_bytes:
            self._best_bytes, self._attempts = has_bytes, 1
        self._positions = list(want.positions)
        self._next_file = 0
        self._become(_State.STREAMING)
        self._pump()

    def _say(self, words: wire.Words) -> None:
        assert self._attempt is not None
        assert self._attempt.connection is not None
        self._attempt.connection.send(wire.encode(words))
        self._attempt.connection.flush()

    # --- streaming ----------------------------------------------------------------------------------------------------

    def _pump(self) -> None:
        """Send the next piece, when it is time for it."""
        if self._state is not _State.STREAMING or self._reading or self._timer is not None:
            return
        assert self._attempt is not None
        assert self._attempt.connection is not None
        if not self._attempt.connection.has_room:
            return  # `drained` comes here again
        wait_s = self._pace.wait_s()
        if wait_s > 0:
            self._become(_State.STREAMING, wait_s)
            return
        pieces = self._next_pieces()
        if not pieces:
            self._become(_State.ENDED, DONE_TIMEOUT_S)
            self._say(End())
            return
        # The next piece of every snapshot waits for this one's share of the time, whoever reads it.
        self._pace.sent(sum(size for _, _, size in pieces))
        self._reading = True
        attempt = self._attempt
        self._env.scheduler.run_in_thread(
            lambda: self._read(pieces), lambda bodies, error: self._read_done(attempt, bodies, error)
        )

    drained = _pump

    def _next_pieces(self) -> list[tuple[int, int, int]]:
        """(file, offset, size) of what comes next, `PIECE_BYTES` at most in all; and count it as sent."""
        pieces, room = [], PIECE_BYTES
        files = self._offer.files
        while room > 0 and self._next_file < len(files):
            number = self._next_file
            at, end = self._positions[number], files[number].size_bytes
            if at == end:
                self._next_file += 1
                continue
            size = min(room, end - at)
            pieces.append((number, at, size))
            self._positions[number] += size
            room -= size
        return pieces

    def _read(self, pieces: list[tuple[int, int, int]]) -> list[bytes]:
        """Chunks, ready to be sent. Runs in a thread."""
        bodies = []
        for number, at, size in pieces:
            name = self._offer.files[number].name
            file = self._env.files.open(f"{self._path}/{name}")
            try:
                for offset in range(at, at + size, CHUNK_BYTES):
                    wanted = min(CHUNK_BYTES, at + size - offset)
                    data = file.read_at(offset, wanted)
                    if len(data) != wanted:
                        raise OSError(f"{self._path}/{name} has become shorter than it was")
                    bodies.append(wire.encode_chunk(number, offset, data))
            finally:
                file.close()
        return bodies

    def _read_done(self, attempt: _Attempt, bodies: list[bytes] | None, error: BaseException | None) -> None:
        self._reading = False
        if self._state is _State.OVER:
            self._finished(self._outcome)
            return
        if error is not None:
            self._finish(Unavailable(f"reading the snapshot failed: {error}", code="storage_failed"))
            return
        assert bodies is not None
        if attempt is not self._attempt:
            self._pump()  # read for an attempt that is over; the present one may be waiting to read
            return
        connection = attempt.connection
        assert connection is not None
        for body in bodies:
            # There was room for far more than a piece when it was read, and nobody else sends here.
            sent = connection.send(body)
            assert sent or not connection.is_open
        connection.flush()
        self._pump()


class _Attempt:
    """The `StreamHandler` of one attempt, so that a late word of an earlier one is not taken for this one's."""

    __slots__ = ("_sending", "connection")

    def __init__(self, sending: Sending) -> None:
        self._sending: Sending | None = sending
        self.connection: Connection | None = None

    def detach(self, error: KvError) -> None:
        self._sending = None
        if self.connection is not None:
            self.connection.close(error, tell=True)

    def opened(self, stream: Connection) -> None:
        self.connection = stream
        if self._sending is None:
            stream.close()
        else:
            self._sending.opened()

    def received(self, peer: str, body: bytes) -> None:
        if self._sending is not None:
            self._sending.received(body)

    def drained(self) -> None:
        if self._sending is not None:
            self._sending.drained()

    def closed(self, error: KvError) -> None:
        sending, self._sending = self._sending, None
        if sending is not None:
            sending.closed(error)
