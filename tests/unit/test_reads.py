"""ReadIndex: which question serves which read."""

from __future__ import annotations

import pytest

from kvstore.errors import Unavailable
from kvstore.raft.messages import Message, ReadAck, ReadProbe, ReadReply, ReadRequest
from kvstore.raft.reads import ROUNDS_MAX, ReadIndex
from tests.raft_fixtures import Answer, configuration


class Zero:
    """Draws nothing but 0, so that the first question has number 1."""

    def random(self) -> float:
        return 0.0

    def getrandbits(self, bits: int) -> int:
        return 0


class View:
    def __init__(self) -> None:
        self.term = 5
        self.is_leader = True
        self.leader = "a"


class Node:
    """Node `a` of a, b and c with a learner d; it leads, and has committed up to 10 in its term."""

    def __init__(self) -> None:
        self.engine = View()
        self.sent: list[tuple[str, Message]] = []
        self.reads = ReadIndex(
            "a", self.engine, Zero(), lambda peer, message: self.sent.append((peer, message)), 0.1, 1.0
        )
        self.reads.members = configuration("abc", "d")
        self.reads.applied(10)
        self.now_s = 100.0
        self.commit_index = 10
        self.commit_term = 5
        self.reachable = True

    @classmethod
    def following(cls, leader: str = "b") -> Node:
        node = cls()
        node.engine.is_leader = False
        node.engine.leader = leader
        return node

    def ask(self) -> Answer:
        answer = Answer()
        self.reads.request(answer)
        return answer

    def step(self) -> None:
        self.reads.step(self.now_s, self.commit_index, self.commit_term, lambda _peer: self.reachable)

    def ack(self, peer: str, number: int) -> None:
        self.reads.receive(peer, ReadAck(5, number))

    def taken(self) -> list[tuple[str, Message]]:
        taken, self.sent = sorted(self.sent, key=repr), []
        return taken


def test_a_read_is_served_once_a_quorum_has_answered() -> None:
    node = Node()
    answer = node.ask()
    assert node.sent == []
    node.step()
    assert node.taken() == [("b", ReadProbe(5, 1)), ("c", ReadProbe(5, 1))]
    assert not answer.is_done
    node.ack("b", 1)
    assert answer.is_ok


def test_only_voters_count() -> None:
    node = Node()
    answer = node.ask()
    node.step()
    node.ack("d", 1)
    node.ack("stranger", 1)
    assert not answer.is_done


def test_one_voter_does_not_count_twice() -> None:
    node = Node()
    node.reads.members = configuration("abcde")
    answer = node.ask()
    node.step()
    node.ack("b", 1)
    node.ack("b", 1)
    assert not answer.is_done
    node.ack("c", 1)
    assert answer.is_ok


def test_a_round_serves_no_read_that_came_after_it_was_sent() -> None:
    node = Node()
    early = node.ask()
    node.step()
    late = node.ask()
    node.ack("b", 1)
    assert early.is_ok
    assert not late.is_done
    node.step()
    node.ack("b", 1)
    assert not late.is_done
    node.ack("b", 2)
    assert late.is_ok


def test_the_index_is_the_commit_index_when_the_round_was_sent() -> None:
    node = Node()
    node.commit_index = 12
    answer = node.ask()
    node.step()
    node.commit_index = 99
    node.ack("b", 1)
    assert not answer.is_done
    node.reads.applied(11)
    assert not answer.is_done
    node.reads.applied(12)
    assert answer.is_ok


def test_no_round_before_an_entry_of_the_own_term_is_committed() -> None:
    node = Node()
    node.commit_term = 4
    answer = node.ask()
    node.step()
    assert node.sent == []
    node.commit_term = 5
    node.step()
    node.ack("c", 1)
    assert answer.is_ok


def test_an_answer_to_a_later_round_serves_the_earlier_ones() -> None:
    node = Node()
    first = node.ask()
    node.step()
    second = node.ask()
    node.step()
    node.ack("b", 2)
    assert first.is_ok
    assert second.is_ok


def test_an_answer_to_a_round_that_was_never_sent_serves_nobody() -> None:
    node = Node()
    answer = node.ask()
    node.ack("b", 9)
    node.step()
    assert not answer.is_done


def test_a_batch_of_reads_costs_one_round() -> None:
    node = Node()
    answers = [node.ask() for _ in range(100)]
    node.step()
    assert len(node.sent) == 2
    node.ack("b", 1)
    assert all(answer.is_ok for answer in answers)


def test_the_rounds_under_way_are_bounded() -> None:
    node = Node()
    for _ in range(ROUNDS_MAX):
        node.ask()
        node.step()
    node.taken()
    late = node.ask()
    node.step()
    assert node.sent == []
    node.ack("b", 1)
    node.step()
    node.ack("b", ROUNDS_MAX + 1)
    assert late.is_ok


def test_a_lost_question_is_asked_again() -> None:
    node = Node()
    answer = node.ask()
    node.step()
    node.taken()
    node.now_s += 0.05
    node.step()
    assert node.sent == []
    assert node.reads.due == pytest.approx(100.1)
    node.now_s += 0.05
    node.step()
    assert node.taken() == [("b", ReadProbe(5, 1)), ("c", ReadProbe(5, 1))]
    node.ack("c", 1)
    assert answer.is_ok
    assert node.reads.due is None


def test_a_sole_voter_asks_nobody() -> None:
    node = Node()
    node.reads.members = configuration("a")
    answer = node.ask()
    node.step()
    assert answer.is_ok
    assert node.sent == []


def test_lost_leadership_fails_what_waits() -> None:
    node = Node()
    sent = node.ask()
    node.step()
    unsent = node.ask()
    node.engine.is_leader = False
    node.reads.leadership_lost()
    for answer in (sent, unsent):
        assert isinstance(answer.error, Unavailable)
        assert answer.error.code == "no_leader"
    node.ack("b", 1)


def test_what_was_confirmed_is_still_served_after_leadership_is_lost() -> None:
    node = Node()
    node.commit_index = 12
    answer = node.ask()
    node.step()
    node.ack("b", 1)
    node.reads.leadership_lost()
    node.reads.applied(12)
    assert answer.is_ok


# --- through a follower -----------------------------------------------------------------------------------------------


def test_a_follower_asks_its_leader_and_waits_until_it_has_applied() -> None:
    node = Node.following()
    answers = [node.ask(), node.ask()]
    node.step()
    assert node.taken() == [("b", ReadRequest(5, 1))]
    node.reads.receive("b", ReadReply(5, 1, 12))
    assert not answers[0].is_done
    node.reads.applied(12)
    assert all(answer.is_ok for answer in answers)


def test_a_question_is_answered_once() -> None:
    node = Node.following()
    node.ask()
    node.step()
    node.reads.receive("b", ReadReply(5, 1, 1))
    node.reads.receive("b", ReadReply(5, 1, 1))


def test_the_answer_to_one_question_serves_no_later_one() -> None:
    node = Node.following()
    first = node.ask()
    node.step()
    second = node.ask()
    node.step()
    node.reads.receive("b", ReadReply(5, 1, 1))
    assert first.is_ok
    assert not second.is_done
    node.reads.receive("b", ReadReply(5, 2, 1))
    assert second.is_ok


def test_nobody_but_the_leader_that_was_asked_answers() -> None:
    node = Node.following()
    answer = node.ask()
    node.step()
    node.reads.receive("c", ReadReply(5, 1, 1))
    assert not answer.is_done


@pytest.mark.parametrize(("leader", "reachable"), [("", True), ("b", False)])
def test_without_a_leader_in_reach_a_read_fails_at_once(leader: str, reachable: bool) -> None:
    node = Node.following(leader)
    node.reachable = reachable
    answer = node.ask()
    node.step()
    assert isinstance(answer.error, Unavailable)
    assert node.sent == []


def test_a_leader_that_cannot_tell_fails_the_read() -> None:
    node = Node.following()
    answer = node.ask()
    node.step()
    node.reads.receive("b", ReadReply(5, 1, 0))
    assert isinstance(answer.error, Unavailable)


def test_a_leader_that_says_nothing_fails_the_read_after_the_timeout() -> None:
    node = Node.following()
    answer = node.ask()
    node.step()
    assert node.reads.due == pytest.approx(101.0)
    node.now_s += 0.9
    node.step()
    assert not answer.is_done
    node.now_s += 0.1
    node.step()
    assert isinstance(answer.error, Unavailable)
    assert node.reads.due is None


def test_a_lost_leader_fails_what_was_asked_of_it() -> None:
    node = Node.following()
    answer = node.ask()
    node.step()
    node.reads.leader_lost("c")
    assert not answer.is_done
    node.reads.leader_lost("b")
    assert isinstance(answer.error, Unavailable)


def test_a_leader_answers_a_follower_with_an_index_of_a_later_round() -> None:
    node = Node()
    node.ask()
    node.step()
    node.reads.receive("c", ReadRequest(5, 7))
    node.ack("b", 1)
    assert [message for _, message in node.sent if isinstance(message, ReadReply)] == []
    node.commit_index = 11
    node.step()
    node.ack("b", 2)
    assert ("c", ReadReply(5, 7, 11)) in node.sent


def test_who_does_not_lead_tells_the_asking_follower_so() -> None:
    node = Node.following()
    node.reads.receive("c", ReadRequest(5, 7))
    assert node.taken() == [("c", ReadReply(5, 7, 0))]


def test_a_leader_that_loses_its_leadership_tells_the_asking_follower_so() -> None:
    node = Node()
    node.reads.receive("c", ReadRequest(5, 7))
    node.reads.leadership_lost()
    assert node.taken() == [("c", ReadReply(5, 7, 0))]


def test_a_read_that_came_just_before_this_node_was_elected_is_served() -> None:
    node = Node.following("")
    answer = node.ask()
    node.engine.is_leader = True
    node.step()
    node.ack("b", 1)
    assert answer.is_ok


def test_the_end_of_the_node_ends_every_read() -> None:
    node = Node()
    node.commit_index = 12
    answers = [node.ask()]
    node.step()
    node.ack("b", 1)
    answers.append(node.ask())
    node.step()
    answers.append(node.ask())
    node.engine.is_leader = False
    answers.append(node.ask())
    node.reads.fail_all()
    assert [answer.is_done for answer in answers] == [True] * 4
    assert all(isinstance(answer.error, Unavailable) for answer in answers)
