"""Runs one service as a process: bind, serve, stop.

Stopping (SIGTERM, SIGINT): `/readyz` turns to 503, the socket stops accepting, running requests get `GRACE_S` to
finish, then what the service holds is closed, the store's client last. A second signal ends the process at once.

A listener on an address that other machines can reach is refused without `insecure`: there is no TLS yet.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import os
import signal
from collections.abc import Callable
from typing import Final

import structlog
import uvloop
from aiohttp import web

import kvstore
from services.web.app import STATE
from services.web.logs import AccessLog

GRACE_S: Final = 10.0  # the store's own timeout is 5 s, so whatever runs has an answer by then
KEEPALIVE_S: Final = 75.0
BACKLOG: Final = 1024  # a burst of clients after a leader change must not be turned away

log = structlog.get_logger("services")

BuildApp = Callable[[kvstore.Client, AccessLog | None], web.Application]


class CannotServe(Exception):
    """The process cannot start; `code` is stable, the message says what to do."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{message} [{code}]")
        self.code = code


def run_service(
    endpoints: str | None, build: BuildApp, host: str, port: int, insecure: bool, access_log: AccessLog | None
) -> None:
    """Serve until a signal. Raises `CannotServe`, and ValueError for endpoints that are none."""
    check_host(host, insecure)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(endpoints, build, host, port, access_log))


def check_host(host: str, insecure: bool) -> None:
    if insecure or host == "localhost":
        return
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(host).is_loopback:
            return
    raise CannotServe(
        "address_not_loopback",
        f"{host} can be reached from other machines, and there is no TLS yet: use 127.0.0.1 behind a proxy that has "
        "it, or pass --insecure",
    )


async def _serve(endpoints: str | None, build: BuildApp, host: str, port: int, access_log: AccessLog | None) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            os._exit(1)  # the second one: whoever sends it does not want to wait
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    async with kvstore.connect(endpoints) as store:
        app = build(store, access_log)
        runner = web.AppRunner(
            app,
            access_log=None,  # ours is in the application
            auto_decompress=False,  # bodies with a Content-Encoding are refused, and must not be unpacked before
            handle_signals=False,
            shutdown_timeout=GRACE_S,
            keepalive_timeout=KEEPALIVE_S,
        )
        await runner.setup()
        try:
            site = web.TCPSite(runner, host, port, backlog=BACKLOG)
            try:
                await site.start()
            except OSError as error:
                raise _cannot_listen(error, host, port) from None
            log.info("listening", url=f"http://{_bound(runner)}", pid=os.getpid())
            await stop.wait()
            log.info("stopping", in_flight=app[STATE].in_flight)
            app[STATE].stopping = True
        finally:
            await runner.cleanup()
            if access_log is not None:
                access_log.flush()
    log.info("stopped")


def _cannot_listen(error: OSError, host: str, port: int) -> CannotServe:
    if error.errno == errno.EADDRINUSE:
        return CannotServe("address_in_use", f"{host}:{port} is in use: stop what uses it, or choose another --port")
    return CannotServe("startup_failed", f"cannot listen on {host}:{port}: {error.strerror or error}")


def _bound(runner: web.AppRunner) -> str:
    host, port = runner.addresses[0][:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
