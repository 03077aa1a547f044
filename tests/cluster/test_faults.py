"""A full disk and a partition, on real processes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from msgspec import Raw

import kvstore
from kvstore import codec, model
from tests.cluster.harness import ClusterProcesses, until

pytestmark = pytest.mark.timeout(120)


class FaultyCluster(ClusterProcesses):
    def __init__(self, path: Path) -> None:
        self.faults = path / "faults"
        self.faults.mkdir()
        environment = {"KVSTORE_TEST_FAULTS": str(self.faults)}
        super().__init__(path, 3, main="tests.cluster.faulty_main", environment=environment)

    async def part(self, name: str) -> None:
        """Cut one node off from the others, both ways; returns when it is."""
        addresses = {other: {self.nodes[name].peer_address} for other in self.nodes if other != name}
        addresses[name] = {node.peer_address for node in self.nodes.values() if node.name != name}
        await self._cut(addresses)

    async def heal(self) -> None:
        await self._cut({name: set() for name in self.nodes})

    async def _cut(self, addresses: dict[str, set[str]]) -> None:
        for name, cut in addresses.items():
            (self.faults / f"cut.{name}").write_text("\n".join(sorted(cut)))

        async def all_noticed() -> bool:
            noticed = {name: self.faults / f"noticed.{name}" for name in addresses}
            return all(noticed[n].exists() and set(noticed[n].read_text().split()) == addresses[n] for n in addresses)

        await until(all_noticed, 5, "the nodes to notice")


async def test_a_cut_off_leader_refuses_what_it_cannot_promise_and_the_majority_goes_on(tmp_path: Path) -> None:
    async with FaultyCluster(tmp_path) as cluster, cluster.client(timeout_s=10) as client:
        await client.put(b"k", b"before")
        await cluster.converged()
        old = await cluster.leader()
        await cluster.part(old)
        # It may take the write, and then does not know what became of it; but it acknowledges none, and reads nothing.
        write, linearizable, local = await asyncio.gather(
            cluster.ask(old, write_of(b"from the cut-off side"), 10),
            cluster.ask(old, read_of(codec.ReadLevel.LINEARIZABLE), 10),
            cluster.ask(old, read_of(codec.ReadLevel.LOCAL), 10),
        )
        assert isinstance(write, codec.Failure)
        assert write.code in ("outcome_unknown", "not_leader", "no_leader")
        assert isinstance(linearizable, codec.Failure)
        assert isinstance(local, codec.Answer)
        assert value_in(local) == b"before"
        assert await cluster.leader(other_than=old) != old
        majority = ",".join(node.client_address for node in cluster.nodes.values() if node.name != old)
        async with kvstore.connect(majority, timeout_s=10) as with_them:
            await with_them.put(b"k", b"after")
            record = await with_them.get(b"k")
            assert record is not None
            assert record.value == b"after"

        async def stepped_down() -> bool:
            status = await cluster.status(old)
            return status is not None and status.role != "leader"

        await until(stepped_down, 5, "the cut-off leader to step down")
        await cluster.heal()
        await cluster.converged()
        async with kvstore.connect(cluster.nodes[old].client_address, timeout_s=10) as returned:
            record = await returned.get(b"k")
            assert record is not None
            assert record.value == b"after"


async def test_a_node_that_returns_from_a_partition_does_not_disturb_the_leader(tmp_path: Path) -> None:
    async with FaultyCluster(tmp_path) as cluster, cluster.client(timeout_s=10) as client:
        leader = await cluster.leader()
        follower = next(name for name in cluster.nodes if name != leader)
        before = await cluster.status(leader)
        assert before is not None
        await cluster.part(follower)

        async def alone() -> bool:
            status = await cluster.status(follower)
            return status is not None and not any(peer.connected for peer in status.peers)

        await until(alone, 15, "the cut-off node to notice")
        await client.put(b"k", b"v")
        await cluster.heal()
        await cluster.converged()
        after = await cluster.status(leader)
        assert after is not None
        assert (after.role, after.term) == ("leader", before.term)


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


def write_of(value: bytes) -> codec.Write:
    return codec.Write(2, 0, 0, 0, Raw(codec.encode_request(model.Put(b"k", value))))


def read_of(level: int) -> codec.Read:
    return codec.Read(3, level, 0, Raw(codec.encode_request(model.Range(b"k"))))


def value_in(answer: codec.Answer) -> bytes:
    result = codec.decode_result(answer.result)
    assert isinstance(result, model.RangeResult)
    (record,) = result.records
    return record.value
