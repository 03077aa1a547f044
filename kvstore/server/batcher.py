"""Concurrent requests -> one log entry -> their answers (design section 3).

All writes that arrive while the previous step is busy travel as one entry: one encoding, one fsync, one round trip.
The first request of an idle moment waits for nothing but the end of the loop's turn.

Rules
- An entry closes at `ENTRY_BYTES_MAX` or `ENTRY_REQUESTS_MAX`; a larger request travels alone. At most
  `IN_FLIGHT_MAX` entries are under way; what arrives meanwhile makes the next ones larger.
- Answers find their requests by position: the state machine gives one encoded result per request, in order.
- Every request gets exactly one answer: its result, or a `Failure` that says for sure that it was not taken, or
  `outcome_unknown`.
- What waits is bounded. Past the high mark the doors are asked to stop reading (`on_pressure`), past the hard bound
  (what their buffers still held) requests are refused with `overloaded`.

No task and no future per request: a list of requests, a list of those who wait, one callback per entry. It does not
judge requests (the node has), knows no connection, and sends no request twice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from msgspec import Raw

from kvstore import codec, versions
from kvstore.env import Environment, Timer
from kvstore.errors import KvError, Unavailable
from kvstore.meters import Meter
from kvstore.server.failures import not_leading, shutting_down
from kvstore.server.log_clock import LogClock
from kvstore.server.ports import Proposer, Reply

# Large enough that framing and fsync cost nothing per request; small enough that an entry takes few milliseconds to
# send, sync and apply, and no follower waits long behind one.
ENTRY_BYTES_MAX = 1024 * 1024
ENTRY_REQUESTS_MAX = 8_192
# One at the disk, one on the way, one being applied, one to come. More would only make each smaller.
IN_FLIGHT_MAX = 4
# What a request costs in an entry besides its own bytes (session, sequence number, array heads), at most.
_ITEM_OVERHEAD_BYTES = 32

# About as much as the four entries under way: enough to keep them coming, not so much that a request waits long.
WAITING_REQUESTS_HIGH, WAITING_REQUESTS_LOW = 4 * ENTRY_REQUESTS_MAX, 2 * ENTRY_REQUESTS_MAX
WAITING_BYTES_HIGH, WAITING_BYTES_LOW = 16 * ENTRY_BYTES_MAX, 8 * ENTRY_BYTES_MAX
# Sockets that were told to stop have up to a read buffer (256 KiB) of requests each under way still.
WAITING_REQUESTS_MAX = 16 * ENTRY_REQUESTS_MAX
WAITING_BYTES_MAX = 64 * ENTRY_BYTES_MAX

# A leader may be unable to take proposals for a moment (a hand-over under way, its first entry not yet committed).
# What waits is held that long: longer than a hand-over is tried, shorter than a client's default timeout.
_HOLD_S = 3.0
_HOLD_POLL_S = 0.01


class _Entry:
    """Requests that will travel together, and who waits for them."""

    __slots__ = ("items", "size_bytes", "waiters")

    def __init__(self) -> None:
        self.items: list[codec.RawBatchItem] = []
        self.waiters: list[tuple[int, Reply]] = []
        self.size_bytes = 0


class Batcher:
    """One per node. `submit` takes a checked write; its answer comes through its `reply`, later, on the loop."""

    def __init__(
        self,
        env: Environment,
        raft: Proposer,
        log_clock: LogClock,
        failure: Callable[[int, KvError], codec.Failure],
        on_pressure: Callable[[bool], None],
    ) -> None:
        """`failure(id, error)` words a refusal (it adds the leader's address where that helps)."""
        self._env = env
        self._raft = raft
        self._log_clock = log_clock
        self._failure = failure
        self._on_pressure = on_pressure
        self._open = _Entry()
        self._closed: deque[_Entry] = deque()
        self._in_flight = 0
        self._waiting_requests = 0
        self._waiting_bytes = 0
        self._pressed = False
        self._turn_due = False
        self._held_since: float | None = None
        self._hold_timer: Timer | None = None
        self._stopping: Unavailable | None = None
        self._on_idle: Callable[[], None] | None = None
        self.commit_times = Meter()
        """From proposing an entry to its answers, however it ended."""
        self.proposed_entries = self.proposed_requests = 0
        self.entry_version = versions.FIRST
        """The cluster's version: what new entries carry."""

    @property
    def waiting(self) -> int:
        """Requests that are not yet proposed."""
        return self._waiting_requests

    @property
    def in_flight(self) -> int:
        """Entries that are proposed and not yet answered."""
        return self._in_flight

    def submit(self, write: codec.Write, reply: Reply) -> None:
        """Take a write that was found well formed and within its limits. O(1)."""
        if self._stopping is not None:
            reply(self._failure(write.id, self._stopping))
            return
        size = len(write.request) + _ITEM_OVERHEAD_BYTES
        if self._waiting_requests >= WAITING_REQUESTS_MAX or self._waiting_bytes + size > WAITING_BYTES_MAX:
            waiting = f"{self._waiting_requests} writes of {self._waiting_bytes} bytes wait already"
            reply(self._failure(write.id, Unavailable(f"{waiting}; try again in a moment", code="overloaded")))
            return
        entry = self._open
        if entry.items and (entry.size_bytes + size > ENTRY_BYTES_MAX or len(entry.items) >= ENTRY_REQUESTS_MAX):
            self._closed.append(entry)
            self._open = entry = _Entry()
        entry.items.append(codec.RawBatchItem(write.session, write.seq, write.acked_below, write.request))
        entry.waiters.append((write.id, reply))
        entry.size_bytes += size
        self._waiting_requests += 1
        self._waiting_bytes += size
        if not self._turn_due and self._in_flight < IN_FLIGHT_MAX:
            self._turn_due = True
            self._env.scheduler.call_soon(self._turn)
        if not self._pressed:
            self._press()

    def leadership_changed(self, leading: bool) -> None:
        """What was not proposed cannot be any more; what was is answered by consensus."""
        if leading:
            self._schedule()
        else:
            self._refuse_waiting(not_leading(self._raft))

    def stop(self, on_idle: Callable[[], None]) -> None:
        """Refuse what waits and all that comes; `on_idle()` once nothing is under way."""
        self._stopping = shutting_down()
        self._refuse_waiting(self._stopping)
        if self._in_flight:
            self._on_idle = on_idle
        else:
            on_idle()

    # --- the turn -----------------------------------------------------------------------------------------------------

    def _schedule(self) -> None:
        if not self._turn_due and self._waiting_requests:
            self._turn_due = True
            self._env.scheduler.call_soon(self._turn)

    def _turn(self) -> None:
        """Propose what has come together, as far as entries may be under way."""
        self._turn_due = False
        if not self._waiting_requests:
            return
        if not self._raft.accepting or not self._log_clock.is_known:
            self._hold()
            return
        self._held_since = None
        while self._waiting_requests and self._in_flight < IN_FLIGHT_MAX and self._raft.accepting:
            if self._closed:
                entry = self._closed.popleft()
            else:
                entry, self._open = self._open, _Entry()
            self._forget_waiting(entry)
            self._propose(entry)
        self._press()

    def _propose(self, entry: _Entry) -> None:
        payload = codec.encode_batch(self._log_clock.stamp(), entry.items, self.entry_version)
        entry.items = []
        self._in_flight += 1
        waiters = entry.waiters
        proposed_at = self._env.clock.monotonic()
        self.proposed_entries += 1
        self.proposed_requests += len(waiters)

        def applied(results: Any, error: KvError | None) -> None:
            self._in_flight -= 1
            self.commit_times.observe(self._env.clock.monotonic() - proposed_at)
            self._schedule()
            if error is not None:
                for request_id, reply in waiters:
                    reply(self._failure(request_id, error))
            else:
                for (request_id, reply), result in zip(waiters, results, strict=True):
                    reply(codec.Answer(request_id, Raw(result)))
            if self._on_idle is not None and not self._in_flight:
                on_idle, self._on_idle = self._on_idle, None
                on_idle()

        self._raft.propose(payload, applied)

    def _hold(self) -> None:
        """Not able to propose now: keep what waits for a moment if this node leads, else send it away."""
        now = self._env.clock.monotonic()
        if self._held_since is None:
            self._held_since = now
        if not self._raft.is_leader:
            self._refuse_waiting(not_leading(self._raft))
        elif now - self._held_since >= _HOLD_S:
            self._refuse_waiting(Unavailable(f"the leader took no write for {_HOLD_S:g} s; try again"))
        elif self._hold_timer is None:
            self._hold_timer = self._env.scheduler.call_later(_HOLD_POLL_S, self._hold_over)

    def _hold_over(self) -> None:
        self._hold_timer = None
        self._schedule()

    # --- what waits ---------------------------------------------------------------------------------------------------

    def _forget_waiting(self, entry: _Entry) -> None:
        self._waiting_requests -= len(entry.waiters)
        self._waiting_bytes -= entry.size_bytes
        assert min(self._waiting_requests, self._waiting_bytes) >= 0, "the batcher lost count"

    def _refuse_waiting(self, error: KvError) -> None:
        self._held_since = None
        entries = [*self._closed, self._open]
        self._closed.clear()
        self._open = _Entry()
        for entry in entries:
            self._forget_waiting(entry)
        self._press()
        for entry in entries:
            for request_id, reply in entry.waiters:
                reply(self._failure(request_id, error))

    def _press(self) -> None:
        if self._pressed:
            if self._waiting_requests <= WAITING_REQUESTS_LOW and self._waiting_bytes <= WAITING_BYTES_LOW:
                self._pressed = False
                self._on_pressure(False)
        elif self._waiting_requests >= WAITING_REQUESTS_HIGH or self._waiting_bytes >= WAITING_BYTES_HIGH:
            self._pressed = True
            self._on_pressure(True)
