"""Several processes of one service on one port, and one process that looks after them.

Each listens on the same address with SO_REUSEPORT, so the kernel deals connections out among them; none shares anything
with another but the store, and files for their metrics. One that dies is started again. SIGTERM and SIGINT are passed
on, and the whole ends when all have.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Final

import structlog
from prometheus_client.multiprocess import mark_process_dead

from services.web.metrics import SHARED_DIRECTORY
from services.web.runner import GRACE_S
from services.web.serve import CannotServe, cannot_listen

# One that dies at once would else be started in a circle, as fast as the machine can.
_RESTART_S: Final = 1.0
_KILL_AFTER_S: Final = GRACE_S + 5.0

log = structlog.get_logger("services")


def run_workers(command: Sequence[str], count: int, host: str, port: int) -> int:
    """Run `command` that many times, each a service that shares its port, until a signal. The exit code: 0, or that of
    the first that could not even start. Raises `CannotServe`."""
    if port == 0:
        raise CannotServe("startup_failed", "several workers share one port: choose it with --port")
    _check_free(host, port)
    with tempfile.TemporaryDirectory(prefix="services-metrics-") as directory:
        return asyncio.run(_Workers([*command], count, directory).run())


def _check_free(host: str, port: int) -> None:
    """SO_REUSEPORT would let a second service take half of the first one's connections, and nobody would notice."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise cannot_listen(error, host, port) from None


class _Workers:
    def __init__(self, command: list[str], count: int, directory: str) -> None:
        self._command = command
        self._count = count
        self._environment = {**os.environ, SHARED_DIRECTORY: directory}
        self._directory = directory
        self._running: set[asyncio.subprocess.Process] = set()
        self._stopping = asyncio.Event()
        self._code = 0

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        keepers = [asyncio.create_task(self._keep()) for _ in range(self._count)]
        await self._stopping.wait()
        _, left = await asyncio.wait(keepers, timeout=_KILL_AFTER_S)
        if left:
            for process in self._running:
                process.kill()
            await asyncio.wait(left)
        for keeper in keepers:
            keeper.result()
        return self._code

    def _stop(self) -> None:
        self._stopping.set()
        for process in self._running:
            process.send_signal(signal.SIGTERM)

    async def _keep(self) -> None:
        is_first = True
        while not self._stopping.is_set():
            began_s = time.monotonic()
            # A session of its own, so that Ctrl-C reaches it once: from here. A pipe that ends if we are killed.
            process = await asyncio.create_subprocess_exec(
                *self._command, env=self._environment, start_new_session=True, stdin=asyncio.subprocess.PIPE
            )
            self._running.add(process)
            if self._stopping.is_set():
                process.send_signal(signal.SIGTERM)
            code = await process.wait()
            self._running.discard(process)
            mark_process_dead(process.pid, self._directory)  # type: ignore[no-untyped-call]
            if self._stopping.is_set():
                break
            if is_first and code == 1 and time.monotonic() - began_s < GRACE_S:
                self._code = code  # it has said why it cannot start, and so would the next
                self._stop()
                break
            is_first = False
            log.error("worker died", pid=process.pid, code=code)
            try:
                async with asyncio.timeout(_RESTART_S):
                    await self._stopping.wait()
            except TimeoutError:
                continue


def command_of(service: str, options: Sequence[str]) -> list[str]:
    """The command line of one worker."""
    return [sys.executable, "-m", "services", service, *options, "--shared-port"]
