"""What a leader does about the cluster itself, on a real log and without a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kvstore.errors import KvError, Refused, Unavailable
from kvstore.model import Member
from kvstore.raft.changes import PROMOTE_BEHIND_MAX, TELL_AGAIN_S, Changes
from kvstore.raft.members import Configuration
from kvstore.raft.messages import Message, TimeoutNow
from kvstore.raft.wal import Wal
from tests.fake_files import FaultyFiles
from tests.raft_fixtures import NOOP, SEGMENT_BYTES, Answer, Lines, configuration, data

NEW = Member("d", "d:1", "d:2", "id-d", False)
Proposed = Callable[[Any, KvError | None], None]


class FakeLeader:
    """Node `a`, leader of a, b and c in term 2; its no-op, entry 2, is committed."""

    def __init__(self) -> None:
        self.accepting = True
        self.term = 2
        self.committed = 2
        self.matched = {"b": 2, "c": 2}
        self.connected = set("abc")
        self.versions = {("d", ""): 2, ("d", "id-d"): 2}
        self.proposed: list[tuple[bytes, Proposed]] = []
        self.told: list[str] = []

    def match_index(self, peer: str) -> int:
        return self.matched.get(peer, 0)

    def version_of(self, name: str, node_id: str) -> int:
        return self.versions.get((name, node_id), 0)

    def alive(self) -> set[str]:
        return self.connected

    def propose_entry(self, entry: bytes, done: Proposed) -> None:
        self.proposed.append((entry, done))

    def send(self, peer: str, message: Message) -> None:
        assert message == TimeoutNow(self.term)
        self.told.append(peer)


class Bench:
    def __init__(self) -> None:
        self.leader = FakeLeader()
        self.wal = Wal.open(FaultyFiles(), "/wal", node_id="1", segment_bytes=SEGMENT_BYTES)
        self.wal.append(NOOP, 1, 0)
        self.wal.append(NOOP, 2, 2)
        self.changes = Changes("a", self.leader, self.wal, self.leader.send, Lines())
        self.use(configuration("abc"))

    def use(self, members: Configuration) -> None:
        self.changes.members = members

    def take_proposal(self) -> Configuration:
        """Put what was proposed into the log, as the node would; gives the configuration in it."""
        ((entry, self.done),) = self.leader.proposed
        self.leader.proposed.clear()
        self.wal.append(entry, self.wal.last_index + 1, self.leader.term)
        self.use(Configuration.decode(entry[1:]))
        return self.changes.members

    def commit(self) -> None:
        self.leader.committed = self.wal.last_index
        self.done(None, None)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def code_of(answer: Answer) -> str:
    assert isinstance(answer.error, KvError)
    return answer.error.code


# --- membership -------------------------------------------------------------------------------------------------------


def test_a_change_is_done_when_its_entry_is(bench: Bench) -> None:
    answer = Answer()
    bench.changes.add_learner(NEW, answer)
    assert bench.take_proposal().learners == {"d"}
    assert not answer.is_done
    bench.commit()
    assert answer.is_ok


def test_a_change_fails_as_its_entry_does(bench: Bench) -> None:
    answer = Answer()
    bench.changes.add_learner(NEW, answer)
    bench.leader.proposed[0][1](None, Unavailable("not now"))
    assert code_of(answer) == "unavailable"
    again = Answer()
    bench.changes.add_learner(NEW, again)
    assert not again.is_done


def test_one_change_at_a_time_even_before_it_is_in_the_log(bench: Bench) -> None:
    bench.changes.add_learner(NEW, Answer())
    second = Answer()
    bench.changes.remove("c", second)
    assert code_of(second) == "membership_busy"


def test_one_change_at_a_time_until_it_is_committed(bench: Bench) -> None:
    bench.changes.add_learner(NEW, Answer())
    bench.take_proposal()
    bench.done(None, Unavailable("the answer was lost, the entry was not"))
    second = Answer()
    bench.changes.remove("c", second)
    assert code_of(second) == "membership_busy"
    bench.leader.committed = bench.wal.last_index
    third = Answer()
    bench.changes.remove("c", third)
    assert bench.take_proposal().voters == {"a", "b"}


def test_no_change_while_one_of_an_earlier_leader_is_in_the_log(bench: Bench) -> None:
    bench.wal.truncate_from(2)
    bench.wal.append(configuration("abc", "d").entry(), 2, 1)
    bench.wal.append(NOOP, 3, 2)
    bench.leader.committed = 1
    answer = Answer()
    bench.changes.remove("c", answer)
    assert code_of(answer) == "membership_busy"


def test_no_change_before_an_entry_of_the_own_term_is_committed(bench: Bench) -> None:
    bench.leader.term = 3
    bench.wal.append(NOOP, 3, 3)
    answer = Answer()
    bench.changes.remove("c", answer)
    assert code_of(answer) == "membership_busy"
    bench.leader.committed = 3
    bench.changes.remove("c", Answer())
    assert len(bench.leader.proposed) == 1


def test_other_entries_in_flight_do_not_matter(bench: Bench) -> None:
    bench.wal.append(data("x"), 3, 2)
    bench.changes.remove("c", Answer())
    assert len(bench.leader.proposed) == 1


def test_only_a_leader_changes_members(bench: Bench) -> None:
    bench.leader.accepting = False
    answers = [Answer(), Answer(), Answer()]
    bench.changes.add_learner(NEW, answers[0])
    bench.changes.promote("d", answers[1])
    bench.changes.remove("c", answers[2])
    assert [code_of(answer) for answer in answers] == ["not_leader"] * 3


def test_a_refused_change_leaves_nothing_under_way(bench: Bench) -> None:
    answer = Answer()
    bench.changes.remove("stranger", answer)
    assert isinstance(answer.error, Refused)
    bench.changes.remove("c", Answer())
    assert len(bench.leader.proposed) == 1


def test_a_leader_that_could_not_be_removed_is_not_told_to_hand_over_first(bench: Bench) -> None:
    """Else `kvstore leave` would move leadership, and be refused then."""
    bench.leader.connected = set("ab")
    bench.changes.step(5.0)
    bench.changes.step(6.0)
    answer, alone = Answer(), Answer()
    bench.changes.remove("a", answer)
    assert code_of(answer) == "would_lose_quorum"
    bench.use(configuration("a"))
    bench.changes.remove("a", alone, True)
    assert code_of(alone) == "would_lose_quorum", "not even by force"


def test_a_leader_does_not_remove_itself(bench: Bench) -> None:
    answer = Answer()
    bench.changes.remove("a", answer)
    assert code_of(answer) == "cannot_remove_leader"
    assert bench.leader.proposed == []


def test_a_leader_that_has_just_begun_waits_to_hear_the_others_before_it_calls_them_dead(bench: Bench) -> None:
    bench.leader.connected = set("ac")
    answers = []
    for now in (5.0, 5.9, 6.0):
        bench.changes.step(now)
        answers.append(Answer())
        bench.changes.remove("c", answers[-1])
    assert [code_of(answer) for answer in answers] == ["membership_busy", "membership_busy", "would_lose_quorum"]
    bench.changes.leadership_lost()
    bench.changes.step(7.0)
    again = Answer()
    bench.changes.remove("c", again)
    assert code_of(again) == "membership_busy", "it leads anew"


def test_a_removal_that_would_lose_the_quorum_is_refused(bench: Bench) -> None:
    bench.leader.connected = set("ac")
    bench.changes.step(5.0)
    bench.changes.step(6.0)
    answer = Answer()
    bench.changes.remove("c", answer)
    assert code_of(answer) == "would_lose_quorum"
    refused = Answer()
    bench.changes.remove("a", refused, True)
    assert code_of(refused) == "cannot_remove_leader", "force is no licence for that"
    bench.changes.remove("c", Answer(), True)
    assert bench.take_proposal().voters == set("ab")


def test_a_learner_is_promoted_when_it_has_caught_up(bench: Bench) -> None:
    bench.use(configuration("abc", "d"))
    bench.leader.connected = set("abcd")
    bench.leader.committed = 2
    bench.leader.matched["d"] = 2
    bench.changes.promote("d", Answer())
    assert bench.take_proposal().voters == set("abcd")


def test_a_learner_that_is_far_behind_is_not_promoted(bench: Bench) -> None:
    bench.use(configuration("abc", "d"))
    bench.leader.connected = set("abcd")
    for index in range(3, PROMOTE_BEHIND_MAX + 5):
        bench.wal.append(NOOP, index, 2)
    bench.leader.committed = bench.wal.last_index
    bench.leader.matched["d"] = 2
    answer = Answer()
    bench.changes.promote("d", answer)
    assert code_of(answer) == "not_caught_up"


def test_a_learner_that_the_leader_never_heard_is_not_promoted_however_short_the_log_is(bench: Bench) -> None:
    bench.use(configuration("abc", "d"))
    for connected, matched in (("abc", 0), ("abc", 2), ("abcd", 0)):
        bench.leader.connected = set(connected)
        bench.leader.matched["d"] = matched
        answer = Answer()
        bench.changes.promote("d", answer)
        assert code_of(answer) == "not_caught_up"
    assert bench.leader.proposed == []


def test_who_is_known_to_lack_the_cluster_s_version_is_neither_added_nor_promoted(bench: Bench) -> None:
    """It would stop at the next entry, and a cluster that has just grown would lose its quorum with it."""
    bench.leader.connected = set("abcd")
    bench.leader.matched["d"] = 2
    added, promoted, early = Answer(), Answer(), Answer()
    bench.changes.add_learner(NEW, added, 3)
    assert code_of(added) == "data_format_newer"
    bench.use(configuration("abc", "d"))
    bench.changes.promote("d", promoted, 3)
    assert code_of(promoted) == "data_format_newer"
    bench.leader.versions.clear()
    bench.changes.promote("d", early, 1)
    assert code_of(early) == "not_caught_up", "nobody knows what it understands"
    assert bench.leader.proposed == []


def test_a_new_node_is_added_before_it_was_heard(bench: Bench) -> None:
    bench.leader.versions.clear()
    bench.changes.add_learner(NEW, Answer(), 3)
    assert bench.take_proposal().learners == {"d"}


def test_node_ids_are_recorded_once_they_are_known(bench: Bench) -> None:
    seen = {"b": Member("b", "b:1", "b:2", "id-b", False)}
    bench.changes.identify(seen)
    known = bench.take_proposal().get("b")
    assert known is not None
    assert known.node_id == "id-b"
    assert known.voter
    bench.commit()
    bench.changes.identify(seen)
    assert bench.leader.proposed == []


def test_identifying_waits_for_its_turn(bench: Bench) -> None:
    seen = {"b": Member("b", "b:1", "b:2", "id-b", False)}
    bench.changes.add_learner(NEW, Answer())
    bench.changes.identify(seen)
    assert len(bench.leader.proposed) == 1
    bench.leader.proposed.clear()
    bench.leader.accepting = False
    bench.changes.identify(seen)
    assert bench.leader.proposed == []


# --- hand-over --------------------------------------------------------------------------------------------------------


def test_the_target_is_told_once_it_holds_the_whole_log(bench: Bench) -> None:
    bench.wal.append(data("x"), 3, 2)
    answer = Answer()
    bench.changes.transfer("b", 110.0, answer)
    assert bench.changes.handing_over
    bench.changes.step(100.0)
    assert bench.leader.told == []
    bench.leader.matched["b"] = 3
    bench.changes.step(100.1)
    bench.changes.step(100.15)
    assert bench.leader.told == ["b"]
    assert bench.changes.due == pytest.approx(100.1 + TELL_AGAIN_S)
    bench.changes.step(100.25)  # it may not have known its leader yet
    assert bench.leader.told == ["b", "b"]
    bench.changes.leadership_lost()
    assert answer.is_ok
    assert not bench.changes.handing_over


def test_leadership_that_is_lost_before_the_target_was_told_is_no_hand_over(bench: Bench) -> None:
    bench.wal.append(data("x"), 3, 2)
    answer = Answer()
    bench.changes.transfer("b", 110.0, answer)
    bench.changes.step(100.0)
    bench.changes.leadership_lost()
    assert code_of(answer) == "transfer_failed"
    assert not bench.changes.handing_over


def test_a_hand_over_that_takes_too_long_is_given_up(bench: Bench) -> None:
    answer = Answer()
    bench.changes.transfer("b", 110.0, answer)
    assert bench.changes.due == 110.0
    bench.changes.step(110.1)
    assert code_of(answer) == "transfer_failed"
    assert not bench.changes.handing_over
    assert bench.changes.due is None


def test_without_a_name_the_one_that_holds_most_takes_over(bench: Bench) -> None:
    bench.leader.matched = {"b": 1, "c": 2}
    bench.changes.transfer("", 110.0, Answer())
    bench.changes.step(100.0)
    assert bench.leader.told == ["c"]


@pytest.mark.parametrize(
    ("target", "code"),
    [("a", "transfer_failed"), ("c", "transfer_failed"), ("d", "not_voter"), ("stranger", "member_unknown")],
)
def test_only_another_voter_in_reach_takes_over(bench: Bench, target: str, code: str) -> None:
    """Only who may be in reach later is worth another try."""
    bench.use(configuration("abc", "d"))
    bench.leader.connected = set("abd")
    answer = Answer()
    bench.changes.transfer(target, 110.0, answer)
    assert code_of(answer) == code
    assert isinstance(answer.error, Unavailable) == (code == "transfer_failed")
    assert not bench.changes.handing_over


def test_with_nobody_in_reach_leadership_stays(bench: Bench) -> None:
    bench.leader.connected = {"a"}
    answer = Answer()
    bench.changes.transfer("", 110.0, answer)
    assert code_of(answer) == "transfer_failed"


def test_who_does_not_lead_hands_nothing_over(bench: Bench) -> None:
    bench.leader.accepting = False
    answer = Answer()
    bench.changes.transfer("b", 110.0, answer)
    assert code_of(answer) == "not_leader"


def test_nothing_to_hand_over_is_no_work(bench: Bench) -> None:
    bench.changes.step(100.0)
    bench.changes.leadership_lost()
    assert bench.leader.told == []
