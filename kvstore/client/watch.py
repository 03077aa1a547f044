"""Watches: every event of a key or range, once, in order, whichever node it comes from.

`Watch` is what a user iterates over; `Stream` is what stays connected for it. A stream knows one number: the next
revision that it lacks. Where its node stops, falls silent, or has no leader, it asks another one to go on from there,
so that nothing is missed and nothing comes twice. Events of a revision are handed on when all of them are here, so a
revision that was cut off in its middle is simply asked for again.

What is read ahead is bounded: the node sends no more than a window of bytes beyond what has been taken from the
iterator. A program that stops iterating costs itself that window and the cluster nothing. If it stays away until the
history that it needs next is compacted, it gets `Refused(revision_compacted)`.

A revision larger than the window is assembled beyond it, up to `REVISION_BYTES_MAX`, once all before it has been taken;
and until it has been taken, no more than a window comes after it.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import AsyncIterator, Callable

from msgspec import Struct

from kvstore.client.call import BACKOFF_MAX_S, BACKOFF_MIN_S
from kvstore.client.pool import Link, Pool, Route
from kvstore.codec import (
    Answer,
    Failure,
    ServerFrame,
    WatchCancel,
    WatchCredit,
    WatchEvents,
    Watching,
    WatchProgress,
    decode_result,
)
from kvstore.codec import Watch as WatchFrame
from kvstore.errors import UNAVAILABLE_CODES, InternalError, KvError, Refused, Unavailable, error_for
from kvstore.model import ErrorResult, Event

# Some thousand small events: enough to keep a reader busy through a round trip, little enough for a thousand watches.
WINDOW_BYTES = 1024 * 1024
# Of one revision, as it is encoded. What a request puts, deletes and replaces takes some 80 MiB at most, with all the
# records before (`model.REPLACED_BYTES_MAX`, and keys come twice). The end of a lease on many large ones may take more.
REVISION_BYTES_MAX = 128 * 1024 * 1024


class What(Struct, frozen=True):
    """What is watched."""

    start: bytes
    end: bytes | None
    from_revision: int
    prev: bool
    puts: bool
    deletes: bool
    future: bool


class Stream:
    """A sink of frames, and something that can be parked in the pool."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        pool: Pool,
        chance: random.Random,
        what: What,
        timeout_s: float,
        ended: Callable[[Stream], None],
    ) -> None:
        self.loop = loop
        self._ended = ended
        self._pool = pool
        self._chance = chance
        self._what = what
        self._timeout_s = timeout_s
        self._link: Link | None = None
        self._frame_id = 0
        self._attempts = 0  # since a node last served it
        self._parked = False
        self._is_full = False
        self._is_served = False  # by the node that was asked last
        self._last_error = ""
        self._retry: asyncio.TimerHandle | None = None
        self._give_up: asyncio.TimerHandle | None = None
        self._partial: list[Event] = []  # of a revision whose end has yet to come
        self._partial_bytes = 0
        self._ahead_bytes = 0  # of these, what was credited though it is not taken
        self._held_bytes = 0  # of whole revisions that are not taken
        self._owed_bytes = 0  # taken, and not yet credited
        self._waiter: asyncio.Future[None] | None = None
        self.first = what.from_revision
        """The first revision that is watched; 0 until the first node has said it."""
        self.next = what.from_revision
        """The first revision of which it lacks events; 0 until the first node has said from where on it watches."""
        self.ready: deque[tuple[tuple[Event, ...], int, int]] = deque()
        """Events of whole revisions, the last revision that they complete, and what they took of the window."""
        self.error: KvError | None = None
        self.stands = False

    # --- for the iterator ---------------------------------------------------------------------------------------------

    async def more(self) -> None:
        """Return when something is ready, the stream has ended, or it knows more."""
        if self.ready or self.error is not None:
            return
        if self._waiter is not None:
            raise RuntimeError("one task at a time reads a watch; have each open its own")
        self._waiter = self.loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def taken(self, size_bytes: int) -> None:
        """So many bytes of events need no room any more."""
        if self.error is not None:
            return
        self._held_bytes -= size_bytes
        self._credit(size_bytes)
        if self._is_full and self._room >= WINDOW_BYTES // 4:
            self.begin()
        self._let_partial_grow()

    def close(self, error: KvError) -> None:
        """End it, with what is to be told to who still reads."""
        if self.error is not None or self.loop.is_closed():  # a closed loop, and every connection with it
            return
        link, self._link = self._link, None
        if link is not None and link.channel is not None:
            link.channel.forget(self._frame_id)
            link.channel.tell(WatchCancel(self._frame_id))
        self._end(error)

    # --- getting served -----------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Ask a node to serve it, or park until there is one."""
        self._retry = None
        self._is_full = self._room < WINDOW_BYTES // 4
        if self._is_full:
            if self._give_up is not None:
                self._give_up.cancel()
                self._give_up = None
            return  # nobody is asked for what there is no room for; `taken` goes on
        self._arm_give_up()
        link = self._pool.choose(Route.REPLICA)
        channel = link.channel if link is not None else None
        if link is None or channel is None:
            self._parked = True
            self._pool.park(self)
            return
        self._link = link
        self._frame_id = self._pool.next_id()
        self._attempts += 1
        self._owed_bytes = 0
        self._is_served = False
        self._drop_partial()
        what = self._what
        future = what.future and self.next == what.from_revision
        channel.send(
            WatchFrame(
                self._frame_id,
                what.start,
                what.end,
                self.next,
                what.prev,
                what.puts,
                what.deletes,
                future,
                self._room,
            ),
            self,
        )

    @property
    def _room(self) -> int:
        """Bytes of the window that are not filled by what is not yet taken; below 0 where that is more."""
        return WINDOW_BYTES - self._held_bytes

    def _credit(self, size_bytes: int) -> None:
        self._owed_bytes += size_bytes
        # In a few portions: each costs a frame.
        if self._owed_bytes >= WINDOW_BYTES // 4 and self._link is not None and self._link.channel is not None:
            self._link.channel.tell(WatchCredit(self._frame_id, self._owed_bytes))
            self._owed_bytes = 0

    def _let_partial_grow(self) -> None:
        """The rest of a revision may need the room that its beginning takes. It gets it when nothing else is held."""
        more_bytes = self._partial_bytes - self._ahead_bytes
        if more_bytes and not self._held_bytes:
            self._ahead_bytes += more_bytes
            self._credit(more_bytes)

    def _drop_partial(self) -> None:
        self._partial.clear()
        self._partial_bytes = self._ahead_bytes = 0

    def _arm_give_up(self) -> None:
        if self._give_up is None:
            self._give_up = self.loop.call_later(self._timeout_s, self._too_late)

    def wake(self) -> None:
        """There is a way to a node."""
        self._parked = False
        self.begin()

    def refuse(self, error: KvError) -> None:
        self._parked = False
        self._end(error_for(error.code, error.message))

    def _again(self) -> None:
        self._link = None
        self._drop_partial()
        if self.error is not None or self._retry is not None:
            return
        self._arm_give_up()
        if self._attempts == 0:
            self.begin()  # it was served until now: another node may be ready
            return
        ceiling_s = min(BACKOFF_MAX_S, BACKOFF_MIN_S * 2 ** min(self._attempts, 10))
        self._retry = self.loop.call_later(self._chance.random() * ceiling_s, self.begin)

    def _too_late(self) -> None:
        self._give_up = None
        link, self._link = self._link, None
        if link is not None and link.channel is not None:
            link.channel.forget(self._frame_id)
            link.channel.tell(WatchCancel(self._frame_id))
        reason = self._last_error or self._pool.why_parked(Route.REPLICA).text
        text = f"no node has served this watch for {self._timeout_s:g} s{'; last: ' + reason if reason else ''}"
        self._end(Unavailable(text, code="timeout"))

    def _end(self, error: KvError) -> None:
        if self.error is not None:
            return
        self.error = error
        for timer in (self._retry, self._give_up):
            if timer is not None:
                timer.cancel()
        self._retry = self._give_up = None
        if self._parked:
            self._parked = False
            self._pool.unpark(self)
        self._link = None
        self._drop_partial()
        self._ended(self)
        self._notify()

    def _notify(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # --- sink ---------------------------------------------------------------------------------------------------------

    def on_frame(self, frame: ServerFrame) -> None:
        if self._link is None:
            return
        if type(frame) is WatchEvents:
            self._on_events(frame)
        elif type(frame) is WatchProgress:
            # One that was on its way before this watch stood speaks of others.
            if self._is_served and self._frame_id not in frame.behind and not self._partial:
                self._complete((), frame.revision, 0)
        elif type(frame) is Watching:
            self.stands = self._is_served = True
            self.first = self.first or frame.from_revision
            self.next = self.next or frame.from_revision
            if self._give_up is not None:
                self._give_up.cancel()
                self._give_up = None
            self._notify()
        elif type(frame) is Failure:
            self._failed(frame.code, frame.message, frame.leader)
        elif type(frame) is Answer:
            try:
                result = decode_result(frame.result)
            except Refused as error:
                self._nonsense(f"bytes that are no result: {error.message}")
                return
            if isinstance(result, ErrorResult):
                self._failed(result.code, result.message, "")
            else:
                self._nonsense(type(result).__name__)
        else:
            self._nonsense(type(frame).__name__)

    def on_lost(self) -> None:
        if self._link is not None:
            self._last_error = self._link.last_error
            self._again()

    def _on_events(self, frame: WatchEvents) -> None:
        if frame.more:
            self._partial.extend(frame.events)
            self._partial_bytes += frame.size_bytes
            if self._partial_bytes > REVISION_BYTES_MAX:
                self.close(_too_large(frame.revision))
            else:
                self._let_partial_grow()
            return
        events, size_bytes = frame.events, frame.size_bytes
        if self._partial:
            events = (*self._partial, *events)
            size_bytes += self._partial_bytes
            self._owed_bytes -= self._ahead_bytes
            self._drop_partial()
        self._complete(events, frame.revision, size_bytes)

    def _complete(self, events: tuple[Event, ...], revision: int, size_bytes: int) -> None:
        self._attempts = 0
        if revision < self.next and not events:
            return
        self.next = max(self.next, revision + 1)
        if events:
            self._held_bytes += size_bytes
            self.ready.append((events, revision, size_bytes))
        elif self.ready and not self.ready[-1][0]:
            self.ready[-1] = ((), revision, 0)
        else:
            self.ready.append(((), revision, 0))
        self._notify()

    def _failed(self, code: str, message: str, leader: str) -> None:
        """This node does not serve it, or not any more."""
        link, self._link = self._link, None
        if code in UNAVAILABLE_CODES:
            self._last_error = f"{link.address if link else ''}: {message} [{code}]"
            self._pool.failed(link, code, leader)
            self._again()
        else:
            self._end(error_for(code, message))

    def _nonsense(self, what: str) -> None:
        """This node knows the watch no more, and was not understood. It would answer so again: that is for people."""
        link, self._link = self._link, None
        assert link is not None
        self._end(InternalError(f"{link.address} answered a watch with {what}; its version may not be this client's"))
        link.close("it answered a watch with what is none of its answers")


def _too_large(revision: int) -> Refused:
    return Refused(
        f"the events of revision {revision} take more than {REVISION_BYTES_MAX} bytes: read what you need anew, and "
        f"watch from {revision + 1} on; a narrower range, or a watch without `prev`, takes less",
        code="result_too_large",
    )


class Watch:
    """Made by `Client.watch`: an async iterator over events that never ends by itself.

    `async for event in watch` gives `Event`s one by one; `async for events in watch.revisions()` a tuple of those of
    one revision, which are a transaction's. One task at a time may read. Leave it with `break` and `await
    watch.close()`, or use it as `async with kv.watch(...) as watch`, which waits until the watch stands: what changes
    from then on will be seen.
    """

    def __init__(self, stream: Stream, marks: bool) -> None:
        self._stream = stream
        self._marks = marks
        self._current: deque[Event] = deque()
        self._current_revision = 0  # what `_current`'s last event completes
        self._current_bytes = 0
        self._next = stream.first

    async def __aenter__(self) -> Watch:
        await self.standing()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def standing(self) -> None:
        """Wait until a node serves it. Raises what iterating would raise."""
        stream = self._stream
        while not stream.stands and stream.error is None:
            await stream.more()
        if stream.error is not None and not stream.stands:
            raise stream.error

    async def close(self) -> None:
        """End it. May be called twice."""
        self._stream.close(Unavailable("this watch was closed", code="closed"))

    def __del__(self) -> None:
        stream = self._stream
        if stream.error is None:
            try:
                stream.loop.call_soon_threadsafe(stream.close, Unavailable("this watch was dropped", code="closed"))
            except RuntimeError:
                return  # its loop is closed, and with it every connection

    @property
    def next_revision(self) -> int:
        """Where to go on after what has been read: `kv.watch(..., from_revision=watch.next_revision)` misses nothing
        and repeats nothing, if every event of the revisions before has been dealt with. 0 before the watch stands."""
        return self._next or self._stream.first

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        while not self._current:
            await self._load()
        event = self._current.popleft()
        if self._current:
            self._next = event.revision + (self._current[0].revision > event.revision)
        else:
            self._unload()
        return event

    async def revisions(self) -> AsyncIterator[tuple[Event, ...]]:
        """The events of one revision at a time. With `marks`, also empty tuples: nothing has happened here up to
        `next_revision`."""
        while True:
            if not self._current:
                is_mark = await self._load()
                if is_mark and self._marks:
                    yield ()
                continue
            revision = self._current[0].revision
            events = []
            while self._current and self._current[0].revision == revision:
                events.append(self._current.popleft())
            if self._current:
                self._next = revision + 1
            else:
                self._unload()
            yield tuple(events)

    async def _load(self) -> bool:
        """Make the next frame's events current; True if it was a mark, and has none."""
        stream = self._stream
        while not stream.ready:
            if stream.error is not None:
                raise stream.error
            await stream.more()
        events, self._current_revision, self._current_bytes = stream.ready.popleft()
        self._current.extend(events)
        if not events:
            self._unload()
        return not events

    def _unload(self) -> None:
        self._next = max(self.next_revision, self._current_revision + 1)
        self._stream.taken(self._current_bytes)
        self._current_bytes = 0
