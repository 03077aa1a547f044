"""The timer wheel, on a loop whose clock the test turns."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import cast

from kvstore.client.deadlines import SLOTS_PER_S, Deadlines


class _Handle:
    def __init__(self, when: float, callback: Callable[[], None]) -> None:
        self.when, self.callback = when, callback
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class _Loop:
    def __init__(self) -> None:
        self.now = 1000.0
        self.timers: list[_Handle] = []

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, callback: Callable[[], None]) -> _Handle:
        self.timers.append(_Handle(when, callback))
        return self.timers[-1]

    def advance(self, to: float) -> None:
        while True:
            live = [timer for timer in self.timers if not timer.cancelled and timer.when <= to]
            if not live:
                break
            first = min(live, key=lambda timer: timer.when)
            self.timers.remove(first)
            self.now = max(self.now, first.when)
            first.callback()
        self.now = to

    @property
    def armed(self) -> int:
        return sum(not timer.cancelled for timer in self.timers)


class _Item:
    def __init__(self, loop: _Loop, deadline: float) -> None:
        self.deadline = deadline
        self.slot = 0
        self.expired_at: float | None = None
        self.on_expire: Callable[[], None] = lambda: None
        self._loop = loop

    def expire(self) -> None:
        assert self.expired_at is None
        self.expired_at = self._loop.now
        self.on_expire()


def make() -> tuple[_Loop, Deadlines]:
    loop = _Loop()
    return loop, Deadlines(cast("object", loop))  # type: ignore[arg-type]


def test_each_expires_once_never_early_and_at_most_a_slot_late() -> None:
    loop, deadlines = make()
    chance = random.Random(3)
    items = [_Item(loop, loop.now + chance.random() * 10) for _ in range(2000)]
    for item in items:
        deadlines.add(item)
    removed = set(chance.sample(range(2000), 700))
    for number in removed:
        deadlines.remove(items[number])
    loop.advance(loop.now + 11)
    for number, item in enumerate(items):
        if number in removed:
            assert item.expired_at is None
        else:
            assert item.expired_at is not None
            assert 0 <= item.expired_at - item.deadline <= 1 / SLOTS_PER_S + 1e-9
    assert loop.armed == 0


def test_one_timer_at_a_time() -> None:
    loop, deadlines = make()
    for delay in (5.0, 1.0, 3.0, 0.5, 0.7):
        deadlines.add(_Item(loop, loop.now + delay))
        assert loop.armed == 1
    loop.advance(loop.now + 0.6)
    assert loop.armed == 1


def test_a_deadline_that_adds_another() -> None:
    loop, deadlines = make()
    second = _Item(loop, loop.now + 0.2)
    first = _Item(loop, loop.now + 0.1)
    first.on_expire = lambda: deadlines.add(second)
    last = _Item(loop, loop.now + 5)
    deadlines.add(last)
    deadlines.add(first)
    loop.advance(loop.now + 1)
    assert second.expired_at is not None
    assert last.expired_at is None
    assert loop.armed == 1


def test_slots_that_emptied_wake_nobody() -> None:
    loop, deadlines = make()
    items = [_Item(loop, loop.now + number / 10) for number in range(1, 50)]
    for item in items:
        deadlines.add(item)
    for item in items[1:]:
        deadlines.remove(item)
    loop.advance(loop.now + 0.15)
    assert loop.armed == 0
    deadlines.remove(items[0])  # removing what has expired does no harm


def test_closing_returns_what_was_left() -> None:
    loop, deadlines = make()
    items = [_Item(loop, loop.now + delay) for delay in (0.1, 0.2, 0.3)]
    for item in items:
        deadlines.add(item)
    loop.advance(loop.now + 0.15)
    assert deadlines.close() == items[1:]
    assert loop.armed == 0
