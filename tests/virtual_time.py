"""A clock and a scheduler of their own: `VirtualTime`.

Nothing happens but when `advance` or `run_until` is called, and then in an order that depends on nothing but the calls
made: by time, and what is due at the same time in the order in which it was scheduled.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from typing import Any

# So many cancelled timers may lie in the heap before it is looked through for them; more where most of it is alive.
CANCELLED_MAX = 256


class _Timer:
    __slots__ = ("args", "callback", "count", "heap_of")

    def __init__(
        self, callback: Callable[..., object], args: tuple[Any, ...], count: int, heap_of: VirtualTime | None
    ) -> None:
        self.callback: Callable[..., object] | None = callback
        self.args = args
        self.count = count
        self.heap_of = heap_of

    def cancel(self) -> None:
        if self.callback is not None:
            self.callback, self.args = None, ()
            if self.heap_of is not None:
                self.heap_of.cancelled()


class VirtualTime:
    """`Clock` and `Scheduler`. `run_in_thread` runs the work at once and reports after `thread_s`."""

    def __init__(self, wall_ms: int = 1_700_000_000_000, thread_s: float = 0.0) -> None:
        self.now_s = 0.0
        self.thread_s = thread_s
        self._wall_ms = wall_ms
        self._soon: deque[_Timer] = deque()  # due at `now_s`
        self._later: list[tuple[float, int, _Timer]] = []  # a heap
        self._cancelled = 0  # in `_later`
        self._count = 0

    def monotonic(self) -> float:
        return self.now_s

    def wall_ms(self) -> int:
        return self._wall_ms + int(self.now_s * 1000)

    def call_soon(self, callback: Callable[..., object], *args: Any) -> _Timer:
        self._count += 1
        timer = _Timer(callback, args, self._count, None)
        self._soon.append(timer)
        return timer

    def call_later(self, delay_s: float, callback: Callable[..., object], *args: Any) -> _Timer:
        self._count = count = self._count + 1
        if delay_s > 0.0:
            timer = _Timer(callback, args, count, self)
            heapq.heappush(self._later, (self.now_s + delay_s, count, timer))
        else:
            timer = _Timer(callback, args, count, None)
            self._soon.append(timer)
        return timer

    def call_at(self, at_s: float, callback: Callable[..., object], *args: Any) -> _Timer:
        """At just this time; now if that is past."""
        self._count = count = self._count + 1
        if at_s > self.now_s:
            timer = _Timer(callback, args, count, self)
            heapq.heappush(self._later, (at_s, count, timer))
        else:
            timer = _Timer(callback, args, count, None)
            self._soon.append(timer)
        return timer

    def run_in_thread(self, work: Callable[[], Any], done: Callable[[Any, BaseException | None], None]) -> None:
        try:
            result, error = work(), None
        except Exception as raised:
            result, error = None, raised
        self.call_later(self.thread_s, done, result, error)

    def cancelled(self) -> None:
        """A timer in the heap was cancelled. Costs O(1), spread over many: a long run cancels timers all the time."""
        self._cancelled += 1
        if self._cancelled > CANCELLED_MAX and 2 * self._cancelled > len(self._later):
            # In place: `_step` may be running.
            self._later[:] = [entry for entry in self._later if entry[2].callback is not None]
            heapq.heapify(self._later)
            self._cancelled = 0

    def _step(self, until_s: float) -> bool:
        """Let the next thing happen, if it is due until then."""
        soon, later = self._soon, self._later
        if soon and (not later or later[0][0] > self.now_s or later[0][1] > soon[0].count):
            if self.now_s > until_s:
                return False
            timer = soon.popleft()
        elif later and later[0][0] <= until_s:
            at_s, _, timer = heapq.heappop(later)
            if at_s > self.now_s:
                self.now_s = at_s
            if timer.callback is None:
                self._cancelled -= 1
                return True
        else:
            return False
        callback = timer.callback
        if callback is not None:
            timer.callback = None  # it is too late to cancel it
            callback(*timer.args)
        return True

    def advance(self, delay_s: float) -> None:
        """Let everything happen that is due within `delay_s` from now."""
        until_s = self.now_s + delay_s
        step = self._step
        while step(until_s):
            pass
        self.now_s = until_s

    def run_until(self, condition: Callable[[], object], within_s: float = 10.0) -> float:
        """Let things happen until the condition holds; returns how long that took. AssertionError past the limit."""
        began_s = self.now_s
        until_s = began_s + within_s
        step = self._step
        while not condition():
            assert step(until_s), f"not so within {within_s} virtual seconds"
        return self.now_s - began_s
