"""Receives one snapshot at a time, into a directory of its own, and hands it over when every byte of it is proved.

    receiving   chunks are checked and written, in the order they come
    verifying   every file is synced, read again and held against the offer's checksum; what is damaged is wanted anew
    inspecting  the state machine looks at the directory: it must hold what was announced
    handed over the node installs it, or not, and says so (it may be busy, and is asked again)

Rules
- Nothing counts before the node has switched to the directory; until then a crash or an error leaves only a leftover.
- The stream may break and come back with the same offer; the node may be told of a newer one, which replaces what is
  there, unless that is being verified already.
- All work on files is done in a thread, one piece of work at a time, in order. What waits for it is bounded: past
  `WAITING_BYTES_MAX` the stream is not read until it is below.
- A full or failing disk ends the snapshot and removes what was written.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from enum import Enum
from typing import Any, Protocol

from kvstore.env import Environment, File, Log, Timer
from kvstore.errors import InternalError, KvError, Refused, Unavailable
from kvstore.raft import snapshot_wire as wire
from kvstore.raft.fsm import Checkpoint, StateMachine
from kvstore.raft.snapshot_files import describe
from kvstore.raft.snapshot_wire import Chunk, Done, End, Offer, Want
from kvstore.raft.state_directory import StateDirectory
from kvstore.raft.transport import Connection

# A disk that is slower than the network makes the sender wait, not this process grow.
WAITING_BYTES_MAX = 4 * 1024 * 1024
# Synced as it comes: a gigabyte that is synced at the end keeps the disk from the log of whoever shares it for seconds.
SYNC_BYTES = 8 * 1024 * 1024
# The sender tries for about 20 s to come back; then nobody will ask for what is here.
KEPT_S = 60.0
# A node that is flushing or syncing in a thread cannot install just then. Asking again is cheap, sending again is not;
# after 10 s it is more than a flush, and the sender should know.
HAND_OVER_AGAIN_S = 0.2
HAND_OVERS_MAX = 50


class SnapshotHandler(Protocol):
    """The node, as the receiver sees it."""

    def snapshot_offered(self, peer: str, checkpoint: Checkpoint) -> KvError | None:
        """None if a snapshot of this from this peer is welcome now."""

    def snapshot_held(self, checkpoint: Checkpoint) -> bool:
        """True if the node holds all of this already: then it need not be sent, and counts as installed."""

    def snapshot_received(
        self, peer: str, checkpoint: Checkpoint, path: str, finish: Callable[[KvError | None], None]
    ) -> None:
        """`path` holds this checkpoint, verified and synced. To install it, switch the `StateDirectory` to it. In any
        case call `finish` once: its error, or none, goes to the sender. What was not switched to is removed then.
        With the code `unavailable` the node is asked again for a while, before that is an answer."""


class Worker:
    """Work on files, in a thread, one piece after the other. `done(result, error)` comes on the loop."""

    __slots__ = ("_env", "_idle", "_waiting", "is_busy")

    def __init__(self, env: Environment) -> None:
        self._env = env
        # Bounded by those who give work: one piece per stream for chunks, and one per state of a snapshot.
        self._waiting: deque[tuple[Callable[[], Any], Callable[[Any, BaseException | None], None]]] = deque()
        self.is_busy = False
        self._idle: asyncio.Event | None = None

    def run(self, work: Callable[[], Any], done: Callable[[Any, BaseException | None], None]) -> None:
        self._waiting.append((work, done))
        self._next()

    def _next(self) -> None:
        if self.is_busy:
            return
        if not self._waiting:
            if self._idle is not None:
                self._idle.set()
            return
        self.is_busy = True
        work, done = self._waiting.popleft()

        def worked(result: Any, error: BaseException | None) -> None:
            self.is_busy = False
            try:
                done(result, error)
            finally:
                self._next()

        self._env.scheduler.run_in_thread(work, worked)

    async def finish(self) -> None:
        """Wait until nothing is left to do."""
        while self.is_busy or self._waiting:
            self._idle = asyncio.Event()
            await self._idle.wait()


class _State(Enum):
    RECEIVING = "receiving"
    VERIFYING = "verifying"
    HANDED_OVER = "handed over"
    OVER = "over"


class _Partial:
    """A snapshot that is on its way here. Its positions and files belong to the worker's thread while work is under
    way, to the loop otherwise."""

    __slots__ = (
        "chunks",
        "hand_overs",
        "inbound",
        "is_writing",
        "offer",
        "path",
        "peer",
        "positions",
        "state",
        "timer",
        "unsynced",
        "unsynced_bytes",
        "waiting_bytes",
    )

    def __init__(self, peer: str, offer: Offer, path: str) -> None:
        self.peer = peer
        self.offer = offer
        self.path = path
        self.positions = [0] * len(offer.files)
        self.state = _State.RECEIVING
        self.inbound: _Inbound | None = None
        self.timer: Timer | None = None
        self.chunks: list[Chunk] = []
        self.waiting_bytes = 0
        self.unsynced: set[int] = set()  # files
        self.unsynced_bytes = 0
        self.is_writing = False
        self.hand_overs = 0

    def drop_chunks(self) -> None:
        """Those that are not being written yet."""
        self.chunks.clear()
        self.waiting_bytes = 0


class SnapshotReceiver:
    def __init__(
        self,
        env: Environment,
        machine: StateMachine,
        directory: StateDirectory,
        handler: SnapshotHandler,
        log: Log | None,
    ) -> None:
        self._env = env
        self._machine = machine
        self._directory = directory
        self._handler = handler
        self._log = log
        self._worker = Worker(env)
        self._partial: _Partial | None = None
        self._installed = ""  # the id of the last one: its sender may not have heard that it is
        self._is_stopped = False

    def accept(self, peer: str) -> _Inbound:
        """The handler for a stream that a peer opened to send us a snapshot."""
        return _Inbound(self, peer)

    def stop(self) -> None:
        """Take nothing more. What is not installed is left for the next start to remove."""
        self._is_stopped = True
        partial = self._partial
        if partial is not None:
            self._forget(partial, Unavailable("this node is stopping", code="shutting_down"))

    async def finish(self) -> None:
        """After `stop`: wait until no thread works here any more."""
        await self._worker.finish()

    @property
    def progress(self) -> tuple[int, int]:
        """Bytes that are written, and bytes in all, of the snapshot that is on its way here; else zeroes."""
        partial = self._partial
        return (sum(partial.positions), partial.offer.size_bytes) if partial is not None else (0, 0)

    # --- what the sender says -----------------------------------------------------------------------------------------

    def offered(self, inbound: _Inbound, offer: Offer) -> None:
        if self._is_stopped:
            inbound.break_off(Unavailable("this node is stopping", code="shutting_down"))
            return
        # Who died inside an install may hold it, too: a refusal would be taken for a failure, and make the sender wait.
        if offer.id == self._installed or self._handler.snapshot_held(offer.checkpoint):
            inbound.say(Done())
            return
        partial = self._partial
        if partial is not None and partial.state is not _State.RECEIVING:
            # Verified what was begun, it is worth more than what begins; the sender asks again.
            inbound.break_off(Unavailable("another snapshot is being installed here", code="unavailable"))
            return
        refusal = self._handler.snapshot_offered(inbound.peer, offer.checkpoint)
        if refusal is not None:
            inbound.say(Done(refusal.code, refusal.message))
            return
        if partial is not None and (partial.peer, partial.offer) == (inbound.peer, offer):
            self._resume(partial, inbound)
            return
        if partial is not None:
            self._discard(partial, Unavailable("a newer snapshot is on its way here", code="unavailable"))
        self._begin(inbound, offer)

    def _begin(self, inbound: _Inbound, offer: Offer) -> None:
        partial = self._partial = _Partial(inbound.peer, offer, self._directory.new())
        partial.inbound = inbound
        inbound.partial = partial
        if self._log is not None:
            self._log.info("receiving a snapshot", sender=partial.peer, index=offer.index, size_bytes=offer.size_bytes)
        partial.is_writing = True
        self._worker.run(lambda: self._prepare(partial), lambda _, error: self._written(partial, error))

    def _resume(self, partial: _Partial, inbound: _Inbound) -> None:
        if partial.timer is not None:
            partial.timer.cancel()
            partial.timer = None
        if partial.inbound is not None:
            partial.inbound.break_off(Unavailable("the sender came back on another stream", code="closed"))
        partial.inbound = inbound
        inbound.partial = partial
        if not partial.is_writing:
            inbound.say(Want(tuple(partial.positions)))
        # else: `_written` says it, when the positions are known

    def chunk_came(self, partial: _Partial, chunk: Chunk) -> None:
        if partial.state is not _State.RECEIVING or not partial.inbound or not partial.inbound.has_been_answered:
            self._out_of_turn(partial, "a chunk")
            return
        partial.chunks.append(chunk)
        partial.waiting_bytes += len(chunk.data)
        if partial.waiting_bytes >= WAITING_BYTES_MAX:
            partial.inbound.pause()
        self._write(partial)

    def end_came(self, partial: _Partial) -> None:
        if partial.state is not _State.RECEIVING or not partial.inbound or not partial.inbound.has_been_answered:
            self._out_of_turn(partial, "an end")
            return
        partial.inbound.has_ended = True
        self._verify_when_written(partial)

    def _out_of_turn(self, partial: _Partial, what: str) -> None:
        if partial.inbound is not None:
            partial.inbound.break_off(Refused(f"{what} out of turn ({partial.state.value})", code="malformed_frame"))

    def stream_lost(self, inbound: _Inbound) -> None:
        partial = inbound.partial
        if partial is None or partial.inbound is not inbound:
            return
        partial.inbound = None
        if partial.state is _State.RECEIVING and not self._is_stopped:
            partial.timer = self._env.scheduler.call_later(KEPT_S, self._given_up, partial)

    def _given_up(self, partial: _Partial) -> None:
        partial.timer = None
        self._discard(partial, Unavailable("the sender did not come back", code="timeout"))

    # --- writing ------------------------------------------------------------------------------------------------------

    def _prepare(self, partial: _Partial) -> None:
        """Make the directory and reserve the space, so that a disk that is too full says so at once. In a thread."""
        files = self._env.files
        files.make_dirs(partial.path)
        for info in partial.offer.files:
            file = files.open(f"{partial.path}/{info.name}", create=True)
            try:
                if info.size_bytes:
                    file.allocate(info.size_bytes)
            finally:
                file.close()

    def _write(self, partial: _Partial) -> None:
        if partial.is_writing or not partial.chunks:
            return
        partial.is_writing = True
        chunks, partial.chunks = partial.chunks, []
        self._worker.run(lambda: self._write_chunks(partial, chunks), lambda _, error: self._written(partial, error))

    def _write_chunks(self, partial: _Partial, chunks: list[Chunk]) -> None:
        """In a thread. Raises `Unavailable` for what was damaged on its way, OSError for what the disk does not take;
        positions say how far it came."""
        file, number = None, -1
        try:
            for chunk in chunks:
                if not wire.is_whole(chunk):
                    raise Unavailable("a chunk was damaged on its way", code="unavailable")
                if (
                    chunk.file >= len(partial.positions)
                    or chunk.offset != partial.positions[chunk.file]
                    or chunk.offset + len(chunk.data) > partial.offer.files[chunk.file].size_bytes
                ):
                    raise Unavailable("a chunk that was not wanted", code="unavailable")
                if chunk.file != number:
                    if file is not None:
                        file.close()
                    number, file = chunk.file, self._open(partial, chunk.file)
                assert file is not None
                file.write_at(chunk.offset, [chunk.data])
                partial.positions[number] += len(chunk.data)
                partial.unsynced.add(number)
                partial.unsynced_bytes += len(chunk.data)
                if partial.unsynced_bytes >= SYNC_BYTES:
                    self._sync_written(partial)
        finally:
            if file is not None:
                file.close()

    def _sync_written(self, partial: _Partial) -> None:
        for number in sorted(partial.unsynced):
            file = self._open(partial, number)
            try:
                file.sync()
            finally:
                file.close()
        partial.unsynced.clear()
        partial.unsynced_bytes = 0

    def _open(self, partial: _Partial, number: int) -> File:
        return self._env.files.open(f"{partial.path}/{partial.offer.files[number].name}")

    def _written(self, partial: _Partial, error: BaseException | None) -> None:
        partial.is_writing = False
        if partial.state is _State.OVER:
            return
        inbound = partial.inbound
        if isinstance(error, Unavailable):
            # What was written before it stands; the sender comes back for the rest.
            partial.drop_chunks()
            if inbound is not None and inbound.has_been_answered:
                inbound.break_off(error)
                return
        elif error is not None:
            self._failed(partial, error)
            return
        partial.waiting_bytes = sum(len(chunk.data) for chunk in partial.chunks)
        self._write(partial)  # also when the stream that brought them is lost: they need not come again
        if inbound is None:
            return
        if not inbound.has_been_answered:
            if not partial.is_writing:
                inbound.say(Want(tuple(partial.positions)))
            return
        if partial.waiting_bytes < WAITING_BYTES_MAX:
            inbound.resume()
        self._verify_when_written(partial)

    # --- verifying ----------------------------------------------------------------------------------------------------

    def _verify_when_written(self, partial: _Partial) -> None:
        inbound = partial.inbound
        if inbound is None or not inbound.has_ended or partial.is_writing or partial.chunks:
            return
        if partial.state is _State.RECEIVING:
            partial.state = _State.VERIFYING
            self._worker.run(lambda: self._verify(partial), lambda bad, error: self._verified(partial, bad, error))

    def _verify(self, partial: _Partial) -> list[int]:
        """Sync the rest; then the numbers of the files that are not what was offered. In a thread."""
        files, bad = self._env.files, []
        for number, info in enumerate(partial.offer.files):
            file = self._open(partial, number)
            try:
                file.sync()
            finally:
                file.close()
            if describe(files, partial.path, info.name) != info:
                bad.append(number)
        files.sync_dir(partial.path)
        return bad

    def _verified(self, partial: _Partial, bad: list[int] | None, error: BaseException | None) -> None:
        if partial.state is _State.OVER:
            return
        if error is not None:
            self._failed(partial, error)
            return
        if bad:
            if self._log is not None:
                names = [partial.offer.files[number].name for number in bad]
                self._log.warning("a snapshot came damaged; fetching again", sender=partial.peer, files=names)
            for number in bad:
                partial.positions[number] = 0
            partial.state = _State.RECEIVING
            inbound = partial.inbound
            if inbound is None:  # it was lost meanwhile; the sender comes back
                partial.timer = self._env.scheduler.call_later(KEPT_S, self._given_up, partial)
            else:
                inbound.has_ended = False
                inbound.say(Want(tuple(partial.positions)))
            return
        self._worker.run(
            lambda: self._machine.inspect(partial.path), lambda found, error: self._inspected(partial, found, error)
        )

    def _inspected(self, partial: _Partial, found: Checkpoint | None, error: BaseException | None) -> None:
        if partial.state is _State.OVER:
            return
        if error is None and found != partial.offer.checkpoint:
            error = InternalError("the snapshot does not hold what was announced", code="state_damaged")
        if error is not None:
            self._failed(partial, error)
            return
        partial.state = _State.HANDED_OVER
        self._hand_over(partial)

    def _hand_over(self, partial: _Partial) -> None:
        partial.timer = None
        partial.hand_overs += 1
        self._handler.snapshot_received(
            partial.peer, partial.offer.checkpoint, partial.path, lambda refusal: self._answered(partial, refusal)
        )

    def _answered(self, partial: _Partial, refusal: KvError | None) -> None:
        assert partial.state in (_State.HANDED_OVER, _State.OVER), "a snapshot is answered once"
        if partial.state is _State.OVER:
            return  # stopped meanwhile
        if refusal is not None and refusal.code == "unavailable" and partial.hand_overs < HAND_OVERS_MAX:
            partial.timer = self._env.scheduler.call_later(HAND_OVER_AGAIN_S, self._hand_over, partial)
            return
        if refusal is None:
            self._installed = partial.offer.id
        self._end(partial, refusal)

    # --- endings ------------------------------------------------------------------------------------------------------

    def _failed(self, partial: _Partial, error: BaseException) -> None:
        if not isinstance(error, KvError):
            code = "storage_failed" if isinstance(error, OSError) else "state_damaged"
            error = InternalError(f"the snapshot cannot be received here: {error}", code=code)
        if self._log is not None:
            self._log.error("a snapshot could not be received", sender=partial.peer, code=error.code, reason=str(error))
        self._end(partial, error)

    def _end(self, partial: _Partial, error: KvError | None) -> None:
        """Tell the sender, for good."""
        inbound, partial.inbound = partial.inbound, None
        if inbound is not None:
            inbound.partial = None
            inbound.say(Done(error.code, error.message) if error else Done())
        self._discard(partial, None)

    def _discard(self, partial: _Partial, error: KvError | None) -> None:
        """Forget it, and remove what is not in use: its directory, and after an install the former state."""
        self._forget(partial, error)
        if self._is_stopped:
            return
        leftovers = self._directory.leftovers()

        def removed(_: None, error: BaseException | None) -> None:
            if error is not None and self._log is not None:
                self._log.warning("leftovers stay until the next start", error=str(error))

        self._worker.run(lambda: self._directory.remove_leftovers(leftovers), removed)

    def _forget(self, partial: _Partial, error: KvError | None) -> None:
        partial.state = _State.OVER
        partial.drop_chunks()
        if partial.timer is not None:
            partial.timer.cancel()
            partial.timer = None
        if partial.inbound is not None and error is not None:
            partial.inbound.break_off(error)
        partial.inbound = None
        self._directory.release(partial.path)
        if self._partial is partial:
            self._partial = None


class _Inbound:
    """The `StreamHandler` of a stream on which a peer sends us a snapshot."""

    __slots__ = ("_receiver", "_stream", "has_been_answered", "has_ended", "partial", "peer")

    def __init__(self, receiver: SnapshotReceiver, peer: str) -> None:
        self._receiver = receiver
        self.peer = peer
        self.partial: _Partial | None = None
        self.has_been_answered = False  # it was told what is wanted
        self.has_ended = False
        self._stream: Connection | None = None

    def opened(self, stream: Connection) -> None:
        self._stream = stream

    def received(self, peer: str, body: bytes) -> None:
        try:
            words = wire.decode(body)
        except Refused as error:
            self.break_off(error)
            return
        partial = self.partial
        if partial is None and isinstance(words, Offer):
            self._receiver.offered(self, words)
        elif partial is not None and isinstance(words, Chunk):
            self._receiver.chunk_came(partial, words)
        elif partial is not None and isinstance(words, End):
            self._receiver.end_came(partial)
        elif partial is not None or isinstance(words, (Want, Done)):
            self.break_off(Refused(f"{type(words).__name__} has no place here", code="malformed_frame"))
        # else: what was still on its way when this stream's snapshot ended

    def drained(self) -> None:
        """Nothing waits: what is said here is a few words."""

    def closed(self, error: KvError) -> None:
        self._stream = None
        self._receiver.stream_lost(self)

    def say(self, words: wire.Words) -> None:
        if isinstance(words, Want):
            self.has_been_answered = True
        if self._stream is not None:
            self._stream.send(wire.encode(words))
            self._stream.flush()

    def break_off(self, error: KvError) -> None:
        """Close the stream; the sender may come back."""
        if self._stream is not None:
            self._stream.close(error, tell=True)

    def pause(self) -> None:
        if self._stream is not None:
            self._stream.pause_reading()

    def resume(self) -> None:
        if self._stream is not None:
            self._stream.resume_reading()
