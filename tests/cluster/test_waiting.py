"""Who waits for a lock, watches who leads, or keeps a lease alive sits out a time without a majority."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from kvstore import Lock
from kvstore.client.lock import lock_prefix
from tests.cluster.harness import COMMAND, ROOT, ClusterProcesses, until

pytestmark = pytest.mark.timeout(120)

# Calls give up after this, and the outage is some times as long.
TIMEOUT_S, OUTAGE_S = 1.0, 4.0
TTL_S = 30.0
WITHIN_S = 20.0


async def test_an_outage_ends_no_wait_while_leases_are_good(tmp_path: Path) -> None:
    async with (
        ClusterProcesses(tmp_path) as cluster,
        cluster.client(timeout_s=10.0) as holder,
        cluster.client(timeout_s=TIMEOUT_S) as waiter,
    ):
        leaders: list[bytes | None] = []

        async def observe() -> None:
            async for leader in waiter.election("job").observe():
                leaders.append(None if leader is None else leader.value)

        async def wait() -> Lock:
            async with waiter.election("job").campaign(b"second", ttl_s=TTL_S) as lock:
                return lock

        async def in_line() -> bool:
            return (await holder.range(prefix=lock_prefix("job"), count_only=True)).count == 2

        async with holder.election("job").campaign(b"first", ttl_s=TTL_S) as first:
            observing, waiting = asyncio.ensure_future(observe()), asyncio.ensure_future(wait())
            await until(in_line, WITHIN_S, "the waiter has its place")
            # Its next keep-alives fall into the outage.
            lease = (await holder.grant_lease(3 * OUTAGE_S / 2)).lease
            keeper = await asyncio.create_subprocess_exec(
                sys.executable, "-m", COMMAND, "lease", "keep-alive", str(lease), "--timeout", str(TIMEOUT_S),
                cwd=ROOT, env={**os.environ, "KVSTORE_ENDPOINTS": cluster.endpoints},
                stdout=asyncio.subprocess.PIPE,
            )  # fmt: skip
            assert keeper.stdout is not None
            async with asyncio.timeout(WITHIN_S):
                assert b"lives another" in await keeper.stdout.readline()
            paused = list(cluster.nodes)[:2]
            for name in paused:
                cluster.pause(name)
            await asyncio.sleep(OUTAGE_S)
            assert not waiting.done(), waiting
            assert not observing.done(), observing
            for name in paused:
                cluster.resume(name)
            async with asyncio.timeout(WITHIN_S):
                assert b"lives another" in await keeper.stdout.readline()
            assert not first.lost
        async with asyncio.timeout(WITHIN_S):
            await waiting
            while leaders != [b"first", b"second", None]:
                assert not observing.done(), observing
                await asyncio.sleep(0.02)
        observing.cancel()
        keeper.terminate()
        await keeper.wait()
