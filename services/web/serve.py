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
from collections.abc import AsyncIterator, Callable
from typing import Final

import structlog
import uvloop
from aiohttp import web
from msgspec import Struct

import kvstore
from services.web.app import STATE
from services.web.clients import TRUSTED_PROXIES, parse_network
from services.web.limits import Limit
from services.web.logs import AccessLog
from services.web.runner import ServiceRunner

WORKERS_MAX: Final = 64  # more than the cores of any machine that this was thought for
BACKLOG: Final = 1024  # a burst of clients after a leader change must not be turned away

log = structlog.get_logger("services")

BuildApp = Callable[[kvstore.Client, AccessLog | None, Limit | None], web.Application]


class CannotServe(Exception):
    """The process cannot start; `code` is stable, the message says what to do."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{message} [{code}]")
        self.code = code


class Serving(Struct, frozen=True, kw_only=True):
    """How a service is to run. With `shared_port` others listen on the same one, and one looks after all of them."""

    endpoints: str | None
    host: str
    port: int
    insecure: bool = False
    shared_port: bool = False
    access_log: AccessLog | None = None
    limit: Limit | None = None
    trusted_proxies: tuple[str, ...] = ()


def run_service(build: BuildApp, serving: Serving) -> None:
    """Serve until a signal. Raises `CannotServe`, and ValueError for endpoints or networks that are none."""
    check_host(serving.host, serving.insecure)
    for network in serving.trusted_proxies:
        parse_network(network)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(build, serving))


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


async def _serve(build: BuildApp, serving: Serving) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            os._exit(1)  # the second one: whoever sends it does not want to wait
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    if serving.shared_port:
        _follow_parent(loop, stop)
    async with kvstore.connect(serving.endpoints) as store:
        app = build(store, serving.access_log, serving.limit)
        app[TRUSTED_PROXIES] = tuple(parse_network(network) for network in serving.trusted_proxies)
        try:
            async with listening(app, serving.host, serving.port, shared_port=serving.shared_port):
                await stop.wait()
                log.info("stopping", in_flight=app[STATE].in_flight, streams=app[STATE].streams)
                app[STATE].stopping = True
        finally:
            if serving.access_log is not None:
                serving.access_log.flush()
    log.info("stopped")


@contextlib.asynccontextmanager
async def listening(app: web.Application, host: str, port: int, *, shared_port: bool = False) -> AsyncIterator[None]:
    """Serve `app`; at the end what is running gets `GRACE_S` to finish. Raises `CannotServe`."""
    runner = ServiceRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port, backlog=BACKLOG, reuse_port=shared_port or None)
        try:
            await site.start()
        except OSError as error:
            raise cannot_listen(error, host, port) from None
        log.info("listening", url=f"http://{_bound(runner)}", pid=os.getpid())
        yield
    finally:
        await runner.cleanup()


def _follow_parent(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    """Standard input is a pipe from the process that looks after this one, and ends with it, however that ends."""

    def on_readable() -> None:
        if not os.read(0, 1024):
            loop.remove_reader(0)
            stop.set()

    loop.add_reader(0, on_readable)


def cannot_listen(error: OSError, host: str, port: int) -> CannotServe:
    if error.errno == errno.EADDRINUSE:
        return CannotServe("address_in_use", f"{host}:{port} is in use: stop what uses it, or choose another --port")
    return CannotServe("startup_failed", f"cannot listen on {host}:{port}: {error.strerror or error}")


def _bound(runner: web.AppRunner) -> str:
    host, port = runner.addresses[0][:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
