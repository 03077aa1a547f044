"""When to ask for votes, and whom to grant one: in hand-made time."""

from __future__ import annotations

import pytest

from kvstore.raft.elections import Elections
from tests.raft_fixtures import Draws


def elections(draw: float = 0.5, now: float = 100.0) -> Elections:
    return Elections(Draws(draw), 0.5, 1.0, now)


@pytest.mark.parametrize(("draw", "wait_s"), [(0.0, 0.5), (0.5, 0.75), (0.999, 0.9995)])
def test_the_deadline_lies_between_the_two_timeouts(draw: float, wait_s: float) -> None:
    one = elections(draw)
    assert one.deadline == pytest.approx(100.0 + wait_s)
    one.postpone(200.0)
    assert one.deadline == pytest.approx(200.0 + wait_s)


def test_each_deadline_is_drawn_anew() -> None:
    chance = Draws(0.0)
    one = Elections(chance, 0.5, 1.0, 100.0)
    chance.value = 0.8
    one.postpone(100.0)
    assert one.deadline == pytest.approx(100.9)


def test_a_leader_that_speaks_postpones_and_ends_the_pre_vote() -> None:
    one = elections()
    one.begin_pre_vote(7, "b", 100.0)
    one.heard_leader(100.3)
    assert one.deadline == pytest.approx(101.05)
    assert one.pre_vote_term == 0
    assert one.count_pre_vote(7, "a") == set()


def test_loyalty_lasts_the_minimum_election_timeout() -> None:
    one = elections()
    one.heard_leader(110.0)
    assert one.loyal(110.499)
    assert not one.loyal(110.5)


def test_a_node_is_loyal_for_as_long_after_its_start() -> None:
    one = elections()
    assert one.loyal(100.499)
    assert not one.loyal(100.5)


def test_a_leader_whose_connection_broke_holds_loyalty_no_longer() -> None:
    one = elections()
    one.heard_leader(110.0)
    one.lost_leader(110.1)
    assert not one.loyal(110.1)
    assert 110.1 < one.deadline <= 110.1 + 0.25


def test_a_lost_leader_never_moves_the_deadline_back() -> None:
    one = elections()
    deadline = one.deadline
    one.lost_leader(deadline - 0.01)
    assert one.deadline == deadline


def test_a_pre_vote_counts_its_own_node_and_each_other_once() -> None:
    one = elections()
    one.begin_pre_vote(7, "b", 100.0)
    assert one.count_pre_vote(7, "a") == {"a", "b"}
    assert one.count_pre_vote(7, "a") == {"a", "b"}
    assert one.count_pre_vote(7, "c") == {"a", "b", "c"}


def test_a_pre_vote_for_another_term_counts_nobody() -> None:
    one = elections()
    assert one.count_pre_vote(0, "a") == set()
    one.begin_pre_vote(7, "b", 100.0)
    assert one.count_pre_vote(6, "a") == set()
    one.end_pre_vote()
    assert one.count_pre_vote(7, "a") == set()


def test_a_new_pre_vote_begins_with_nobody_but_itself() -> None:
    one = elections()
    one.begin_pre_vote(7, "b", 100.0)
    one.count_pre_vote(7, "a")
    one.begin_pre_vote(7, "b", 101.0)
    assert one.count_pre_vote(7, "c") == {"b", "c"}


def test_asking_postpones_the_next_attempt() -> None:
    one = elections()
    one.begin_pre_vote(7, "b", 105.0)
    assert one.deadline == pytest.approx(105.75)


def test_a_voters_vote_is_first_once_a_term() -> None:
    one = elections()
    assert one.first_vote(3, "a")
    assert not one.first_vote(3, "a")
    assert one.first_vote(3, "c")
    assert one.first_vote(4, "a")
