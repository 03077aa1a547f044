"""Vets every message before the engine sees it, and decides what it may promise. Pure: no clock, no socket, no engine.

pysyncobj elects, replicates and commits, but trusts what it is told (`docs/raft.md` lists its faults by number). The
guard stands in between. A message goes in with the time; out come actions for the node to carry out, in order. It
reads the engine's and the log's state through the two views below, and changes neither.

The rules, each a method or a marked line of one:

- **stamps**: an acknowledgement from another term is dropped (fault 3).
- **appends**: a prefix that matches is never removed; the log is truncated only at a conflict, and never at or below
  the commit index; the acknowledgement covers what the message proved, and the commit index is clamped to it
  (faults 2, 4). A refusal names where to go on: the end of the log, or the commit index + 1 (fault 20).
- **acknowledgements**: from members only (fault 18); the leader counts itself only for what its own disk holds, so one
  beyond the durable index is delivered lowered to it at once (it is also a sign of life), and raised when the sync
  lands (faults 1, 16).
- **votes**: one per voter and term, voters only (fault 13); none while a leader lives, except in a hand-over; a
  pre-vote before a term is raised (fault 12); a lower-term leader is told.
- **reads**: a probe is acknowledged only in its own term.
- whatever is malformed, or makes no sense at this node, is dropped and counted in `dropped`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol, Union

from msgspec import Struct

from kvstore.raft.elections import Elections
from kvstore.raft.fsm import EntryKind
from kvstore.raft.members import Configuration, MalformedConfiguration
from kvstore.raft.messages import (
    AppendEntries,
    AppendReply,
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

_KINDS = frozenset(int(kind) for kind in EntryKind)


class SafetyViolation(Exception):
    """What Raft proves impossible was seen: a committed entry would have to change. The node stops."""


class EngineView(Protocol):
    @property
    def term(self) -> int: ...
    @property
    def is_leader(self) -> bool: ...
    @property
    def is_candidate(self) -> bool: ...
    @property
    def commit_index(self) -> int: ...
    def match_index(self, peer: str) -> int: ...


class LogView(Protocol):
    @property
    def first_index(self) -> int: ...
    @property
    def last_index(self) -> int: ...
    @property
    def last_term(self) -> int: ...
    @property
    def durable_index(self) -> int: ...
    def term_at(self, index: int) -> int | None: ...


class Send(Struct, frozen=True, gc=False):
    """Send once everything that the log holds by now is durable."""

    peer: str
    message: Message


class Deliver(Struct, frozen=True):
    """Hand the engine this message of its own form."""

    peer: str
    message: dict[str, Any]


class DeliverAck(Struct, frozen=True, gc=False):
    """`is_news`: the peer said it just now, and so is alive."""

    peer: str
    next_index: int
    success: bool
    is_news: bool = True


class AdoptTerm(Struct, frozen=True, gc=False):
    term: int


class Campaign(Struct, frozen=True, gc=False):
    """Raise the term and ask for votes, now."""

    transfer: bool = False


class Pass(Struct, frozen=True, gc=False):
    """A vetted message about reads, for the node's own use."""

    peer: str
    message: Union[ReadAck, ReadRequest, ReadReply]


class Removed(Struct, frozen=True, gc=False):
    """This node is no longer a member."""


Action = Union[Send, Deliver, DeliverAck, AdoptTerm, Campaign, Pass, Removed]


class Guard:
    """The rules, for one node.

    The node keeps up to date: `members`, the configuration in force, committed or not; `applied_members`, the last one
    that it applied, empty before the first; and `was_member`, whether that one holds this node with its node id.
    """

    def __init__(self, name: str, engine: EngineView, log: LogView, elections: Elections) -> None:
        self.name = name
        self.engine = engine
        self.log = log
        self.elections = elections
        self.members = Configuration()
        self.applied_members = Configuration()
        self.applied_last = (0, 0)  # term and index of the last applied entry, kept up to date by the node
        self.was_member = False
        self.dropped: Counter[str] = Counter()
        self._acked: dict[str, int] = {}  # highest index that each peer has acknowledged in this term
        self._heard_at: dict[str, float] = {}  # when each peer last answered in this term
        self._refused: dict[str, int] = {}  # the lowest index that a peer's refusals named, until it acknowledges
        self._leader_of: tuple[int, str] = (0, "")
        self._handlers: dict[type, Callable[..., list[Action]]] = {
            AppendEntries: self._append_entries,
            AppendReply: self._append_reply,
            RequestVote: self._request_vote,
            VoteReply: self._vote_reply,
            PreVote: self._pre_vote,
            PreVoteReply: self._pre_vote_reply,
            TermNotice: self._term_notice,
            TimeoutNow: self._timeout_now,
            ReadProbe: self._read_probe,
            ReadAck: self._read_message,
            ReadRequest: self._read_message,
            ReadReply: self._read_message,
        }

    def set_members(self, members: Configuration) -> None:
        """The configuration in force from now on. What a name acknowledged counts for the node that had it then: one
        that joins under the name of a removed one holds nothing yet."""
        for name in self._heard_at.keys() | self._acked.keys() | self._refused.keys():
            before, now = self.members.get(name), members.get(name)
            if before is None or now is None or (before.node_id and before.node_id != now.node_id):
                self._acked.pop(name, None)
                self._refused.pop(name, None)
                self._heard_at.pop(name, None)
        self.members = members

    def set_applied_members(self, payload: bytes, node_id: str) -> None:
        """`payload` as the state machine holds it; this node's id tells it from one that had its name before."""
        self.applied_members = Configuration.decode(payload) if payload else Configuration()
        self.was_member = self.applied_members.holds(self.name, node_id)

    def receive(self, peer: str, message: Message, now: float) -> list[Action]:
        """What to do about a message from `peer`."""
        return self._handlers[type(message)](peer, message, now)

    def _drop(self, reason: str) -> list[Action]:
        self.dropped[reason] += 1
        return []

    # --- log replication, as a follower -------------------------------------------------------------------------------

    def _append_entries(self, peer: str, m: AppendEntries, now: float) -> list[Action]:
        engine, log = self.engine, self.log
        if m.term < engine.term:
            return [Send(peer, TermNotice(engine.term))]
        if not _well_formed(m):
            return self._drop("malformed")
        if not self._is_the_leader(peer, m.term):
            return self._drop("two_leaders")
        self.elections.heard_leader(now)
        commit = engine.commit_index
        previous, entries = m.prev_index, m.entries
        end = previous + len(entries)
        if previous < commit:
            # What is committed here matches in every later leader's log, whether we still hold it or not.
            if end < commit:
                return self._heartbeat(peer, m, end, end + 1, True)
            if end > previous and entries[commit - previous - 1][0] != log.term_at(commit):
                raise SafetyViolation(f"{peer} sent another entry {commit} in term {m.term}; ours is committed")
            entries = entries[commit - previous :]
            previous = commit
        elif previous > log.last_index:
            return self._heartbeat(peer, m, commit, log.last_index + 1, False)
        elif log.term_at(previous) != m.prev_term:
            if previous == commit:
                raise SafetyViolation(f"{peer} claims term {m.prev_term} for entry {commit}; ours is committed")
            return self._heartbeat(peer, m, commit, commit + 1, False)
        matched = 0
        for term, _ in entries:
            if log.term_at(previous + matched + 1) != term:
                break
            matched += 1
        previous += matched
        if matched == len(entries):
            return self._heartbeat(peer, m, previous, previous + 1, True)
        new = [(payload, previous + 1 + at, term) for at, (term, payload) in enumerate(entries[matched:])]
        previous_term = log.term_at(previous)
        assert previous_term is not None
        assert previous >= commit
        message = {
            "type": "append_entries",
            "term": m.term,
            "commit_index": min(m.commit_index, end),
            "prevLogIdx": previous,
            "prevLogTerm": previous_term,
            "entries": new,
        }
        return [Deliver(peer, message), Send(peer, AppendReply(m.term, end + 1, True))]

    def _heartbeat(self, peer: str, m: AppendEntries, proven: int, next_index: int, success: bool) -> list[Action]:
        """An append that changes nothing in the log, in the form that the engine cannot truncate by: from its end."""
        message = {
            "type": "append_entries",
            "term": m.term,
            "commit_index": min(m.commit_index, proven),
            "prevLogIdx": self.log.last_index,
            "prevLogTerm": self.log.last_term,
            "entries": [],
        }
        return [Deliver(peer, message), Send(peer, AppendReply(m.term, next_index, success))]

    def _is_the_leader(self, peer: str, term: int) -> bool:
        if self._leader_of[0] < term and not (self.engine.is_leader and self.engine.term == term):
            self._leader_of = (term, peer)
        return self._leader_of == (term, peer)

    # --- log replication, as the leader -------------------------------------------------------------------------------

    def heard_since(self, then: float) -> set[str]:
        """Who has answered this leader in its term since then."""
        return {peer for peer, at in self._heard_at.items() if at >= then}

    def _append_reply(self, peer: str, m: AppendReply, now: float) -> list[Action]:
        engine = self.engine
        if m.term > engine.term:
            return [AdoptTerm(m.term)]
        if m.term != engine.term or not engine.is_leader:
            return self._drop("stale_acknowledgement")
        if self.members.get(peer) is None:
            return self._drop("not_a_member")
        if not 1 <= m.next_index <= self.log.last_index + 1:
            return self._drop("malformed")
        self._heard_at[peer] = now
        if not m.success:
            # What a peer acknowledged it holds; and it is told once where to go on: on one connection, whatever it
            # refuses until it acknowledges again was sent before the answer to its first refusal. Only a lower place
            # is news: of several appends that were on their way, the first was refused for a conflict, and those
            # behind it for the gap before them.
            next_index = max(m.next_index, self._acked.get(peer, 0) + 1)
            if self._refused.get(peer, next_index + 1) <= next_index:
                return [DeliverAck(peer, engine.match_index(peer) + 1, True)]
            self._refused[peer] = next_index
            return [DeliverAck(peer, next_index, False)]
        self._refused.pop(peer, None)
        acked = max(self._acked.get(peer, 0), m.next_index - 1)
        self._acked[peer] = acked
        return [DeliverAck(peer, min(acked, self.log.durable_index) + 1, True)]

    def raise_acks(self) -> list[Action]:
        """After a sync of the leader: acknowledgements that had to be lowered and now count for more."""
        if not self.engine.is_leader:
            return []
        durable = self.log.durable_index
        return [
            DeliverAck(peer, min(acked, durable) + 1, True, is_news=False)
            for peer, acked in self._acked.items()
            if min(acked, durable) > self.engine.match_index(peer) and self.members.get(peer) is not None
        ]

    def peer_up(self, peer: str) -> None:
        """A new connection: what was refused on the old one may have to be said again."""
        self._refused.pop(peer, None)

    def term_changed(self) -> None:
        """What was acknowledged in an earlier term counts no more."""
        self._acked.clear()
        self._refused.clear()
        self._heard_at.clear()

    # --- elections ----------------------------------------------------------------------------------------------------

    def _request_vote(self, peer: str, m: RequestVote, now: float) -> list[Action]:
        engine = self.engine
        if m.term < engine.term:
            return [Send(peer, TermNotice(engine.term))]
        if not m.transfer and self._loyal(now):
            return self._drop("vote_refused_loyal")
        message = {
            "type": "request_vote",
            "term": m.term,
            "last_log_index": m.last_log_index,
            "last_log_term": m.last_log_term,
        }
        return [Deliver(peer, message)]

    def _loyal(self, now: float) -> bool:
        return self.engine.is_leader or self.elections.loyal(now)

    def _vote_reply(self, peer: str, m: VoteReply, _now: float) -> list[Action]:
        engine = self.engine
        if m.term != engine.term or not engine.is_candidate:
            return self._drop("stale_vote")
        if not self.members.is_voter(peer):
            return self._drop("not_a_voter")
        if not self.elections.first_vote(m.term, peer):
            return self._drop("repeated_vote")
        return [Deliver(peer, {"type": "response_vote", "term": m.term})]

    def tick(self, now: float) -> list[Action]:
        """Called each turn: begins a pre-vote when this node has waited for a leader long enough."""
        engine, elections = self.engine, self.elections
        if engine.is_leader:
            return []
        if not self.members.is_voter(self.name):
            return self._ask_whether_removed(now) if now >= elections.deadline else []
        if self.members.quorum == 1:
            return [Campaign()]  # there is nobody to ask, nor to wait for
        if now < elections.deadline:
            return []
        elections.begin_pre_vote(engine.term + 1, self.name, now)
        ask = PreVote(engine.term, engine.term + 1, self.log.last_index, self.log.last_term)
        return [Send(voter, ask) for voter in sorted(self.members.voters) if voter != self.name]

    def _ask_whether_removed(self, now: float) -> list[Action]:
        """A leader stops sending to a node when its removal enters the log, so the node may never learn that it was
        committed. A node that was a member and is in no configuration any more asks, as it would for votes."""
        self.elections.begin_pre_vote(self.engine.term + 1, self.name, now)
        if not self.was_member:
            return []
        ask = PreVote(self.engine.term, self.engine.term + 1, self.log.last_index, self.log.last_term)
        return [Send(voter, ask) for voter in sorted(self.members.voters) if voter != self.name]

    def _pre_vote(self, peer: str, m: PreVote, now: float) -> list[Action]:
        engine, log = self.engine, self.log
        up_to_date = (m.last_log_term, m.last_log_index) >= (log.last_term, log.last_index)
        # A removal that is not committed may come to nothing, and a member that we do not know may be newer than our
        # log; only where what we applied is no older was it removed.
        removed = (
            bool(self.applied_members.members)
            and self.applied_members.get(peer) is None
            and self.members.get(peer) is None
            and self.applied_last >= (m.last_log_term, m.last_log_index)
        )
        granted = m.next_term > engine.term and up_to_date and not removed and not self._loyal(now)
        return [Send(peer, PreVoteReply(engine.term, m.next_term, granted, removed))]

    def _pre_vote_reply(self, peer: str, m: PreVoteReply, _now: float) -> list[Action]:
        if m.removed:
            # An answer to what was asked before a leader spoke, or by one that had this name before, says nothing.
            is_asked = m.next_term == self.elections.pre_vote_term
            # One that restarted may not have applied yet what made it a voter; its log says so.
            was_member = self.was_member or self.members.is_voter(self.name)
            return [Removed()] if was_member and is_asked else self._drop("stale_removal")
        if m.term > self.engine.term:
            return [AdoptTerm(m.term)]
        if not self.members.is_voter(self.name):
            return []
        if not m.granted or not self.members.is_voter(peer) or m.next_term != self.engine.term + 1:
            return []
        if not self.members.has_quorum(self.elections.count_pre_vote(m.next_term, peer)):
            return []
        self.elections.end_pre_vote()
        return [Campaign()]

    def _term_notice(self, _peer: str, m: TermNotice, _now: float) -> list[Action]:
        return [AdoptTerm(m.term)] if m.term > self.engine.term else self._drop("stale_term_notice")

    def _timeout_now(self, peer: str, m: TimeoutNow, _now: float) -> list[Action]:
        if m.term != self.engine.term or self._leader_of != (m.term, peer) or not self.members.is_voter(self.name):
            return self._drop("stale_hand_over")
        self.elections.transfer_term = m.term + 1
        return [Campaign(transfer=True)]

    # --- reads --------------------------------------------------------------------------------------------------------

    def _read_probe(self, peer: str, m: ReadProbe, now: float) -> list[Action]:
        if m.term < self.engine.term:
            return [Send(peer, TermNotice(self.engine.term))]
        if not self._is_the_leader(peer, m.term):
            return self._drop("two_leaders")
        self.elections.heard_leader(now)
        adopt: list[Action] = [AdoptTerm(m.term)] if m.term > self.engine.term else []
        return [*adopt, Send(peer, ReadAck(m.term, m.round))]

    def _read_message(self, peer: str, m: ReadAck | ReadRequest | ReadReply, now: float) -> list[Action]:
        if isinstance(m, ReadAck):
            if m.term != self.engine.term or not self.engine.is_leader or self.members.get(peer) is None:
                return self._drop("stale_acknowledgement")
            self._heard_at[peer] = now
        return [Pass(peer, m)]


def _well_formed(m: AppendEntries) -> bool:
    """Terms never fall along a log, nor pass the leader's own; no entry is of a kind that the engine would act on."""
    term = m.prev_term
    for entry_term, payload in m.entries:
        if entry_term < term or not payload or payload[0] not in _KINDS:
            return False
        if payload[0] == EntryKind.MEMBERS:
            try:
                Configuration.decode(payload[1:])
            except MalformedConfiguration:
                return False
        term = entry_term
    return term <= m.term and m.prev_index >= 1
