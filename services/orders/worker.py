"""A process that does the order service's durable steps: `python -m services worker`. Any number may run.

It serves nobody. Asked to (`Listener`), it answers whoever looks after it, as the services do: `/livez`, `/readyz` (it
has its lease, and reaches the store) and `/metrics` (`services.work.metrics`).
"""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import AsyncExitStack

import aiohttp
import structlog
import uvloop
from msgspec import Struct
from prometheus_client import CollectorRegistry

import kvstore
from services.orders.steps import PARK_REASONS, OrderSteps
from services.payments.loading import OpenProvider
from services.web.app import STATE, bare_app
from services.web.serve import check_host, listening
from services.work.metrics import WorkMetrics
from services.work.worker import INTERNAL, Worker

log = structlog.get_logger("services.worker")


class Listener(Struct, frozen=True):
    """Where a worker tells how it is."""

    host: str
    port: int
    insecure: bool = False


def run_worker(endpoints: str | None, open_provider: OpenProvider, listener: Listener | None = None) -> None:
    """Work until SIGTERM or SIGINT. What it is at then is taken up by another worker, or by this one's successor: its
    claims end with its lease. Raises `CannotServe`, and ValueError for endpoints that are none."""
    if listener is not None:
        check_host(listener.host, listener.insecure)
    uvloop.run(_work(endpoints, open_provider, listener))


async def _work(endpoints: str | None, open_provider: OpenProvider, listener: Listener | None) -> None:
    loop = asyncio.get_running_loop()
    async with kvstore.connect(endpoints) as store, aiohttp.ClientSession() as session, AsyncExitStack() as stack:
        steps = OrderSteps(store, open_provider(session))
        registry = CollectorRegistry()
        metrics = WorkMetrics(registry, steps.handlers, {*PARK_REASONS, INTERNAL})
        worker = Worker(store, steps.handlers, also_parked=steps.also_parked, metrics=metrics)
        app = bare_app(store, registry=registry, why_not_ready=lambda: worker.why_not_working)
        if listener is not None:
            await stack.enter_async_context(listening(app, listener.host, listener.port))
        working = asyncio.create_task(worker.run())

        def stop() -> None:
            app[STATE].stopping = True
            working.cancel()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop)
        log.info("working", pid=os.getpid())
        await asyncio.wait((working,))
        if not working.cancelled():
            working.result()
    log.info("stopped")
