"""How the client finds its way: to the leader, around nodes that are gone, silent, foreign or talking junk."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator

import msgspec
import pytest

import kvstore
from kvstore import Client, Refused, Unavailable, codec
from kvstore.client.connection import TcpConnector, parse_endpoints
from kvstore.client.pool import LinkState
from tests.fake_server import FakeCluster, FakeNode, answer, fail, until


@pytest.fixture
async def cluster() -> AsyncIterator[FakeCluster]:
    async with FakeCluster(3) as cluster:
        yield cluster


async def quick(endpoints: str, *, silence_s: float = 0.1, timeout_s: float = 5.0, cluster_id: str = "") -> Client:
    """A client that loses patience with a silent connection soon."""
    ids = itertools.count(1_000_000).__next__
    connector = TcpConnector(asyncio.get_running_loop(), ids, silence_s=silence_s)
    return Client(parse_endpoints(endpoints), timeout_s=timeout_s, cluster_id=cluster_id, connector=connector)


async def test_one_reachable_node_is_enough(cluster: FakeCluster) -> None:
    first, second, third = cluster.nodes
    async with kvstore.connect(second.address) as kv:
        await kv.put(b"a", b"1")
        assert len(first.writes) == 1
        # It has learned of the others: the one that it was told of may go.
        await until(lambda: third.address in kv._pool._links)
        await second.stop()
        cluster.elect(third)
        await kv.put(b"b", b"2")
        assert len(third.writes) == 1


async def test_a_node_that_is_down_does_not_hold_up_the_others(cluster: FakeCluster) -> None:
    await cluster.nodes[2].stop()
    async with kvstore.connect(cluster.endpoints) as kv:
        started = time.monotonic()
        await kv.put(b"a", b"1")
        assert time.monotonic() - started < 0.5


async def test_writes_go_only_to_the_leader(cluster: FakeCluster) -> None:
    async with kvstore.connect(cluster.endpoints) as kv:
        for number in range(10):
            await kv.put(b"%d" % number, b"")
        assert [len(node.writes) for node in cluster.nodes] == [10, 0, 0]


async def test_a_new_leader_is_found_soon_after_the_old_one_died(cluster: FakeCluster) -> None:
    first, second, _ = cluster.nodes
    async with kvstore.connect(cluster.endpoints) as kv:
        await kv.put(b"a", b"1")
        await first.stop()
        call = asyncio.ensure_future(kv.put(b"b", b"2"))
        await until(lambda: not kv._dispatcher.leader_ready)
        cluster.elect(second)
        started = time.monotonic()
        await call
        assert time.monotonic() - started < 0.5
        assert len(second.writes) == 1


async def test_followers_that_name_a_dead_leader_are_not_believed(cluster: FakeCluster) -> None:
    first, second, _ = cluster.nodes
    async with kvstore.connect(cluster.endpoints) as kv:
        await kv.put(b"a", b"1")
        await first.stop()  # and the others go on naming it, in the same term
        call = asyncio.ensure_future(kv.put(b"b", b"2"))
        await asyncio.wait((call,), timeout=0.2)
        assert not call.done()
        cluster.elect(second)
        await asyncio.wait_for(call, 1.0)


async def test_without_a_leader_writes_wait_and_bother_nobody(cluster: FakeCluster) -> None:
    async with kvstore.connect(cluster.endpoints) as kv:
        await kv.put(b"a", b"1")
        cluster.elect(None)
        before = sum(len(node.writes) for node in cluster.nodes)
        calls = [asyncio.ensure_future(kv.put(b"%d" % number, b"")) for number in range(50)]
        await asyncio.wait(calls, timeout=0.5)
        sent = sum(len(node.writes) for node in cluster.nodes) - before
        assert sent <= 50, "one attempt each, which found that nobody leads"
        cluster.elect(cluster.nodes[2])
        await asyncio.gather(*calls)
        assert len(cluster.nodes[2].writes) == 50


@pytest.mark.parametrize("wrote_before", [False, True])
async def test_without_a_leader_the_error_says_who_knows_none(cluster: FakeCluster, wrote_before: bool) -> None:
    """Nothing can be sent, so no answer tells: what the nodes say of themselves does."""
    async with kvstore.connect(cluster.endpoints) as kv:
        if wrote_before:
            await kv.put(b"a", b"1")
        cluster.elect(None)
        await cluster.nodes[0].stop()
        if wrote_before:
            # What is sent before the loss is noticed is in doubt.
            await until(lambda: not kv._dispatcher.leader_ready)
        for _ in range(2):
            with pytest.raises(Unavailable) as caught:
                await kv.put(b"a", b"2", timeout=0.3)
            assert caught.value.code == "no_leader"
            for node in cluster.nodes[1:]:
                assert f"{node.address}: {node.name} knows no leader" in caught.value.message
            assert "cannot connect" in caught.value.message


async def test_a_failed_disk_is_what_the_error_is_about(cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several nodes without a leader, the one that somebody can mend gives the code and comes first."""
    cluster.elect(None)
    failed = cluster.nodes[1]
    status = msgspec.structs.replace(failed.status(), role="failed", storage_error="the disk is full")
    monkeypatch.setattr(failed, "status", lambda: status)
    async with kvstore.connect(cluster.endpoints) as kv:
        with pytest.raises(Unavailable) as caught:
            await kv.put(b"a", b"2", timeout=0.3)
        assert caught.value.code == "storage_failed"
        text = caught.value.message
        assert 0 < text.index(f"{failed.address}: the disk is full") < text.index("knows no leader")
        with pytest.raises(Unavailable) as caught:
            await kv.transfer_leader("n2", timeout=0.2)
        assert caught.value.code == "storage_failed"
        await kv.get(b"a", level="local")


async def test_a_hint_is_followed_at_once(cluster: FakeCluster) -> None:
    second = cluster.nodes[1]
    async with kvstore.connect(cluster.endpoints) as kv:
        await kv.put(b"a", b"1")
        cluster.elect(second)  # the first still runs, and says who leads
        started = time.monotonic()
        await kv.put(b"b", b"2")
        assert time.monotonic() - started < 0.2
        assert len(second.writes) == 1


async def test_nodes_that_send_each_other_the_client_cost_few_attempts(cluster: FakeCluster) -> None:
    first, second, third = cluster.nodes
    first.always = fail("not_leader", second.address)
    second.always = fail("not_leader", first.address)
    async with kvstore.connect(cluster.endpoints) as kv:
        with pytest.raises(Unavailable) as caught:
            await kv.put(b"a", b"1", timeout=1.0)
        assert caught.value.code == "not_leader"
        assert sum(len(node.writes) for node in cluster.nodes) < 40
        cluster.elect(third)
        await kv.put(b"a", b"1")


async def test_nobody_there() -> None:
    async with FakeCluster(2) as cluster:
        endpoints = cluster.endpoints
    async with kvstore.connect(endpoints, timeout_s=0.3) as kv:
        started = time.monotonic()
        with pytest.raises(Unavailable) as caught:
            await kv.put(b"a", b"1")
        assert 0.3 <= time.monotonic() - started < 2.0  # not the default of 5 s, on however busy a machine
        assert caught.value.code == "timeout"
        assert "cannot connect" in caught.value.message
        with pytest.raises(Unavailable):
            await kv.get(b"a", level="local")


async def test_a_store_that_comes_up_late_is_found() -> None:
    cluster = FakeCluster(1)
    async with cluster:
        endpoints = cluster.endpoints
    async with kvstore.connect(endpoints) as kv:
        call = asyncio.ensure_future(kv.put(b"a", b"1"))
        await asyncio.wait((call,), timeout=0.2)
        async with cluster:
            await asyncio.wait_for(call, 2.0)


async def test_another_cluster_is_refused_at_once(cluster: FakeCluster) -> None:
    async with kvstore.connect(cluster.endpoints, cluster_id="another") as kv:
        started = time.monotonic()
        with pytest.raises(Refused) as caught:
            await kv.put(b"a", b"1")
        assert caught.value.code == "wrong_cluster"
        assert cluster.cluster_id in caught.value.message
        with pytest.raises(Refused) as caught:
            await kv.get(b"a")
        assert caught.value.code == "wrong_cluster"
        assert time.monotonic() - started < 1.0
    assert all(not node.writes and not node.reads for node in cluster.nodes)


async def test_a_foreign_node_among_the_endpoints_is_left_out(cluster: FakeCluster) -> None:
    async with FakeCluster(1, cluster_id="another") as foreign:
        kv = kvstore.connect(f"{foreign.endpoints},{cluster.endpoints}", cluster_id=cluster.cluster_id)
        async with kv:
            await kv.put(b"a", b"1")
            assert await kv.get(b"a", level="local") is not None
        assert not foreign.nodes[0].writes
        assert not foreign.nodes[0].reads


async def test_the_first_cluster_stays_the_only_one(cluster: FakeCluster) -> None:
    async with kvstore.connect(cluster.endpoints) as kv:
        await kv.put(b"a", b"1")
        for node in cluster.nodes:
            await node.stop()
        cluster.cluster_id = "another one at the same ports"
        for node in cluster.nodes:
            await node.start()
        with pytest.raises(Refused) as caught:
            await kv.put(b"b", b"2")
        assert caught.value.code == "wrong_cluster"


async def test_a_stopped_leader_is_given_up(cluster: FakeCluster) -> None:
    first, second, _ = cluster.nodes
    kv = await quick(cluster.endpoints)
    async with kv:
        await kv.put(b"a", b"1")
        first.silent = True  # as a stopped process: its connections stay open
        call = asyncio.ensure_future(kv.put(b"b", b"2"))
        await until(lambda: len(first.writes) == 2)
        cluster.elect(second)
        await asyncio.wait_for(call, 2.0)
        assert len(second.writes) == 1


async def test_a_silent_leader_is_left_for_a_new_one_before_it_is_given_up(cluster: FakeCluster) -> None:
    first, second, _ = cluster.nodes
    kv = await quick(cluster.endpoints, silence_s=8.0)
    async with kv:
        await kv.put(b"a", b"1")
        first.silent = True
        call = asyncio.ensure_future(kv.put(b"b", b"2", timeout=20))
        await until(lambda: len(first.writes) == 2)
        cluster.elect(second)
        await asyncio.wait_for(call, 4.0)
        assert len(second.writes) == 1


async def test_a_silent_leader_is_left_also_by_a_client_that_has_no_way_to_the_others_yet(cluster: FakeCluster) -> None:
    """Links open when they are needed: those to the followers may have ended long ago, by restarts or by faults."""
    first, second, third = cluster.nodes
    kv = await quick(cluster.endpoints, silence_s=8.0)
    async with kv:
        await kv.put(b"a", b"1")
        for node in (second, third):
            await until(lambda node=node: kv._pool._links[node.address].state is LinkState.READY)
            await node.stop()
            await until(lambda node=node: kv._pool._links[node.address].state is LinkState.IDLE)
            await node.start()
        first.silent = True
        call = asyncio.ensure_future(kv.put(b"b", b"2", timeout=20))
        await until(lambda: len(first.writes) == 2)
        cluster.elect(second)
        await asyncio.wait_for(call, 4.0)
        assert len(second.writes) == 1


async def test_a_slow_answer_is_no_silence(cluster: FakeCluster) -> None:
    """A node that answers status probes is alive, however long it takes for a request."""
    first = cluster.nodes[0]
    kv = await quick(cluster.endpoints)
    async with kv:
        held: list[object] = []

        def hold(node: FakeNode, connection: object, frame: object) -> None:
            held.append(lambda: answer(node, connection, frame))  # type: ignore[arg-type]

        first.script.append(hold)
        call = asyncio.ensure_future(kv.put(b"a", b"1"))
        await until(lambda: held)
        await asyncio.wait((call,), timeout=0.5)  # ten times the silence that it bears
        held[0]()  # type: ignore[operator]
        await call
        assert len(first.writes) == 1


async def test_a_node_that_accepts_and_says_nothing_is_no_node(cluster: FakeCluster) -> None:
    cluster.nodes[1].silent = True
    async with kvstore.connect(cluster.endpoints) as kv:
        started = time.monotonic()
        await kv.put(b"a", b"1")
        assert time.monotonic() - started < 0.5


async def test_junk_ends_the_connection_only(cluster: FakeCluster) -> None:
    first = cluster.nodes[0]

    def junk(node: FakeNode, connection: object, frame: object) -> None:
        connection.transport.write(b"\x00\x00\x00\x03abc")  # type: ignore[attr-defined]

    def huge(node: FakeNode, connection: object, frame: object) -> None:
        connection.transport.write(b"\xff\xff\xff\xff")  # type: ignore[attr-defined]

    async with kvstore.connect(cluster.endpoints) as kv:
        first.script.extend((junk, huge))
        await kv.put(b"a", b"1")
        assert len(first.writes) == 3
        assert cluster.fake.revision == 1


async def test_local_reads_turn_to_another_replica(cluster: FakeCluster) -> None:
    async with kvstore.connect(cluster.endpoints) as kv:
        written = await kv.put(b"a", b"1")
        for node in cluster.nodes[1:]:
            node.always = fail("unavailable")  # as one that lags behind
        for _ in range(5):
            assert await kv.get(b"a", level="local") is not None
        local = [frame for node in cluster.nodes for frame in node.reads]
        assert {frame.min_revision for frame in local} == {written.revision}


async def test_linearizable_reads_are_served_without_a_reachable_leader(cluster: FakeCluster) -> None:
    async with kvstore.connect(cluster.endpoints) as kv:
        await kv.put(b"a", b"1")
        await cluster.nodes[0].stop()  # for this client; the others may still hear it
        assert await asyncio.wait_for(kv.get(b"a"), 1.0) is not None


async def test_later_reads_of_a_transaction_cost_no_quorum_and_meet_no_lag(cluster: FakeCluster) -> None:
    async with kvstore.connect(cluster.endpoints) as kv:
        written = await kv.put(b"a", b"1")
        async with kv.transaction() as txn:
            await txn.get(b"a")
            await txn.get(b"b")
            await txn.range(prefix=b"c")
        assert [node.reads for node in cluster.nodes[1:]] == [[], []]
        assert [(read.level, read.min_revision) for read in cluster.nodes[0].reads] == [
            (codec.ReadLevel.LINEARIZABLE, 0),
            (codec.ReadLevel.LOCAL, written.revision),
            (codec.ReadLevel.LOCAL, written.revision),
        ]


async def test_members_are_learned_and_forgotten(cluster: FakeCluster) -> None:
    extra = FakeNode(cluster, "n4")
    await extra.start()
    cluster.nodes.append(extra)
    async with kvstore.connect(cluster.nodes[0].address) as kv:
        await kv.put(b"a", b"1")
        await until(lambda: extra.address in kv._pool._links)
        cluster.nodes.remove(extra)
        await extra.stop()
        cluster.nodes[0].script.append(fail("no_leader"))  # makes the client look around
        await kv.put(b"b", b"2")
        await until(lambda: extra.address not in kv._pool._links)


async def test_an_old_configuration_makes_nobody_forgotten(cluster: FakeCluster) -> None:
    """A node whose disk was lost knows only whom the cluster began with; the others may all be elsewhere by now."""
    async with kvstore.connect(cluster.nodes[0].address) as kv:
        await kv.put(b"a", b"1")
        pool, status = kv._pool, await kv.status()
        await until(lambda: len(pool._links) == len(cluster.nodes) and pool._leader_term > 0)
        (link,) = [link for link in pool._links.values() if link.given]
        learned = set(pool._links)
        alone = tuple(member for member in status.members if member.client_address == link.address)
        pool.learn(link, msgspec.structs.replace(status, term=0, role="follower", members=alone))
        assert set(pool._links) == learned
        pool.learn(link, msgspec.structs.replace(status, members=alone))
        assert {address for address in pool._links if pool._links[address].channel is None} <= {link.address}


async def test_status_of_a_certain_node(cluster: FakeCluster) -> None:
    async with kvstore.connect(cluster.endpoints) as kv:
        for node in cluster.nodes:
            assert (await kv.status(node.address)).name == node.name
        with pytest.raises(ValueError):
            await kv.status("nowhere")
        await cluster.nodes[2].stop()
        with pytest.raises(Unavailable):
            await kv.status(cluster.nodes[2].address, timeout=0.2)


@pytest.mark.parametrize("text", ["", " , ", "host", "host:", ":1", "host:x", "host:0", "host:65536", "h:1,h"])
def test_bad_endpoints(text: str) -> None:
    with pytest.raises(ValueError):
        kvstore.connect(text)


def test_endpoints_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVSTORE_ENDPOINTS", "127.0.0.1:1, [::1]:2,127.0.0.1:1")
    assert kvstore.connect()._endpoints == ("127.0.0.1:1", "[::1]:2")
    monkeypatch.delenv("KVSTORE_ENDPOINTS")
    with pytest.raises(ValueError, match="KVSTORE_ENDPOINTS"):
        kvstore.connect()
