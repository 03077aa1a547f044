"""How a connection fails: no answer, a reset, a 500; and what is done only after the client has given up."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable
from typing import Final

from aiohttp import web

from services.sandbox_psp.failures import Failure
from services.sandbox_psp.rules import Refusal
from services.sandbox_psp.wire import json_answer

# Connections held without an answer, and requests that are acted on late. Past that they fail at once.
HELD_MAX: Final = 2_000


class Faults:
    """Belongs to one event loop."""

    def __init__(self) -> None:
        self._closing = asyncio.Event()
        self._held = 0
        self._late: set[asyncio.Task[None]] = set()

    async def fail(self, request: web.Request, failure: Failure, hold_ms: int) -> web.Response:
        """Answer the request as `failure` says."""
        if failure in (Failure.ERROR_BEFORE, Failure.ERROR_AFTER):
            return json_answer(Refusal(500, "internal", "Something went wrong").body, 500)
        if failure in (Failure.TIMEOUT_BEFORE, Failure.TIMEOUT_AFTER, Failure.ACTS_LATE):
            await self.pause(hold_ms)
        _reset(request)
        return web.Response()  # nobody gets it

    async def pause(self, pause_ms: int) -> None:
        """Wait, but not past the end of the process."""
        if self._held >= HELD_MAX:
            return
        self._held += 1
        try:
            await asyncio.wait_for(self._closing.wait(), pause_ms / 1000)
        except TimeoutError:
            pass
        finally:
            self._held -= 1

    def later(self, delay_ms: int, act: Callable[[], object]) -> None:
        """Call `act` after the delay, whether the client is still there or not; its refusal is nobody's business."""
        if len(self._late) >= HELD_MAX:
            return
        task = asyncio.ensure_future(_act_late(delay_ms, act))
        self._late.add(task)
        task.add_done_callback(self._late.discard)

    async def close(self, app: web.Application) -> None:
        """Let go of every connection; what would have been done later is not."""
        self._closing.set()
        for task in self._late:
            task.cancel()


async def _act_late(delay_ms: int, act: Callable[[], object]) -> None:
    await asyncio.sleep(delay_ms / 1000)
    with contextlib.suppress(Refusal, OSError):
        act()


def _reset(request: web.Request) -> None:
    transport = request.transport
    if transport is None:  # the client has gone
        return
    connection = transport.get_extra_info("socket")
    if connection is not None:
        # Closed with no time to linger, the system sends a reset instead of an orderly end.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()
