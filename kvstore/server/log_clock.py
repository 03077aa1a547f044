"""Log time: the stamp that a leader gives its entries (design section 5, "Time"). Pure but for the clock handed in.

The rule that this keeps: log time never runs ahead of real time by more than 1 %, measured from a moment at which it
was known, whoever leads. So a successor with a clock ahead shortens no lease, and a clock that jumps forward does
nothing. It may fall behind real time (a clock that jumps back, a cluster that was down): leases then last longer.

    stamp = max(last own stamp, min(wall clock, base + 1.01 x monotonic time since base))

`base` is the newest log time known here and the moment at which it was: for another leader's entry the moment it was
applied here, for an own one the moment it was stamped. (Counting own entries from their apply, as one might, would
lose the time between stamp and apply at every entry, and log time would stand still on a leader under steady load.)
When leadership begins or ends, own stamps may never have been committed, and it counts from the newest applied entry,
own or not, and the moment at which it was applied here: so the time since then is lost to no lease.

An empty store has no lease to shorten, so its first stamp is the wall clock. But a state without a log time may also be
one whose log is not replayed yet: until the leader knows better (`begin`, or an applied entry that has one), nothing is
proposed (`is_known`).
"""

from __future__ import annotations

from kvstore.env import Clock

# How much faster than our monotonic clock log time may run: more than two clocks' drift against each other (crystals
# are good for 0.01 %), little enough to matter to no lease.
_RATE = 1.01


class LogClock:
    __slots__ = (
        "_applied_at",
        "_applied_index",
        "_applied_ms",
        "_base_at",
        "_base_ms",
        "_clock",
        "_floor_ms",
        "_is_empty",
    )

    def __init__(self, clock: Clock, log_time_ms: int, stamped_index: int = 0) -> None:
        """Of the state as the node opened it; `log_time_ms` is 0 where it is empty."""
        self._clock = clock
        # Kept in fractions of a millisecond: many entries are stamped within one, and none may lose its part.
        self._applied_ms = self._base_ms = float(log_time_ms)
        self._applied_at = self._base_at = clock.monotonic()
        self._applied_index = stamped_index
        self._floor_ms = 0
        self._is_empty = False

    @property
    def is_known(self) -> bool:
        """There is something to count from: a log time, or a store that is surely empty."""
        return self._is_empty or self._base_ms > 0.0

    def begin(self) -> None:
        """This node leads, has applied all that was before its term, and there was no log time in it."""
        self._is_empty = True

    def observe(self, log_time_ms: int, stamped_index: int) -> None:
        """The state now stands at this log time, which the entry at `stamped_index` said. Our own stamps come back here
        too: committed, they are anyone's.

        What counts is when it was last said. Where wall clocks are behind, many entries have one log time: counted from
        the first of them, it would leap by all that has passed since, and shorten what the later ones granted."""
        if stamped_index > self._applied_index:
            self._applied_index = stamped_index
            self._applied_ms, self._applied_at = float(log_time_ms), self._clock.monotonic()
        # Own stamps are newer; but where the wall clock is behind, they are below what log time is all the same.
        if not self._floor_ms or self._applied_ms > self._base_ms:
            self._base_ms, self._base_at = self._applied_ms, self._applied_at

    def forget_own(self) -> None:
        """Leadership began or ended: our earlier stamps may never have been committed, so they count no more."""
        self._base_ms, self._base_at = self._applied_ms, self._applied_at
        self._floor_ms = 0
        self._is_empty = False

    def now_ms(self) -> int:
        """The stamp that an entry would get now."""
        return max(int(self._limit_ms(self._clock.monotonic())), self._floor_ms)

    def stamp(self) -> int:
        """Log time for the entry that is proposed next; never below an earlier one."""
        now = self._clock.monotonic()
        limit_ms = max(self._limit_ms(now), float(self._floor_ms))
        self._base_ms, self._base_at = limit_ms, now
        self._floor_ms = int(limit_ms)
        return self._floor_ms

    def _limit_ms(self, now: float) -> float:
        wall_ms = float(self._clock.wall_ms())
        if not self._base_ms:
            return wall_ms if self._is_empty else 0.0
        return min(wall_ms, self._base_ms + (now - self._base_at) * 1000.0 * _RATE)
