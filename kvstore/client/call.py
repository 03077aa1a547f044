"""One call: a request on its way to its one answer, over as many attempts as its deadline allows.

What an attempt's end means:

| it ended with | the attempt | then |
|---|---|---|
| an answer, a refusal | is done | the call is done |
| `not_leader` `no_leader` `overloaded` `unavailable` `storage_failed` `shutting_down` … | took no effect | send again |
| `outcome_unknown`, a lost connection | may have taken effect | send again: reads freely, mutations by their session |
| `session_expired` | took no effect | a new session, if no earlier attempt is in doubt; else the outcome is unknown |

The same mutation keeps its (session, seq) through all attempts, so the store applies it once. At the deadline a
mutation with an attempt in doubt ends as `OutcomeUnknown`; anything else as `Unavailable`. Its code is that of the last
definite no (`storage_failed`, `no_leader` …), whoever was told it: the call, the opening of its session, or, where
nothing could be sent, the pool; `timeout` where there was none, or something newer is unanswered.

A call has one future, which its caller awaits, and no task: attempts, backoff and deadline are callbacks.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import TYPE_CHECKING

from msgspec import Raw

from kvstore import codec
from kvstore.client.deadlines import Deadlines
from kvstore.client.pool import Link, Pool, Reason, Route
from kvstore.codec import Answer, ClientFrame, Failure, Read, ServerFrame, Write
from kvstore.errors import UNAVAILABLE_CODES, KvError, OutcomeUnknown, Refused, Unavailable, error_for
from kvstore.model import ErrorResult

if TYPE_CHECKING:
    from kvstore.client.session import Session, Sessions

# The first retry comes about when a busy leader has finished its batch; the last keeps a refused client's load low
# while it still notices a recovery within half a second.
BACKOFF_MIN_S, BACKOFF_MAX_S = 0.010, 0.500
# Reads under way in one client. Mutations are bounded by their session; this many reads keep any node busy.
READS_MAX = 16_384


class Call:
    """A request without a session: base of the kinds below. A sink of frames, and something that can be parked."""

    __slots__ = (
        "_dispatcher",
        "_frame_id",
        "_link",
        "_over",
        "_timer",
        "attempts",
        "deadline",
        "future",
        "in_doubt",
        "last_code",
        "last_error",
        "parked",
        "route",
        "slot",
    )

    def __init__(self, dispatcher: Dispatcher, loop: asyncio.AbstractEventLoop, deadline: float, route: Route) -> None:
        self._dispatcher = dispatcher
        self._frame_id = 0
        self._link: Link | None = None
        self._over = False
        self._timer: asyncio.TimerHandle | None = None
        self.attempts = 0
        self.deadline = deadline
        self.future: asyncio.Future[object] = loop.create_future()
        self.parked = False
        self.in_doubt = False
        """True once an attempt ended that may have taken effect."""
        self.last_code = ""
        """The code of the last attempt's end if that was a definite no, else empty."""
        self.last_error = ""
        self.route = route
        self.slot = 0

    # --- what the kinds of calls differ in ----------------------------------------------------------------------------

    def frame(self, frame_id: int) -> ClientFrame:
        raise NotImplementedError

    def refused(self, code: str, message: str, operation: tuple[int, ...]) -> None:
        """A definite no from the store."""
        self.fail(error_for(code, message, operation))

    def lost(self) -> None:
        """An attempt ended in doubt."""
        self._dispatcher.again(self)

    def released(self) -> None:
        """The call is over, however it ended."""

    def late(self, what: str, code: str) -> KvError:
        """The error of a call that ends without an answer: its time is up, or its client closes."""
        return Unavailable(self._message(what), code=code)

    def choose(self, pool: Pool) -> Link | None:
        return pool.choose(self.route)

    # --- for callers and the dispatcher -------------------------------------------------------------------------------

    @property
    def under_way(self) -> bool:
        return self._link is not None

    def finish(self, result: object) -> None:
        self._release()
        if not self.future.done():
            self.future.set_result(result)

    def fail(self, error: KvError) -> None:
        self._release()
        if not self.future.done():
            self.future.set_exception(error)

    def expire(self) -> None:
        self.fail(self.late("no answer in time", self.reason().code or "timeout"))

    def drop(self) -> None:
        """The caller is gone."""
        self._release()
        self.future.cancel()

    def sent(self, link: Link, frame_id: int) -> None:
        self._link = link
        self._frame_id = frame_id
        self.attempts += 1

    def wait(self, timer: asyncio.TimerHandle) -> None:
        self._timer = timer

    def wake(self) -> None:
        self._timer = None
        self.parked = False
        self._dispatcher.attempt(self)

    def refuse(self, error: KvError) -> None:
        # Each caller gets an error of its own: one exception raised in many tasks would mix up their tracebacks.
        self.fail(error_for(error.code, error.message))

    def _release(self) -> None:
        if self._over:
            return
        self._over = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._link is not None:
            if self._link.channel is not None:
                self._link.channel.forget(self._frame_id)
            self._link = None
        self._dispatcher.done(self)
        self.released()

    def reason(self) -> Reason:
        """Why this call is not done yet, as far as anybody knows."""
        if self.last_error:
            return Reason("" if self.under_way else self.last_code, self.last_error)
        if self._link is not None:
            return Reason("", f"{self._link.address} has not answered")
        return self._why_not_sent()

    def _why_not_sent(self) -> Reason:
        return self._dispatcher.why_parked(self.route)

    def _message(self, what: str) -> str:
        reason = self.reason().text
        return f"{what} (attempts: {self.attempts}{'; last: ' + reason if reason else ''})"

    # --- sink ---------------------------------------------------------------------------------------------------------

    def on_frame(self, frame: ServerFrame) -> None:
        if self._over:
            return
        link, self._link = self._link, None
        if type(frame) is Answer:
            try:
                result = codec.decode_result(frame.result)
            except Refused as error:  # the node did something, and we cannot read what
                self.last_code, self.last_error = "", str(error)
                self.in_doubt = True
                if link is not None:
                    link.close(f"it gave an answer that is none: {error}")
                self.lost()
                return
            if type(result) is not ErrorResult:
                self.finish(result)
                return
            code, message, operation, hint = result.code, result.message, result.operation, ""
        elif type(frame) is Failure:
            code, message, operation, hint = frame.code, frame.message, (), frame.leader
        else:
            self.finish(frame)
            return
        if code in UNAVAILABLE_CODES:
            self.last_code, self.last_error = code, f"{link.address if link else ''}: {message} [{code}]"
            self._dispatcher.unavailable(self, link, code, message, hint)
        elif code == "outcome_unknown":
            self.last_code, self.last_error = "", f"{link.address if link else ''}: {message} [{code}]"
            self.in_doubt = True
            self.lost()
        else:
            self.refused(code, message, operation)

    def on_lost(self) -> None:
        if self._over:
            return
        link, self._link = self._link, None
        self.last_code = ""
        self.last_error = link.last_error if link is not None else self.last_error
        self.in_doubt = True
        self.lost()


class ReadCall(Call):
    """A Range, or a Txn that only reads. Changes nothing, so it is repeated anywhere."""

    __slots__ = ("_address", "_level", "_min_revision", "_request")

    def __init__(
        self,
        dispatcher: Dispatcher,
        loop: asyncio.AbstractEventLoop,
        deadline: float,
        request: bytes,
        level: int,
        min_revision: int,
        route: Route,
        address: str = "",
    ) -> None:
        """`address`: the one node that is asked, where it is not any."""
        super().__init__(dispatcher, loop, deadline, route)
        self._address = address
        self._request = request
        self._level = level
        self._min_revision = min_revision

    def released(self) -> None:
        self._dispatcher.read_done()

    def frame(self, frame_id: int) -> ClientFrame:
        return Read(frame_id, self._level, self._min_revision, Raw(self._request))

    def choose(self, pool: Pool) -> Link | None:
        return pool.at(self._address) if self._address else super().choose(pool)


class AdminCall(Call):
    """A status request (repeated until it is answered) or a change of the cluster, which no session protects: once it
    is in doubt it ends so."""

    __slots__ = ("_address", "_make_frame")

    def __init__(
        self,
        dispatcher: Dispatcher,
        loop: asyncio.AbstractEventLoop,
        deadline: float,
        make_frame: Callable[[int], ClientFrame],
        *,
        changes: bool,
        address: str = "",
    ) -> None:
        super().__init__(dispatcher, loop, deadline, Route.LEADER if changes else Route.ANY)
        self._make_frame = make_frame
        self._address = address

    def frame(self, frame_id: int) -> ClientFrame:
        return self._make_frame(frame_id)

    def lost(self) -> None:
        if self.route is Route.LEADER:
            self.fail(self.late("the connection was lost", "unavailable"))
        else:
            super().lost()

    def late(self, what: str, code: str) -> KvError:
        if self.route is Route.LEADER and (self.in_doubt or self.under_way):
            return OutcomeUnknown(self._message(f"{what}; look at the members before you try again"))
        return super().late(what, code)

    def choose(self, pool: Pool) -> Link | None:
        return pool.at(self._address) if self._address else super().choose(pool)


class WriteCall(Call):
    """A mutation. `session` is None until one takes it in (and stays so for OpenSession, which needs none: a second
    session opened by a repeated request harms nobody and expires)."""

    __slots__ = ("_sessions", "request", "seq", "session")

    def __init__(
        self,
        dispatcher: Dispatcher,
        loop: asyncio.AbstractEventLoop,
        deadline: float,
        request: bytes,
        sessions: Sessions,
    ) -> None:
        super().__init__(dispatcher, loop, deadline, Route.LEADER)
        self._sessions = sessions
        self.request = request
        self.session: Session | None = None
        self.seq = 0

    def frame(self, frame_id: int) -> ClientFrame:
        session = self.session
        if session is None:
            return Write(frame_id, 0, 0, 0, Raw(self.request))
        # The newest bound, also on a repeated request: it is at most this seq, which is unanswered.
        return Write(frame_id, session.id, self.seq, session.acked_below, Raw(self.request))

    def refused(self, code: str, message: str, operation: tuple[int, ...]) -> None:
        session = self.session
        if session is not None and code == "session_expired":
            self._sessions.expired(session)
            if self.in_doubt:
                self.fail(OutcomeUnknown(self._message("the session expired before an answer came")))
            else:
                self._sessions.readmit(self)
        elif session is not None and code == "session_full":
            # Answers that this client has by now fill the server's store; the next frame acknowledges them.
            self.last_code, self.last_error = "", f"{message} [{code}]"
            self._dispatcher.again(self)
        elif code == "stale_sequence":
            self.fail(OutcomeUnknown(self._message("the store no longer has the answer")))
        else:
            super().refused(code, message, operation)

    def late(self, what: str, code: str) -> KvError:
        if self.session is not None and (self.in_doubt or self.under_way):
            return OutcomeUnknown(self._message(f"{what}; the write may have taken effect, at most once"))
        return super().late(what, code)

    def _why_not_sent(self) -> Reason:
        # In line for a session: what keeps that from opening keeps this call.
        opening = self._sessions.opening if self.session is None else None
        if opening is not None and opening is not self:
            code, text = opening.reason()
            return Reason(code, f"opening a session: {text}" if text else "")
        return super()._why_not_sent()

    def released(self) -> None:
        self._sessions.over(self)


class Dispatcher:
    """Sends calls, sends them again, and ends them at their deadline."""

    __slots__ = ("_chance", "_deadlines", "_loop", "_next_id", "_pool", "_reads")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        pool: Pool,
        deadlines: Deadlines,
        chance: random.Random,
        next_id: Callable[[], int],
    ) -> None:
        self._loop = loop
        self._pool = pool
        self._deadlines = deadlines
        self._chance = chance
        self._next_id = next_id
        self._reads = 0

    def why_parked(self, route: Route) -> Reason:
        return self._pool.why_parked(route)

    @property
    def leader_ready(self) -> bool:
        return self._pool.leader_ready

    def submit_read(self, call: ReadCall) -> None:
        """Raises `Unavailable(overloaded)` when too many reads are under way."""
        if self._reads >= READS_MAX:
            raise Unavailable(f"{READS_MAX} reads of this client are under way; send fewer", code="overloaded")
        self._reads += 1
        self.submit(call)

    def read_done(self) -> None:
        self._reads -= 1

    def submit(self, call: Call) -> None:
        self._deadlines.add(call)
        self.attempt(call)

    def hold(self, call: Call) -> None:
        """Watch the deadline of a call that somebody else will let attempt."""
        self._deadlines.add(call)

    def attempt(self, call: Call) -> None:
        """Send it over a link that is ready, or park it until there is one."""
        link = call.choose(self._pool)
        channel = link.channel if link is not None else None
        if link is None or channel is None:
            call.parked = True
            self._pool.park(call)
            return
        frame_id = self._next_id()
        call.sent(link, frame_id)
        channel.send(call.frame(frame_id), call)

    def unavailable(self, call: Call, link: Link | None, code: str, message: str, hint: str) -> None:
        """An attempt took no effect."""
        self._pool.failed(link, code, hint)
        if code == "transfer_failed":
            call.fail(error_for(code, message))  # an operator asked for one try, and decides about the next
        elif code == "not_leader" and hint and call.attempts == 1:
            self.attempt(call)  # a first redirection is no sign of trouble
        else:
            self.again(call)

    def again(self, call: Call) -> None:
        """Attempt once more after a backoff with full jitter."""
        # 2**10 times the first wait is beyond the last already.
        ceiling_s = min(BACKOFF_MAX_S, BACKOFF_MIN_S * 2 ** min(call.attempts - 1, 10))
        call.wait(self._loop.call_later(self._chance.random() * ceiling_s, call.wake))

    def abandon(self, call: Call) -> None:
        """Its caller does not wait any more."""
        call.drop()

    def done(self, call: Call) -> None:
        self._deadlines.remove(call)
        if call.parked:
            self._pool.unpark(call)

    def close(self) -> None:
        """End every call that is not over."""
        for call in self._deadlines.close():
            assert isinstance(call, Call)
            call.fail(call.late("this client was closed", "closed"))
