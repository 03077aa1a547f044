"""Deadlines of many calls behind one timer.

A timer wheel with slots of 1/128 s: adding and removing a deadline costs one dictionary operation, where a loop timer
for each call costs a heap operation and an object. A deadline never fires early, and up to one slot late.

Varghese and Lauck, "Hashed and Hierarchical Timing Wheels" (1987), scheme 6 without its wrap-around: slots are made
when they are needed, and a heap holds their numbers.
"""

from __future__ import annotations

import asyncio
import math
from heapq import heappop, heappush
from typing import Protocol

SLOTS_PER_S = 128


class Expiring(Protocol):
    deadline: float
    slot: int

    def expire(self) -> None: ...


class Deadlines:
    __slots__ = ("_due", "_loop", "_slots", "_timer", "_timer_slot")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._slots: dict[int, dict[Expiring, None]] = {}
        self._due: list[int] = []
        self._timer: asyncio.TimerHandle | None = None
        self._timer_slot = 0

    def add(self, item: Expiring) -> None:
        """`item.expire()` is called at `item.deadline` (loop time), unless it is removed before."""
        slot = math.ceil(item.deadline * SLOTS_PER_S)
        item.slot = slot
        items = self._slots.get(slot)
        if items is not None:
            items[item] = None
            return
        self._slots[slot] = {item: None}
        heappush(self._due, slot)
        if self._timer is None or slot < self._timer_slot:
            self._arm(slot)

    def remove(self, item: Expiring) -> None:
        items = self._slots.get(item.slot)
        if items is not None:
            items.pop(item, None)

    def close(self) -> list[Expiring]:
        """Stop. Returns what had not expired."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        left = [item for items in self._slots.values() for item in items]
        self._slots.clear()
        self._due.clear()
        return left

    def _arm(self, slot: int) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_slot = slot
        self._timer = self._loop.call_at(slot / SLOTS_PER_S, self._fire)

    def _fire(self) -> None:
        self._timer = None
        # The loop may call a timer up to its clock's resolution early; slot numbers decide, so none is skipped.
        now_slot = max(self._timer_slot, int(self._loop.time() * SLOTS_PER_S))
        due: list[Expiring] = []
        while self._due and self._due[0] <= now_slot:
            due.extend(self._slots.pop(heappop(self._due)))
        # Empty slots would wake the loop for nothing.
        while self._due and not self._slots[self._due[0]]:
            del self._slots[heappop(self._due)]
        for item in due:
            item.expire()
        # One of them may have added a deadline, and armed the timer for it.
        if self._due:
            self._arm(self._due[0])
