"""Faults 12, 13 and 19 of pysyncobj 0.3.17: who leads, and how leadership moves. Stock fails, ours holds."""

from __future__ import annotations

import pysyncobj.syncobj
import pytest
from pysyncobj.config import FAIL_REASON

from kvstore.raft.messages import PreVote, RequestVote, VoteReply
from tests.raft_cluster import Cluster
from tests.raft_fixtures import ELECTION_MAX_S, Answer, HandClock, Lone
from tests.stock import Stock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> HandClock:
    """The stock engine's clock."""
    clock = HandClock(1000.0)
    monkeypatch.setattr(pysyncobj.syncobj, "monotonicTime", clock.monotonic)
    return clock


# --- 12: a node that returns deposes a healthy leader -----------------------------------------------------------------


def test_fault_12_stock_leader_is_deposed_by_a_node_that_returns(clock: HandClock) -> None:
    returning, leader = Stock("c", "ab"), Stock("a", "bc")
    leader.lead(1)
    leader.fill(20, 1)
    returning.connect()  # it does not know that nothing it says arrives
    for _ in range(10):
        clock.now_s += 10.0
        returning.tick()
    assert returning.raftCurrentTerm == 10
    request = returning.said("request_vote")[-1]
    leader.receive("c", **request)
    assert not leader._isLeader()
    assert leader.raftCurrentTerm == 10
    assert leader.said("response_vote") == []  # and all for a node that cannot win


def test_fault_12_ours_keeps_its_leader_and_its_term() -> None:
    cluster = Cluster()
    cluster.start("a", "b", "c")
    leader = cluster.elect()
    term = leader.term
    away = cluster.followers()[0]
    cluster.isolate(away.config.name)
    cluster.time.advance(30.0)
    assert away.term == term
    cluster.propose(leader, "meanwhile")
    cluster.network.heal()
    cluster.time.advance(10.0)
    assert cluster.leader is leader
    assert [node.term for node in cluster.nodes.values()] == [term] * 3
    assert cluster.machine(away.config.name).payloads == [b"meanwhile"]


def test_fault_12_ours_returning_node_only_asks() -> None:
    """Whoever hears from a leader refuses, so the asking node never raises its term."""
    lone = Lone("c")
    for _ in range(10):
        lone.clock.now_s += 2 * ELECTION_MAX_S
        lone.tick()
    assert len(lone.heard(PreVote)) == 20
    assert lone.heard(RequestVote) == []
    assert lone.engine.term == 0


# --- 13: votes are a bare counter -------------------------------------------------------------------------------------


def test_fault_13_stock_is_elected_by_one_vote_that_comes_twice() -> None:
    stock = Stock("a", "bcde")
    stock.campaign()
    stock.receive("b", type="response_vote", term=1)
    stock.receive("b", type="response_vote", term=1)
    assert stock._isLeader()  # by two of five


def test_fault_13_ours_counts_voters() -> None:
    lone = Lone("a", voters="abcde", learners="f")
    lone.engine.tick(campaign=True)
    for voter in ("b", "b", "f", "stranger", "b"):
        lone.receive(voter, VoteReply(1))
    assert not lone.engine.is_leader
    lone.receive("c", VoteReply(1))
    assert lone.engine.is_leader


# --- 19: hand-over ----------------------------------------------------------------------------------------------------


def test_fault_19_stock_denies_a_hand_over_while_one_entry_is_in_flight() -> None:
    stock = Stock("a", "bc")
    stock.lead(1)
    for peer in "bc":
        stock.acknowledge(peer, stock.end + 1)
    stock.store("x")
    stock.tick()
    answers: list[int] = []
    stock.transferLeadership(stock.node("b"), lambda _result, error: answers.append(error))
    assert answers == [FAIL_REASON.REQUEST_DENIED]
    assert stock.said("timeout_now") == []


def test_fault_19_ours_hands_over_under_load() -> None:
    cluster = Cluster()
    cluster.start("a", "b", "c")
    leader = cluster.lead("a")
    answers: list[Answer] = []

    def load() -> None:
        """Two requests in each half millisecond: something is always in flight."""
        if len(answers) < 200:
            node = cluster.leader
            if node is not None:
                answers.extend(cluster.propose(node, len(answers)) for _ in range(2))
            cluster.time.call_later(0.0005, load)

    load()
    cluster.until(lambda: len(answers) >= 50)
    assert any(not answer.is_done for answer in answers)
    term = leader.term
    handed = Answer()
    leader.transfer("b", handed)
    took_s = cluster.until(lambda: cluster.nodes["b"].is_leader)
    assert took_s < 0.1
    cluster.until(lambda: len(answers) >= 200 and all(answer.is_done for answer in answers))
    assert handed.is_ok
    assert cluster.nodes["b"].term == term + 1
    # What came during the hand-over was refused; nothing's outcome is unknown, and what was answered is there.
    assert {answer.error.code for answer in answers if answer.error} <= {"not_leader"}
    stored = {int(payload) for payload in cluster.machine("b").payloads}
    assert stored == {number for number, answer in enumerate(answers) if answer.is_ok}
    assert len(stored) > 100


def test_fault_19_ours_leads_on_if_the_target_does_not_take_over() -> None:
    cluster = Cluster()
    cluster.start("a", "b", "c")
    leader = cluster.lead("a")
    cluster.network.cut("a", "b")
    cluster.propose(leader, "b does not hold this")
    handed = Answer()
    leader.transfer("b", handed)
    refused = cluster.propose(leader, "not while it hands over")
    assert refused.error is not None
    assert refused.error.code == "not_leader"
    cluster.wait(handed)
    assert handed.error is not None
    assert handed.error.code == "transfer_failed"
    assert leader.accepting
    assert cluster.leader is leader


def test_fault_19_stock_raises_its_term_in_the_tick_after_a_step_down(clock: HandClock) -> None:
    stock = Stock("a", "bc", leaderFallbackTimeout=1.0)
    stock.lead(1)
    clock.now_s += 10.0
    stock.tick()
    assert not stock._isLeader()
    stock.tick()
    assert stock.raftCurrentTerm == 2


def test_fault_19_ours_waits_a_full_timeout_and_asks_first() -> None:
    cluster = Cluster()
    cluster.start("a", "b", "c")
    leader = cluster.lead("a")
    term = leader.term
    cluster.isolate("a")
    cluster.until(lambda: not leader.is_leader)
    stepped_down_s = cluster.time.now_s
    assert leader._elections.deadline >= stepped_down_s + 0.5
    cluster.time.advance(20.0)
    assert leader.term == term
    assert cluster.leader is not leader
