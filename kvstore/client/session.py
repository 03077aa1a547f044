"""Exactly once: the session that numbers this client's mutations.

Rules
- A session opens before the first mutation and closes with the client; in between it is renewed when nothing else
  renews it. Its numbers run from 1, one for each mutation, in the order in which they are first sent.
- `acked_below` is the lowest number whose call is not over. A call is over when it was answered, and also when its
  caller gave up on it (deadline, cancellation): nobody will send that number again, so the store may forget its answer,
  and must not execute a copy of it that is still on its way once it has seen the acknowledgement.
- At most `WINDOW` numbers lie between `acked_below` and the next one, and at most `UNANSWERED_BYTES_MAX` of requests.
  Further calls wait in line; a line that is full refuses with `overloaded`.
- Keep-alives wait in no line: else a program with more to write than its cluster takes would lose its leases over it.
  `KEEPS` numbers beyond the window are theirs.
- When the store has forgotten a session, nothing that was in doubt is ever sent under a new one: see `call.py`.

After RIFL, "Implementing Linearizability at Large Scale and Low Latency" (SOSP 2015), and Ongaro's thesis, 6.3.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import TYPE_CHECKING

from kvstore import codec
from kvstore.client.call import WriteCall
from kvstore.errors import InternalError, KvError, Unavailable, error_for
from kvstore.model import CloseSession, KeepSession, OpenSession, SessionResult

if TYPE_CHECKING:
    from kvstore.client.call import Dispatcher

# The store keeps 1,024 unacknowledged results of a session (design section 5): these two together.
# A few keep-alives for each of some tens of leases, while the oldest request is being repeated.
KEEPS = 64
WINDOW = 1024 - KEEPS
# Twenty of the largest requests, or all of the window at 32 KiB each: enough to fill any line, small enough to hold.
UNANSWERED_BYTES_MAX = 32 * 1024 * 1024
# Callers in line behind a full window. Sixteen windows are more than a second's work; beyond, waiting helps nobody.
LINE_MAX = 16 * WINDOW
# A session lives 60 s without a request: three renewals would have to get lost. (Less where its ttl is shorter.)
RENEW_EVERY_S = 20.0

_OPEN = codec.encode_request(OpenSession())
_CLOSE = codec.encode_request(CloseSession())
_KEEP = codec.encode_request(KeepSession())


class Session:
    """The numbers of one session."""

    __slots__ = ("_over", "acked_below", "id", "next_seq", "used")

    def __init__(self, id: int) -> None:
        self.id = id
        self.next_seq = 1
        self.acked_below = 1
        self.used = True
        """True if a mutation went out since the last look."""
        self._over: set[int] = set()

    def take(self) -> int:
        seq = self.next_seq
        self.next_seq = seq + 1
        self.used = True
        return seq

    def over(self, seq: int) -> None:
        """Nobody waits for this number any more. Amortised O(1)."""
        assert self.acked_below <= seq < self.next_seq, "a number ends once, after it was taken"
        if seq != self.acked_below:
            self._over.add(seq)
            return
        seq += 1
        while seq in self._over:
            self._over.remove(seq)
            seq += 1
        self.acked_below = seq


class Sessions:
    """Takes mutations in, numbers them, and keeps a session open for them."""

    def __init__(self, loop: asyncio.AbstractEventLoop, dispatcher: Dispatcher, timeout_s: float) -> None:
        self._loop = loop
        self._dispatcher = dispatcher
        self._timeout_s = timeout_s
        self._session: Session | None = None
        self.opening: WriteCall | None = None
        """The call that opens a session for those in line, while there is one."""
        self._line: OrderedDict[WriteCall, None] = OrderedDict()
        self._unanswered_bytes = 0
        self._renew_every_s = RENEW_EVERY_S
        self._renew_timer: asyncio.TimerHandle | None = None
        self._closed = False

    def submit(self, call: WriteCall) -> None:
        """Number it and send it, or let it wait in line. Raises `Unavailable(overloaded)` when the line is full."""
        session = self._session
        if session is not None and not self._line and self._has_room(session):
            self._dispatcher.hold(call)
            self._admit(session, call)
            return
        if session is not None and self._may_overtake(session, call):
            self._dispatcher.hold(call)
            self._admit(session, call)
            return
        if len(self._line) >= LINE_MAX:
            raise Unavailable(
                f"{LINE_MAX} writes of this client wait behind {WINDOW} unanswered ones; send fewer", code="overloaded"
            )
        self._dispatcher.hold(call)
        self._line[call] = None
        if session is None:
            self._open()

    def over(self, call: WriteCall) -> None:
        """A call has ended, however it did."""
        session = call.session
        if session is None:
            self._line.pop(call, None)
            return
        session.over(call.seq)
        self._unanswered_bytes -= len(call.request)
        if self._line:
            self._advance()

    def expired(self, session: Session) -> None:
        """The store has forgotten a session: whatever is not sent yet goes under a new one."""
        if session is self._session:
            self._session = None

    def readmit(self, call: WriteCall) -> None:
        """A call of an expired session took no effect: it goes first under the new one."""
        assert not call.in_doubt, "what is in doubt is never sent under another session"
        self._unanswered_bytes -= len(call.request)
        call.session, call.seq = None, 0
        self._line[call] = None
        self._line.move_to_end(call, last=False)
        if self._session is None:
            self._open()
        else:
            self._advance()

    async def close(self, timeout_s: float) -> None:
        """Close the session, if that can be done soon; one that stays open ends by itself after its ttl."""
        self._closed = True
        if self._renew_timer is not None:
            self._renew_timer.cancel()
            self._renew_timer = None
        session, self._session = self._session, None
        if session is None or not self._dispatcher.leader_ready:
            return
        call = WriteCall(self._dispatcher, self._loop, self._loop.time() + timeout_s, _CLOSE, self)
        call.future.add_done_callback(_retrieve)
        self._dispatcher.hold(call)
        self._admit(session, call)
        await asyncio.wait((call.future,))  # ends by the call's own deadline

    # --- inside -------------------------------------------------------------------------------------------------------

    def _has_room(self, session: Session) -> bool:
        return session.next_seq - session.acked_below < WINDOW and self._unanswered_bytes < UNANSWERED_BYTES_MAX

    @staticmethod
    def _may_overtake(session: Session, call: WriteCall) -> bool:
        is_room = session.next_seq - session.acked_below < WINDOW + KEEPS
        return is_room and codec.is_keep_alive(call.request)

    def _admit(self, session: Session, call: WriteCall) -> None:
        call.session = session
        call.seq = session.take()
        self._unanswered_bytes += len(call.request)
        self._dispatcher.attempt(call)

    def _advance(self) -> None:
        """Let those in line go, as far as there is room."""
        session = self._session
        if session is None:
            return
        now = self._loop.time()
        while self._line and self._has_room(session):
            call, _ = self._line.popitem(last=False)
            if call.deadline > now:  # others are about to be told that their time is up
                self._admit(session, call)

    def _open(self) -> None:
        if self.opening is not None or self._closed:
            return
        call = WriteCall(self._dispatcher, self._loop, self._loop.time() + self._timeout_s, _OPEN, self)
        self.opening = call
        call.future.add_done_callback(self._opened)
        self._dispatcher.submit(call)

    def _opened(self, future: asyncio.Future[object]) -> None:
        self.opening = None
        error = asyncio.CancelledError() if future.cancelled() else future.exception()
        if self._closed:
            return
        if error is None:
            result = future.result()
            if isinstance(result, SessionResult):
                self._session = Session(result.session)
                self._renew_every_s = min(RENEW_EVERY_S, result.ttl_ms / 1000 / 3)
                if self._renew_timer is None:
                    self._renew_timer = self._loop.call_later(self._renew_every_s, self._renew)
                self._advance()
                return
            error = InternalError(f"the server answered {type(result).__name__} to OpenSession")
        if isinstance(error, Unavailable):
            # Its time was up, whatever code it ended with. Those in line have deadlines of their own, and later ones.
            if self._line:
                self._open()
            return
        assert isinstance(error, KvError), "an opening ends by an answer or by its deadline"
        waiting, self._line = self._line, OrderedDict()
        for call in waiting:
            call.fail(error_for(error.code, error.message))

    def _renew(self) -> None:
        self._renew_timer = None
        session = self._session
        if session is None or self._closed:
            return
        if not session.used:
            call = WriteCall(self._dispatcher, self._loop, self._loop.time() + self._renew_every_s, _KEEP, self)
            # If it fails, the session ends or does not; the next mutation finds out and acts on it.
            call.future.add_done_callback(_retrieve)
            self.submit(call)
        session.used = False
        self._renew_timer = self._loop.call_later(self._renew_every_s, self._renew)


def _retrieve(future: asyncio.Future[object]) -> None:
    """Nobody awaits this call: take its error, so that the loop does not report it as forgotten."""
    if not future.cancelled():
        future.exception()
