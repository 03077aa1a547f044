"""When and where the log is synced: inline while the disk is fast, in a thread while it is slow.

An inline sync on a good disk takes 0.1 to 0.3 ms; a hop to a thread and back beside a busy loop costs as much again, or
ten times that. But a disk that takes 50 ms would hold up heartbeats and reads, so a slow sync moves the next ones to a
thread, until they are fast again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from kvstore.env import Environment
from kvstore.meters import Meter
from kvstore.raft.wal import Wal

# An inline sync slower than this is felt by everything else on the loop; one as slow as the other holds up heartbeats.
SLOW_S, VERY_SLOW_S = 0.005, 0.05
# A slow sync weighs as much as this many fast ones; three in a short time, or a very slow one, move the next to a
# thread. (On a busy machine a fast disk looks slow now and then, and a needless thread is what one feels then.)
SLOW_WEIGHT = 8
SLOWNESS_MAX = 3 * SLOW_WEIGHT


class LogSync:
    """`synced()` is called on the loop after a sync in a thread; `failed(error)` when that one failed."""

    __slots__ = ("_done", "_env", "_failed", "_running", "_slowness", "_synced", "_threaded", "_times", "_wal")

    def __init__(
        self,
        env: Environment,
        wal: Wal,
        synced: Callable[[], None],
        failed: Callable[[BaseException], None],
        times: Meter,
    ) -> None:
        self._env = env
        self._wal = wal
        self._synced = synced
        self._failed = failed
        self._times = times
        self._threaded = False
        self._running = False
        self._slowness = 0
        self._done: asyncio.Event | None = None

    def run(self) -> None:
        """Sync what is not synced, or see to it that it will be. Raises OSError."""
        wal = self._wal
        if self._running or wal.position == wal.synced_position:
            return
        if self._threaded:
            self._start()
            return
        clock = self._env.clock
        started = clock.monotonic()
        wal.sync()
        self._judge(clock.monotonic() - started)

    def _judge(self, took_s: float) -> None:
        self._times.observe(took_s)
        if took_s > SLOW_S:
            self._slowness = SLOWNESS_MAX if took_s > VERY_SLOW_S else min(SLOWNESS_MAX, self._slowness + SLOW_WEIGHT)
            self._threaded = self._threaded or self._slowness == SLOWNESS_MAX
        elif self._slowness:
            self._slowness -= 1
            self._threaded = self._threaded and self._slowness > 0

    def _start(self) -> None:
        work = self._wal.start_sync()
        if work is None:
            return
        clock = self._env.clock
        took: list[float] = []

        def timed() -> None:
            started = clock.monotonic()
            work()
            took.append(clock.monotonic() - started)

        self._running = True
        self._env.scheduler.run_in_thread(timed, lambda _result, error: self._ended(took, error))

    def _ended(self, took: list[float], error: BaseException | None) -> None:
        self._running = False
        if self._done is not None:
            self._done.set()
        if error is not None:
            self._failed(error)
            return
        self._wal.finish_sync()
        self._judge(took[0])
        self._synced()

    @property
    def running(self) -> bool:
        return self._running

    async def finish(self) -> None:
        """Wait until no sync runs in a thread."""
        if self._running:
            self._done = asyncio.Event()
            await self._done.wait()
