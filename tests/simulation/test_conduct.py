"""What a node may do to the others: each rule is broken by hand, and found; a healthy cluster breaks none."""

from __future__ import annotations

from kvstore.raft.messages import RequestVote
from tests.raft_fixtures import Answer
from tests.simulation.checked_cluster import running, say, violates


def test_cuts_crashes_and_hand_overs_break_no_rule() -> None:
    cluster = running("abcde")
    for round_number in range(12):
        names = sorted(cluster.nodes)
        name = names[round_number % len(names)]
        if round_number % 3 == 0:
            cluster.isolate(name)
        elif round_number % 3 == 1:
            cluster.silence(name, *(other for other in names if other != name))
        else:
            leader = cluster.leader
            assert leader is not None
            leader.transfer("", Answer())
        cluster.time.advance(2.5)
        cluster.network.heal()
        cluster.elect()
    cluster.commit("the end")


def test_a_vote_while_a_leader_lives() -> None:
    cluster = running()
    cluster.nodes["b"]._guard._loyal = lambda _now: False  # type: ignore[method-assign]
    with violates("loyalty", "b considers a vote for c", "its leader a"):
        term = cluster.nodes["b"].term + 1
        actions = cluster.nodes["b"]._guard.receive("c", RequestVote(term, 100, term - 1), cluster.time.now_s)
        assert actions
        cluster.look()


def test_a_pre_vote_while_a_leader_lives() -> None:
    cluster = running()
    cluster.silence("a", "c")
    cluster.nodes["b"]._guard._loyal = lambda _now: False  # type: ignore[method-assign]
    with violates("loyalty", "b considers a pre-vote for c"):
        cluster.time.advance(2.0)


def test_a_term_that_is_raised_without_a_pre_vote() -> None:
    cluster = running()
    with violates("pre-vote", "nobody granted"):
        say(cluster, "b", "c", RequestVote(cluster.nodes["b"].term + 1, 100, 1))


def test_a_hand_over_that_nobody_asked_for() -> None:
    cluster = running()
    with violates("pre-vote", "its leader asked"):
        say(cluster, "b", "c", RequestVote(cluster.nodes["b"].term + 1, 100, 1, transfer=True))


def test_a_leader_that_hears_nobody() -> None:
    cluster = running()
    cluster.nodes["a"]._engine._o._SyncObj__conf.leaderFallbackTimeout = 1e9
    cluster.isolate("a")
    with violates("deaf leader", "has heard 1 of the voters"):
        cluster.time.advance(3.0)


def test_an_entry_that_is_sent_again() -> None:
    cluster = running()
    cluster.nodes["a"]._engine.set_next_index("b", cluster.nodes["a"].status().last_index)
    with violates("appends in order", "to b in term"):
        cluster.commit("more")


def test_an_entry_that_may_be_lost_is_sent_again() -> None:
    cluster = running()
    cluster.isolate("b")
    cluster.propose(cluster.nodes["a"], "more")
    cluster.time.advance(1.0)
    for stream in list(cluster.network.streams):
        stream.lose_soon(ConnectionResetError("lost"))
    cluster.network.heal()
    cluster.commit("and more")


def test_one_that_steps_down_in_time_breaks_no_rule() -> None:
    cluster = running()
    cluster.isolate("a")
    cluster.time.advance(3.0)
    assert not cluster.nodes["a"].is_leader
