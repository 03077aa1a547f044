"""Entries that this node proposed as a leader, until each has its answer.

A proposal is matched with the log by identity when the engine's tick has appended it, then by index and term when that
index is applied. Every one is answered exactly once. Bounded by the batcher, which has at most four under way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kvstore.errors import KvError, OutcomeUnknown, Unavailable

Proposed = Callable[[Any, KvError | None], None]
"""`done(result of apply, None)`; or `(None, Unavailable)`: surely not in the log; or `(None, OutcomeUnknown)`."""


class Proposals:
    __slots__ = ("_by_index", "_queue")

    def __init__(self) -> None:
        self._queue: list[tuple[bytes, Proposed]] = []
        self._by_index: dict[int, tuple[int, Proposed]] = {}

    def add(self, entry: bytes, done: Proposed) -> None:
        self._queue.append((entry, done))

    @property
    def queued(self) -> list[bytes]:
        """What the next tick is to append."""
        return [entry for entry, _ in self._queue]

    def appended(self, entries: Sequence[tuple[bytes, int, int]]) -> None:
        """The tick is over; `entries` are those that it appended. What is not among them never will be."""
        queue, self._queue = self._queue, []
        taken = 0
        for payload, index, term in entries:
            if taken < len(queue) and payload is queue[taken][0]:
                self._by_index[index] = (term, queue[taken][1])
                taken += 1
        _refuse(queue[taken:])

    def applied(self, index: int, term: int, result: Any) -> None:
        waiting = self._by_index.pop(index, None)
        if waiting is None:
            return
        if waiting[0] == term:
            waiting[1](result, None)
        else:
            waiting[1](None, OutcomeUnknown("another leader's entry took the place of this one"))

    def end(self, why: str) -> None:
        """This node leads no more: what is in its log may be committed yet, or never."""
        queue, self._queue = self._queue, []
        by_index, self._by_index = self._by_index, {}
        for _, done in by_index.values():
            done(None, OutcomeUnknown(why))
        _refuse(queue)


def _refuse(proposals: Sequence[tuple[bytes, Proposed]]) -> None:
    for _, done in proposals:
        done(None, Unavailable("this node does not lead any more", code="not_leader"))
