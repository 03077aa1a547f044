"""Whose time passes next, where most are renewed long before it does. Pure: time is handed in.

A heap of (deadline, id), for each id one at least that is not later than its true deadline. Renewals do not touch it;
who comes to its top too early is put back with what is true by then. So a renewal costs nothing, and an id that lives
on costs O(log n) in each of its times to live.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from heapq import heapify, heappop, heappush, heapreplace


class Deadlines:
    __slots__ = ("_deadline_of", "_heap")

    def __init__(self, deadline_of: Callable[[int], int | None], known: Iterable[tuple[int, int]] = ()) -> None:
        """`deadline_of` gives an id's true deadline, or None for one that is gone; `known` are (deadline, id)."""
        self._deadline_of = deadline_of
        self._heap = list(known)
        heapify(self._heap)

    def add(self, deadline: int, which: int) -> None:
        heappush(self._heap, (deadline, which))

    def due(self, now: int) -> int | None:
        """The id whose deadline passed first, if one's has; the lower id where two passed together."""
        heap = self._heap
        while heap and heap[0][0] <= now:
            deadline, which = heap[0]
            true = self._deadline_of(which)
            if true is None:
                heappop(heap)
            elif true > deadline:
                heapreplace(heap, (true, which))
            else:
                return which
        return None

    def take(self) -> int:
        """Forget the id that `due` has just given."""
        return heappop(self._heap)[1]
