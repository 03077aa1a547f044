"""What waits for the disk, what is merged, and what a peer does not take."""

from __future__ import annotations

from typing import Any

from kvstore.raft import messages
from kvstore.raft.messages import AppendEntries, AppendReply, Message, ReadProbe, ReadReply, TermNotice, VoteReply
from kvstore.raft.outbox import NOTICE_DELAY_S, PEER_TURN_BYTES_MAX, Outbox
from tests.raft_fixtures import data


class Sent:
    def __init__(self) -> None:
        self.bodies: list[tuple[str, bytes]] = []
        self.full: set[str] = set()
        self.now_s = 10.0
        self.outbox = Outbox(self._send, lambda: self.now_s)

    def _send(self, peer: str, body: bytes) -> bool:
        if peer in self.full:
            return False
        self.bodies.append((peer, body))
        return True

    @property
    def messages(self) -> list[tuple[str, Message]]:
        return [(peer, messages.decode(body)) for peer, body in self.bodies]


def engine_append(previous: int, *entries: bytes, commit: int = 1, term: int = 3) -> dict[str, Any]:
    """An append as the engine makes it."""
    return {
        "type": "append_entries",
        "term": term,
        "commit_index": commit,
        "prevLogIdx": previous,
        "prevLogTerm": 2,
        "entries": [(payload, previous + 1 + at, term) for at, payload in enumerate(entries)],
    }


def test_a_message_waits_for_the_position_that_it_needs() -> None:
    sent = Sent()
    sent.outbox.add("a", AppendReply(3, 5, True), 100)
    sent.outbox.add("a", TermNotice(3), 0)
    sent.outbox.send_ready(99)
    assert sent.messages == [("a", TermNotice(3))]
    assert len(sent.outbox) == 1
    sent.outbox.send_ready(100)
    assert sent.messages == [("a", TermNotice(3)), ("a", AppendReply(3, 5, True))]
    assert len(sent.outbox) == 0


def test_messages_to_one_peer_keep_their_order() -> None:
    sent = Sent()
    for number in range(5):
        sent.outbox.add("a", AppendReply(3, number, True), number)
    sent.outbox.send_ready(2)
    sent.outbox.send_ready(9)
    assert [message for _, message in sent.messages] == [AppendReply(3, number, True) for number in range(5)]


def test_an_append_goes_out_in_our_form() -> None:
    sent = Sent()
    assert sent.outbox.add_append("a", engine_append(7, data("x"), data("y"), commit=6), 0)
    sent.outbox.send_ready(0)
    assert sent.messages == [("a", AppendEntries(3, 6, 7, 2, ((3, data("x")), (3, data("y")))))]


def test_of_two_appends_the_empty_one_is_dropped() -> None:
    full, empty = engine_append(7, data("x")), engine_append(8)
    for first, second in [(full, empty), (empty, full)]:
        sent = Sent()
        sent.outbox.add_append("a", first, 0)
        sent.outbox.add_append("a", second, 0)
        sent.outbox.send_ready(0)
        ((_, message),) = sent.messages
        assert isinstance(message, AppendEntries)
        assert message.entries


def commits(sent: Sent) -> list[int]:
    return [message.commit_index for _, message in sent.messages if isinstance(message, AppendEntries)]


def noticed() -> Sent:
    """A commit notice is held for peer `a`."""
    sent = Sent()
    sent.outbox.add_append("a", engine_append(7, data("x"), commit=5), 0)
    sent.outbox.add_append("a", engine_append(8, commit=6), 0)
    sent.outbox.add_append("a", engine_append(8, commit=7), 0)
    sent.outbox.send_ready(0)
    sent.outbox.end_turn()
    assert commits(sent) == [5]
    assert sent.outbox.due == sent.now_s + NOTICE_DELAY_S
    return sent


def test_a_commit_notice_is_held_for_a_moment_and_then_sent() -> None:
    sent = noticed()
    sent.now_s += NOTICE_DELAY_S
    sent.outbox.send_ready(0)
    assert commits(sent) == [5, 7]
    assert sent.outbox.due is None
    assert len(sent.outbox) == 0


def test_an_append_with_entries_makes_a_commit_notice_needless() -> None:
    sent = noticed()
    sent.outbox.add_append("a", engine_append(8, data("y"), commit=7), 0)
    sent.now_s += NOTICE_DELAY_S
    sent.outbox.send_ready(0)
    assert commits(sent) == [5, 7]


def test_a_heartbeat_makes_a_commit_notice_needless() -> None:
    sent = noticed()
    sent.outbox.add_append("a", engine_append(8, commit=7), 0)
    sent.outbox.send_ready(0)
    assert commits(sent) == [5, 7]
    assert sent.outbox.due is None


def test_the_answer_to_a_read_lets_the_commit_notice_go_first() -> None:
    sent = noticed()
    sent.outbox.add("b", ReadReply(3, 1, 7), 0)
    sent.outbox.send_ready(0)
    assert commits(sent) == [5]
    sent.outbox.add("a", ReadReply(3, 1, 7), 0)
    sent.outbox.send_ready(0)
    assert commits(sent) == [5, 7]
    assert [type(message) for _, message in sent.messages[-2:]] == [AppendEntries, ReadReply]


def test_a_new_term_forgets_commit_notices() -> None:
    sent = noticed()
    sent.outbox.drop_other_terms(4)
    sent.now_s += NOTICE_DELAY_S
    sent.outbox.send_ready(0)
    assert commits(sent) == [5]


def test_appends_to_other_peers_are_no_reason_to_drop_one() -> None:
    sent = Sent()
    sent.outbox.add_append("a", engine_append(7, data("x")), 0)
    sent.outbox.add_append("b", engine_append(8), 0)
    sent.outbox.send_ready(0)
    assert [peer for peer, _ in sent.messages] == ["a", "b"]


def test_an_append_to_several_peers_is_encoded_once() -> None:
    sent = Sent()
    for peer in "abc":
        sent.outbox.add_append(peer, engine_append(7, data("x")), 0)
    sent.outbox.send_ready(0)
    first, *others = [body for _, body in sent.bodies]
    assert all(body is first for body in others)


def test_an_append_from_another_place_is_encoded_anew() -> None:
    sent = Sent()
    sent.outbox.add_append("a", engine_append(7, data("x")), 0)
    sent.outbox.add_append("b", engine_append(8, data("y")), 0)
    sent.outbox.add_append("c", engine_append(8, data("y"), commit=2), 0)
    sent.outbox.send_ready(0)
    assert len({body for _, body in sent.bodies}) == 3


def test_a_turn_takes_only_so_much_for_one_peer() -> None:
    sent = Sent()
    big = bytes(PEER_TURN_BYTES_MAX // 2)
    assert sent.outbox.add_append("a", engine_append(7, big), 0)
    assert not sent.outbox.add_append("a", engine_append(8, big), 0)
    assert sent.outbox.add_append("b", engine_append(7, big), 0)
    sent.outbox.send_ready(0)
    assert len(sent.bodies) == 3
    sent.outbox.end_turn()
    assert sent.outbox.add_append("a", engine_append(9, big), 0)


def test_what_a_full_peer_does_not_take_is_named_by_its_first_entry() -> None:
    sent = Sent()
    sent.full.add("a")
    sent.outbox.add_append("a", engine_append(7, data("x")), 0)
    sent.outbox.add_append("a", engine_append(8, data("y")), 0)
    sent.outbox.add_append("b", engine_append(7, data("x")), 0)
    assert sent.outbox.send_ready(0) == {"a": 8}
    assert [peer for peer, _ in sent.bodies] == ["b"]
    assert len(sent.outbox) == 0


def test_after_a_refused_append_nothing_later_goes_to_that_peer_in_the_same_go() -> None:
    sent = Sent()
    sent.full.add("a")
    sent.outbox.add_append("a", engine_append(7, data("x")), 0)
    sent.outbox.add_append("a", engine_append(8, data("y")), 50)
    assert sent.outbox.send_ready(0) == {"a": 8}
    sent.full.clear()
    sent.outbox.send_ready(99)
    assert [m.prev_index for _, m in sent.messages if isinstance(m, AppendEntries)] == [8]


def test_a_reply_that_is_not_taken_is_lost() -> None:
    sent = Sent()
    sent.full.add("a")
    sent.outbox.add("a", AppendReply(3, 5, True), 0)
    assert sent.outbox.send_ready(0) == {}
    assert len(sent.outbox) == 0


def test_what_was_promised_in_another_term_is_not_said_any_more() -> None:
    sent = Sent()
    sent.outbox.add("a", AppendReply(3, 5, True), 100)
    sent.outbox.add("a", VoteReply(4), 100)
    sent.outbox.add_append("a", engine_append(7, data("x"), term=3), 100)
    sent.outbox.add("a", ReadProbe(4, 1), 100)
    sent.outbox.drop_other_terms(4)
    sent.outbox.send_ready(100)
    assert sent.messages == [("a", VoteReply(4)), ("a", ReadProbe(4, 1))]


def test_dropped_is_dropped() -> None:
    sent = Sent()
    sent.outbox.add("a", VoteReply(4), 0)
    sent.outbox.add_append("a", engine_append(7), 0)
    sent.outbox.drop()
    sent.outbox.send_ready(0)
    assert sent.bodies == []
