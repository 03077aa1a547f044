"""A cluster that grows 1 → 3 → 5 and shrinks to 3 while clients write: nothing is lost, and nobody waits for long."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from kvstore import Client
from tests.cluster.harness import ClusterProcesses, run_command, until

pytestmark = pytest.mark.timeout(150)

WRITERS = 8
PAUSE_MAX_S = 3.0
JOINS_WITHIN_S = 30.0


class Load:
    """Writers that count, each on a key of its own and on one of all, and the longest time without an answer."""

    def __init__(self, kv: Client) -> None:
        self._kv = kv
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._last = self._loop.time()
        self.acknowledged = [0] * WRITERS
        self.longest_pause_s = 0.0
        self._tasks = [self._loop.create_task(self._write(writer)) for writer in range(WRITERS)]

    async def _write(self, writer: int) -> None:
        while not self._stop.is_set():
            count = (await self._kv.add(b"%d" % writer, 1, timeout=20.0)).value
            self.acknowledged[writer] += 1
            assert count == self.acknowledged[writer], "an addition was lost, or made twice"
            now = self._loop.time()
            self.longest_pause_s = max(self.longest_pause_s, now - self._last)
            self._last = now

    async def end(self) -> None:
        self._stop.set()
        await asyncio.gather(*self._tasks)


async def command(cluster: ClusterProcesses, *arguments: str) -> str:
    code, out, err = await run_command(*arguments, environment={"KVSTORE_ENDPOINTS": cluster.endpoints})
    assert code == 0, err
    return out


async def joined(cluster: ClusterProcesses, name: str) -> None:
    cluster.join(name)

    async def has_a_vote() -> bool:
        status = await cluster.status(name)
        return status is not None and any(member.name == name and member.voter for member in status.members)

    await until(has_a_vote, JOINS_WITHIN_S, f"{name} has a vote")


async def gone(cluster: ClusterProcesses, name: str) -> None:
    """It was removed, and ends by itself."""
    node = cluster.nodes[name]

    async def ended() -> bool:
        return not node.running

    await until(ended, JOINS_WITHIN_S, f"{name} ends")
    assert node.reap() == 0
    del cluster.nodes[name]


async def test_it_grows_and_shrinks_under_load(tmp_path: Path) -> None:
    async with ClusterProcesses(tmp_path, nodes=1) as cluster, cluster.client() as kv:
        load = Load(kv)
        for name in ("n2", "n3", "n4", "n5"):
            await joined(cluster, name)
        leader = await cluster.leader()
        for name in (leader, next(name for name in ("n4", "n5") if name != leader)):
            await command(cluster, "leave", name)
            await gone(cluster, name)
        leader = await cluster.leader()

        # A node loses its disk: it is replaced under its own name.
        lost = next(name for name in cluster.nodes if name != leader)
        cluster.kill(lost)
        shutil.rmtree(cluster.nodes[lost].data_dir)
        await command(cluster, "member", "remove", lost)
        del cluster.nodes[lost]
        await joined(cluster, lost)

        await load.end()
        assert load.longest_pause_s < PAUSE_MAX_S
        assert min(load.acknowledged) > 0
        for writer, count in enumerate(load.acknowledged):
            record = await kv.get(b"%d" % writer)
            assert record is not None
            assert int(record.value) == count
        assert len((await kv.status()).members) == 3
        await cluster.converged()


async def test_a_learner_serves_reads_and_is_promoted_when_asked(tmp_path: Path) -> None:
    async with ClusterProcesses(tmp_path) as cluster, cluster.client() as kv:
        await kv.put(b"a", b"1")
        cluster.join("n4", "--learner")

        async def caught_up() -> bool:
            status = await cluster.status("n4")
            return status is not None and status.revision == 1 and status.role == "learner"

        await until(caught_up, JOINS_WITHIN_S, "n4 has caught up")
        async with cluster.client() as reader:
            found = await reader.digest(revision=1, address=cluster.nodes["n4"].client_address)
            assert found.count == 1
        assert sum(member.voter for member in (await kv.status()).members) == 3
        assert "n4 has a vote" in await command(cluster, "member", "promote", "n4")
        assert sum(member.voter for member in (await kv.status()).members) == 4
        code, _, err = await run_command(
            "member", "promote", "n4", environment={"KVSTORE_ENDPOINTS": cluster.endpoints}
        )
        assert code == 1
        assert "not_learner" in err
