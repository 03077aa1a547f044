"""Snapshots between whole nodes, where the receiver cannot take one."""

from __future__ import annotations

import errno

import pytest

from kvstore.errors import KvError, StartupError
from kvstore.raft.flush import LOG_SNAPSHOT_BYTES_MAX
from kvstore.raft.fsm import Checkpoint
from kvstore.raft.node import RaftNode
from kvstore.raft.replicas import RETRY_S
from tests.raft_cluster import Cluster


def lagging() -> tuple[Cluster, RaftNode, RaftNode]:
    """Node a leads; c is just back, and needs a snapshot."""
    cluster = Cluster()
    cluster.start("a", "b", "c")
    leader = cluster.lead("a")
    cluster.make_lag("c")
    (node,) = cluster.start("c")
    return cluster, leader, node


def test_a_snapshot_that_is_refused_is_not_taken_anew_with_every_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each costs the leader a flush and a checkpoint."""
    cluster, leader, node = lagging()
    term, taken = leader.term, []
    checkpoint = leader.machine.checkpoint

    def counted(path: str) -> Checkpoint:
        taken.append(path)
        return checkpoint(path)

    def no_space(*_args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(leader.machine, "checkpoint", counted)
    with monkeypatch.context() as full:
        full.setattr(node._snapshots._receiver, "_prepare", no_space)
        cluster.time.advance(4 * RETRY_S)
        assert 2 <= len(taken) <= 5
    assert (leader.is_leader, leader.term) == (True, term)  # c hears signs of life, and starts no election
    assert node.failure is None
    cluster.until(lambda: node.machine.applied_index == leader.machine.applied_index, within_s=2 * RETRY_S)


@pytest.mark.parametrize("log_bytes_max", [LOG_SNAPSHOT_BYTES_MAX, 0])
def test_a_flush_between_a_snapshot_and_what_follows_it(monkeypatch: pytest.MonkeyPatch, log_bytes_max: int) -> None:
    """The log is kept for a peer that is about to get it. Where it is too long by then, another snapshot is due."""
    monkeypatch.setattr("kvstore.raft.flush.LOG_TAIL_BYTES", 0)
    monkeypatch.setattr("kvstore.raft.flush.LOG_SNAPSHOT_BYTES_MAX", log_bytes_max)
    cluster, leader, node = lagging()
    sent = leader._replicas._sent
    snapshots = []

    def sent_late(peer: str, error: KvError | None, checkpoint: Checkpoint | None) -> None:
        assert error is None
        snapshots.append(checkpoint)
        if len(snapshots) > 1:
            sent(peer, error, checkpoint)
            return

        def flushed() -> None:
            sent(peer, None, checkpoint)
            leader._flush._ended(leader.machine.flush(), None)

        for number in range(100, 110):
            cluster.propose(leader, number)
        leader.propose(b"the last before the flush", lambda _result, _error: cluster.time.call_soon(flushed))

    monkeypatch.setattr(leader._replicas, "_sent", sent_late)
    cluster.until(lambda: node.machine.applied_index == leader.machine.applied_index > 30, within_s=4 * RETRY_S)
    assert cluster.machine("c").payloads == cluster.machine("a").payloads
    cluster.time.advance(0.5)
    assert len(snapshots) == (1 if log_bytes_max else 2)
    leader._flush._ended(leader.machine.flush(), None)
    assert cluster.wal("a").first_index == leader.machine.applied_index, "it is kept for nobody any more"


def test_a_node_that_cannot_open_a_snapshot_fails_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would go on without a state, and answer nobody."""
    cluster, leader, node = lagging()
    fatal: list[KvError] = []
    node.on_fatal = fatal.append

    def damaged(_path: str) -> None:
        raise StartupError("the state is damaged", code="state_damaged")

    monkeypatch.setattr(node.machine, "restore", damaged)
    cluster.until(lambda: node.failure is not None)
    assert [error.code for error in fatal] == ["state_damaged"]
    assert node.status().role == "failed"
    cluster.until(lambda: not leader._replicas._receiving, within_s=60.0)
    assert cluster.leader is leader
    # A restart finds the state that it had, and gets the snapshot again.
    cluster.crash("c")
    (node,) = cluster.start("c")
    cluster.until(lambda: node.machine.applied_index == leader.machine.applied_index, within_s=2 * RETRY_S)
    assert cluster.machine("c").payloads == cluster.machine("a").payloads
