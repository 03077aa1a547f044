"""The sandbox as a process: open the books, serve, stop.

One process for each data directory. A kill at any moment loses nothing that anybody was told of. A second signal while
it stops ends it at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import aiohttp
import msgspec
import structlog
import uvloop
from aiohttp import web
from msgspec import Struct

from services.sandbox_psp.acquirer import Acquirer
from services.sandbox_psp.app import create_app
from services.sandbox_psp.books import Books
from services.sandbox_psp.failures import Failures, Settings
from services.sandbox_psp.journal import JournalDamaged
from services.sandbox_psp.webhooks import Webhooks
from services.web.logs import configure_logs
from services.web.serve import CannotServe, cannot_listen, check_host

GRACE_S: Final = 2.0  # for answers that are under way; connections that are held on purpose are let go at once
# For whoever only wants to try it; an address that others can reach needs secrets of its own.
API_KEY: Final = "sk_sandbox"
WEBHOOK_SECRET: Final = "whsec_sandbox"

log = structlog.get_logger("sandbox_psp")


class Options(Struct, frozen=True, kw_only=True):
    """`webhook_url` empty is a merchant who wants none. Each webhook is signed with all `webhook_secrets`."""

    data_dir: Path
    host: str = "127.0.0.1"
    port: int = 0
    insecure: bool = False
    api_key: str = API_KEY
    webhook_url: str = ""
    webhook_secrets: tuple[str, ...] = (WEBHOOK_SECRET,)
    public_url: str = ""
    settings: Settings = Settings()


def run_command(
    *, api_key: str | None, webhook_secrets: tuple[str, ...], seed: int, rates: tuple[str, ...], **more: Any
) -> None:
    """`python -m services sandbox-psp`: its options as they were typed. Raises `CannotServe`, ValueError."""
    configure_logs("sandbox-psp")
    options = Options(
        api_key=api_key or API_KEY,
        webhook_secrets=webhook_secrets or (WEBHOOK_SECRET,),
        settings=settings_of(seed, rates),
        **more,
    )
    run(options)


def settings_of(seed: int, rates: tuple[str, ...]) -> Settings:
    """From rates as they are typed: `slow=0.1`. Raises ValueError."""
    pairs = [rate.partition("=") for rate in rates]
    return msgspec.convert({"seed": seed, "rates": {kind: rate for kind, _, rate in pairs}}, Settings, strict=False)


def run(options: Options) -> None:
    """Serve until a signal. Raises `CannotServe`."""
    check_host(options.host, options.insecure)
    if options.insecure and (options.api_key == API_KEY or WEBHOOK_SECRET in options.webhook_secrets):
        raise CannotServe("default_secrets", "on an address that others can reach, give an API key and webhook secrets")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(options))


@contextlib.asynccontextmanager
async def sandbox(options: Options) -> AsyncIterator[web.Application]:
    """The application over its books, with all that runs beside it. Raises `CannotServe`."""
    try:
        books = Books(options.data_dir)
    except JournalDamaged as error:
        raise CannotServe("journal_unusable", str(error)) from None
    except OSError as error:
        raise CannotServe("startup_failed", f"cannot use {options.data_dir}: {error.strerror or error}") from None
    failures = Failures(options.settings)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(books.close)
        webhooks = None
        if options.webhook_url:
            session = await stack.enter_async_context(aiohttp.ClientSession())
            webhooks = Webhooks(books, failures, session, options.webhook_url, options.webhook_secrets)
            stack.push_async_callback(webhooks.close)
        acquirer = Acquirer(books, failures, webhooks)
        stack.callback(acquirer.close)
        acquirer.start()
        yield create_app(books, failures, acquirer, webhooks, options.api_key, options.public_url)


async def _serve(options: Options) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            os._exit(1)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    async with sandbox(options) as app:
        # A client that gives up frees what is held for it.
        runner = web.AppRunner(
            app, access_log=None, handle_signals=False, handler_cancellation=True, shutdown_timeout=GRACE_S
        )
        await runner.setup()
        try:
            try:
                await web.TCPSite(runner, options.host, options.port).start()
            except OSError as error:
                raise cannot_listen(error, options.host, options.port) from None
            host, port = runner.addresses[0][:2]
            log.info("listening", url=f"http://{host}:{port}", pid=os.getpid())
            await stop.wait()
        finally:
            await runner.cleanup()
    log.info("stopped")
