"""A full disk, on real processes. (What networks do is test_partitions.py.)"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from kvstore import codec
from tests.chaos.cluster import ProxiedCluster
from tests.cluster.frames import read_of, value_in, write_of
from tests.cluster.harness import ClusterProcesses, until

pytestmark = pytest.mark.timeout(120)


class FaultyCluster(ClusterProcesses):
    def __init__(self, path: Path) -> None:
        self.faults = path / "faults"
        self.faults.mkdir()
        environment = {"KVSTORE_TEST_FAULTS": str(self.faults)}
        super().__init__(path, 3, main="tests.cluster.faulty_main", environment=environment)


async def test_a_full_disk_refuses_writes_serves_reads_and_loses_nothing(tmp_path: Path) -> None:
    async with FaultyCluster(tmp_path) as cluster, cluster.client(timeout_s=20) as client:
        for number in range(20):
            await client.put(b"k%d" % number, b"v")
        await client.put(b"k", b"v")
        await cluster.converged()
        full = await cluster.leader()
        flag = cluster.faults / f"full.{full}"
        flag.touch()
        writes = [asyncio.create_task(client.add(b"n", 1)) for _ in range(20)]
        await asyncio.gather(*writes)
        assert await cluster.leader(other_than=full) != full
        status = await cluster.status(full)
        assert status is not None
        assert status.role == "failed"
        assert "No space left" in status.storage_error
        local = await cluster.ask(full, read_of(codec.ReadLevel.LOCAL), 5)
        assert isinstance(local, codec.Answer)
        assert value_in(local) == b"v"
        refused = await cluster.ask(full, write_of(b"w"), 5)
        assert isinstance(refused, codec.Failure)
        assert refused.code == "storage_failed"
        flag.unlink()
        assert cluster.stop(full) == 0
        cluster.start(full)
        await cluster.converged()
        record = await client.get(b"n")
        assert record is not None
        assert record.value == b"20"
        assert (await client.range(prefix=b"k", count_only=True)).count == 21


async def test_a_node_that_can_write_no_file_at_all_not_even_its_log_says_that_its_disk_failed(tmp_path: Path) -> None:
    """By the kernel's own limit on file sizes: what the node logs of its failure is lost, and nothing else."""
    async with ProxiedCluster(tmp_path) as cluster, cluster.client(timeout_s=20) as client:
        await client.put(b"k", b"v")
        await cluster.converged()
        full = await cluster.leader()
        cluster.fill_disk(full)
        assert (await client.add(b"n", 1)).value == 1
        assert await cluster.leader(other_than=full) != full

        async def says_so() -> bool:
            status = await cluster.status(full)
            return status is not None and status.role == "failed" and "File too large" in status.storage_error

        await until(says_so, 5, "the node to say that its disk failed")
        local = await cluster.ask(full, read_of(codec.ReadLevel.LOCAL), 5)
        assert isinstance(local, codec.Answer)
        assert value_in(local) == b"v"
        cluster.free_disk(full)
        assert await cluster.terminate(full) == 0
        cluster.start(full)
        await cluster.converged()
