"""A follower's guard, engine and log against everything that a legal Raft history, a bad network and a bad disk can do;
and any node's against junk.

The history is made by `History`: other members as plain lists, that elect leaders, append, replicate and commit by
Raft's rules. What its leaders send to the follower is kept, and delivered late, twice, in any order, or never.
"""

from __future__ import annotations

import random
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstore.raft import messages
from kvstore.raft.guard import SafetyViolation
from kvstore.raft.messages import (
    AppendEntries,
    AppendReply,
    MalformedMessage,
    Message,
    PreVote,
    PreVoteReply,
    ReadAck,
    ReadProbe,
    ReadReply,
    ReadRequest,
    RequestVote,
    TermNotice,
    TimeoutNow,
    VoteReply,
)
from tests.fake_files import FaultyFiles, keep_random
from tests.raft_fixtures import ELECTION_MAX_S, NOOP, Lone, data

QUICK = settings(max_examples=50, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])


class Entry(NamedTuple):
    term: int
    payload: bytes


class Other:
    """Another member: its log (`log[0]` is entry 1), term, and what it knows as a leader."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.log = [Entry(0, NOOP)]
        self.term = 0
        self.is_leader = False
        self.commit_index = 1
        self.matched: dict[str, int] = {}

    @property
    def position(self) -> tuple[int, int]:
        return self.log[-1].term, len(self.log)


class Sent(NamedTuple):
    sender: Other
    message: AppendEntries


class FollowerMachine(RuleBasedStateMachine):
    """The follower `f` among `a` to `d`, of which two more make a quorum of five."""

    @initialize(seed=st.integers(0, 2**32))
    def begin(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.files = FaultyFiles(self.chance)
        self.others = [Other(name) for name in "abcd"]
        self.lone = self.open()
        self.leader_logs: dict[int, list[Entry]] = {}  # by term, as long as that leader's log has got
        self.committed = [Entry(0, NOOP)]
        self.in_flight: list[Sent] = []
        self.acknowledged: dict[int, tuple[Entry, int]] = {}  # by index: the entry, and the term of the promise
        self.commit_index = 1
        self.number = 0

    def open(self, applied_index: int = 0) -> Lone:
        return Lone("f", voters="abcdf", files=self.files, applied_index=applied_index)

    # --- the others ---------------------------------------------------------------------------------------------------

    @rule(which=st.integers(0, 3), asked=st.sets(st.integers(0, 3)), ask_follower=st.booleans())
    def campaign(self, which: int, asked: set[int], ask_follower: bool) -> None:
        candidate = self.others[which]
        term = candidate.term = 1 + max(candidate.term, *(self.others[other].term for other in asked), 0)
        candidate.is_leader = False
        votes = 1
        for voter in (self.others[other] for other in sorted(asked - {which})):
            if voter.term < term:
                voter.term, voter.is_leader = term, False
                votes += voter.position <= candidate.position
        if ask_follower:
            self.lone.clock.now_s += ELECTION_MAX_S
            last_term, last_index = candidate.position
            self.lone.clock.now_s += ELECTION_MAX_S
            votes += VoteReply(term) in self.lone.receive(candidate.name, RequestVote(term, last_index, last_term))
        if votes >= 3:
            assert term not in self.leader_logs, "the history itself is not Raft's"
            candidate.is_leader = True
            candidate.matched = {}
            candidate.log.append(Entry(term, NOOP))
            self.leader_logs[term] = list(candidate.log)

    def leaders(self) -> list[Other]:
        return [other for other in self.others if other.is_leader]

    @precondition(lambda self: self.leaders())
    @rule(which=st.integers(0, 3), count=st.integers(1, 3))
    def propose(self, which: int, count: int) -> None:
        leader = self.leaders()[which % len(self.leaders())]
        for _ in range(count):
            self.number += 1
            leader.log.append(Entry(leader.term, data(self.number)))
        self.leader_logs[leader.term] = list(leader.log)

    @precondition(lambda self: self.leaders())
    @rule(which=st.integers(0, 3), to=st.integers(0, 3), most=st.integers(0, 8))
    def replicate(self, which: int, to: int, most: int) -> None:
        """To another of the plain members, at once, `most` entries after what is the same."""
        leader, other = self.leaders()[which % len(self.leaders())], self.others[to]
        if other is leader or other.term > leader.term:
            return
        other.term, other.is_leader = leader.term, False
        same = 0
        while same < min(len(leader.log), len(other.log)) and leader.log[same] == other.log[same]:
            same += 1
        end = min(len(leader.log), same + most)
        if other.log[same:end] != leader.log[same:end]:
            other.log[same:] = leader.log[same:end]
        self.take_acknowledgement(leader, other.name, end)

    def take_acknowledgement(self, leader: Other, name: str, index: int) -> None:
        leader.matched[name] = max(leader.matched.get(name, 0), index)
        reached = sorted(leader.matched.values(), reverse=True)
        if len(reached) >= 2 and reached[1] > leader.commit_index and leader.log[reached[1] - 1].term == leader.term:
            leader.commit_index = reached[1]
            agreed = leader.log[: leader.commit_index]
            shorter = min(len(agreed), len(self.committed))
            assert agreed[:shorter] == self.committed[:shorter], "the history itself is not Raft's"
            self.committed = max(agreed, self.committed, key=len)

    @precondition(lambda self: self.leaders())
    @rule(which=st.integers(0, 3), before_end=st.integers(0, 8), count=st.integers(0, 8), now=st.booleans())
    def send(self, which: int, before_end: int, count: int, now: bool) -> None:
        leader = self.leaders()[which % len(self.leaders())]
        previous = max(1, len(leader.log) - before_end)
        message = AppendEntries(
            leader.term,
            leader.commit_index,
            previous,
            leader.log[previous - 1].term,
            tuple(leader.log[previous : previous + count]),
        )
        self.in_flight.append(Sent(leader, message))
        if now:
            self.receive(self.in_flight[-1])

    # --- the follower -------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.in_flight)
    @rule(which=st.integers(0, 2**16), again=st.booleans())
    def deliver(self, which: int, again: bool) -> None:
        at = which % len(self.in_flight)
        self.receive(self.in_flight[at] if again else self.in_flight.pop(at))

    def receive(self, sent: Sent) -> None:
        before = [Entry(term, payload) for payload, _, term in self.lone.wal.entries]
        message = sent.message
        replies = self.lone.receive(sent.sender.name, message)
        self.judge_losses(before, message)
        for reply in replies:
            if isinstance(reply, AppendReply) and reply.success:
                self.note_acknowledgement(reply, message)
                if sent.sender.is_leader and sent.sender.term == reply.term:
                    self.take_acknowledgement(sent.sender, "f", reply.next_index - 1)

    def note_acknowledgement(self, reply: AppendReply, message: AppendEntries) -> None:
        assert reply.term == message.term
        index = reply.next_index - 1
        assert index <= message.prev_index + len(message.entries), "it acknowledges what the message did not prove"
        assert index <= self.lone.wal.durable_index, "it acknowledges what is not on its disk"
        log = [Entry(term, payload) for payload, _, term in self.lone.wal.entries]
        assert log[:index] == self.leader_logs[reply.term][:index], "it acknowledges what its leader does not have"
        for at in range(1, index + 1):
            self.acknowledged[at] = (log[at - 1], reply.term)

    def judge_losses(self, before: list[Entry], message: AppendEntries) -> None:
        log = [Entry(term, payload) for payload, _, term in self.lone.wal.entries]
        same = 0
        while same < min(len(before), len(log)) and before[same] == log[same]:
            same += 1
        for index in range(same + 1, len(before) + 1):
            assert index > self.commit_index, "it truncated what was committed"
            entry, term = self.acknowledged.pop(index, (None, 0))
            if entry is None:
                continue
            assert entry not in self.committed, "it lost an entry that was committed"
            assert message.term > term, "it lost an acknowledged entry to no later leader"
            rivals = self.leader_logs[message.term]
            assert len(rivals) < index or rivals[index - 1] != entry, "it lost an entry that its leader holds"
        if same < len(before):
            at = same + 1 - message.prev_index - 1
            assert 0 <= at < len(message.entries), "it truncated where the message shows no conflict"
            assert message.entries[at][0] != before[same].term, "it truncated what matches"

    @rule(higher=st.integers(0, 3))
    def hear_a_term(self, higher: int) -> None:
        """From somebody who lost an election elsewhere."""
        top = max([self.lone.engine.term, *(other.term for other in self.others)])
        self.lone.receive("a", TermNotice(min(top, self.lone.engine.term + higher)))

    @rule()
    def tick(self) -> None:
        self.lone.engine.tick()
        self.lone.sync()

    @rule(unsynced=st.booleans())
    def crash(self, unsynced: bool) -> None:
        if unsynced and self.in_flight:
            # It was at work on a message when the power went: nothing was said, and all, some or nothing is kept.
            sent = self.chance.choice(self.in_flight)
            before = [Entry(term, payload) for payload, _, term in self.lone.wal.entries]
            self.lone.receive(sent.sender.name, sent.message, sync=False)
            self.files.crash(keep_random(self.chance))
            self.lone = self.open()
            self.judge_losses(before, sent.message)
        else:
            self.files.crash()
            self.lone = self.open(applied_index=self.chance.choice([0, self.commit_index]))
        self.commit_index = self.lone.engine.commit_index

    # --- what always holds --------------------------------------------------------------------------------------------

    @invariant()
    def commits_only_what_is_committed(self) -> None:
        commit_index = self.lone.engine.commit_index
        assert commit_index >= self.commit_index
        self.commit_index = commit_index
        assert commit_index <= len(self.committed)
        log = [Entry(term, payload) for payload, _, term in self.lone.wal.entries[:commit_index]]
        assert log == self.committed[:commit_index]

    @invariant()
    def holds_what_it_acknowledged(self) -> None:
        for index, (entry, _) in self.acknowledged.items():
            payload, at, term = self.lone.wal.entries[index - 1]
            assert (at, Entry(term, payload)) == (index, entry)

    @invariant()
    def terms_never_fall_along_the_log(self) -> None:
        terms = self.lone.log_terms()
        assert terms == sorted(terms)
        assert self.lone.wal.term >= terms[-1]


FollowerMachine.TestCase.settings = QUICK
TestFollower = pytest.mark.timeout(60)(FollowerMachine.TestCase)


# --- junk -------------------------------------------------------------------------------------------------------------

NUMBERS = st.one_of(st.integers(0, 12), st.sampled_from([0, 1, 2**31, 2**62 - 100, 2**62, 2**63, 2**64 - 1]))
PAYLOADS = st.one_of(
    st.sampled_from([b"", NOOP, data("x"), b"\x00x", b"\x02x", b"\x03x", b"\x11"]), st.binary(max_size=3)
)
APPENDS = st.builds(
    AppendEntries, NUMBERS, NUMBERS, NUMBERS, NUMBERS, st.lists(st.tuples(NUMBERS, PAYLOADS), max_size=5).map(tuple)
)
JUNK: st.SearchStrategy[Message] = st.one_of(
    APPENDS,
    st.builds(AppendReply, NUMBERS, NUMBERS, st.booleans()),
    st.builds(RequestVote, NUMBERS, NUMBERS, NUMBERS, st.booleans()),
    st.builds(VoteReply, NUMBERS),
    st.builds(PreVote, NUMBERS, NUMBERS, NUMBERS, NUMBERS),
    st.builds(PreVoteReply, NUMBERS, NUMBERS, st.booleans(), st.booleans()),
    st.builds(TermNotice, NUMBERS),
    st.builds(TimeoutNow, NUMBERS),
    st.builds(ReadProbe, NUMBERS, NUMBERS),
    st.builds(ReadAck, NUMBERS, NUMBERS),
    st.builds(ReadRequest, NUMBERS, NUMBERS),
    st.builds(ReadReply, NUMBERS, NUMBERS, NUMBERS),
)
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["a", "c", "d", "stranger"]), JUNK, st.sampled_from(["", "", "tick", "later", "propose"])
    ),
    max_size=30,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(role=st.sampled_from(["follower", "candidate", "leader"]), steps=STEPS)
def test_junk_raises_nothing_and_corrupts_nothing(role: str, steps: list[tuple[str, Message, str]]) -> None:
    lone = Lone(
        "b", voters="abc", learners="d", entries=[(NOOP, 1, 0), *[(data(i), i, 1 + i // 4) for i in range(2, 8)]]
    )
    lone.receive("a", AppendEntries(3, 4, 4, 2, ()))
    if role == "candidate":
        lone.engine.tick(campaign=True)
    elif role == "leader":
        lone.lead()
    for peer, message, then in steps:
        before, commit_index = list(lone.wal.entries), lone.engine.commit_index
        vote = lone.wal.term, lone.wal.voted_for
        try:
            lone.receive(peer, message)
            if then == "tick":
                lone.tick()
            elif then == "later":
                lone.clock.now_s += ELECTION_MAX_S
                lone.tick()
            elif then == "propose" and lone.engine.is_leader:
                lone.propose(data("y"))
        except MalformedMessage:
            assert lone.wal.entries == before
            continue
        except SafetyViolation:
            assert isinstance(message, AppendEntries)
            assert contradicts(message, before[commit_index - 1])
            assert lone.wal.entries == before
            assert lone.engine.commit_index == commit_index
            return
        assert lone.engine.commit_index >= commit_index
        assert lone.engine.commit_index <= lone.wal.last_index
        assert lone.wal.entries[:commit_index] == before[:commit_index]
        assert [index for _, index, _ in lone.wal.entries] == list(range(1, len(lone.wal.entries) + 1))
        assert lone.log_terms() == sorted(lone.log_terms())
        assert lone.wal.term >= vote[0]
        assert lone.wal.term > vote[0] or vote[1] in (None, lone.wal.voted_for), "it voted twice in a term"
    lone.sync()
    lone.files.crash()
    again = Lone("b", files=lone.files)
    assert again.wal.entries == lone.wal.entries
    assert (again.wal.term, again.wal.voted_for) == (lone.wal.term, lone.wal.voted_for)


def contradicts(message: AppendEntries, committed: tuple[bytes, int, int]) -> bool:
    _, index, term = committed
    terms = dict(enumerate([message.prev_term, *(entry_term for entry_term, _ in message.entries)], message.prev_index))
    return terms.get(index, term) != term


@given(body=st.binary(max_size=60))
def test_random_bytes_are_a_message_or_malformed(body: bytes) -> None:
    try:
        message = messages.decode(body)
    except MalformedMessage:
        return
    assert messages.decode(messages.encode(message)) == message


@given(message=JUNK)
def test_a_message_survives_the_wire(message: Message) -> None:
    try:
        assert messages.decode(messages.encode(message)) == message
    except MalformedMessage:
        assert any(isinstance(number, int) and number >= 2**62 for number in flat(message))


def flat(message: Message) -> list[object]:
    """Every number in a message."""
    numbers: list[object] = [getattr(message, field) for field in message.__struct_fields__]
    if isinstance(message, AppendEntries):
        numbers += [term for term, _ in message.entries]
    return numbers
