"""What the tests of consensus share: views to test the guard alone, and one member without a network.

- `FakeEngine`, `FakeLog`: the two views that the guard reads, as plain values.
- `Lone`: real engine, guard and WAL of one node on `FaultyFiles`, driven message by message; what it would send is
  listed once its disk holds what is promised. It does what `RaftNode` does about a message, and nothing else.
- `Answer`, `Lines`: what became of a request, and what was logged.

Whole nodes and clusters are in `raft_cluster.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from kvstore.errors import KvError
from kvstore.model import Member
from kvstore.raft import guard as actions
from kvstore.raft import messages
from kvstore.raft.elections import Elections
from kvstore.raft.engine import Engine
from kvstore.raft.fsm import EntryKind
from kvstore.raft.guard import Guard
from kvstore.raft.members import Configuration
from kvstore.raft.messages import AppendEntries, AppendReply, Message
from kvstore.raft.outbox import Outbox
from kvstore.raft.wal import Wal
from tests.fake_files import FaultyFiles

M = TypeVar("M")

ELECTION_MIN_S, ELECTION_MAX_S = 0.5, 1.0
NOOP = bytes([EntryKind.NOOP])
# Small, because fake disks keep every zero of it in memory.
SEGMENT_BYTES = 64 * 1024


def data(text: str | int) -> bytes:
    """A log entry that holds this text."""
    return bytes([EntryKind.DATA]) + str(text).encode()


def configuration(voters: Iterable[str], learners: Iterable[str] = ()) -> Configuration:
    return Configuration.of(
        [Member(name, f"{name}:1", "", "", True) for name in voters]
        + [Member(name, f"{name}:1", "", "", False) for name in learners]
    )


class Draws:
    """A `Chance` that always draws the same."""

    def __init__(self, value: float = 0.5) -> None:
        self.value = value

    def random(self) -> float:
        return self.value

    def getrandbits(self, bits: int, /) -> int:
        return 1


class HandClock:
    """A `Clock` that stands still until it is moved."""

    def __init__(self, now_s: float = 100.0) -> None:
        self.now_s = now_s

    def monotonic(self) -> float:
        return self.now_s

    def wall_ms(self) -> int:
        return 1_700_000_000_000 + int(self.now_s * 1000)


# --- the guard alone --------------------------------------------------------------------------------------------------


class FakeEngine:
    def __init__(self) -> None:
        self.term = 5
        self.is_leader = False
        self.is_candidate = False
        self.commit_index = 1
        self.matched: dict[str, int] = {}

    def match_index(self, peer: str) -> int:
        return self.matched.get(peer, 0)


class FakeLog:
    """`terms[i]` is the term of entry `first_index + i`."""

    def __init__(self, terms: Sequence[int] = (0,), first_index: int = 1) -> None:
        self.terms = list(terms)
        self.first_index = first_index
        self.durable: int | None = None  # all, unless said otherwise

    @property
    def last_index(self) -> int:
        return self.first_index + len(self.terms) - 1

    @property
    def last_term(self) -> int:
        return self.terms[-1]

    @property
    def durable_index(self) -> int:
        return self.last_index if self.durable is None else self.durable

    def term_at(self, index: int) -> int | None:
        at = index - self.first_index
        return self.terms[at] if 0 <= at < len(self.terms) else None


# --- one member without a network -------------------------------------------------------------------------------------


class Lone:
    """One member, `b` of a, b and c unless said otherwise. `sent` is what it has said: (peer, message)."""

    def __init__(
        self,
        name: str = "b",
        voters: Iterable[str] = "abc",
        learners: Iterable[str] = (),
        *,
        files: FaultyFiles | None = None,
        entries: Iterable[tuple[bytes, int, int]] = (),
        applied_index: int = 0,
        clock: HandClock | None = None,
        members: Configuration | None = None,
    ) -> None:
        self.clock = clock or HandClock()
        self.files = files or FaultyFiles()
        self.wal = Wal.open(self.files, "/wal", node_id="1", segment_bytes=SEGMENT_BYTES)
        for entry in entries:
            self.wal.append(*entry)
        self.wal.set_term(max(self.wal.term, self.wal.last_term), self.wal.voted_for)
        self.wal.sync()
        self.sent: list[tuple[str, Message]] = []
        self.wanted_snapshots: list[str] = []
        self.engine_said: list[tuple[str, dict[str, Any]]] = []
        self._outbox = Outbox(self._transmit, self.clock.monotonic)
        self.engine = Engine(
            name,
            self.wal,
            applied_index,
            clock=self.clock,
            heartbeat_s=0.1,
            quorum_timeout_s=ELECTION_MAX_S,
            emit=self._emit,
            members_changed=lambda: None,
        )
        # It has run long enough that loyalty at the start is over.
        started_at = self.clock.now_s - 10 * ELECTION_MAX_S
        self.elections = Elections(Draws(), ELECTION_MIN_S, ELECTION_MAX_S, started_at)
        self.guard = Guard(name, self.engine, self.wal, self.elections)
        self.set_members(members or configuration(voters, learners))
        self._term = self.engine.term
        self.sync()

    def set_members(self, members: Configuration) -> None:
        self.guard.members = self.guard.applied_members = members
        self.engine.set_members(members.voters, members.learners)
        for peer in (members.voters | members.learners) - {self.guard.name}:
            self.engine.set_connected(peer, True)

    def receive(self, peer: str, message: Message, *, sync: bool = True) -> list[Message]:
        """Take a message as it comes off the wire; returns what was said because of it."""
        before = len(self.sent)
        self.act(self.guard.receive(peer, messages.decode(messages.encode(message)), self.clock.now_s))
        if sync:
            self.sync()
        return [said for _, said in self.sent[before:]]

    def act(self, todo: Iterable[actions.Action]) -> None:
        for action in todo:
            if isinstance(action, actions.DeliverAck):
                self.engine.deliver_ack(action.peer, action.next_index, action.success, action.is_news)
            elif isinstance(action, actions.Deliver):
                self.engine.deliver(action.peer, action.message)
            elif isinstance(action, actions.Send):
                self._outbox.add(action.peer, action.message, self.wal.position)
            elif isinstance(action, actions.AdoptTerm):
                self.engine.adopt_term(action.term)
            elif isinstance(action, actions.Campaign):
                self.engine.tick(campaign=True)
            if self.engine.term != self._term:
                self._term = self.engine.term
                self.guard.term_changed()
                self._outbox.drop_other_terms(self.engine.term)

    def tick(self, *, sync: bool = True) -> None:
        """What a node does in a turn where nothing came in."""
        self.act(self.guard.tick(self.clock.now_s))
        self.engine.tick()
        if sync:
            self.sync()

    def sync(self) -> None:
        self.flush()
        self.wal.sync()
        self.act(self.guard.raise_acks())
        self.flush()

    def flush(self) -> None:
        """Say what may be said by now."""
        self._outbox.send_ready(self.wal.synced_position)
        self._outbox.end_turn()

    def lead(self, voters: Iterable[str] | None = None) -> None:
        """Become leader, by an election that the other voters (or these) decide."""
        self.act([actions.Campaign()])
        for voter in sorted(voters if voters is not None else self.guard.members.voters - {self.guard.name}):
            if not self.engine.is_leader:
                self.receive(voter, messages.VoteReply(self.engine.term))
        assert self.engine.is_leader
        self.sync()

    def propose(self, *entries: bytes, sync: bool = True) -> None:
        for entry in entries:
            self.engine.queue_proposal(entry)
        self.engine.tick()
        if sync:
            self.sync()

    def heard(self, kind: type[M], peer: str | None = None) -> list[M]:
        """What it has said so far of this kind (to this peer)."""
        return [said for to, said in self.sent if isinstance(said, kind) and peer in (None, to)]

    def log_terms(self) -> list[int]:
        return [term for _, _, term in self.wal.entries]

    def _transmit(self, peer: str, body: bytes) -> bool:
        self.sent.append((peer, messages.decode(body)))
        return True

    def _emit(self, peer: str, m: dict[str, Any]) -> None:
        self.engine_said.append((peer, m))
        kind = m["type"]
        if kind == "append_entries":
            if "prevLogIdx" in m:
                self._outbox.add_append(peer, m, 0)
            else:
                self.wanted_snapshots.append(peer)
                self.engine.set_connected(peer, False)  # or it would ask again until its clock moves on
        elif kind == "request_vote":
            vote = messages.RequestVote(m["term"], m["last_log_index"], m["last_log_term"])
            self._outbox.add(peer, vote, self.wal.position)
        elif kind == "response_vote":
            self._outbox.add(peer, messages.VoteReply(m["term"]), self.wal.position)


# --- answers ----------------------------------------------------------------------------------------------------------


class Lines:
    """A `Log` that keeps its lines: (event, fields)."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, dict[str, Any]]] = []

    def info(self, event: str, /, **fields: Any) -> None:
        self.lines.append((event, fields))

    warning = error = info


class Answer:
    """What became of a request: `result` and `error`, once `is_done`."""

    def __init__(self) -> None:
        self.is_done = False
        self.result: Any = None
        self.error: KvError | None = None

    def with_result(self, result: Any, error: KvError | None) -> None:
        assert not self.is_done, "answered twice"
        self.is_done, self.result, self.error = True, result, error

    def __call__(self, error: KvError | None) -> None:
        self.with_result(None, error)

    @property
    def is_ok(self) -> bool:
        return self.is_done and self.error is None


# --- messages ---------------------------------------------------------------------------------------------------------


def append(term: int, previous: tuple[int, int], *entries: tuple[int, bytes], commit: int = 1) -> AppendEntries:
    """An append after the entry `previous`, (index, term)."""
    return AppendEntries(term, commit, previous[0], previous[1], entries)


def acked(replies: Iterable[Message]) -> int:
    """The index that a single reply acknowledges."""
    (reply,) = replies
    assert isinstance(reply, AppendReply), reply
    assert reply.success, reply
    return reply.next_index - 1
