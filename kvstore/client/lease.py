"""A lease that is kept alive as long as a block runs: `async with kv.lease(10) as lease: ...`.

What it promises: until `valid_for_s` is used up, the lease is surely there, and so are the records under it, wherever
the leader is. The store may end it any moment after that. The clock that counts it is this process's monotonic one,
from the moment at which the last successful keep-alive was *sent*, and 2 % are taken off for log time and clocks.

What it does not promise: a process that is paused (a long garbage collection, a stopped container) notices afterwards.
Whoever must not act twice sends the lease's id along, and has the other side refuse an older one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Protocol

from kvstore.errors import KvError, Refused
from kvstore.model import DoneResult, LeaseResult

# So much faster than the clock here log time may run: at most 1 % faster than the leader's clock
# (`server/log_clock.py`), which may be 0.5 % fast, while the one here is 0.5 % slow. Clocks are good for 0.01 %.
LOG_TIME_RATE = 1.021
# Three attempts fall into a time to live, and the last of them still has a third of it.
KEEPS_PER_TTL = 3


class LeaseCalls(Protocol):
    """What a lease needs of the client."""

    async def grant_lease(self, ttl_s: float, *, lease: int = 0, timeout: float | None = None) -> LeaseResult: ...
    async def keep_lease(self, lease: int, *, timeout: float | None = None) -> LeaseResult: ...
    async def revoke_lease(self, lease: int, *, timeout: float | None = None) -> DoneResult: ...


class Lease:
    """Made by `Client.lease`. `id` is what a `put(..., lease=lease.id)` wants."""

    def __init__(self, calls: LeaseCalls, ttl_s: float, on_lost: Callable[[], object] | None) -> None:
        self._calls = calls
        self._ttl_s = ttl_s
        self._on_lost = on_lost
        self._loop: asyncio.AbstractEventLoop | None = None
        self._valid_until = 0.0
        self._task: asyncio.Task[None] | None = None
        self.id = 0

    @property
    def ttl_s(self) -> float:
        """Seconds that it lives without a keep-alive."""
        return self._ttl_s

    @property
    def valid_for_s(self) -> float:
        """For how many seconds from now it is surely there; 0 once that is not sure any more."""
        if self._loop is None:
            return 0.0
        return max(0.0, self._valid_until - self._loop.time())

    @property
    def lost(self) -> bool:
        """The store has said that it is gone, or nothing was heard of it for its whole time to live."""
        return self.valid_for_s == 0.0

    async def __aenter__(self) -> Lease:
        self._loop = asyncio.get_running_loop()
        granted = await self._sent(lambda: self._calls.grant_lease(self._ttl_s))
        self.id = granted.lease
        self._task = self._loop.create_task(self._keep())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Revoke it, with its records. One that cannot be reached ends by itself."""
        assert self._task is not None
        self._task.cancel()
        await asyncio.wait([self._task])
        was_valid, self._valid_until = not self.lost, 0.0
        if was_valid:
            try:
                await self._calls.revoke_lease(self.id)
            except KvError as failed:
                if failed.code != "lease_not_found" and error is None:
                    raise

    async def _sent(self, call: Callable[[], Awaitable[LeaseResult]]) -> LeaseResult:
        assert self._loop is not None
        sent_at = self._loop.time()
        result = await call()
        self._valid_until = sent_at + result.ttl_ms / 1000 / LOG_TIME_RATE
        return result

    async def _keep(self) -> None:
        every_s = self._ttl_s / KEEPS_PER_TTL
        while not self.lost:
            await asyncio.sleep(every_s)
            try:
                await self._sent(lambda: self._calls.keep_lease(self.id, timeout=max(every_s, self.valid_for_s)))
            except Refused:
                self._valid_until = 0.0  # it was revoked, or has expired
            except KvError:
                continue  # it may be kept yet: it is lost when its time is up
        if self._on_lost is not None:
            self._on_lost()
