"""Faults 7, 17 and 18 of pysyncobj 0.3.17: who is a member. Stock fails, ours holds."""

from __future__ import annotations

import pytest
from pysyncobj.node import Node, TCPNode

from kvstore.model import Member
from kvstore.raft.messages import AppendReply, PreVote, PreVoteReply, RequestVote, VoteReply
from tests.raft_cluster import Cluster, ScriptedPeer
from tests.raft_fixtures import NOOP, Answer, Lone, append, configuration, data
from tests.stock import NOOP as STOCK_NOOP
from tests.stock import Stock, membership_change


def newcomer(name: str) -> Member:
    return Member(name, f"{name}:1", "", f"id-{name}", False)


# --- 7: several changes at once ---------------------------------------------------------------------------------------


def test_fault_07_stock_takes_three_changes_at_once() -> None:
    stock = Stock("a", "bc")
    stock.lead(2)
    stock.poke("raftLastApplied", stock.peek("noopIDx"))
    for name in "def":
        assert stock.peek("changeCluster")(["add", name, Node(name)])
    assert {node.id for node in stock.otherNodes} == set("bcdef")


def test_fault_07_ours_takes_one() -> None:
    cluster = Cluster()
    cluster.start("a", "b", "c")
    leader = cluster.elect()
    cluster.time.advance(1.0)  # the node ids are recorded first
    answers = [Answer(), Answer(), Answer()]
    for name, answer in zip("def", answers, strict=True):
        leader.add_learner(newcomer(name), answer)
    assert [answer.error and answer.error.code for answer in answers] == [None, "membership_busy", "membership_busy"]
    cluster.wait(answers[0])
    assert answers[0].is_ok
    again = Answer()
    leader.add_learner(newcomer("e"), again)
    cluster.wait(again)
    assert again.is_ok
    assert [member.name for member in leader.members] == ["a", "b", "c", "d", "e"]


def test_fault_07_stock_leader_cannot_leave() -> None:
    stock = Stock("a", "bc")
    stock.lead(2)
    stock.poke("raftLastApplied", stock.peek("noopIDx"))
    assert not stock.peek("changeCluster")(["rem", "a", Node("a")])


def test_fault_07_ours_hands_over_and_leaves() -> None:
    cluster = Cluster()
    cluster.start("a", "b", "c")
    leaving = cluster.lead("a")
    cluster.time.advance(1.0)
    refused, handed, removed = Answer(), Answer(), Answer()
    leaving.remove("a", refused)
    assert refused.error is not None
    assert refused.error.code == "cannot_remove_leader"
    leaving.transfer("", handed)
    cluster.wait(handed)
    leader = cluster.elect()
    cluster.time.advance(1.0)
    leader.remove("a", removed)
    cluster.wait(removed)
    assert removed.is_ok
    assert [member.name for member in leader.members] == ["b", "c"]
    # It learns of it when it asks for votes, and stops asking.
    cluster.until(lambda: leaving.failure is not None)
    assert leaving.failure is not None
    assert leaving.failure.code == "removed_from_cluster"
    assert leaving.status().role == "removed"
    assert cluster.leader is leader


# --- 17: members after a restart --------------------------------------------------------------------------------------


def test_fault_17_stock_forgets_the_members_in_its_log_and_is_elected_by_two_of_five() -> None:
    stock = Stock("b", "ac")  # the constructor's members; d and e were added by entries in its log
    for index, entry in enumerate([membership_change("add", "d"), membership_change("add", "e"), STOCK_NOOP], 2):
        stock.log.add(entry, index, 1)
    stock.poke("raftCurrentTerm", 1)
    stock.campaign()
    stock.receive("c", type="response_vote", term=2)
    assert stock._isLeader()
    assert {node.id for node in stock.otherNodes} == set("ac")


def test_fault_17_ours_needs_three_of_five() -> None:
    cluster = Cluster()
    entries = [
        (NOOP, 1, 0),
        (configuration("abcd").entry(), 2, 1),
        (configuration("abcde").entry(), 3, 1),
        (data("x"), 4, 1),
    ]
    cluster.prepare_log("b", entries)
    (node,) = cluster.start("b")
    assert [member.name for member in node.members] == list("abcde")
    peers = [ScriptedPeer(cluster, name, "b") for name in "cd"]
    c, d = peers
    assert node.machine.applied_index == 1  # none of it is committed as far as this node knows
    cluster.until(lambda: all(peer.heard(PreVote) for peer in peers))
    c.say("b", PreVoteReply(1, 2, True))
    cluster.time.advance(0.01)
    assert node.term == 1
    d.say("b", PreVoteReply(1, 2, True))
    cluster.until(lambda: all(peer.heard(RequestVote) for peer in peers))
    c.say("b", VoteReply(2))
    cluster.time.advance(0.01)
    assert not node.is_leader
    d.say("b", VoteReply(2))
    cluster.until(lambda: node.is_leader)


def test_fault_17_stock_undoes_a_removal_by_applying_an_older_addition() -> None:
    stock = Stock("b", "ac")
    entries = [(membership_change("add", "d"), 2, 1), (membership_change("rem", "d"), 3, 1)]
    stock.append("a", 1, (1, 0), *entries, commit_index=2)
    assert {node.id for node in stock.otherNodes} == set("ac")
    stock.tick()
    assert stock.raftLastApplied == 2
    assert {node.id for node in stock.otherNodes} == set("acd")  # the removal stands in its log


def test_fault_17_ours_goes_by_the_newest_configuration_in_the_log() -> None:
    cluster = Cluster()
    (node,) = cluster.start("b")
    leader = ScriptedPeer(cluster, "a", "b")
    entries = [(1, configuration("abcd").entry()), (1, configuration("abc").entry())]
    leader.ask("b", append(1, (1, 0), *entries, commit=2), AppendReply)
    assert node.machine.applied_index == 2
    assert [member.name for member in node.members] == list("abc")
    # And when the newest one is truncated, by the one before it.
    leader.ask("b", append(2, (2, 1), (2, data("x")), commit=2), AppendReply)
    assert [member.name for member in node.members] == list("abcd")


def test_fault_17_ours_finds_the_members_in_the_state_when_the_log_holds_none() -> None:
    cluster = Cluster()
    cluster.start("a", "b", "c")
    leader = cluster.elect()
    cluster.time.advance(1.0)
    added = Answer()
    leader.add_learner(newcomer("d"), added)
    cluster.wait(added)
    cluster.commit("x")
    machine = cluster.machine("b")
    machine.flush()
    cluster.wal("b").reset(machine.applied_index, machine.applied_term)  # as after a snapshot
    cluster.wal("b").sync()
    cluster.crash("b")
    (node,) = cluster.start("b")
    assert cluster.wal("b").first_index == cluster.wal("b").last_index
    assert [member.name for member in node.members] == list("abcd")


# --- 18: strangers and names ------------------------------------------------------------------------------------------


def test_fault_18_stock_raises_at_an_acknowledgement_from_a_member_that_left() -> None:
    stock = Stock("a", "bc")
    stock.lead(1)
    left = stock.node("b")
    stock.peek("doChangeCluster")(["rem", "b", left])
    message = {"type": "next_node_idx", "next_node_idx": 3, "reset": False, "success": True}
    for _ in range(2):
        with pytest.raises(KeyError):
            stock.peek("onMessageReceived")(left, message)


def test_fault_18_stock_raises_at_every_tick_once_a_learner_has_become_a_voter() -> None:
    stock = Stock("a", "bc")
    stock.lead(1)
    joining = Node("d")
    stock.peek("onReadonlyNodeConnected")(joining)
    stock.poke("raftLastApplied", stock.peek("noopIDx"))
    assert stock.peek("changeCluster")(["add", "d", Node("d")])
    stock.fill(3, 1)
    stock.peek("onReadonlyNodeDisconnected")(joining)  # it comes back as a voter
    for _ in range(2):
        with pytest.raises(KeyError):
            stock.tick()


def test_fault_18_ours_drops_them() -> None:
    lone = Lone("a")
    lone.lead()
    lone.propose(data("x"))
    lone.set_members(configuration("ac"))
    lone.receive("b", AppendReply(1, 4, True))
    lone.receive("b", AppendReply(1, 2, False))
    lone.engine.tick()
    assert lone.guard.dropped["not_a_member"] == 2
    assert lone.engine.commit_index == 1


def test_fault_18_ours_promotes_a_learner_under_its_own_name() -> None:
    cluster = Cluster()
    cluster.start("a", "b", "c")
    leader = cluster.elect()
    cluster.time.advance(1.0)
    (joining,) = cluster.start("d", members=configuration("abc", "d"))
    added, promoted = Answer(), Answer()
    leader.add_learner(Member("d", "d:1", "", joining.node_id, False), added)
    cluster.wait(added)
    assert added.is_ok
    cluster.until(lambda: joining.machine.applied_index == leader.machine.applied_index == leader.match_index("d"))
    assert joining.status().role == "learner"
    leader.promote("d", promoted)
    cluster.wait(promoted)
    assert promoted.is_ok
    cluster.commit("x")
    assert joining.status().role == "follower"
    assert cluster.machine("d").payloads == [b"x"]
    assert {member.name for member in leader.members if member.voter} == set("abcd")


def test_fault_18_stock_takes_no_plain_names() -> None:
    with pytest.raises(ValueError):
        TCPNode("n2")


def test_fault_18_ours_does() -> None:
    lone = Lone("n1", voters=["n1", "n2", "a-longer.name"])
    lone.lead()
    assert lone.engine.next_index("a-longer.name") > 1
