"""Disks that take long to sync, so that a thread does it: what waits for them, and what must not."""

from __future__ import annotations

import pytest

from kvstore.raft.node import RaftNode
from tests.fake_network import run
from tests.raft_cluster import Cluster
from tests.raft_fixtures import ELECTION_MAX_S, Answer


def slow(cluster: Cluster, sync_s: float) -> RaftNode:
    """From now on every node's sync takes this long, in a thread."""
    leader = cluster.elect()
    cluster.time.advance(2.0)
    for node in cluster.nodes.values():
        node._sync._threaded = True
    cluster.time.thread_s = sync_s
    return leader


def three() -> Cluster:
    cluster = Cluster()
    cluster.start("a", "b", "c")
    return cluster


@pytest.mark.parametrize("sync_s", [0.2, 1.2 * ELECTION_MAX_S])
def test_reads_do_not_wait_for_disks(sync_s: float) -> None:
    cluster = three()
    leader = slow(cluster, sync_s)
    writes: list[Answer] = []
    longest_s = 0.0
    for number in range(200):
        writes.append(cluster.propose(leader, number))
        read, began_s = Answer(), cluster.time.now_s
        leader.read_index(read)
        cluster.wait(read)
        assert read.is_ok
        longest_s = max(longest_s, cluster.time.now_s - began_s)
        cluster.time.advance(0.02)
    assert longest_s < 0.02
    cluster.wait(*writes)
    assert all(write.is_ok for write in writes)
    assert cluster.leader is leader


def test_syncs_longer_than_an_election_timeout_cost_no_leadership() -> None:
    """An acknowledgement waits for the disk; the sign of life that a heartbeat asks for does not."""
    cluster = three()
    leader = slow(cluster, 2.5 * ELECTION_MAX_S)
    term, writes = leader.term, []
    for number in range(200):
        writes.append(cluster.propose(leader, number))
        cluster.time.advance(0.05)
        assert leader.is_leader
    cluster.wait(*writes)
    assert all(write.is_ok for write in writes)
    assert leader.term == term


def test_a_sole_voter_sleeps_while_its_disk_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not tick then, so its engine's next heartbeat stays overdue."""
    cluster = Cluster("a")
    cluster.start("a")
    leader = slow(cluster, 0.5)
    answer = cluster.propose(leader, "x")
    assert cluster.count_turns("a", monkeypatch, 0.49) <= 5
    assert not answer.is_done
    cluster.wait(answer)
    assert answer.is_ok


def test_a_disk_that_fails_while_a_node_stops_leaves_nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = three()
    follower = next(node for node in cluster.nodes.values() if node is not cluster.elect())
    closed: list[str] = []
    monkeypatch.setattr(follower.machine, "close", lambda: closed.append("machine"), raising=False)
    cluster.disk(follower.config.name).fail_sync(times=10)
    run(follower.stop())
    assert closed == ["machine"]
    assert cluster.has_logged(follower.config.name, "what was not promised may be lost: the disk failed on stopping")
