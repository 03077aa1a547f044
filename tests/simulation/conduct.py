"""How a node behaves towards the others, beyond what safety demands: what keeps a healthy cluster undisturbed.

- **loyalty**: who heard a living leader within the minimum election timeout grants no vote and no pre-vote, but to
  whom the leader itself asked to take over;
- **pre-vote**: a term is raised only by a node to which a majority of the voters granted its pre-vote, or whom the
  leader asked;
- **deaf leader**: a leader that hears no majority of the voters for an election timeout leads no more;
- **appends in order**: what a leader sends to a peer continues what it sent before, or begins where the peer refused;
  only what may have been lost is sent again.

No Raft paper's safety proof needs these; a cluster that stays available does (Ongaro's thesis, 4.2.3, 6.2 and 9.6).
`Conduct` listens at the guard, where messages are judged, at the transport, and at the engine's tick. It keeps its own
record of who was heard when, and takes none of the product's.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from kvstore.raft import messages
from kvstore.raft.guard import Action, Campaign, Deliver, Send
from kvstore.raft.members import Configuration
from kvstore.raft.messages import (
    AppendEntries,
    AppendReply,
    Message,
    PreVote,
    PreVoteReply,
    ReadAck,
    ReadProbe,
    RequestVote,
    TimeoutNow,
)
from tests.simulation.ledger import Broken

if TYPE_CHECKING:
    from tests.simulation.watch import Watch

RULES = {
    "loyalty": "who hears a living leader grants no vote and no pre-vote, but in a hand-over",
    "pre-vote": "a term is raised only after a majority granted a pre-vote for it, or when the leader asked for it",
    "deaf leader": "a leader that hears no majority for an election timeout leads no more",
    "appends in order": "a leader sends a peer entry after entry: none twice that may not be lost, and it leaves none "
    "out that was refused",
}
_REQUEST_VOTE = 3  # the second byte of such a message
# A turn takes its time once, at its begin; what it does is judged by a clock that went on within it, by three or four
# stalls where there are some.
_SLACK_S = 0.6


class Conduct:
    """Of one process. Made once its `Watch` has begun."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        raft: Any = watch.raft
        self._raft = raft
        self._min_s = raft.config.election_min_ms / 1000
        self._max_s = raft.config.election_max_ms / 1000
        self._heard_leader_at = -math.inf
        self._leader = ""
        self._grants: dict[int, set[str]] = {}  # term -> who granted a pre-vote for it; of the newest few terms
        self._asked_for = 0  # the term that the leader asked this node to raise
        self._campaign: tuple[int, Configuration] | None = None  # the term, and what was in force as it began
        self._answered_at: dict[str, float] = {}  # what a leader heard from whom, in this term of its own
        self._led_term = 0
        self._led_from = 0.0
        self._quorum_of: object = None
        # To whom it has sent in which term up to which entry; nothing of a peer that may have lost some of them.
        self._sent: dict[str, tuple[int, int]] = {}
        # Up to where it had sent before an acknowledgement told of more.
        self._unnoted: dict[str, int] = {}
        # (peer, term) -> the lowest that it refused on this connection since its last acknowledgement
        self._refused: dict[tuple[str, int], int] = {}
        self._listen(raft)
        self._listen_to_appends(raft)

    def _listen(self, raft: Any) -> None:
        build_engine, tick, peer_down, send = raft._build_engine, raft._tick, raft.peer_down, raft._transport.send
        act = raft._act

        def acting(todo: list[Action], now: float) -> None:
            if any(isinstance(action, Campaign) for action in todo):
                self._campaign = (raft._engine.term + 1, self._watch.configuration())
            act(todo, now)

        def building() -> None:
            build_engine()
            self._listen_to_guard()
            self._listen_to_replicas()

        def ticking(now: float) -> None:
            tick(now)
            if raft._engine.is_leader:
                self._watch._judge(self._leads, now)

        def losing(name: str) -> None:
            if name in (self._leader, raft._engine.leader):
                self._heard_leader_at = -math.inf
            peer_down(name)

        def sending(peer: str, body: bytes) -> bool:
            if body[1] == _REQUEST_VOTE:
                self._watch._judge(self._asks_for_votes, messages.decode(body))
            return send(peer, body)  # type: ignore[no-any-return]

        raft._act = acting
        raft._build_engine, raft._tick, raft.peer_down, raft._transport.send = building, ticking, losing, sending
        self._listen_to_guard()

    def _listen_to_guard(self) -> None:
        guard = self._raft._guard
        receive = guard.receive

        def receiving(peer: str, message: Message, now: float) -> list[Action]:
            term = self._raft._engine.term
            actions: list[Action] = receive(peer, message, now)
            self._watch._judge(self._received, peer, message, term, now, actions)
            return actions

        guard.receive = receiving

    def _listen_to_appends(self, raft: Any) -> None:
        outbox = raft._outbox
        add_append, peer_up, peer_down = outbox.add_append, raft.peer_up, raft.peer_down

        def adding(peer: str, m: dict[str, Any], needs: int) -> bool:
            if m["entries"]:
                self._watch._judge(self._appends, peer, m["term"], m["prevLogIdx"] + 1, len(m["entries"]))
            return add_append(peer, m, needs)  # type: ignore[no-any-return]

        def connected(name: str) -> None:
            self._sent.pop(name, None)
            for key in [key for key in self._refused if key[0] == name]:
                del self._refused[key]
            peer_up(name)

        def disconnected(name: str) -> None:
            self._sent.pop(name, None)
            peer_down(name)

        outbox.add_append, raft.peer_up, raft.peer_down = adding, connected, disconnected
        self._listen_to_replicas()

    def _listen_to_replicas(self) -> None:
        replicas = self._raft._replicas
        took_no_more, snapshot_sent = replicas.took_no_more, replicas._sent

        def leaving(peer: str, first_unsent: int) -> None:
            self._sent.pop(peer, None)
            took_no_more(peer, first_unsent)

        def installed(peer: str, *outcome: Any) -> None:
            self._sent.pop(peer, None)
            snapshot_sent(peer, *outcome)

        replicas.took_no_more, replicas._sent = leaving, installed

    # --- what it hears ------------------------------------------------------------------------------------------------

    def _received(self, peer: str, m: Message, term: int, now: float, actions: list[Action]) -> None:
        """A message was judged, when this node was in `term`."""
        if isinstance(m, (AppendReply, ReadAck)):
            if m.term == term:
                self._answered_at[peer] = now
            if isinstance(m, AppendReply) and m.term == term:
                self._answered(peer, m)
        elif isinstance(m, (AppendEntries, ReadProbe)):
            if m.term >= term and actions:
                self._heard_leader_at, self._leader = now, peer
        elif isinstance(m, PreVoteReply):
            if m.granted:
                self._grants.setdefault(m.next_term, set()).add(peer)
        elif isinstance(m, TimeoutNow):
            if m.term == term:
                self._asked_for = term + 1
        elif isinstance(m, PreVote):
            for action in actions:
                if isinstance(action, Send) and isinstance(action.message, PreVoteReply) and action.message.granted:
                    self._grants_a_vote(peer, "a pre-vote", m.next_term, now)
        elif isinstance(m, RequestVote) and not m.transfer and any(isinstance(action, Deliver) for action in actions):
            self._grants_a_vote(peer, "a vote", m.term, now)

    # --- rules --------------------------------------------------------------------------------------------------------

    def _grants_a_vote(self, candidate: str, what: str, term: int, now: float) -> None:
        since_s = now - self._heard_leader_at
        if since_s < self._min_s:
            message = f"{self._watch.name} considers {what} for {candidate} in term {term}, and heard its leader"
            raise Broken("loyalty", f"{message} {self._leader} {since_s:.3f} s ago")

    def _asks_for_votes(self, m: RequestVote) -> None:
        name = self._watch.name
        if m.transfer:
            if m.term != self._asked_for:
                raise Broken(
                    "pre-vote", f"{name} says that its leader asked it to raise the term to {m.term}; it did not"
                )
            return
        granted = {name, *self._grants.get(m.term, ())}
        for term in [term for term in self._grants if term < m.term]:
            del self._grants[term]
        # What is sent now may have waited for the disk, and the log may have changed meanwhile.
        began_in, configuration = self._campaign or (0, self._watch.configuration())
        if began_in != m.term:
            configuration = self._watch.configuration()
        if len(granted & configuration.voters) < configuration.quorum:
            told = ", ".join(sorted(granted - {name})) or "nobody"
            raise Broken("pre-vote", f"{name} raises its term to {m.term}, for which {told} granted a pre-vote")

    def _answered(self, peer: str, m: AppendReply) -> None:
        """Its next append to this peer continues what it sent, or begins at the lowest refused entry. (A refusal that
        is no lower than one before it answers what was sent before the leader heard of that one.)"""
        sent_term, last = self._sent.get(peer, (0, 0))
        is_known = sent_term == m.term
        if m.success:
            self._refused.pop((peer, m.term), None)
            if is_known and m.next_index - 1 > last:
                # It goes on behind that; or where it was, if its own disk does not hold as much yet: an acknowledgement
                # beyond that is lowered to it.
                self._sent[peer], self._unnoted[peer] = (m.term, m.next_index - 1), last
        elif m.next_index < self._refused.get((peer, m.term), math.inf):
            self._refused[peer, m.term] = m.next_index
            begins = max(m.next_index, self._raft._guard._acked.get(peer, 0) + 1)
            self._sent[peer] = (m.term, min(last, begins - 1) if is_known else begins - 1)

    def _appends(self, peer: str, term: int, first: int, count: int) -> None:
        sent_term, last = self._sent.get(peer, (0, 0))
        if sent_term == term and first not in (last + 1, self._unnoted.pop(peer, last) + 1):
            what = "they may not be lost" if first <= last else "those between were refused, or never sent"
            message = f"{self._watch.name} sends entries from {first} on to {peer} in term {term}, after {last}"
            raise Broken("appends in order", f"{message}; {what}", first, last)
        self._sent[peer] = (term, first + count - 1)

    def _leads(self, now: float) -> None:
        """It leads, and its engine has just had the occasion not to."""
        term = self._raft._engine.term
        configuration = self._raft._members
        if term != self._led_term or configuration is not self._quorum_of:
            # A new leader, or one with other voters, has a whole timeout to hear from them.
            self._led_term, self._quorum_of, self._led_from = term, configuration, now
        if now - self._led_from <= self._max_s + _SLACK_S:
            return
        due = now - self._max_s - _SLACK_S
        heard = sum(
            1
            for member in configuration.members
            if member.voter
            and (member.name == self._watch.name or self._answered_at.get(member.name, -math.inf) >= due)
        )
        if heard < configuration.quorum:
            message = (
                f"{self._watch.name} leads term {term}, and has heard {heard} of the voters, itself among them, in"
            )
            raise Broken("deaf leader", f"{message} the last {self._max_s + _SLACK_S:.1f} s")
