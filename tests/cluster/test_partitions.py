"""Partitions on real processes, through the proxy in their path: both ways, one way, half-open."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

import kvstore
from kvstore import codec
from tests.chaos.campaign import Campaign, Options
from tests.chaos.cluster import ProxiedCluster
from tests.chaos.faults import FollowerOneWay, HalfOpen, LeaderHearsNothing, LeaderUnheard
from tests.chaos.proxy import HOLD
from tests.chaos.schedule import plan
from tests.cluster.frames import read_of, value_in, write_of
from tests.cluster.harness import until

pytestmark = pytest.mark.timeout(120)

# A leader that hears no quorum for an election timeout (1 s at most) steps down.
STEPS_DOWN_S = 5.0


async def test_a_cut_off_leader_refuses_what_it_cannot_promise_and_the_majority_goes_on(tmp_path: Path) -> None:
    async with ProxiedCluster(tmp_path) as cluster, cluster.client(timeout_s=10) as client:
        await client.put(b"k", b"before")
        await cluster.converged()
        old = await cluster.leader()
        others = [name for name in cluster.nodes if name != old]
        await cluster.network.cut(HOLD, [old], others)
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
        # A client that reaches all of them finds those who can serve it, and so do linearizable reads through each.
        began = time.monotonic()
        await client.put(b"k", b"after")
        assert time.monotonic() - began < STEPS_DOWN_S
        for name in others:
            answer = await cluster.ask(name, read_of(codec.ReadLevel.LINEARIZABLE), 10)
            assert isinstance(answer, codec.Answer)
            assert value_in(answer) == b"after"

        async def stepped_down() -> bool:
            status = await cluster.status(old)
            return status is not None and status.role != "leader"

        await until(stepped_down, STEPS_DOWN_S, "the cut-off leader to step down")
        refused = await cluster.ask(old, write_of(b"from the cut-off side again"), 10)
        assert isinstance(refused, codec.Failure)
        assert refused.code in ("not_leader", "no_leader")
        await cluster.network.heal()
        await cluster.converged()
        async with kvstore.connect(cluster.nodes[old].client_address, timeout_s=10) as returned:
            record = await returned.get(b"k")
            assert record is not None
            assert record.value == b"after"


async def test_a_node_that_returns_from_a_partition_does_not_disturb_the_leader(tmp_path: Path) -> None:
    async with ProxiedCluster(tmp_path) as cluster, cluster.client(timeout_s=10) as client:
        leader = await cluster.leader()
        follower = next(name for name in cluster.nodes if name != leader)
        before = await cluster.status(leader)
        assert before is not None
        await cluster.network.cut(HOLD, [follower], [name for name in cluster.nodes if name != follower])

        async def alone() -> bool:
            status = await cluster.status(follower)
            return status is not None and not any(peer.connected for peer in status.peers)

        await until(alone, 15, "the cut-off node to notice")
        await client.put(b"k", b"v")
        await cluster.network.heal()
        await cluster.converged()
        after = await cluster.status(leader)
        assert after is not None
        assert (after.role, after.term) == ("leader", before.term)


async def test_one_way_cuts_and_half_open_connections_under_load_lose_nothing(tmp_path: Path) -> None:
    faults = plan((LeaderUnheard, 1.5), (LeaderHearsNothing, 2.5), (FollowerOneWay, 1.5), (HalfOpen, 2.5))
    campaign = Campaign(Options(), tmp_path, plan=faults)
    await campaign.run()
    assert not campaign.violations
    assert len(campaign.spans) == len(faults)
