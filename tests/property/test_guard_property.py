"""A follower's guard, engine and log against everything that a legal Raft history, a bad network and a bad disk can do;
and any node's against junk.

The history is made by `World`: other members as plain lists, that elect leaders, append, replicate and commit by Raft's
rules. What its leaders send to the follower is kept, and delivered late, twice, in any order, or never.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import NamedTuple

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore.raft import messages
from kvstore.raft.fsm import EntryKind
from kvstore.raft.guard import SafetyViolation
from kvstore.raft.members import Configuration
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


class World:
    """The follower `f` among `a` to `d`, of which two more make a quorum of five. Each step takes a number that decides
    who, how much, and which."""

    def __init__(self) -> None:
        self.chance = random.Random(0)
        self.files = FaultyFiles(self.chance)
        self.others = [Other(name) for name in "abcd"]
        self.lone = self.open()
        self.leader_logs: dict[int, list[Entry]] = {}  # by term, as long as that leader's log has got
        self.committed = [Entry(0, NOOP)]
        self.in_flight: list[Sent] = []
        self.acknowledged: dict[int, tuple[Entry, int]] = {}  # by index: the entry, and the term of the promise
        self.commit_index = 1
        self.number = 0
        self.seen: Counter[str] = Counter()  # what happened, to know that it did

    def open(self, applied_index: int = 0) -> Lone:
        return Lone("f", voters="abcdf", files=self.files, applied_index=applied_index)

    def step(self, name: str, number: int) -> None:
        self.chance.seed(number)
        getattr(self, name)()
        self.judge()

    # --- the others ---------------------------------------------------------------------------------------------------

    def campaign(self) -> None:
        candidate = self.chance.choice(self.others)
        asked = [other for other in self.others if other is not candidate and self.chance.random() < 0.8]
        term = candidate.term = 1 + max([candidate.term, *(other.term for other in asked)])
        candidate.is_leader = False
        votes = 1
        for voter in asked:
            if voter.term < term:
                voter.term, voter.is_leader = term, False
                votes += voter.position <= candidate.position
        if self.chance.random() < 0.5:
            self.lone.clock.now_s += 2 * ELECTION_MAX_S  # it is loyal to nobody any more
            last_term, last_index = candidate.position
            replies = self.lone.receive(candidate.name, RequestVote(term, last_index, last_term))
            votes += VoteReply(term) in replies
            self.seen["vote"] += VoteReply(term) in replies
        if votes >= 3:
            assert term not in self.leader_logs, "the history itself is not Raft's"
            candidate.is_leader = True
            candidate.matched = {}
            candidate.log.append(Entry(term, NOOP))
            self.leader_logs[term] = list(candidate.log)
            self.seen["leader"] += 1

    def any_leader(self) -> Other | None:
        leaders = [other for other in self.others if other.is_leader]
        return self.chance.choice(leaders) if leaders else None

    def propose(self) -> None:
        leader = self.any_leader()
        if leader is None:
            return
        for _ in range(self.chance.randint(1, 3)):
            self.number += 1
            leader.log.append(Entry(leader.term, data(self.number)))
        self.leader_logs[leader.term] = list(leader.log)

    def replicate(self) -> None:
        """To some of the plain members, at once, some entries after what is the same."""
        leader = self.any_leader()
        for other in self.others:
            if leader is None or other is leader or other.term > leader.term or self.chance.random() < 0.4:
                continue
            other.term, other.is_leader = leader.term, False
            same = common(leader.log, other.log)
            end = min(len(leader.log), same + self.chance.randint(0, 8))
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
            assert agreed[:shorter] == self.committed[:shorter], "members disagree about what is committed"
            self.committed = max(agreed, self.committed, key=len)

    def send(self) -> None:
        leader = self.any_leader()
        if leader is None:
            return
        # From anywhere above, or a little below, what the follower has committed: there it may differ.
        end = len(leader.log)
        previous = self.chance.randint(min(end, max(1, self.commit_index - 2)), end)
        count = self.chance.randint(0, 12)
        entries = tuple(leader.log[previous : previous + count])
        term = leader.log[previous - 1].term
        message = AppendEntries(leader.term, leader.commit_index, previous, term, entries)
        self.in_flight.append(Sent(leader, message))
        if self.chance.random() < 0.5:
            self.receive(self.in_flight[-1])

    # --- the follower -------------------------------------------------------------------------------------------------

    def deliver(self) -> None:
        if self.in_flight:
            # Mostly a late one: an old one would only be told that its term is over.
            at = -min(len(self.in_flight), 1 + int(self.chance.expovariate(0.2)))
            self.receive(self.in_flight[at] if self.chance.random() < 0.5 else self.in_flight.pop(at))

    def receive(self, sent: Sent) -> None:
        before, message = self.log, sent.message
        replies = self.lone.receive(sent.sender.name, message)
        self.judge_losses(before, message)
        for reply in replies:
            if not isinstance(reply, AppendReply):
                continue
            if not reply.success:
                self.seen["refusal"] += 1
                continue
            self.note_acknowledgement(reply, message)
            if sent.sender.is_leader and sent.sender.term == reply.term:
                self.take_acknowledgement(sent.sender, "f", reply.next_index - 1)

    @property
    def log(self) -> list[Entry]:
        return [Entry(term, payload) for payload, _, term in self.lone.wal.entries]

    def note_acknowledgement(self, reply: AppendReply, message: AppendEntries) -> None:
        index, log = reply.next_index - 1, self.log
        assert reply.term == message.term
        assert index <= message.prev_index + len(message.entries), "it acknowledges what the message did not prove"
        assert index <= self.lone.wal.durable_index, "it acknowledges what is not on its disk"
        assert log[:index] == self.leader_logs[reply.term][:index], "it acknowledges what its leader does not have"
        for at in range(1, index + 1):
            self.acknowledged[at] = (log[at - 1], reply.term)
        self.seen["acknowledgement"] += 1

    def judge_losses(self, before: list[Entry], message: AppendEntries) -> None:
        same = common(before, self.log)
        for index in range(same + 1, len(before) + 1):
            assert index > self.commit_index, "it truncated what was committed"
            entry, term = self.acknowledged.pop(index, (None, 0))
            if entry is None:
                continue
            self.seen["legal loss"] += 1
            assert entry not in self.committed, "it lost an entry that was committed"
            assert message.term > term, "it lost an acknowledged entry to no later leader"
            rivals = self.leader_logs[message.term]
            assert len(rivals) < index or rivals[index - 1] != entry, "it lost an entry that its leader holds"
        if same < len(before):
            self.seen["truncation"] += 1
            at = same - message.prev_index
            assert 0 <= at < len(message.entries), "it truncated where the message shows no conflict"
            assert message.entries[at][0] != before[same].term, "it truncated what matches"

    def hear_a_term(self) -> None:
        """From somebody who lost an election elsewhere."""
        top = max([self.lone.engine.term, *(other.term for other in self.others)])
        self.lone.receive("a", TermNotice(min(top, self.lone.engine.term + self.chance.randint(0, 2))))

    def tick(self) -> None:
        self.lone.engine.tick()
        self.lone.sync()

    def crash(self) -> None:
        """Power loss, now and then while it is at work on a message: then nothing was said, and of what was not synced
        all, some or nothing is kept."""
        applied_index = self.chance.choice([0, self.commit_index])
        if self.in_flight and self.chance.random() < 0.7:
            sent, before = self.in_flight[-1], self.log
            self.lone.receive(sent.sender.name, sent.message, sync=False)
            self.files.crash(keep_random(self.chance))
            self.lone = self.open(applied_index)
            self.judge_losses(before, sent.message)
        else:
            self.files.crash()
            self.lone = self.open(applied_index)
        self.commit_index = self.lone.engine.commit_index
        self.seen["crash"] += 1

    # --- what always holds --------------------------------------------------------------------------------------------

    def judge(self) -> None:
        log, commit_index = self.log, self.lone.engine.commit_index
        assert commit_index >= self.commit_index, "the commit index fell"
        self.seen["commit"] += commit_index > self.commit_index
        self.commit_index = commit_index
        assert commit_index <= len(self.committed), "it committed what nobody has"
        assert log[:commit_index] == self.committed[:commit_index], "it committed another entry"
        for index, (entry, _) in self.acknowledged.items():
            assert log[index - 1] == entry, "it lost what it acknowledged"
        terms = [entry.term for entry in log]
        assert terms == sorted(terms)
        assert self.lone.wal.term >= terms[-1]


def common(one: list[Entry], other: list[Entry]) -> int:
    """How many entries two logs begin with alike."""
    shorter = min(len(one), len(other))
    return next((at for at in range(shorter) if one[at] != other[at]), shorter)


WEIGHTS = {
    "send": 16, "deliver": 6, "replicate": 3, "propose": 3, "campaign": 2, "tick": 1, "crash": 1, "hear_a_term": 1,
}  # fmt: skip
# Long ones: what a bug needs (two leaders, a conflict, a re-sent message) rarely comes together in a few steps.
STEP_NAMES = [name for name, weight in WEIGHTS.items() for _ in range(weight)]
HISTORIES = st.lists(st.tuples(st.sampled_from(STEP_NAMES), st.integers(0, 2**16)), min_size=100, max_size=250)


@pytest.mark.timeout(120)  # a failure takes its time to shrink
@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(history=HISTORIES)
def test_a_follower_keeps_its_promises_in_every_legal_history(history: list[tuple[str, int]]) -> None:
    world = World()
    for name, number in history:
        world.step(name, number)


def test_the_histories_are_worth_their_name() -> None:
    """They hold all that the rules are about, and much of it."""
    seen: Counter[str] = Counter()
    chance = random.Random(7)
    for _ in range(20):
        world = World()
        for name in chance.choices(STEP_NAMES, k=150):
            world.step(name, chance.getrandbits(16))
        seen += world.seen
    enough = {
        "acknowledgement": 200,
        "refusal": 100,
        "leader": 50,
        "vote": 30,
        "legal loss": 30,
        "commit": 20,
        "crash": 20,
    }
    assert {what: seen[what] for what, least in (enough | {"truncation": 10}).items() if seen[what] < least} == {}


# --- junk -------------------------------------------------------------------------------------------------------------

NUMBERS = st.one_of(st.integers(0, 12), st.sampled_from([0, 1, 2**31, 2**62 - 100, 2**62, 2**63, 2**64 - 1]))
# Half of them well-formed, so that more than one in an append may be.
PAYLOADS = st.one_of(
    st.just(data("z")),
    st.just(NOOP),
    st.sampled_from([b"", NOOP, data("x"), b"\x00x", b"\x02x", b"\x03x", b"\x11"]),
    st.binary(max_size=3),
)
APPENDS = st.builds(
    AppendEntries,
    NUMBERS,
    NUMBERS,
    NUMBERS,
    NUMBERS,
    st.lists(st.tuples(NUMBERS, PAYLOADS), min_size=1, max_size=5).map(tuple),
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


def likely_append(chance: random.Random, lone: Lone) -> AppendEntries:
    """Junk that is not turned away at the door: in the node's term or the next, after an entry that is there."""
    term = lone.engine.term + (chance.random() < 0.1)
    previous = chance.randint(1, lone.wal.last_index)
    entry_term = previous_term = lone.wal.term_at(previous) or 0
    entries = []
    for _ in range(chance.randint(0, 4)):
        entry_term += chance.choice([0, 0, 0, 1, 1, -1])
        payload = chance.choice([data("z"), data("z"), NOOP, b"", b"\x00x", b"\x02x", b"\x03x", b"\x11", b"\x99"])
        entries.append((max(0, entry_term), payload))
    previous -= chance.random() < 0.05
    return AppendEntries(term, chance.randint(0, 20), previous, previous_term, tuple(entries))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    role=st.sampled_from(["follower", "candidate", "leader"]),
    steps=st.lists(st.tuples(JUNK, st.integers(0, 2**32)), min_size=40, max_size=80),
)
def test_junk_raises_nothing_and_corrupts_nothing(role: str, steps: list[tuple[Message, int]]) -> None:
    entries = [(NOOP, 1, 0), *[(data(index), index, 1 + index // 4) for index in range(2, 8)]]
    lone = Lone("b", voters="abc", learners="d", entries=entries)
    lone.receive("a", AppendEntries(3, 4, 4, 2, ()))
    if role == "candidate":
        lone.engine.tick(campaign=True)
    elif role == "leader":
        lone.lead()
    for message, number in steps:
        chance = random.Random(number)
        if chance.random() < 0.6:
            message = likely_append(chance, lone)
        elif chance.random() < 0.5:
            message = msgspec.structs.replace(message, term=lone.engine.term)
        peer = chance.choice(["a", "a", "a", "a", "c", "d", "stranger"])
        then = chance.choice(["", "", "", "tick", "propose"] + ["later"] * (chance.random() < 0.2))
        before, commit_index, term = list(lone.wal.entries), lone.engine.commit_index, lone.wal.term
        voted_for = lone.wal.voted_for
        try:
            lone.receive(peer, message)
        except MalformedMessage:
            assert lone.wal.entries == before
        except SafetyViolation:
            assert isinstance(message, AppendEntries)
            assert contradicts(message, before[commit_index - 1])
            assert lone.wal.entries == before
            assert lone.engine.commit_index == commit_index
        if then == "tick":
            lone.tick()
        elif then == "later":
            lone.clock.now_s += ELECTION_MAX_S
            lone.tick()
        elif then == "propose" and lone.engine.is_leader:
            lone.propose(data("y"))
        assert commit_index <= lone.engine.commit_index <= lone.wal.last_index
        assert lone.wal.entries[:commit_index] == before[:commit_index]
        assert [index for _, index, _ in lone.wal.entries] == list(range(1, len(lone.wal.entries) + 1))
        assert all(is_entry(payload) for payload, _, _ in lone.wal.entries)
        assert lone.log_terms() == sorted(lone.log_terms())
        assert lone.wal.term >= max(term, lone.wal.last_term)
        assert lone.wal.term > term or voted_for in (None, lone.wal.voted_for), "it voted twice in a term"
    lone.sync()
    lone.files.crash()
    again = Lone("b", files=lone.files)
    assert again.wal.entries == lone.wal.entries
    assert (again.wal.term, again.wal.voted_for) == (lone.wal.term, lone.wal.voted_for)


def is_entry(payload: bytes) -> bool:
    """It has a kind that is ours, and a configuration is one."""
    if payload[:1] == bytes([EntryKind.MEMBERS]):
        Configuration.decode(payload[1:])
    return payload[:1] in [bytes([kind]) for kind in EntryKind]


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
