"""A lease that is kept alive as long as a block runs: `async with kv.lease(10) as lease: ...`.

What it promises: until `valid_for_s` is used up, the lease is surely there, and so are the records under it, wherever
the leader is. The store may end it any moment after that. The clock that counts it is this process's monotonic one,
from the moment at which the last successful keep-alive was *sent*, and 2 % are taken off for log time and clocks.

An outage is sat out: a keep-alive that is not answered is sent again for as long as the lease is surely there, and it
is lost once nothing was heard of it for its whole time to live, or when the store says that it is gone.

What it does not promise: a process that is paused (a long garbage collection, a stopped container) notices afterwards.
And a lease that somebody else revokes is gone at once, while `valid_for_s` goes on until the next keep-alive is
refused, within a third of its time to live. Whoever must not act twice sends the lease's id along, and has the other
side refuse an older one.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import Protocol

from kvstore.client.seconds import TIMEOUT_MAX_S, ttl_ms
from kvstore.errors import KvError, Refused, Unavailable
from kvstore.model import LEASE_TTL_MS_MIN, DoneResult, LeaseResult

# So much faster than the clock here log time may run: at most 1 % faster than the leader's clock
# (`server/log_clock.py`), which may be 0.5 % fast, while the one here is 0.5 % slow. Clocks are good for 0.01 %.
LOG_TIME_RATE = 1.021
# Three attempts fall into a time to live, and the last of them still has a third of it.
KEEPS_PER_TTL = 3
# One that failed at once is sent again after a tenth of the time between two.
RETRIES_PER_KEEP = 10


class LeaseCalls(Protocol):
    """What a lease needs of the client."""

    async def grant_lease(self, ttl_s: float, *, lease: int = 0, timeout: float | None = None) -> LeaseResult: ...
    async def keep_lease(self, lease: int, *, timeout: float | None = None) -> LeaseResult: ...
    async def revoke_lease(self, lease: int, *, timeout: float | None = None) -> DoneResult: ...


class Lease:
    """Made by `Client.lease`. `id` is what a `put(..., lease=lease.id)` wants."""

    def __init__(self, calls: LeaseCalls, ttl_s: float, on_lost: Callable[[], object] | None) -> None:
        ttl_ms(ttl_s)  # raises for what no lease can live
        self._calls = calls
        self._ttl_s = ttl_s
        self._on_lost = on_lost
        self._loop: asyncio.AbstractEventLoop | None = None
        self._kept_at = 0.0  # when the last keep-alive that was answered was sent
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
        granted = await self._sent(self._calls.grant_lease(self._ttl_s))
        self.id = granted.lease
        self._task = self._loop.create_task(self._keep())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Revoke it, with its records. One that cannot be reached ends by itself."""
        assert self._task is not None
        if kind is GeneratorExit and not _is_loop_running():
            self.drop()
            return
        self._task.cancel()
        await asyncio.wait([self._task])
        was_valid, self._valid_until = not self.lost, 0.0
        if was_valid:
            try:
                await self._calls.revoke_lease(self.id)
            except KvError as failed:
                if failed.code != "lease_not_found" and error is None:
                    raise

    def drop(self) -> None:
        """Keep it alive no more: it ends by itself. For a coroutine that is closed in its middle, as the garbage
        collector does anywhere: nobody would run what it awaits."""
        assert self._loop is not None
        assert self._task is not None
        self._valid_until = 0.0
        with contextlib.suppress(RuntimeError):  # its loop is closed, and its tasks with it
            self._loop.call_soon_threadsafe(self._task.cancel)

    async def _adopt(self, lease: int) -> LeaseResult:
        """Begin to keep one alive that was granted before."""
        self._loop = asyncio.get_running_loop()
        self.id = lease
        kept = await self._sent(self._calls.keep_lease(lease))
        self._ttl_s = kept.ttl_ms / 1000
        return kept

    async def _sent(self, call: Awaitable[LeaseResult]) -> LeaseResult:
        assert self._loop is not None
        sent_at = self._loop.time()
        result = await call
        self._kept_at = sent_at
        self._valid_until = sent_at + result.ttl_ms / 1000 / LOG_TIME_RATE
        return result

    async def _again(self) -> LeaseResult:
        """The next keep-alive, when it is due, sent until it is answered. Raises what ended the lease: what the store
        says (`Refused`), or `Unavailable(timeout)` where nothing was heard for its whole time to live."""
        assert self._loop is not None
        every_s = self._ttl_s / KEEPS_PER_TTL
        last = ""
        while not self.lost:
            due_s = self._kept_at + every_s - self._loop.time()
            await asyncio.sleep(max(due_s, every_s / RETRIES_PER_KEEP))
            timeout_s = min(max(every_s, self.valid_for_s), TIMEOUT_MAX_S)
            try:
                return await self._sent(self._calls.keep_lease(self.id, timeout=timeout_s))
            except Refused:
                self._valid_until = 0.0  # it was revoked, or has expired
                raise
            except KvError as error:
                last = f"; last: {error}"  # it may be kept yet: it is lost when its time is up
        silence = f"nothing was heard of lease {self.id} for its whole time to live, {self._ttl_s:g} s"
        raise Unavailable(f"{silence}, and it may have ended{last}", code="timeout")

    async def _keep(self) -> None:
        with contextlib.suppress(KvError):
            while True:
                await self._again()
        if self._on_lost is not None:
            self._on_lost()


async def keep_alive(calls: LeaseCalls, lease: int) -> AsyncIterator[LeaseResult]:
    """Keep a lease alive that was granted before, as `Lease` does: each answer, the first at once, for as long as
    somebody iterates. Raises what the first keep-alive raises; after that, what ended the lease: `Refused`, or
    `Unavailable(timeout)` where nothing was heard of it for its whole time to live."""
    kept = Lease(calls, LEASE_TTL_MS_MIN / 1000, None)
    yield await kept._adopt(lease)
    while True:
        yield await kept._again()


def _is_loop_running() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
