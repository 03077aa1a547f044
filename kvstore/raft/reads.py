"""ReadIndex: linearizable reads without a log entry (Ongaro's thesis, 6.4). Pure: time is handed in.

A leader asks its voters whether it still leads. Once a quorum says so, every read that waited *before* the question
was sent may be served from any replica that has applied the commit index of that moment. A round serves no read that
came after it was sent: a newer leader may have answered a write in between. And no round starts before an entry of the
leader's own term is committed: until then it may not know what an earlier leader committed.

A follower asks its leader for such an index, and serves the read itself once it has applied that far.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from typing import NamedTuple, Protocol

from kvstore.env import Chance
from kvstore.errors import KvError, Unavailable
from kvstore.raft.members import Configuration
from kvstore.raft.messages import Message, ReadAck, ReadProbe, ReadReply, ReadRequest

# Rounds under way at once. Reads that come meanwhile wait for the next round, so more would only add messages.
ROUNDS_MAX = 4

Done = Callable[[KvError | None], None]
Ready = Callable[[int], None]
"""Called with the index to wait for, or 0: this node no longer leads, ask again."""


class EngineView(Protocol):
    @property
    def term(self) -> int: ...
    @property
    def is_leader(self) -> bool: ...
    @property
    def leader(self) -> str: ...


class _Round(NamedTuple):
    number: int
    commit_index: int
    acks: set[str]
    waiting: list[Ready]


class _Asked(NamedTuple):
    id: int
    deadline: float
    waiting: list[Done]


class ReadIndex:
    """All reads that wait at one node. Their number is bounded by the doors, which bound the requests that they hold.

    `send(peer, message)` sends without waiting for the log. `members` is the configuration in force.
    """

    def __init__(
        self,
        name: str,
        engine: EngineView,
        chance: Chance,
        send: Callable[[str, Message], None],
        retry_s: float,
        timeout_s: float,
    ) -> None:
        self._name = name
        self._engine = engine
        self._send = send
        self._retry_s = retry_s
        self._timeout_s = timeout_s
        self.members = Configuration()
        self._applied = 0
        self._at_index: list[tuple[int, Done]] = []
        self._waiting: list[Ready] = []  # for the leader's next round
        self._rounds: deque[_Round] = deque()
        self._number = 0
        self._probe_due = 0.0
        self._to_ask: list[Done] = []  # for the follower's next question
        self._asked: deque[_Asked] = deque()
        self._asked_of = ""
        # An answer to a question from before a restart must fit none from after it: a write may have been acknowledged
        # in between.
        self._asked_id = chance.getrandbits(48)

    def request(self, done: Done) -> None:
        """`done(None)` once this node has applied all that was acknowledged before this call. Needs a `step`."""
        if self._engine.is_leader:
            self._waiting.append(lambda index: self._wait_for(index, done))
        else:
            self._to_ask.append(done)

    def applied(self, index: int) -> None:
        """The state machine has applied everything up to `index`."""
        self._applied = index
        if not self._at_index:
            return
        ready = [done for at, done in self._at_index if at <= index]
        if ready:
            self._at_index = [(at, done) for at, done in self._at_index if at > index]
            for done in ready:
                done(None)

    def step(self, now: float, commit_index: int, commit_term: int | None, can_reach: Callable[[str], bool]) -> None:
        """Once a turn: send what is to be asked. `commit_term` is the term of the entry at `commit_index`."""
        if self._engine.is_leader:
            if self._to_ask:  # they came in the turn in which this node was elected
                asked, self._to_ask = self._to_ask, []
                for done in asked:
                    self.request(done)
            if self._waiting and len(self._rounds) < ROUNDS_MAX and commit_term == self._engine.term:
                self._number += 1
                self._rounds.append(_Round(self._number, commit_index, {self._name}, self._waiting))
                self._waiting = []
                self._send_probe(now)
            elif self._rounds and now >= self._probe_due:
                self._send_probe(now)  # the first may be lost with a connection
            self._take_ready()
            return
        while self._asked and self._asked[0].deadline <= now:
            self._fail(self._asked.popleft().waiting, "the leader did not answer in time")
        if self._to_ask:
            waiting, self._to_ask = self._to_ask, []
            leader = self._engine.leader
            if not leader or not can_reach(leader):
                self._fail(waiting, "no leader can be reached now")
                return
            self._asked_of = leader
            self._asked_id += 1
            self._asked.append(_Asked(self._asked_id, now + self._timeout_s, waiting))
            self._send(leader, ReadRequest(self._engine.term, self._asked_id))

    @property
    def due(self) -> float | None:
        """When `step` should be called next though nothing else happens; None: no need."""
        if self._rounds:
            return self._probe_due
        return self._asked[0].deadline if self._asked else None

    def receive(self, peer: str, message: ReadAck | ReadRequest | ReadReply) -> None:
        """A message that the guard let through."""
        if isinstance(message, ReadAck):
            for waiting_round in self._rounds:
                # A voter that follows in one round did so in every earlier one.
                if waiting_round.number <= message.round:
                    waiting_round.acks.add(peer)
            self._take_ready()
        elif isinstance(message, ReadRequest):
            if self._engine.is_leader:
                self._waiting.append(lambda index: self._answer(peer, message.id, index))
            else:
                self._answer(peer, message.id, 0)
        elif peer == self._asked_of:
            for asked in self._asked:
                if asked.id == message.id:
                    self._asked.remove(asked)
                    for done in asked.waiting:
                        self._wait_for(message.index, done)
                    return

    def leadership_lost(self) -> None:
        """This node led, and does so no more."""
        waiting = [ready for waiting_round in self._rounds for ready in waiting_round.waiting]
        waiting.extend(self._waiting)
        self._rounds.clear()
        self._waiting = []
        for ready in waiting:
            ready(0)

    def leader_lost(self, peer: str = "") -> None:
        """The leader that was asked (or, without a name, any) is gone: it will not answer."""
        if peer in ("", self._asked_of):
            asked, self._asked = self._asked, deque()
            for question in asked:
                self._fail(question.waiting, "the leader changed")

    def fail_all(self) -> None:
        """This node ends: nobody will be served."""
        self.leadership_lost()
        self.leader_lost()
        self._fail(self._to_ask, "this node stopped")
        self._fail([done for _, done in self._at_index], "this node stopped")
        self._to_ask = []
        self._at_index = []

    def _wait_for(self, index: int, done: Done) -> None:
        if index == 0:
            self._fail([done], "leadership changed before the read could be served")
        elif index <= self._applied:
            done(None)
        else:
            self._at_index.append((index, done))

    def _answer(self, peer: str, asked: int, index: int) -> None:
        self._send(peer, ReadReply(self._engine.term, asked, index))

    def _send_probe(self, now: float) -> None:
        self._probe_due = now + self._retry_s
        probe = ReadProbe(self._engine.term, self._number)
        for voter in self.members.voters:
            if voter != self._name:
                self._send(voter, probe)

    def _take_ready(self) -> None:
        while self._rounds and self.members.has_quorum(self._rounds[0].acks):
            done = self._rounds.popleft()
            for ready in done.waiting:
                ready(done.commit_index)

    @staticmethod
    def _fail(waiting: Collection[Done], why: str) -> None:
        for done in waiting:
            done(Unavailable(why, code="no_leader"))
