"""The guard's rules on elections: votes, pre-votes, loyalty, hand-over, removed members."""

from __future__ import annotations

import pytest

from kvstore.model import Member
from kvstore.raft.guard import AdoptTerm, Campaign, Deliver, Removed, Send
from kvstore.raft.members import Configuration
from kvstore.raft.messages import (
    AppendEntries,
    PreVote,
    PreVoteReply,
    ReadProbe,
    RequestVote,
    TermNotice,
    TimeoutNow,
    VoteReply,
)
from tests.raft_fixtures import ELECTION_MAX_S, ELECTION_MIN_S, Lone, append, configuration, data
from tests.unit.test_guard import NOW, Pure

LATER = NOW + 10 * ELECTION_MAX_S


def candidate(voters: str = "abcde") -> Pure:
    pure = Pure()
    pure.guard.members = configuration(voters)
    pure.engine.is_candidate = True
    return pure


# --- counting votes ---------------------------------------------------------------------------------------------------


def test_a_vote_counts_once_per_voter_and_term() -> None:
    pure = candidate()
    assert pure.guard.receive("a", VoteReply(5), NOW) == [Deliver("a", {"type": "response_vote", "term": 5})]
    assert pure.guard.receive("a", VoteReply(5), NOW) == []
    assert pure.guard.dropped["repeated_vote"] == 1
    pure.engine.term = 6
    assert len(pure.guard.receive("a", VoteReply(6), NOW)) == 1


def test_a_vote_of_another_term_does_not_count() -> None:
    pure = candidate()
    assert pure.guard.receive("a", VoteReply(4), NOW) == []
    assert pure.guard.receive("a", VoteReply(6), NOW) == []
    assert pure.guard.dropped["stale_vote"] == 2


def test_only_a_candidate_takes_votes() -> None:
    assert Pure().guard.receive("a", VoteReply(5), NOW) == []


@pytest.mark.parametrize("peer", ["d", "stranger"])
def test_only_voters_count(peer: str) -> None:
    pure = candidate("abc")
    pure.guard.members = configuration("abc", ["d"])
    assert pure.guard.receive(peer, VoteReply(5), NOW) == []
    assert pure.guard.dropped["not_a_voter"] == 1


def test_the_same_vote_twice_elects_nobody() -> None:
    lone = Lone("b", voters="abcde")
    lone.engine.tick(campaign=True)
    for _ in range(3):
        lone.receive("a", VoteReply(1))
    assert not lone.engine.is_leader
    lone.receive("c", VoteReply(1))
    assert lone.engine.is_leader


# --- granting votes ---------------------------------------------------------------------------------------------------


def test_a_vote_is_granted_when_no_leader_lives() -> None:
    lone = Lone()
    assert lone.receive("a", RequestVote(1, 1, 0)) == [VoteReply(1)]
    assert lone.wal.voted_for == "a"


def test_a_vote_is_promised_only_when_it_is_on_disk() -> None:
    lone = Lone()
    assert lone.receive("a", RequestVote(1, 1, 0), sync=False) == []
    lone.flush()
    assert lone.heard(VoteReply) == []
    lone.sync()
    assert lone.heard(VoteReply) == [VoteReply(1)]


def test_one_vote_per_term() -> None:
    lone = Lone()
    assert lone.receive("a", RequestVote(1, 1, 0)) == [VoteReply(1)]
    assert lone.receive("c", RequestVote(1, 1, 0)) == []
    assert lone.receive("c", RequestVote(2, 1, 0)) == [VoteReply(2)]


def test_no_vote_for_a_log_that_is_behind() -> None:
    lone = Lone(entries=[(b"\x01", 1, 0), (data(2), 2, 3)])
    assert lone.receive("a", RequestVote(4, 1, 0)) == []
    assert lone.receive("a", RequestVote(5, 9, 2)) == []
    assert lone.receive("a", RequestVote(6, 2, 3)) == [VoteReply(6)]


def test_a_node_that_hears_a_living_leader_grants_no_vote_and_keeps_its_term() -> None:
    pure = Pure()
    pure.guard.receive("a", append(5, (5, 1)), NOW)
    assert pure.guard.receive("c", RequestVote(9, 99, 5), NOW + 0.9 * ELECTION_MIN_S) == []
    assert pure.guard.dropped["vote_refused_loyal"] == 1
    assert len(pure.guard.receive("c", RequestVote(9, 99, 5), NOW + 1.1 * ELECTION_MIN_S)) == 1


def test_a_read_probe_makes_loyal_too() -> None:
    pure = Pure()
    pure.guard.receive("a", ReadProbe(5, 1), NOW)
    assert pure.guard.receive("c", RequestVote(9, 99, 5), NOW) == []


def test_a_leader_grants_no_vote() -> None:
    pure = Pure()
    pure.engine.is_leader = True
    assert pure.guard.receive("c", RequestVote(9, 99, 5), LATER) == []


def test_a_node_that_has_just_started_grants_no_vote() -> None:
    """It may have promised loyalty a moment before it went down."""
    pure = Pure()
    assert pure.guard.receive("c", RequestVote(9, 99, 5), 0.9 * ELECTION_MIN_S) == []
    assert len(pure.guard.receive("c", RequestVote(9, 99, 5), 1.1 * ELECTION_MIN_S)) == 1


def test_a_vote_that_the_leader_itself_asked_for_is_granted_in_spite_of_loyalty() -> None:
    pure = Pure()
    pure.guard.receive("a", append(5, (5, 1)), NOW)
    (deliver,) = pure.guard.receive("c", RequestVote(6, 99, 5, transfer=True), NOW)
    assert isinstance(deliver, Deliver)
    pure.engine.is_leader = True
    assert len(pure.guard.receive("c", RequestVote(6, 99, 5, transfer=True), NOW)) == 1


def test_a_candidate_of_a_lower_term_is_told() -> None:
    assert Pure().guard.receive("c", RequestVote(4, 99, 4), NOW) == [Send("c", TermNotice(5))]


# --- pre-votes --------------------------------------------------------------------------------------------------------


def test_before_the_deadline_nothing_is_asked() -> None:
    pure = Pure()
    assert pure.guard.tick(pure.elections.deadline - 0.001) == []


def test_at_the_deadline_the_other_voters_are_asked_and_no_term_is_raised() -> None:
    pure = Pure()
    pure.guard.members = configuration("abc", ["d"])
    deadline = pure.elections.deadline
    asked = pure.guard.tick(deadline)
    assert asked == [Send("a", PreVote(5, 6, 5, 1)), Send("c", PreVote(5, 6, 5, 1))]
    assert pure.elections.deadline >= deadline + ELECTION_MIN_S


def test_a_learner_does_not_campaign_but_asks_whether_it_was_removed() -> None:
    """It may have been, while it was away."""
    pure = Pure()
    pure.guard.members = configuration("acd", "b")
    sent = pure.guard.tick(LATER)
    assert [(action.peer, type(action.message)) for action in sent if isinstance(action, Send)] == [
        (peer, PreVote) for peer in "acd"
    ]
    assert pure.elections.deadline > LATER
    for peer in "acd":
        assert pure.guard.receive(peer, PreVoteReply(5, 6, True), LATER) == []


def test_a_node_that_waits_to_be_added_asks_nobody() -> None:
    pure = Pure()
    pure.guard.members = configuration("acd")
    pure.guard.was_member = False
    assert pure.guard.tick(LATER) == []
    assert pure.elections.deadline > LATER


def test_a_node_that_finds_its_removal_in_its_log_asks_and_never_campaigns() -> None:
    """The leader speaks to it no more, so it learns only by asking that the removal stands."""
    pure = Pure()
    pure.guard.members = configuration("acd")
    assert pure.guard.tick(pure.elections.deadline - 0.001) == []
    assert [action.peer for action in pure.guard.tick(LATER) if isinstance(action, Send)] == ["a", "c", "d"]
    assert pure.elections.deadline > LATER
    assert pure.guard.receive("a", PreVoteReply(5, 6, True), LATER) == []
    assert pure.guard.receive("c", PreVoteReply(5, 6, True), LATER) == []
    assert pure.guard.receive("d", PreVoteReply(5, 6, False, removed=True), LATER) == [Removed()]


def test_a_leader_does_not_campaign() -> None:
    pure = Pure()
    pure.engine.is_leader = True
    assert pure.guard.tick(LATER) == []


def test_a_sole_voter_campaigns_at_once() -> None:
    pure = Pure()
    pure.guard.members = configuration("b", "c")
    assert pure.guard.tick(0.0) == [Campaign()]


def asking(voters: str = "abcde") -> Pure:
    pure = Pure()
    pure.guard.members = configuration(voters)
    assert pure.guard.tick(LATER) != []
    return pure


def test_a_campaign_needs_the_pre_votes_of_a_quorum() -> None:
    pure = asking()
    assert pure.guard.receive("a", PreVoteReply(5, 6, True), LATER) == []
    assert pure.guard.receive("a", PreVoteReply(5, 6, True), LATER) == []
    assert pure.guard.receive("c", PreVoteReply(5, 6, False), LATER) == []
    for peer in ("f", "stranger"):
        assert pure.guard.receive(peer, PreVoteReply(5, 6, True), LATER) == []
    assert pure.guard.receive("d", PreVoteReply(5, 6, True), LATER) == [Campaign()]
    # The rest of the answers come too late to matter.
    assert pure.guard.receive("e", PreVoteReply(5, 6, True), LATER) == []


def test_an_answer_to_an_earlier_pre_vote_does_not_count() -> None:
    pure = asking("abc")
    assert pure.guard.receive("a", PreVoteReply(5, 5, True), LATER) == []
    pure.engine.term = 6
    assert pure.guard.receive("a", PreVoteReply(5, 6, True), LATER) == []


def test_who_lost_its_vote_while_it_asked_does_not_campaign() -> None:
    pure = asking("abc")
    pure.guard.members = configuration("ac", "b")
    assert pure.guard.receive("a", PreVoteReply(5, 6, True), LATER) == []
    assert pure.guard.receive("c", PreVoteReply(5, 6, True), LATER) == []


def test_a_leader_that_speaks_ends_the_pre_vote() -> None:
    pure = asking("abc")
    pure.guard.receive("c", append(5, (5, 1)), LATER)
    assert pure.guard.receive("a", PreVoteReply(5, 6, True), LATER) == []


def test_a_pre_vote_that_meets_a_higher_term_adopts_it() -> None:
    assert asking().guard.receive("a", PreVoteReply(9, 6, False), LATER) == [AdoptTerm(9)]


def reply_to(pure: Pure, message: PreVote, now: float = LATER, peer: str = "c") -> PreVoteReply:
    (send,) = pure.guard.receive(peer, message, now)
    assert isinstance(send, Send)
    assert isinstance(send.message, PreVoteReply)
    return send.message


def test_a_pre_vote_is_granted_and_changes_nothing() -> None:
    pure = Pure()
    assert reply_to(pure, PreVote(5, 6, 5, 1)) == PreVoteReply(5, 6, True)
    assert reply_to(pure, PreVote(5, 6, 5, 1), peer="a").granted


def test_a_pre_vote_is_refused_while_a_leader_lives() -> None:
    pure = Pure()
    pure.guard.receive("a", append(5, (5, 1)), NOW)
    assert not reply_to(pure, PreVote(5, 6, 5, 1), NOW).granted
    leader = Pure()
    leader.engine.is_leader = True
    assert not reply_to(leader, PreVote(5, 6, 5, 1)).granted
    assert not reply_to(Pure(), PreVote(5, 6, 5, 1), now=0.1).granted


@pytest.mark.parametrize("message", [PreVote(5, 6, 4, 1), PreVote(5, 6, 99, 0)])
def test_a_pre_vote_is_refused_to_a_log_that_is_behind(message: PreVote) -> None:
    assert not reply_to(Pure(), message).granted


def test_a_pre_vote_for_a_term_that_is_past_is_refused_with_the_present_one() -> None:
    assert reply_to(Pure(), PreVote(4, 5, 99, 4)) == PreVoteReply(5, 5, False)


# --- removed members --------------------------------------------------------------------------------------------------


def test_a_removed_nodes_pre_vote_is_answered_removed() -> None:
    pure = Pure()
    pure.guard.members = pure.guard.applied_members = configuration("ab")
    assert reply_to(pure, PreVote(5, 6, 4, 1)) == PreVoteReply(5, 6, False, removed=True)
    assert reply_to(pure, PreVote(5, 6, 5, 1)) == PreVoteReply(5, 6, False, removed=True)


def test_what_was_not_applied_yet_proves_no_removal() -> None:
    """This node's log may end in a removal that is never committed."""
    pure = Pure()
    pure.guard.members = pure.guard.applied_members = configuration("ab")
    pure.guard.applied_last = (1, 4)
    assert not reply_to(pure, PreVote(5, 6, 5, 1)).removed


def test_a_removal_that_is_not_committed_may_come_to_nothing() -> None:
    pure = Pure()
    pure.guard.members = configuration("ab")
    assert not reply_to(pure, PreVote(5, 6, 4, 1)).removed


def test_a_member_whose_addition_is_not_committed_is_not_called_removed() -> None:
    pure = Pure()
    pure.guard.applied_members = configuration("ab")
    assert not reply_to(pure, PreVote(5, 6, 4, 1)).removed


def test_a_member_that_our_log_does_not_know_yet_is_not_called_removed() -> None:
    pure = Pure()
    pure.guard.members = pure.guard.applied_members = configuration("ab")
    assert reply_to(pure, PreVote(5, 6, 9, 1)) == PreVoteReply(5, 6, True)


def test_who_knows_no_configuration_calls_nobody_removed() -> None:
    pure = Pure()
    pure.guard.members = pure.guard.applied_members = Configuration()
    assert not reply_to(pure, PreVote(5, 6, 4, 1)).removed


def test_who_is_told_that_it_was_removed_stops() -> None:
    assert asking().guard.receive("a", PreVoteReply(5, 6, False, removed=True), LATER) == [Removed()]


@pytest.mark.parametrize("next_term", [5, 7])
def test_an_answer_to_another_question_removes_nobody(next_term: int) -> None:
    """One that had this name before may have asked."""
    pure = asking()
    assert pure.guard.receive("a", PreVoteReply(5, next_term, False, removed=True), LATER) == []
    assert pure.guard.dropped["stale_removal"] == 1


def test_who_hears_a_leader_after_it_asked_does_not_take_itself_for_removed() -> None:
    pure = asking()
    pure.elections.heard_leader(LATER)
    assert pure.guard.receive("a", PreVoteReply(5, 6, False, removed=True), LATER) == []


def test_a_voter_by_its_log_that_has_applied_nothing_yet_is_told_as_well() -> None:
    pure = asking()
    pure.guard.was_member = False
    assert pure.guard.receive("a", PreVoteReply(5, 6, False, removed=True), LATER) == [Removed()]


def test_who_was_never_a_member_is_not_stopped() -> None:
    pure = Pure()
    pure.guard.members = configuration("acd", "b")
    assert pure.guard.tick(LATER)
    pure.guard.was_member = False
    assert pure.guard.receive("a", PreVoteReply(5, 6, False, removed=True), LATER) == []


def test_a_member_of_that_name_with_another_node_id_is_not_this_node() -> None:
    pure = Pure()
    for node_id, is_member in (("id-b", True), ("another", False)):
        members = Configuration.of([Member("b", "b:1", "", node_id, True)])
        pure.guard.set_applied_members(members.encode(), "id-b")
        assert pure.guard.was_member is is_member
    pure.guard.set_applied_members(b"", "id-b")
    assert not pure.guard.was_member


# --- terms and hand-over ----------------------------------------------------------------------------------------------


def test_a_term_notice_is_adopted_if_it_is_news() -> None:
    pure = Pure()
    assert pure.guard.receive("c", TermNotice(9), NOW) == [AdoptTerm(9)]
    assert pure.guard.receive("c", TermNotice(5), NOW) == []


def test_a_term_notice_deposes_a_leader_without_a_vote() -> None:
    lone = Lone("a")
    lone.lead()
    lone.receive("c", TermNotice(9))
    assert not lone.engine.is_leader
    assert (lone.wal.term, lone.wal.voted_for) == (9, None)
    assert lone.heard(VoteReply) == []


def test_a_leader_that_hears_no_quorum_steps_down_after_an_election_timeout() -> None:
    lone = Lone("a", voters="abcde")
    lone.lead()
    lone.clock.now_s += 0.9 * ELECTION_MAX_S
    lone.receive("b", VoteReply(0))
    lone.engine.heard_from("b")
    lone.engine.tick()
    assert lone.engine.leader == "a"
    lone.clock.now_s += 0.2 * ELECTION_MAX_S
    lone.engine.tick()
    assert not lone.engine.is_leader
    assert lone.engine.leader == ""


def test_the_leaders_word_to_take_over_starts_a_campaign_at_once() -> None:
    pure = Pure()
    pure.guard.receive("a", append(5, (5, 1)), NOW)
    assert pure.guard.receive("a", TimeoutNow(5), NOW) == [Campaign(transfer=True)]
    assert pure.elections.transfer_term == 6


@pytest.mark.parametrize(("peer", "term"), [("c", 5), ("a", 4), ("a", 6)])
def test_only_the_leader_of_the_term_can_hand_over(peer: str, term: int) -> None:
    pure = Pure()
    pure.guard.receive("a", append(5, (5, 1)), NOW)
    assert pure.guard.receive(peer, TimeoutNow(term), NOW) == []
    assert pure.guard.dropped["stale_hand_over"] == 1


def test_a_leader_of_a_term_that_is_past_cannot_hand_over() -> None:
    pure = Pure()
    pure.guard.receive("a", append(5, (5, 1)), NOW)
    pure.engine.term = 6
    assert pure.guard.receive("a", TimeoutNow(5), NOW) == []


def test_a_learner_takes_no_hand_over() -> None:
    pure = Pure()
    pure.guard.members = configuration("ac", "b")
    pure.guard.receive("a", append(5, (5, 1)), NOW)
    assert pure.guard.receive("a", TimeoutNow(5), NOW) == []


def test_a_won_pre_vote_leads_to_an_election() -> None:
    lone = Lone()
    lone.clock.now_s = lone.elections.deadline
    lone.tick()
    assert lone.heard(PreVote) == [PreVote(0, 1, 1, 0)] * 2
    assert lone.engine.term == 0
    lone.receive("a", PreVoteReply(0, 1, True))
    assert lone.engine.is_candidate
    assert lone.heard(RequestVote) == [RequestVote(1, 1, 0)] * 2
    lone.receive("c", VoteReply(1))
    assert lone.engine.is_leader
    assert lone.heard(AppendEntries) != []
