"""Watches under changes: watchers that stay for the whole run, and others that leave and resume anywhere."""

from __future__ import annotations

import asyncio
import itertools
import re
from random import Random

from kvstore import Client, Delete, Put, Refused, Unavailable
from kvstore.model import Operation
from tests.checkers.history import History
from tests.checkers.verdict import Inconsistent
from tests.checkers.watches import Change, Segment, check_watches
from tests.workloads.base import ATTEMPTS, noted, one_or_several

# Few, so that transactions meet, and records have something before them.
KEYS = 6
# How long a watcher that comes and goes stays.
STAY_MAX_S = 1.0
# Where everything is healed: a new connection, a barrier, and the events.
LAST_LOOK_S = 10.0


class _View:
    """One watcher, across its breaks. After a compaction that overtook it, it begins a new segment."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_busy = False
        self.segments = [Segment(name, 0)]

    @property
    def segment(self) -> Segment:
        return self.segments[-1]

    async def look(self, kv: Client, prefix: bytes, timeout_s: float, until_revision: int = 0) -> None:
        """Read until cancelled, until an error that only says "not now", or through a revision."""
        segment = self.segment
        watch = kv.watch(prefix=prefix, from_revision=segment.next, prev=True, marks=True, timeout=timeout_s)
        try:
            await watch.standing()
            segment.first = segment.first or watch.next_revision
            segment.next = max(segment.next, watch.next_revision)
            if until_revision and segment.next > until_revision:
                return
            async for events in watch.revisions():
                if events:
                    segment.revisions.append(events)
                segment.next = watch.next_revision
                if until_revision and segment.next > until_revision:
                    return
        except Unavailable:
            return
        except Refused as refusal:
            oldest = re.search(r"can be watched from is (\d+)", refusal.message)
            if refusal.code != "revision_compacted" or oldest is None or int(oldest[1]) <= segment.next:
                raise Inconsistent("watch_refused", f"{segment}: {refusal}") from refusal
            self.segments.append(Segment(self.name, 0))
        finally:
            await watch.close()


class WatchWorkload:
    name = "watches"

    def __init__(self, history: History, *, timeout_s: float, views: int = 2, prefix: bytes = b"watches/") -> None:
        self.history = history.part(self.name)
        self._timeout_s = timeout_s
        self._prefix = prefix
        self._numbers = itertools.count(1)
        self._standing = _View("the one that stays")
        self._views = [_View(f"view {number}") for number in range(1, views + 1)]
        self._task: asyncio.Task[None] | None = None
        self._wrong: Inconsistent | None = None  # what a watcher met while it watched

    async def set_up(self, kv: Client) -> None:
        self._task = asyncio.get_running_loop().create_task(self._stay(kv))

    async def _stay(self, kv: Client) -> None:
        try:
            while True:
                await self._standing.look(kv, self._prefix, self._timeout_s)
        except Inconsistent as wrong:
            self._wrong = wrong

    async def step(self, kv: Client, worker: int, chance: Random) -> None:
        if chance.random() < 0.2:
            free = [view for view in self._views if not view.is_busy]
            if free:
                # Now and then all of them at once, each from where it left off: they catch up side by side.
                views = free if chance.random() < 0.4 else [chance.choice(free)]
                for view in views:
                    view.is_busy = True
                await asyncio.gather(*(self._visit(kv, view, STAY_MAX_S * chance.random()) for view in views))
                return
        await one_or_several(lambda: self._change(kv, worker, chance), chance)

    async def _visit(self, kv: Client, view: _View, stay_s: float) -> None:
        try:
            async with asyncio.timeout(stay_s):
                await view.look(kv, self._prefix, self._timeout_s)
        except TimeoutError:
            return
        except Inconsistent as wrong:
            self._wrong = wrong
        finally:
            view.is_busy = False

    async def _change(self, kv: Client, worker: int, chance: Random) -> None:
        writes: dict[bytes, bytes | None] = {}
        for number in chance.sample(range(KEYS), chance.choice([1, 1, 1, 2, 4, 6])):
            gone = chance.random() < 0.2
            writes[self._prefix + b"%d" % number] = None if gone else b"%d" % next(self._numbers)
        operations: list[Operation] = [
            Delete(key) if value is None else Put(key, value) for key, value in writes.items()
        ]
        entry = self.history.begin(worker, Change(writes))
        result = await noted(entry, kv.txn(success=operations, timeout=self._timeout_s))
        if result is not None and not isinstance(result, Refused):
            made = zip(writes.items(), result.results, strict=True)
            changed = {key: value for (key, value), part in made if getattr(part, "deleted", 1)}
            entry.ok(changed, revision=result.revision, changed=bool(changed))

    async def finish(self, kv: Client) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.wait([self._task])
        last = await self._put_last(kv)
        for view in (self._standing, *self._views):
            try:
                async with asyncio.timeout(LAST_LOOK_S):
                    while view.segment.next <= last:
                        await view.look(kv, self._prefix, self._timeout_s, last)
            except TimeoutError:
                self._wrong = Inconsistent("watch_stalls", f"{view.segment}, though revision {last} is there")
            except Inconsistent as wrong:
                self._wrong = wrong

    async def _put_last(self, kv: Client) -> int:
        """Write something that every watcher must see; its revision."""
        key = self._prefix + b"last"
        for _ in range(ATTEMPTS):
            writes: dict[bytes, bytes | None] = {key: b"%d" % next(self._numbers)}
            entry = self.history.begin(-1, Change(writes))
            result = await noted(entry, kv.put(key, writes[key] or b"", timeout=self._timeout_s))
            if result is not None and not isinstance(result, Refused):
                entry.ok(writes, revision=result.revision, changed=True)
                return result.revision
        raise AssertionError(f"{ATTEMPTS} writes were not acknowledged, though everything is healed")

    def check(self) -> None:
        if self._wrong is not None:
            raise self._wrong
        segments = [segment for view in (self._standing, *self._views) for segment in view.segments]
        check_watches(self.history.entries, [segment for segment in segments if segment.first])
