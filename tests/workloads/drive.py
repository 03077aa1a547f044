"""Run workloads to an end: the plain way, for tests without faults of their own. Campaigns have their own drivers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from random import Random

from kvstore import Client
from tests.workloads.base import Workload


async def drive(clients: Sequence[Client], workloads: Sequence[Workload], chance: Random, steps: int) -> None:
    """Set up, take so many steps with one worker per client (one client may be there several times), and finish."""
    for workload in workloads:
        await workload.set_up(clients[0])
    left = steps

    async def work(worker: int, kv: Client, own_chance: Random) -> None:
        nonlocal left
        while left > 0:
            left -= 1
            await own_chance.choice(workloads).step(kv, worker, own_chance)

    workers = [work(number, kv, Random(chance.getrandbits(64))) for number, kv in enumerate(clients)]
    await asyncio.gather(*workers)
    for workload in workloads:
        await workload.finish(clients[0])
