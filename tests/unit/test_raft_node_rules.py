"""Rules that only a whole node can keep: who hears what from it, what it survives, and what it costs when idle."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from kvstore.model import Member
from kvstore.raft.fsm import Checkpoint, EntryKind
from kvstore.raft.members import Configuration
from kvstore.raft.messages import (
    AppendEntries,
    AppendReply,
    PreVote,
    PreVoteReply,
    ReadProbe,
    ReadReply,
    ReadRequest,
    TermNotice,
)
from tests.raft_cluster import Cluster, ScriptedPeer, image_of
from tests.raft_fixtures import ELECTION_MAX_S, ELECTION_MIN_S, Answer, append, configuration, data


def following() -> tuple[Cluster, ScriptedPeer]:
    """Node b follows the scripted a in term 1."""
    cluster = Cluster()
    cluster.start("b")
    leader = ScriptedPeer(cluster, "a", "b")
    leader.ask("b", append(1, (1, 0)), AppendReply)
    return cluster, leader


# --- reads ------------------------------------------------------------------------------------------------------------


def ask_for_read(cluster: Cluster, leader: ScriptedPeer) -> tuple[Answer, ReadRequest]:
    answer, before = Answer(), len(leader.heard(ReadRequest))
    cluster.nodes["b"].read_index(answer)
    cluster.until(lambda: len(leader.heard(ReadRequest)) > before)
    return answer, leader.heard(ReadRequest)[-1]


def test_a_late_answer_from_before_a_restart_serves_no_read() -> None:
    """Its index may be older than a write that was acknowledged before the read began."""
    cluster, leader = following()
    _, first = ask_for_read(cluster, leader)
    cluster.crash("b")
    cluster.start("b")
    cluster.until(lambda: leader._is_connected("b"))
    leader.ask("b", append(1, (1, 0)), AppendReply)
    answer, second = ask_for_read(cluster, leader)
    leader.say("b", ReadReply(1, first.id, 1))
    cluster.time.advance(0.1)
    assert not answer.is_done
    leader.say("b", ReadReply(1, second.id, 1))
    cluster.wait(answer)
    assert answer.is_ok


def test_a_late_answer_from_before_an_install_serves_no_read() -> None:
    cluster, leader = following()
    old, first = ask_for_read(cluster, leader)
    install(cluster, 50)
    assert old.error is not None
    leader.ask("b", append(1, (50, 1)), AppendReply)
    answer, second = ask_for_read(cluster, leader)
    leader.say("b", ReadReply(1, first.id, 40))
    cluster.time.advance(0.1)
    assert not answer.is_done
    leader.say("b", ReadReply(1, second.id, 50))
    cluster.wait(answer)
    assert answer.is_ok


# --- snapshots --------------------------------------------------------------------------------------------------------


def install(cluster: Cluster, index: int) -> None:
    """A verified snapshot of `index`, in term 1, is there for node b."""
    files, ended = cluster.files["b"], Answer()
    path = f"/data/state/state-{index}"
    files.make_dirs(path)
    files.replace(f"{path}/image", image_of(index, 1, configuration("abc"), [(index, b"from the snapshot")]))
    cluster.nodes["b"].snapshot_received("a", Checkpoint(index, 1, configuration("abc").encode()), path, ended)
    cluster.wait(ended)
    assert ended.is_ok


def test_an_installed_snapshot_is_acknowledged_exactly_and_survives_power_loss() -> None:
    cluster, leader = following()
    install(cluster, 50)
    cluster.time.advance(0.01)
    assert leader.heard(AppendReply)[-1] == AppendReply(1, 51, True)
    cluster.crash("b")
    (node,) = cluster.start("b")
    assert (node.committed, cluster.wal("b").first_index, cluster.wal("b").last_index) == (50, 50, 50)
    assert cluster.machine("b").payloads == [b"from the snapshot"]
    cluster.until(lambda: leader._is_connected("b"))
    assert leader.ask("b", append(1, (50, 1), (1, data("x")), commit=51), AppendReply) == AppendReply(1, 52, True)
    assert cluster.machine("b").payloads == [b"from the snapshot", b"x"]


def test_a_leader_takes_no_snapshot() -> None:
    cluster = Cluster()
    cluster.start("a", "b", "c")
    leader = cluster.lead("a")
    refusal = leader.snapshot_offered("b", Checkpoint(100, 9, b""))
    assert refusal is not None
    assert refusal.code == "unavailable"
    ended: list[Any] = []
    leader.snapshot_received("b", Checkpoint(100, 9, b""), "/data/state/state-7", ended.append)
    assert [error.code for error in ended] == ["unavailable"]


def test_a_peer_that_receives_a_snapshot_hears_signs_of_life_and_no_appends() -> None:
    cluster = Cluster()
    cluster.start("a", "b")
    leader = cluster.lead("a")
    for number in range(20):
        cluster.propose(leader, number)
    cluster.time.advance(0.5)
    leader.machine.flush()
    cluster.wal("a").drop_before(leader.machine.applied_index, 0)
    lagging = ScriptedPeer(cluster, "c", "a")
    cluster.until(lambda: "c" in leader._replicas._receiving)
    lagging.inbox.clear()
    cluster.time.advance(5 * ELECTION_MAX_S)
    assert lagging.heard(AppendEntries) == []
    assert len(lagging.heard(ReadProbe)) >= 5 * ELECTION_MAX_S / 0.1 - 1
    assert cluster.leader is leader


# --- junk -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("payload", [b"", b"\xff\xff", msgspec.msgpack.encode([1, "members"])])
def test_an_entry_that_is_no_configuration_is_dropped(payload: bytes) -> None:
    cluster, leader = following()
    node = cluster.nodes["b"]
    leader.say("b", append(1, (1, 0), (1, bytes([EntryKind.MEMBERS]) + payload)))
    cluster.time.advance(0.01)
    assert node.failure is None
    assert node.status().dropped["malformed"] == 1
    assert leader.ask("b", append(1, (1, 0), (1, data("x"))), AppendReply) == AppendReply(1, 3, True)


def test_a_configuration_of_a_newer_format_stops_the_node_with_a_reason() -> None:
    cluster, leader = following()
    payload = msgspec.msgpack.encode([99, []])
    leader.say("b", append(1, (1, 0), (1, bytes([EntryKind.MEMBERS]) + payload)))
    cluster.time.advance(0.01)
    failure = cluster.nodes["b"].failure
    assert failure is not None
    assert "format 99" in failure.message


@pytest.mark.parametrize("body", [b"", b"\xc1", b"\x92\x07\xff", bytes(300), b"\x92\x07\xcf" + b"\xff" * 8])
def test_a_body_that_is_no_message_is_dropped_and_counted(body: bytes) -> None:
    cluster, leader = following()
    leader.transport.send("b", body)
    cluster.time.advance(0.01)
    assert cluster.nodes["b"].status().dropped["malformed"] == 1
    assert leader.ask("b", append(1, (1, 0)), AppendReply) == AppendReply(1, 2, True)


def test_a_contradiction_of_what_is_committed_stops_the_node() -> None:
    cluster, leader = following()
    leader.ask("b", append(1, (1, 0), (1, data("x")), commit=2), AppendReply)
    leader.say("b", append(2, (1, 0), (2, data("y"))))
    cluster.time.advance(0.01)
    failure = cluster.nodes["b"].failure
    assert failure is not None
    assert failure.code == "internal"
    assert cluster.machine("b").payloads == [b"x"]
    assert cluster.wal("b").entries[-1][0] == data("x")


# --- elections --------------------------------------------------------------------------------------------------------


def test_a_dead_leader_is_replaced_within_an_election_timeout() -> None:
    for seed in range(3):
        cluster = Cluster(seed=seed)
        cluster.start("a", "b", "c")
        leader = cluster.elect()
        cluster.commit("x")
        cluster.crash(leader.config.name)
        died_s = cluster.time.now_s
        cluster.elect()
        assert cluster.time.now_s - died_s < ELECTION_MAX_S


def test_a_leader_that_is_told_of_a_higher_term_is_replaced_without_loss() -> None:
    cluster = Cluster()
    cluster.start("a", "b", "c")
    leader = cluster.lead("a")
    cluster.commit("x")
    leader._engine.adopt_term(leader.term + 5)
    leader._wake()
    new = cluster.elect()
    assert new.term > 5
    cluster.commit("y")
    assert [cluster.machine(name).payloads for name in "abc"] == [[b"x", b"y"]] * 3


def test_two_nodes_that_cannot_reach_the_third_go_on_without_it() -> None:
    cluster = Cluster()
    cluster.start("a", "b", "c")
    cluster.lead("a")
    cluster.network.cut("a", "b")  # c reaches both, and is loyal to a
    cluster.time.advance(10.0)
    assert cluster.leader is cluster.nodes["a"]
    answer = cluster.propose(cluster.nodes["a"], "x")
    cluster.wait(answer)
    assert answer.is_ok


# --- idle -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("voters", "learners"), [("ac", "b"), ("ac", ""), ("abc", "")])
def test_a_node_without_a_leader_does_not_spin(voters: str, learners: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster()
    cluster.start("b", members=configuration(voters, learners))
    assert cluster.count_turns("b", monkeypatch, 10.0) <= 10.0 / ELECTION_MIN_S + 10


def test_an_idle_cluster_wakes_for_heartbeats_only(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster()
    cluster.start("a", "b", "c")
    cluster.elect()
    cluster.time.advance(2.0)
    # A heartbeat each 100 ms, two acknowledgements of it, and the timer that finds it a moment too early.
    assert cluster.count_turns("a", monkeypatch, 10.0) <= 100 * 4 + 20


def test_a_removed_node_that_has_its_own_removal_in_its_log_learns_of_it() -> None:
    """The leader stops speaking to it when it removes it, often after having sent it that entry."""
    cluster = Cluster()
    (node,) = cluster.start("b")
    leader = ScriptedPeer(cluster, "a", "b")
    member = Member("b", "b:1", "", node.node_id, True)
    joined = Configuration.of([*configuration("ac").members, member])
    leader.ask("b", append(1, (1, 0), (1, joined.entry()), commit=2), AppendReply)
    leader.ask("b", append(1, (2, 1), (1, configuration("ac").entry()), commit=2), AppendReply)
    cluster.until(lambda: leader.heard(PreVote))
    assert node.failure is None
    leader.say("b", PreVoteReply(1, 2, False, removed=True))
    cluster.until(lambda: node.failure is not None)
    assert node.status().role == "removed"


def test_a_node_that_waits_to_be_added_is_not_told_that_it_was_removed() -> None:
    cluster = Cluster()
    cluster.start("a", "b", "c")
    cluster.elect()
    (joining,) = cluster.start("d")  # it is told the members, and is none of them yet
    cluster.time.advance(5.0)
    assert joining.failure is None
    assert joining.status().role == "learner"


def test_a_term_notice_from_a_member_does_not_stop_a_follower_from_following() -> None:
    cluster, leader = following()
    leader.say("b", TermNotice(7))
    cluster.time.advance(0.01)
    assert leader.ask("b", append(3, (1, 0)), TermNotice) == TermNotice(7)
    assert leader.ask("b", append(8, (1, 0)), AppendReply) == AppendReply(8, 2, True)
