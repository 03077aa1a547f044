"""The guard's rules on replication and reads: pure ones on fake views, and where the log decides, on the real engine.

Elections have a file of their own (`test_guard_elections.py`).
"""

from __future__ import annotations

import pytest

from kvstore.raft.elections import Elections
from kvstore.raft.guard import AdoptTerm, Deliver, DeliverAck, Guard, Pass, SafetyViolation, Send
from kvstore.raft.messages import (
    AppendEntries,
    AppendReply,
    ReadAck,
    ReadProbe,
    ReadReply,
    ReadRequest,
    TermNotice,
)
from kvstore.raft.outbox import NOTICE_DELAY_S
from tests.raft_fixtures import (
    ELECTION_MAX_S,
    ELECTION_MIN_S,
    NOOP,
    Draws,
    FakeEngine,
    FakeLog,
    Lone,
    acked,
    append,
    configuration,
    data,
)

NOW = 100.0


class Pure:
    """A guard of node `b` on fake views, long after its start."""

    def __init__(self, terms: tuple[int, ...] = (0, 1, 1, 1, 1), first_index: int = 1) -> None:
        self.engine = FakeEngine()
        self.log = FakeLog(terms, first_index)
        self.elections = Elections(Draws(), ELECTION_MIN_S, ELECTION_MAX_S, 0.0)
        self.guard = Guard("b", self.engine, self.log, self.elections)
        self.guard.members = self.guard.applied_members = configuration("abc")
        self.guard.applied_last = (self.log.last_term, self.log.last_index)
        self.guard.was_member = True


def leading(durable: int | None = None) -> Pure:
    pure = Pure()
    pure.engine.is_leader = True
    pure.log.durable = durable
    return pure


# --- stamps -----------------------------------------------------------------------------------------------------------


def test_an_acknowledgement_from_an_earlier_term_is_dropped() -> None:
    pure = leading()
    assert pure.guard.receive("a", AppendReply(4, 6, True), NOW) == []
    assert pure.guard.dropped["stale_acknowledgement"] == 1
    assert pure.guard.receive("a", AppendReply(5, 6, True), NOW) == [DeliverAck("a", 6, True)]


def test_an_acknowledgement_from_a_later_term_deposes() -> None:
    assert leading().guard.receive("a", AppendReply(6, 6, True), NOW) == [AdoptTerm(6)]


def test_a_follower_takes_no_acknowledgement() -> None:
    pure = Pure()
    assert pure.guard.receive("a", AppendReply(5, 6, True), NOW) == []


def test_what_was_acknowledged_in_an_earlier_term_is_forgotten() -> None:
    pure = leading(durable=2)
    pure.guard.receive("a", AppendReply(5, 6, True), NOW)
    pure.log.durable = 5
    assert pure.guard.raise_acks() == [DeliverAck("a", 6, True, is_news=False)]
    pure.guard.term_changed()
    pure.engine.term = 6
    assert pure.guard.raise_acks() == []


def test_a_lower_term_leader_is_told_the_term() -> None:
    pure = Pure()
    assert pure.guard.receive("a", append(4, (5, 1)), NOW) == [Send("a", TermNotice(5))]
    assert pure.guard.receive("a", ReadProbe(4, 1), NOW) == [Send("a", TermNotice(5))]


def test_a_leader_of_a_lower_term_is_no_sign_of_a_living_leader() -> None:
    pure = Pure()
    pure.guard.receive("a", append(4, (5, 1)), NOW)
    assert not pure.elections.loyal(NOW)
    pure.guard.receive("a", append(5, (5, 1)), NOW)
    assert pure.elections.loyal(NOW)


# --- appends: the pure rules ------------------------------------------------------------------------------------------


def delivered(pure: Pure, message: AppendEntries) -> tuple[dict[str, object], AppendReply]:
    deliver, send = pure.guard.receive("a", message, NOW)
    assert isinstance(deliver, Deliver)
    assert isinstance(send, Send)
    assert isinstance(send.message, AppendReply)
    return deliver.message, send.message


def test_only_what_does_not_match_reaches_the_engine() -> None:
    pure = Pure()
    message, reply = delivered(pure, append(5, (3, 1), (1, NOOP), (1, NOOP), (5, data("new"))))
    assert (message["prevLogIdx"], message["prevLogTerm"]) == (5, 1)
    assert message["entries"] == [(data("new"), 6, 5)]
    assert reply == AppendReply(5, 7, True)


def test_the_commit_index_is_clamped_to_what_the_message_proved() -> None:
    pure = Pure()
    assert delivered(pure, append(5, (3, 1), commit=99))[0]["commit_index"] == 3
    assert delivered(pure, append(5, (3, 1), (1, NOOP), commit=99))[0]["commit_index"] == 4
    assert delivered(pure, append(5, (5, 1), (5, NOOP), commit=99))[0]["commit_index"] == 6
    assert delivered(pure, append(5, (3, 1), commit=2))[0]["commit_index"] == 2


def test_a_refused_append_commits_nothing() -> None:
    pure = Pure()
    pure.engine.commit_index = 2
    assert delivered(pure, append(5, (9, 5), commit=99))[0]["commit_index"] == 2
    assert delivered(pure, append(5, (4, 3), commit=99))[0]["commit_index"] == 2


def test_a_refusal_for_a_missing_entry_names_the_end_of_the_log() -> None:
    assert delivered(Pure(), append(5, (9, 5)))[1] == AppendReply(5, 6, False)


def test_a_refusal_for_another_term_names_the_commit_index_plus_one() -> None:
    pure = Pure()
    pure.engine.commit_index = 2
    assert delivered(pure, append(5, (5, 4)))[1] == AppendReply(5, 3, False)


def test_an_append_that_ends_below_the_commit_index_is_acknowledged_as_far_as_it_goes() -> None:
    pure = Pure()
    pure.engine.commit_index = 5
    message, reply = delivered(pure, append(5, (1, 0), (1, NOOP)))
    assert reply == AppendReply(5, 3, True)
    assert message["entries"] == []


def test_entries_that_the_log_has_dropped_still_match_if_they_were_committed() -> None:
    pure = Pure(terms=(1, 1, 1), first_index=10)
    pure.engine.commit_index = 11
    message, reply = delivered(pure, append(5, (5, 1), *[(1, NOOP)] * 8))
    assert message["entries"] == [(NOOP, 13, 1)]
    assert reply == AppendReply(5, 14, True)


def test_another_entry_at_the_commit_index_is_a_safety_violation() -> None:
    pure = Pure()
    pure.engine.commit_index = 4
    with pytest.raises(SafetyViolation):
        pure.guard.receive("a", append(5, (4, 3)), NOW)
    with pytest.raises(SafetyViolation):
        pure.guard.receive("a", append(5, (1, 0), (1, NOOP), (1, NOOP), (3, NOOP)), NOW)


def test_two_leaders_of_one_term_are_not_both_believed() -> None:
    pure = Pure()
    pure.guard.receive("a", append(5, (5, 1)), NOW)
    assert pure.guard.receive("c", append(5, (5, 1)), NOW) == []
    assert pure.guard.receive("c", ReadProbe(5, 1), NOW) == []
    assert pure.guard.dropped["two_leaders"] == 2
    assert pure.guard.receive("c", append(6, (5, 1)), NOW) != []


def test_a_leader_believes_no_other_leader_of_its_term() -> None:
    pure = leading()
    assert pure.guard.receive("c", append(5, (5, 1)), NOW) == []


@pytest.mark.parametrize(
    "message",
    [
        append(5, (5, 3), (2, NOOP)),  # terms fall
        append(5, (5, 1), (6, NOOP)),  # beyond the leader's own
        append(5, (5, 1), (5, b"")),  # an empty entry
        append(5, (0, 0), (1, NOOP)),  # before the first
    ],
)
def test_an_append_that_no_leader_makes_is_dropped(message: AppendEntries) -> None:
    pure = Pure()
    assert pure.guard.receive("a", message, NOW) == []
    assert pure.guard.dropped["malformed"] == 1


@pytest.mark.parametrize("kind", [0, 2, 3])
def test_an_entry_that_means_something_to_the_engine_is_dropped(kind: int) -> None:
    """0, 2 and 3 would make it unpickle the rest."""
    pure = Pure()
    assert pure.guard.receive("a", append(5, (5, 1), (5, bytes([kind]) + b"x")), NOW) == []
    assert pure.guard.dropped["malformed"] == 1


def test_a_malformed_append_does_not_make_its_sender_the_leader() -> None:
    pure = Pure()
    pure.guard.receive("a", append(9, (5, 3), (2, NOOP)), NOW)
    assert pure.guard.receive("c", append(6, (5, 1)), NOW) != []


# --- appends: what becomes of the log ---------------------------------------------------------------------------------


def follower(*terms: int) -> Lone:
    """Entry 1 is every log's first; these follow it."""
    entries = [(NOOP, 1, 0), *((data(index), index, term) for index, term in enumerate(terms, 2))]
    return Lone(entries=entries)


def test_a_re_sent_prefix_removes_nothing() -> None:
    lone = follower()
    entries = [(1, data(index)) for index in range(2, 11)]
    assert acked(lone.receive("a", append(1, (1, 0), *entries))) == 10
    assert acked(lone.receive("a", append(1, (4, 1), (1, data(5))))) == 5
    assert lone.wal.last_index == 10


def test_a_heartbeat_at_an_earlier_entry_removes_nothing() -> None:
    lone = follower(1, 1, 1)
    assert acked(lone.receive("a", append(1, (2, 1)))) == 2
    assert lone.wal.last_index == 4


def test_a_conflict_truncates_from_where_it_begins() -> None:
    lone = follower(1, 1, 2, 2, 2)
    assert acked(lone.receive("a", append(3, (2, 1), (1, data(3)), (3, data("x"))))) == 4
    assert lone.log_terms() == [0, 1, 1, 3]
    assert lone.wal.entries[2][0] == data(3)


def test_a_refusal_truncates_nothing() -> None:
    lone = follower(1, 1, 2, 2)
    lone.receive("a", append(3, (5, 3)))
    lone.receive("a", append(3, (9, 3), (3, NOOP)))
    assert lone.log_terms() == [0, 1, 1, 2, 2]


def test_nothing_at_or_below_the_commit_index_is_truncated() -> None:
    lone = follower(1, 1, 1, 2)
    lone.receive("a", append(3, (4, 1), commit=4))
    assert lone.engine.commit_index == 4
    # It claims other entries from 2 on, all the way past what is committed here.
    with pytest.raises(SafetyViolation):
        lone.receive("a", append(3, (1, 0), *[(2, NOOP)] * 6))
    assert lone.log_terms() == [0, 1, 1, 1, 2]


def test_an_acknowledgement_covers_only_what_the_message_proved() -> None:
    lone = follower(1, 1, 2, 2, 2)
    assert acked(lone.receive("a", append(3, (1, 0), (1, data(2))))) == 2
    assert lone.wal.last_index == 6


def test_an_acknowledgement_waits_for_the_disk() -> None:
    lone = follower()
    assert lone.receive("a", append(1, (1, 0), (1, data(2))), sync=False) == []
    lone.flush()
    assert lone.heard(AppendReply) == []
    lone.sync()
    assert lone.heard(AppendReply) == [AppendReply(1, 3, True)]


def test_held_acknowledgements_end_with_their_term() -> None:
    lone = follower()
    lone.receive("a", append(1, (1, 0), (1, data(2))), sync=False)
    lone.receive("c", TermNotice(9), sync=False)
    lone.sync()
    assert lone.heard(AppendReply) == []


# --- acknowledgements -------------------------------------------------------------------------------------------------


def test_an_acknowledgement_beyond_the_durable_index_is_delivered_lowered_and_raised_later() -> None:
    pure = leading(durable=3)
    assert pure.guard.receive("a", AppendReply(5, 6, True), NOW) == [DeliverAck("a", 4, True)]
    assert pure.guard.raise_acks() == [DeliverAck("a", 4, True, is_news=False)]
    pure.engine.matched["a"] = 3
    assert pure.guard.raise_acks() == []
    pure.log.durable = 5
    assert pure.guard.raise_acks() == [DeliverAck("a", 6, True, is_news=False)]


def test_the_leader_commits_only_what_its_own_disk_holds() -> None:
    lone = Lone("a")
    lone.lead()
    lone.propose(data("x"), sync=False)
    for peer in "bc":
        lone.receive(peer, AppendReply(lone.engine.term, 4, True), sync=False)
    lone.engine.tick()
    assert lone.engine.commit_index == 2
    lone.sync()
    lone.engine.tick()
    assert lone.engine.commit_index == 3


def test_a_truncation_lowers_the_durable_index() -> None:
    lone = follower(1, 1, 1)
    assert lone.wal.durable_index == 4
    lone.receive("a", append(2, (2, 1), (2, data("x")), (2, data("y"))), sync=False)
    assert lone.wal.last_index == 4
    assert lone.wal.durable_index == 2
    lone.sync()
    assert lone.wal.durable_index == 4


def test_an_acknowledgement_from_no_member_is_dropped() -> None:
    pure = leading()
    assert pure.guard.receive("stranger", AppendReply(5, 6, True), NOW) == []
    assert pure.guard.dropped["not_a_member"] == 1


def test_a_member_that_left_is_not_raised() -> None:
    pure = leading(durable=2)
    pure.guard.receive("a", AppendReply(5, 6, True), NOW)
    pure.log.durable = 5
    pure.guard.members = configuration("bc")
    assert pure.guard.raise_acks() == []


@pytest.mark.parametrize("next_index", [0, 7, 2**60])
def test_an_acknowledgement_of_what_was_never_sent_is_dropped(next_index: int) -> None:
    pure = leading()
    assert pure.guard.receive("a", AppendReply(5, next_index, True), NOW) == []
    assert pure.guard.receive("a", AppendReply(5, next_index, False), NOW) == []
    assert pure.guard.dropped["malformed"] == 2


def test_a_learners_acknowledgement_is_taken_and_commits_nothing() -> None:
    lone = Lone("a", voters="abc", learners=["d"])
    lone.lead()
    lone.propose(data("x"))
    lone.receive("d", AppendReply(lone.engine.term, 4, True))
    lone.engine.tick()
    assert lone.engine.match_index("d") == 3
    assert lone.engine.commit_index == 1


def test_a_refusal_moves_the_next_index_back_once() -> None:
    pure = leading()
    assert pure.guard.receive("a", AppendReply(5, 3, False), NOW) == [DeliverAck("a", 3, False)]
    # Refusals of what was sent before the answer to the first one say the same again.
    assert pure.guard.receive("a", AppendReply(5, 3, False), NOW) == [DeliverAck("a", 1, True)]
    pure.guard.receive("a", AppendReply(5, 3, True), NOW)
    assert pure.guard.receive("a", AppendReply(5, 3, False), NOW) == [DeliverAck("a", 3, False)]


def test_a_refusal_of_what_follows_a_gap_does_not_lead_away_from_the_conflict() -> None:
    """Several appends are on their way to a peer whose log conflicts. It refuses the first for the conflict, and the
    others for the gap before them, naming the end of its log; to begin there would be refused for ever."""
    pure = leading()
    assert pure.guard.receive("a", AppendReply(5, 2, False), NOW) == [DeliverAck("a", 2, False)]
    assert pure.guard.receive("a", AppendReply(5, 4, False), NOW) == [DeliverAck("a", 1, True)]
    assert pure.guard.receive("a", AppendReply(5, 2, False), NOW) == [DeliverAck("a", 1, True)]


def test_on_a_new_connection_a_refusal_counts_anew() -> None:
    pure = leading()
    pure.guard.receive("a", AppendReply(5, 3, False), NOW)
    pure.guard.peer_up("a")
    assert pure.guard.receive("a", AppendReply(5, 3, False), NOW) == [DeliverAck("a", 3, False)]


def test_in_a_new_term_a_refusal_counts_anew() -> None:
    pure = leading()
    pure.guard.receive("a", AppendReply(5, 3, False), NOW)
    pure.guard.term_changed()
    assert pure.guard.receive("a", AppendReply(5, 3, False), NOW) == [DeliverAck("a", 3, False)]


def test_a_refusal_never_goes_back_behind_what_was_acknowledged() -> None:
    """Not even where the leader itself could not count it yet, its own disk being behind."""
    pure = leading(durable=3)
    pure.guard.receive("a", AppendReply(5, 5, True), NOW)
    assert pure.guard.receive("a", AppendReply(5, 2, False), NOW) == [DeliverAck("a", 5, False)]


def test_an_acknowledgement_does_not_make_the_leader_send_again_what_is_in_flight() -> None:
    lone = Lone("a")
    lone.lead()
    for number in range(5):
        lone.propose(data(number))
    assert lone.engine.next_index("b") == 8
    lone.receive("b", AppendReply(lone.engine.term, 4, True))
    lone.sent.clear()
    lone.propose(data("more"))
    (message,) = [m for m in lone.heard(AppendEntries, "b") if m.entries]
    assert message.prev_index == 7


# --- what is never passed on ------------------------------------------------------------------------------------------


def test_the_engines_own_snapshot_messages_only_say_that_a_peer_needs_one() -> None:
    lone = Lone("a")
    lone.lead()
    lone.propose(*[data(number) for number in range(20)])
    lone.receive("b", AppendReply(lone.engine.term, 23, True))
    lone.engine.tick()
    lone.clock.now_s += NOTICE_DELAY_S
    lone.sync()
    lone.wal.drop_before(15, 0)
    lone.sent.clear()
    lone.receive("c", AppendReply(lone.engine.term, 2, False))
    lone.clock.now_s += 1
    lone.receive("b", AppendReply(lone.engine.term, 23, True))
    lone.engine.tick()
    assert lone.wanted_snapshots == ["c"]
    assert lone.heard(AppendEntries, "c") == []


def test_the_engine_commits_nothing_by_a_snapshot_message_of_its_own() -> None:
    """None of our messages has its form, so none can reach it."""
    assert {"serialized", "transmission", "apply_command"} & set(AppendEntries.__struct_fields__) == set()


# --- reads ------------------------------------------------------------------------------------------------------------


def test_a_probe_is_acknowledged_in_its_own_term() -> None:
    pure = Pure()
    assert pure.guard.receive("a", ReadProbe(5, 3), NOW) == [Send("a", ReadAck(5, 3))]
    assert pure.elections.loyal(NOW)


def test_a_probe_of_a_higher_term_is_acknowledged_after_the_term_is_adopted() -> None:
    assert Pure().guard.receive("a", ReadProbe(6, 3), NOW) == [AdoptTerm(6), Send("a", ReadAck(6, 3))]


def test_a_read_acknowledgement_counts_in_its_term_and_from_members_only() -> None:
    pure = leading()
    ack = ReadAck(5, 3)
    assert pure.guard.receive("a", ack, NOW) == [Pass("a", ack)]
    assert pure.guard.receive("stranger", ack, NOW) == []
    assert pure.guard.receive("a", ReadAck(4, 3), NOW) == []
    pure.engine.is_leader = False
    assert pure.guard.receive("a", ack, NOW) == []
    assert pure.guard.dropped["stale_acknowledgement"] == 3


def test_questions_and_answers_about_reads_are_passed_on() -> None:
    pure = Pure()
    for message in (ReadRequest(5, 1), ReadReply(5, 1, 7)):
        assert pure.guard.receive("a", message, NOW) == [Pass("a", message)]


# --- who is there -----------------------------------------------------------------------------------------------------


def test_who_answered_in_this_term_was_heard() -> None:
    pure = leading()
    assert pure.guard.heard_since(NOW - 1.0) == set()
    pure.guard.receive("a", AppendReply(5, 3, False), NOW)
    pure.guard.receive("c", ReadAck(5, 1), NOW + 1.0)
    assert pure.guard.heard_since(NOW) == {"a", "c"}
    assert pure.guard.heard_since(NOW + 0.5) == {"c"}
    pure.guard.term_changed()
    assert pure.guard.heard_since(NOW) == set()


def test_who_answered_in_another_term_was_not_heard() -> None:
    pure = leading()
    pure.guard.receive("a", AppendReply(4, 3, True), NOW)
    pure.guard.receive("c", ReadAck(4, 1), NOW)
    assert pure.guard.heard_since(NOW) == set()
