"""The client suite against three nodes as processes, and what only a cluster can show of the client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import kvstore
from kvstore import Client
from tests.client_suite import KvFactory
from tests.cluster.harness import ClusterProcesses
from tests.lease_suite import LeaseSuite
from tests.lock_suite import LockSuite
from tests.watch_suite import WatchSuite


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterProcesses]:
    """One cluster for all: each test keeps to keys of its own.

    Started on a loop of its own, in a thread: pytest-asyncio ends fixtures of a module's loop with each test.
    """
    cluster = ClusterProcesses(tmp_path_factory.mktemp("cluster"))
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, cluster.__aenter__()).result()
    yield cluster
    cluster.kill_all()


class TestOnACluster(LeaseSuite, WatchSuite, LockSuite):
    @pytest.fixture
    async def kv_factory(self, cluster: ClusterProcesses) -> AsyncIterator[KvFactory]:
        clients: list[Client] = []

        async def factory() -> Client:
            clients.append(await cluster.client())
            return clients[-1]

        yield factory
        for client in clients:
            await client.close()


async def test_a_killed_leader_costs_little_and_repeats_nothing(tmp_path: Path) -> None:
    async with ClusterProcesses(tmp_path) as cluster, cluster.client(timeout_s=20.0) as kv:
        acknowledged: list[int] = []
        stop = asyncio.Event()

        async def writer() -> None:
            while not stop.is_set():
                acknowledged.append((await kv.add(b"n", 1)).value)

        writers = [asyncio.ensure_future(writer()) for _ in range(16)]
        try:
            for _ in range(2):
                leader = await cluster.leader()
                cluster.kill(leader)
                killed, before = time.monotonic(), len(acknowledged)
                while len(acknowledged) <= before + 16:  # more than what was on its way already
                    await asyncio.sleep(0.005)
                assert time.monotonic() - killed < 5.0
                cluster.start(leader)
                await cluster.leader()
        finally:
            stop.set()
            await asyncio.gather(*writers)
        # Every addition was acknowledged once and applied once: no gap, no double.
        assert sorted(acknowledged) == list(range(1, len(acknowledged) + 1))
        record = await kv.get(b"n")
        assert record is not None
        assert int(record.value) == len(acknowledged)


async def test_a_paused_leader_is_given_up(tmp_path: Path) -> None:
    async with ClusterProcesses(tmp_path) as cluster, cluster.client(timeout_s=20.0) as kv:
        await kv.put(b"a", b"1")
        leader = await cluster.leader()
        cluster.pause(leader)
        started = time.monotonic()
        await kv.put(b"a", b"2")
        assert time.monotonic() - started < 10.0
        cluster.resume(leader)
        record = await kv.get(b"a")
        assert record is not None
        assert record.value == b"2"


async def test_a_cluster_of_another_id_is_refused(cluster: ClusterProcesses) -> None:
    async with kvstore.connect(cluster.endpoints, cluster_id="another") as kv:
        with pytest.raises(kvstore.Refused) as caught:
            await kv.get(b"a")
        assert caught.value.code == "wrong_cluster"
