"""When the state machine's memory goes to disk: beside the loop, one flush at a time; and what the log drops then.

What a flush covered need not be replayed after a restart, so the log drops its head up to there, but for a tail.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from kvstore.env import Environment, Log
from kvstore.raft.fsm import StateMachine
from kvstore.raft.wal import Wal

# Kept in the log behind the last flush, so that a peer that was away briefly needs no snapshot.
LOG_TAIL_BYTES = 64 * 1024 * 1024
# The log's head is kept for who receives a snapshot, and then for what follows it; but not beyond this: the peer then
# gets another snapshot.
LOG_SNAPSHOT_BYTES_MAX = 512 * 1024 * 1024


def remover(env: Environment, log: Log) -> Callable[[Callable[[], None]], None]:
    """What removes the log's old segments, in a thread: freeing their space takes milliseconds."""

    def removed(_result: None, error: BaseException | None) -> None:
        if error is not None:
            log.warning("old files stay until the next start", error=str(error))

    return lambda remove: env.scheduler.run_in_thread(remove, removed)


class StateFlush:
    """`needed(index)`: of the log up to a flush at `index`, where that begins which a peer will still be sent.
    `failed(error)`, on the loop: a flush was not possible."""

    __slots__ = ("_done", "_env", "_failed", "_needed", "_wal", "running")

    def __init__(
        self, env: Environment, wal: Wal, needed: Callable[[int], int], failed: Callable[[BaseException], None]
    ) -> None:
        self._env = env
        self._wal = wal
        self._needed = needed
        self._failed = failed
        self._done: asyncio.Event | None = None
        self.running = False

    def step(self, machine: StateMachine) -> None:
        """Start a flush where one is due."""
        if not self.running and machine.flush_due():
            self.running = True
            self._env.scheduler.run_in_thread(machine.flush, self._ended)

    def _ended(self, index: int, error: BaseException | None) -> None:
        self.running = False
        if self._done is not None:
            self._done.set()
        elif error is not None:
            self._failed(error)
        elif self._wal.size_bytes > LOG_SNAPSHOT_BYTES_MAX:
            self._wal.drop_before(index, LOG_TAIL_BYTES)
        else:
            self._wal.drop_before(self._needed(index), LOG_TAIL_BYTES)

    async def finish(self) -> None:
        """Wait until no flush runs; its end is reported to nobody any more."""
        if self.running:
            self._done = asyncio.Event()
            await self._done.wait()
