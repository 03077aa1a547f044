"""Backup, restore, verify, recover and inspect, as an operator types them, on real processes."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

import pytest

import kvstore
from kvstore import Client, Put, Refused
from kvstore.env import SystemFiles
from kvstore.raft.state_directory import StateDirectory
from kvstore.state.layout import CURRENT
from kvstore.state.storage import RocksStorage
from tests.cluster.harness import ClusterProcesses, run_command, until

pytestmark = pytest.mark.timeout(120)

RECORDS = 3000


async def fill(kv: Client, chance: Random) -> None:
    lease = (await kv.grant_lease(3600.0)).lease
    for start in range(0, RECORDS, 100):
        keys = range(start, start + 100)
        await kv.txn(success=[Put(b"%06d" % key, chance.randbytes(100), lease if key % 50 == 0 else 0) for key in keys])
    for key in range(0, RECORDS, 7):
        await kv.put(b"%06d" % key, b"changed")


async def command(cluster: ClusterProcesses, *arguments: str, expect: int = 0) -> Any:
    environment = {"KVSTORE_ENDPOINTS": cluster.endpoints}
    code, out, err = await run_command(*arguments, "-o", "json", environment=environment)
    assert code == expect, err
    return json.loads(out)


async def verified(cluster: ClusterProcesses) -> Any:
    found = await command(cluster, "verify")
    (digest,) = {replica["digest"] for replica in found["replicas"]}
    return digest, found["revision"]


async def test_a_wiped_cluster_is_restored_as_it_was(tmp_path: Path) -> None:
    file = str(tmp_path / "shop.backup")
    async with ClusterProcesses(tmp_path) as cluster:
        async with cluster.client() as kv:
            await fill(kv, Random(1))
            stop = asyncio.Event()

            async def write_elsewhere() -> None:
                """The backup is taken under load, and holds what there was at its beginning."""
                while not stop.is_set():
                    await kv.add(b"~later", 1)

            writer = asyncio.ensure_future(write_elsewhere())
            under_load = await command(cluster, "backup", file)
            stop.set()
            await writer
            assert RECORDS <= under_load["records"] <= RECORDS + 1
            code, _, err = await run_command("backup", file, environment={"KVSTORE_ENDPOINTS": cluster.endpoints})
            assert code == 2
            assert "--force" in err
            made = await command(cluster, "backup", file, "--force")
            assert (made["digest"], made["revision"]) == await verified(cluster)
        old_id = cluster.cluster_id
        for name, node in cluster.nodes.items():
            cluster.kill(name)
            shutil.rmtree(node.data_dir)
        for name, node in cluster.nodes.items():
            restore = ("restore", file, "--name", name, "--data-dir", str(node.data_dir), "--peers", cluster.peers)
            restored = await command(cluster, *restore)
            assert restored["digest"] == made["digest"]
            assert restored["cluster_id"] != old_id
            code, _, err = await run_command(*restore)
            assert code == 5
            assert "data_dir_not_empty" in err
            cluster.knowing.add(name)
        for name in cluster.nodes:
            cluster.start(name)
        await cluster.leader()
        async with cluster.client() as kv:
            assert await verified(cluster) == (made["digest"], made["revision"])
            assert [lease async for lease in kv.leases()]
            assert (await kv.put(b"more", b"")).revision == made["revision"] + 1
        cluster.join("n4")  # an empty node gets all of it
        await until_voter(cluster, "n4")
        async with kvstore.connect(cluster.endpoints, cluster_id=old_id) as kv:
            with pytest.raises(Refused) as caught:
                await kv.get(b"more")
            assert caught.value.code == "wrong_cluster"
        await cluster.converged()


async def test_a_damaged_replica_is_named_with_the_revision(tmp_path: Path) -> None:
    async with ClusterProcesses(tmp_path) as cluster:
        async with cluster.client() as kv:
            await fill(kv, Random(2))
            record = await kv.get(b"001234")
            assert record is not None
            leader = await cluster.leader()
            victim = next(name for name in cluster.nodes if name != leader)
            cluster.stop(victim)
            path = StateDirectory(SystemFiles(), str(cluster.nodes[victim].data_dir / "state")).current()
            storage = RocksStorage(path)
            packed = storage.get(CURRENT + b"001234")
            assert packed is not None
            batch = storage.batch()
            batch.put(CURRENT + b"001234", packed[:-1] + bytes([packed[-1] ^ 1]))
            storage.write(batch)
            storage.close()
            cluster.start(victim)
            await cluster.leader()
        found = await command(cluster, "verify", expect=1)
        assert {replica["name"] for replica in found["replicas"] if replica["status"] == "same"} == {
            name for name in cluster.nodes if name != victim
        }
        differs = {replica["name"]: replica["differs_since_revision"] for replica in found["replicas"]}
        assert differs.pop(victim) == record.mod_revision
        assert set(differs.values()) == {None}
        cluster.kill(victim)
        code, out, _ = await run_command(
            "verify", "--timeout", "2", environment={"KVSTORE_ENDPOINTS": cluster.endpoints}
        )
        assert code == 3
        assert "unreachable" in out


async def test_a_survivor_is_recovered_alone_and_grows_again(tmp_path: Path) -> None:
    async with ClusterProcesses(tmp_path) as cluster:
        async with cluster.client() as kv:
            await fill(kv, Random(3))
        digest, _ = await verified(cluster)
        survivor = cluster.nodes["n2"]
        for name in cluster.nodes:
            cluster.kill(name)
        inspected = await command(cluster, "inspect", str(survivor.data_dir))
        assert len(inspected["members"]) == 3
        code, out, _ = await run_command("inspect", str(survivor.data_dir), "--digest")
        assert code == 0
        assert "member n3" in out
        code, _, err = await run_command("recover", str(survivor.data_dir), "--name", "n2", stdin=b"n3\n")
        assert code == 1
        assert "not confirmed" in err
        recovered = await command(cluster, "recover", str(survivor.data_dir), "--name", "n2", "--yes")
        assert recovered["lost_members"] == ["n1", "n3"]
        lost = [cluster.nodes.pop(name) for name in ("n1", "n3")]
        cluster.knowing.add("n2")
        cluster.start("n2")
        await cluster.leader()
        assert (await verified(cluster))[0] == digest
        for name in ("n4", "n5"):
            cluster.join(name)
            await until_voter(cluster, name)
        await cluster.leader()
        async with cluster.client() as kv:
            await kv.put(b"after", b"")
        # One of the old cluster that comes back after all is refused by all.
        cluster.nodes["n1"] = lost[0]
        cluster.knowing.add("n1")
        cluster.start("n1")

        async def refused() -> bool:
            return "wrong_cluster" in lost[0].log()

        await until(refused, 10.0, "the nodes of the new cluster refuse one of the old")
        cluster.kill("n1")
        cluster.nodes.pop("n1")
        await cluster.converged()


async def until_voter(cluster: ClusterProcesses, name: str) -> None:
    async def has_a_vote() -> bool:
        status = await cluster.status("n2")
        return status is not None and any(member.name == name and member.voter for member in status.members)

    await until(has_a_vote, 30.0, f"{name} has a vote")
