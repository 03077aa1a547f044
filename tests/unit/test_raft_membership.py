"""Nodes that come, go, and take each other's names, while others are away or cannot reach each other."""

from __future__ import annotations

from kvstore.model import Member
from kvstore.raft.node import RaftNode
from tests.raft_cluster import Cluster
from tests.raft_fixtures import ELECTION_MAX_S, Answer


def identified() -> tuple[Cluster, RaftNode]:
    """Nodes a, b and c, led by a; the configuration holds their node ids."""
    cluster = Cluster()
    cluster.start("a", "b", "c")
    leader = cluster.lead("a")
    cluster.until(lambda: all(member.node_id for node in cluster.nodes.values() for member in node.members))
    cluster.commit(*range(30))
    return cluster, leader


def add(cluster: Cluster, leader: RaftNode, host: str) -> None:
    node, added = cluster.nodes[host], Answer()
    leader.add_learner(Member(node.config.name, f"{host}:1", "", node.node_id, False), added)
    cluster.wait(added)
    assert added.error is None


def promote(cluster: Cluster, leader: RaftNode, name: str) -> None:
    promoted = Answer()
    leader.promote(name, promoted)
    cluster.wait(promoted)
    assert promoted.error is None


def remove(cluster: Cluster, leader: RaftNode, name: str) -> None:
    removed = Answer()
    leader.remove(name, removed)
    cluster.wait(removed)
    assert removed.error is None


def has_caught_up(node: RaftNode, leader: RaftNode) -> bool:
    """And the leader knows."""
    applied = leader.machine.applied_index
    return node.machine.applied_index == applied == leader.match_index(node.config.name)


def connected_ids(node: RaftNode) -> set[str]:
    """Node ids at the other ends of its connections, whichever side dialled."""
    return {connection.them.node_id for connection in node._transport._connections if connection.is_open}


# --- replacements -----------------------------------------------------------------------------------------------------


def test_a_replacement_under_the_same_name_inherits_no_acknowledgements() -> None:
    """Its leader would commit with acknowledgements of entries that only the lost disk held, and send none of them."""
    cluster, leader = identified()
    term = leader.term
    assert leader.match_index("b") == leader.status().last_index
    cluster.crash("b")
    remove(cluster, leader, "b")
    (replacement,) = cluster.start("b2", members=cluster.members, called="b")
    cluster.until(lambda: not leader._transport.connected("b"))
    add(cluster, leader, "b2")
    assert leader.match_index("b") <= replacement.status().last_index
    cluster.until(lambda: has_caught_up(replacement, leader))
    promote(cluster, leader, "b")
    cluster.crash("c")
    answer = cluster.propose(leader, "with the replacement alone")
    cluster.wait(answer)
    assert answer.is_ok
    assert (leader.term, leader.is_leader) == (term, True)
    cluster.until(lambda: has_caught_up(replacement, leader))
    assert cluster.machine("b2").payloads == cluster.machine("a").payloads


def test_a_name_with_a_new_node_id_has_no_vote_on_connections_from_before() -> None:
    """The removed b has not heard of it and is connected with c. Were it listened to under the name of its successor,
    c would be elected by it, while a leads with the successor."""
    cluster, leader = identified()
    follower, removed = cluster.nodes["c"], cluster.nodes["b"]
    (successor,) = cluster.start("b2", members=cluster.members, called="b")
    for here, there in (("b2", "b"), ("b2", "c"), ("a", "b")):
        cluster.network.cut(here, there)
    assert removed.node_id in connected_ids(follower)
    began_s = cluster.time.now_s
    remove(cluster, leader, "b")
    add(cluster, leader, "b2")
    cluster.until(lambda: has_caught_up(successor, leader))
    promote(cluster, leader, "b")
    cluster.until(lambda: has_caught_up(follower, leader))
    assert cluster.time.now_s - began_s < ELECTION_MAX_S  # or the old b asks, and learns of it
    assert removed.failure is None
    assert removed.node_id not in connected_ids(follower)
    cluster.network.cut("a", "c")
    for _ in range(40):
        cluster.time.advance(0.1)
        assert not follower.is_leader
    answer = cluster.propose(leader, "with the successor")
    cluster.wait(answer)
    assert answer.is_ok


def test_a_new_leader_counts_nobody_alive_that_has_not_answered_it() -> None:
    """b died, and its connections stay open: without a, no quorum would be left."""
    cluster, leader = identified()
    cluster.isolate("b")
    handed, removed = Answer(), Answer()
    leader.transfer("c", handed)
    cluster.wait(handed)
    successor = cluster.nodes["c"]
    cluster.until(lambda: successor.accepting and successor.committed == successor.status().last_index)
    assert successor._transport.connected("b")
    successor.remove("a", removed)
    cluster.wait(removed)
    assert removed.error is not None
    assert removed.error.code == "membership_busy", "it has just begun, and cannot know yet"
    cluster.time.advance(2.0)
    removed = Answer()
    successor.remove("a", removed)
    cluster.wait(removed)
    assert removed.error is not None
    assert removed.error.code == "would_lose_quorum"


# --- learners ---------------------------------------------------------------------------------------------------------


def test_a_learner_that_was_removed_while_it_was_away_learns_of_it() -> None:
    cluster, leader = identified()
    (learner,) = cluster.start("d")
    add(cluster, leader, "d")
    cluster.until(lambda: has_caught_up(learner, leader) and learner.status().role == "learner")
    cluster.isolate("d")
    remove(cluster, leader, "d")
    cluster.time.advance(5.0)
    assert learner.failure is None
    cluster.network.heal()
    cluster.until(lambda: learner.failure is not None, within_s=60.0)
    assert learner.status().role == "removed"
    assert cluster.leader is leader


def test_a_member_that_was_removed_and_joined_again_while_it_was_away_stays() -> None:
    """Its log holds the removal and the joining; applying the first must not end it."""
    cluster, leader = identified()
    away = cluster.nodes["b"]
    cluster.isolate("b")
    remove(cluster, leader, "b")
    add(cluster, leader, "b")
    cluster.network.heal()
    cluster.until(lambda: has_caught_up(away, leader) or away.failure is not None, within_s=30.0)
    assert away.failure is None
    assert away.status().role == "learner"


def test_a_node_that_was_connected_before_it_was_a_member_is_sent_to_by_one_that_installed_a_snapshot() -> None:
    """An install makes a new engine, which is told of connections with the members of then."""
    cluster, leader = identified()
    cluster.make_lag("c")
    (joining,) = cluster.start("d")
    cluster.network.cut("a", "c")
    (installed,) = cluster.start("c")
    cluster.until(lambda: installed._transport.connected("d"))
    cluster.network.heal()
    cluster.until(lambda: has_caught_up(installed, leader) and installed.leader == "a", within_s=30.0)
    assert cluster.has_logged("c", "installing a snapshot")
    assert installed._transport.connected("d")
    handed = Answer()
    leader.transfer("c", handed)
    cluster.wait(handed)
    assert handed.is_ok
    cluster.until(lambda: installed.is_leader and installed.machine.applied_term == installed.term)
    add(cluster, installed, "d")
    cluster.until(lambda: has_caught_up(joining, installed))
    assert cluster.machine("d").payloads == cluster.machine("a").payloads
