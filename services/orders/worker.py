"""A process that does the order service's durable steps: `python -m services worker`. Any number may run."""

from __future__ import annotations

import asyncio
import os
import signal

import aiohttp
import structlog
import uvloop

import kvstore
from services.orders.steps import OrderSteps
from services.payments.loading import OpenProvider
from services.work.worker import Worker

log = structlog.get_logger("services.worker")


def run_worker(endpoints: str | None, open_provider: OpenProvider) -> None:
    """Work until SIGTERM or SIGINT. What it is at then is taken up by another worker, or by this one's successor: its
    claims end with its lease. Raises ValueError for endpoints that are none."""
    uvloop.run(_work(endpoints, open_provider))


async def _work(endpoints: str | None, open_provider: OpenProvider) -> None:
    loop = asyncio.get_running_loop()
    async with kvstore.connect(endpoints) as store, aiohttp.ClientSession() as session:
        steps = OrderSteps(store, open_provider(session))
        worker = Worker(store, steps.handlers, also_parked=steps.also_parked)
        working = asyncio.create_task(worker.run())
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, working.cancel)
        log.info("working", pid=os.getpid())
        await asyncio.wait((working,))
        if not working.cancelled():
            working.result()
    log.info("stopped")
