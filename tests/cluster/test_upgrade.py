"""A rolling upgrade: members of this version and of the one before, side by side and under load.

The one before is `previous_version.py`; with KVSTORE_PREVIOUS=DIRECTORY it is the checkout there (`make upgrade`).
"""

from __future__ import annotations

import asyncio
import itertools
import os
from pathlib import Path

import pytest

from kvstore import Client, Unavailable, versions
from kvstore.backup import BackupWriter, Header
from kvstore.model import Record
from tests.cluster.harness import COMMAND, ROOT, ClusterProcesses, run_command, until

pytestmark = pytest.mark.timeout(120)

CHECKOUT = os.environ.get("KVSTORE_PREVIOUS", "")
PREVIOUS = "tests.cluster.previous_version"
WRITERS = 4


class MixedCluster(ClusterProcesses):
    """Begins with the version before on all nodes."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.new: set[str] = set()

    def start(self, name: str) -> None:
        is_old = name not in self.new
        root = Path(CHECKOUT) if is_old and CHECKOUT else ROOT
        main = PREVIOUS if is_old and not CHECKOUT else COMMAND
        self.nodes[name].run(main, self.serve_arguments(name), {}, root)

    async def restart_as(self, name: str, *, new: bool) -> None:
        assert self.stop(name) == 0
        (self.new.add if new else self.new.discard)(name)
        self.start(name)
        await self.converging(name)

    async def converging(self, name: str) -> None:
        """Until a node has applied what was committed a moment ago."""
        commit = max([look.commit_index for look in [await self.status(each) for each in self.nodes] if look])

        async def applied() -> bool:
            look = await self.status(name)
            return look is not None and look.applied_index >= commit

        await until(applied, 20.0, f"{name} has caught up")


class Load:
    """Puts keys of their own, as fast as they are acknowledged."""

    def __init__(self, kv: Client) -> None:
        self._kv = kv
        self._numbers = itertools.count()
        self.acknowledged: list[int] = []
        self.tasks = [asyncio.ensure_future(self._write()) for _ in range(WRITERS)]

    async def _write(self) -> None:
        while True:
            number = next(self._numbers)
            await self._kv.put(b"load/%d" % number, b"%d" % number, timeout=20.0)
            self.acknowledged.append(number)

    async def stop(self) -> None:
        for task in self.tasks:
            task.cancel()
        ended = await asyncio.gather(*self.tasks, return_exceptions=True)
        assert all(isinstance(each, asyncio.CancelledError) for each in ended), ended

    async def check(self) -> None:
        found = {record.key: record.value async for record in self._kv.scan(prefix=b"load/", level="linearizable")}
        lost = [number for number in self.acknowledged if found.get(b"load/%d" % number) != b"%d" % number]
        assert not lost, f"{len(lost)} of {len(self.acknowledged)} acknowledged writes are lost"


async def leases_wait(kv: Client) -> None:
    with pytest.raises(Unavailable, match="needs version 2") as caught:
        await kv.grant_lease(5.0, timeout=0.5)
    assert caught.value.code == "upgrade_pending"


async def test_members_are_upgraded_one_after_the_other_under_load(tmp_path: Path) -> None:
    async with MixedCluster(tmp_path) as cluster, cluster.client() as kv:
        load = Load(kv)
        first, second, third = cluster.nodes
        if not CHECKOUT:
            await leases_wait(kv)
        await cluster.restart_as(first, new=True)
        # And back again: nothing of the new version was used.
        await cluster.restart_as(first, new=False)
        await cluster.restart_as(first, new=True)
        await cluster.restart_as(second, new=True)
        if not CHECKOUT:
            await leases_wait(kv)
        leader = await cluster.leader()
        if leader == third:  # one of each version leads in the mixed cluster
            await kv.transfer_leader(first)
            await cluster.leader(other_than=third)
        if not CHECKOUT:
            await leases_wait(kv)
        look = await cluster.status(first)
        assert look is not None
        assert CHECKOUT or look.cluster_version == 1
        await cluster.restart_as(third, new=True)

        async def raised() -> bool:
            looks = [await cluster.status(name) for name in cluster.nodes]
            return all(look is not None and look.cluster_version == versions.VERSION for look in looks)

        await until(raised, 10.0, "the cluster's version is raised")
        granted = await kv.grant_lease(30.0)
        await kv.put(b"leased", b"", lease=granted.lease)
        await load.stop()
        assert len(load.acknowledged) > 100
        await load.check()
        await cluster.converged()
        if CHECKOUT:
            return

        # Now there is no way back for a member: it says so, and the others go on.
        assert cluster.stop(first) == 0
        cluster.new.discard(first)
        cluster.start(first)
        assert await asyncio.to_thread(cluster.nodes[first].reap) == 5
        assert "data_format_newer" in cluster.nodes[first].log()
        await kv.put(b"on", b"")


async def alone_at_the_new_version(cluster: ClusterProcesses) -> None:
    async def raised() -> bool:
        look = await cluster.status("n1")
        return look is not None and look.cluster_version == versions.VERSION

    await until(raised, 10.0, "the cluster's version is raised")


async def test_an_older_program_does_not_join(tmp_path: Path) -> None:
    """It would get a vote, and stop at the next write: a cluster that grew from one node had no quorum any more."""
    async with ClusterProcesses(tmp_path, nodes=1) as cluster, cluster.client() as kv:
        await alone_at_the_new_version(cluster)
        cluster._main = PREVIOUS
        node = cluster.join("n2")
        assert await asyncio.to_thread(node.reap) == 5
        assert "[data_format_newer]" in node.log()
        assert [member.name for member in (await kv.status()).members] == ["n1"]
        await kv.put(b"on", b"")


async def test_an_older_program_does_not_take_up_a_log_that_raises_the_version(tmp_path: Path) -> None:
    async with ClusterProcesses(tmp_path, nodes=1) as cluster:
        await alone_at_the_new_version(cluster)
        cluster.kill("n1")  # its state on the disk is of before
        cluster._main = PREVIOUS
        cluster.start("n1")
        assert await asyncio.to_thread(cluster.nodes["n1"].reap) == 5
        assert "[data_format_newer]" in cluster.nodes["n1"].log()
        assert "bug" not in cluster.nodes["n1"].log()
        cluster._main = COMMAND
        cluster.start("n1")
        await cluster.leader()
        await alone_at_the_new_version(cluster)


async def test_members_that_were_restored_by_two_versions_are_one_cluster(tmp_path: Path) -> None:
    with (tmp_path / "backup").open("wb") as file:
        writer = BackupWriter(file)
        writer.header(Header(2, "cluster", 7, 1_700_000_000_000, "1.0"))
        writer.record(Record(b"k", b"v", 7, 7, 1))
        writer.leases(())
        writer.end()
    cluster = MixedCluster(tmp_path)
    cluster.new.add("n1")
    for name, node in cluster.nodes.items():
        code, _, err = await run_command(
            "restore", str(tmp_path / "backup"), "--name", name, "--data-dir", str(node.data_dir),
            "--peers", cluster.peers, main=COMMAND if name in cluster.new else PREVIOUS,
        )  # fmt: skip
        assert code == 0, err
        cluster.knowing.add(name)
    async with cluster, cluster.client() as kv:
        await kv.put(b"on", b"")
        await cluster.converged()
        looks = [await cluster.status(name) for name in cluster.nodes]
        assert [look and look.cluster_version for look in looks] == [1, 1, 1]
