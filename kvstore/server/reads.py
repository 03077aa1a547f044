"""Reads: one barrier for all that wait, and local reads at a revision (design section 4).

- **linearizable**: what arrives in a turn shares one ReadIndex. While `ROUNDS_MAX` barriers are under way the rest
  collects and shares the next one; a barrier never serves a read that came after it was asked for.
- **local**: answered in the same turn from this replica, or, where the asker has seen a later revision than we hold,
  as soon as we hold it, within `CATCH_UP_S`.

What is ready together is read together: the machine may prefetch it. Serving is sliced: after `SLICE_READS` reads,
`SLICE_BYTES` of results or `SLICE_S` the loop gets its turn, so that a burst of reads delays no heartbeat. A read whose
asker is congested is handed to its gate and served when there is room: a barrier that has passed stays passed. What
waits is bounded; past it `overloaded`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import NamedTuple

from msgspec import Raw

from kvstore import codec, model
from kvstore.env import Environment, Timer
from kvstore.errors import KvError, Unavailable
from kvstore.server.failures import shutting_down
from kvstore.server.ports import Gate, Machine, Raft, Reply

# Two, so that a next barrier starts while one is under way; with more, each would carry fewer reads.
ROUNDS_MAX = 2
# As many as connections may have in flight together before each of them is told to stop; about 10 MiB of structs.
WAITING_MAX = 65_536
# How long a replica may lag behind what a session has seen. A healthy one lags a heartbeat (100 ms) at most.
CATCH_UP_S = 1.0
_CATCH_UP_POLL_S = 0.05
# About 5 ms of work at 5 to 10 us a read, or of copying large results.
SLICE_READS = 512
SLICE_BYTES = 4 * 1024 * 1024
# A count walks over much and returns little. One may take longer than this (see `state/walk.py`); not several.
SLICE_S = 0.005


class Waiting(NamedTuple):
    """A checked read, and who asked."""

    id: int
    request: model.Read
    reply: Reply
    gate: Gate | None


class _Behind(NamedTuple):
    read: Waiting
    min_revision: int
    deadline: float


class Reads:
    """One per node."""

    def __init__(
        self,
        env: Environment,
        raft: Raft,
        machine: Callable[[], Machine],
        failure: Callable[[int, KvError], codec.Failure],
        log_time_ms: Callable[[], int],
    ) -> None:
        """`log_time_ms` gives what log time would be now."""
        self._env = env
        self._log_time_ms = log_time_ms
        self._raft = raft
        self._machine = machine
        self._failure = failure
        self._collecting: list[Waiting] = []
        self._rounds = 0
        self._under_way = 0
        self._round_due = False
        self._ready: deque[Waiting] = deque()
        self._serve_due = False
        self._behind: list[_Behind] = []
        self._behind_lowest = 0  # the lowest revision that any of them waits for
        self._behind_timer: Timer | None = None

    @property
    def waiting(self) -> int:
        return len(self._collecting) + self._under_way + len(self._ready) + len(self._behind)

    def linearizable(self, read: Waiting) -> None:
        if self._full(read):
            return
        self._collecting.append(read)
        if not self._round_due and self._rounds < ROUNDS_MAX:
            self._round_due = True
            self._env.scheduler.call_soon(self._round)

    def local(self, read: Waiting, min_revision: int) -> None:
        if self._full(read):
            return
        if self._machine().revision >= min_revision:
            # At the end of the turn, with all others that come in it.
            self._ready.append(read)
            self._serve_soon()
            return
        deadline = self._env.clock.monotonic() + CATCH_UP_S
        self._behind_lowest = min(min_revision, self._behind_lowest) if self._behind else min_revision
        self._behind.append(_Behind(read, min_revision, deadline))
        if self._behind_timer is None:
            self._behind_timer = self._env.scheduler.call_later(_CATCH_UP_POLL_S, self._give_up_late)

    def applied(self) -> None:
        """The replica moved on: serve who waited for that."""
        if not self._behind:
            return
        revision = self._machine().revision
        if revision < self._behind_lowest:
            return
        now_served = [entry.read for entry in self._behind if entry.min_revision <= revision]
        self._behind = [entry for entry in self._behind if entry.min_revision > revision]
        self._behind_lowest = min((entry.min_revision for entry in self._behind), default=0)
        self._enqueue(now_served)

    def stop(self) -> None:
        """Answer all that waits; nothing may be asked after."""
        waiting = [*self._collecting, *self._ready, *(entry.read for entry in self._behind)]
        self._collecting, self._behind = [], []
        self._ready.clear()
        if self._behind_timer is not None:
            self._behind_timer.cancel()
            self._behind_timer = None
        self._refuse(waiting, shutting_down())

    # --- barriers -----------------------------------------------------------------------------------------------------

    def _round(self) -> None:
        self._round_due = False
        if not self._collecting:
            return
        reads, self._collecting = self._collecting, []
        self._rounds += 1
        self._under_way += len(reads)

        def passed(error: KvError | None) -> None:
            self._rounds -= 1
            self._under_way -= len(reads)
            if self._collecting and not self._round_due:
                self._round_due = True
                self._env.scheduler.call_soon(self._round)
            if error is None:
                self._enqueue(reads)
            else:
                self._refuse(reads, error)

        self._raft.read_index(passed)

    # --- serving ------------------------------------------------------------------------------------------------------

    def _enqueue(self, reads: list[Waiting]) -> None:
        self._ready.extend(reads)
        if not self._serve_due:
            self._serve()

    def _serve(self) -> None:
        """Answer what is ready, in order, one slice of it."""
        self._serve_due = False
        ready, monotonic = self._ready, self._env.clock.monotonic
        until = monotonic() + SLICE_S
        served_bytes = 0
        count = min(len(ready), SLICE_READS)
        if count > 1:
            self._prefetch(count)
        for _ in range(count):
            read = ready.popleft()
            if read.gate is not None and read.gate.congested:
                read.gate.postpone(partial(self._answer, read))
                continue
            served_bytes += self._answer(read)
            if served_bytes >= SLICE_BYTES or monotonic() >= until:
                break
        if ready:
            self._serve_soon()

    def _serve_soon(self) -> None:
        if not self._serve_due:
            self._serve_due = True
            self._env.scheduler.call_soon(self._serve)

    def _prefetch(self, count: int) -> None:
        """Of the first that are ready."""
        # Whoever needs what could not be read finds that out by itself, and is told so.
        with suppress(OSError):
            self._machine().prefetch([read.request for read in islice(self._ready, count)])

    def _answer(self, read: Waiting) -> int:
        """Answer one read; the size of its result."""
        request = read.request
        try:
            if type(request) is model.DescribeLease:
                result = self._machine().read(request, self._log_time_ms())
            else:
                result = self._machine().read(request)
        except OSError as error:  # the disk; what is wrong with a read itself is its result
            read.reply(self._failure(read.id, Unavailable(f"this node cannot read: {error}", code="storage_failed")))
            return 0
        read.reply(codec.Answer(read.id, Raw(result)))
        return len(result)

    # --- refusing -----------------------------------------------------------------------------------------------------

    def _full(self, read: Waiting) -> bool:
        if self.waiting < WAITING_MAX:
            return False
        self._refuse([read], Unavailable(f"{WAITING_MAX} reads wait already; try again", code="overloaded"))
        return True

    def _refuse(self, reads: list[Waiting], error: KvError) -> None:
        for read in reads:
            read.reply(self._failure(read.id, error))

    def _give_up_late(self) -> None:
        self._behind_timer = None
        now = self._env.clock.monotonic()
        late = [entry for entry in self._behind if entry.deadline <= now]
        if late:
            self._behind = [entry for entry in self._behind if entry.deadline > now]
            held = self._machine().revision
            for entry in late:
                message = f"this replica holds revision {held}, the read asks for {entry.min_revision}; use another"
                entry.read.reply(self._failure(entry.read.id, Unavailable(message)))
        if self._behind:
            self._behind_timer = self._env.scheduler.call_later(_CATCH_UP_POLL_S, self._give_up_late)
