"""What a node has to say to its peers, until it may be said.

A message waits until all that it promises is on disk: it names the log position that it needs. An append that goes to
several peers is encoded once.

The engine sends an empty append to every peer whenever its commit index has risen, and each is acknowledged. Under load
the next append says as much a moment later; so such a **commit notice** is held for `NOTICE_DELAY_S`, and dropped where
an append with entries goes first. An answer to a peer's read lets it go at once: the peer waits for that commit.

Bounded: in one turn at most `PEER_TURN_BYTES_MAX` of appends are taken for a peer; the caller then tells the engine
that the peer is not there, so that one lagging peer cannot put the whole log in memory (fault 20). What waits for a
slow disk is bounded by that and by the few replies that a follower owes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvstore.raft import messages
from kvstore.raft.messages import AppendEntries, Message, ReadReply

# Two full appends: enough to keep a connection busy for a turn, little enough to hold for each peer.
PEER_TURN_BYTES_MAX = 8 * 1024 * 1024
# Longer than a closed loop of one client takes to send its next write; what a replica's local reads may lag by more.
NOTICE_DELAY_S = 0.005


class _Waiting:
    __slots__ = ("append", "message", "needs", "peer")

    def __init__(self, peer: str, message: Message | None, append: AppendEntries | None, needs: int) -> None:
        self.peer = peer
        self.message = message
        self.append = append
        self.needs = needs


class Outbox:
    """`send(peer, body)` is the transport's: False if it does not take the frame."""

    def __init__(self, send: Callable[[str, bytes], bool], monotonic: Callable[[], float]) -> None:
        self._send = send
        self._monotonic = monotonic
        self._notices: dict[str, _Waiting] = {}
        self._notices_due = 0.0
        self._told: dict[str, int] = {}  # the commit index that each peer was sent, or will be
        self._waiting: list[_Waiting] = []
        self._turn_bytes: dict[str, int] = {}  # of the appends with entries to each peer
        self._turn_empty: dict[str, _Waiting] = {}  # the append without entries to each peer
        self._last: tuple[AppendEntries, bytes] | None = None  # the last encoded append

    def add(self, peer: str, message: Message, needs: int) -> None:
        """Send once the log is durable up to position `needs`."""
        if type(message) is ReadReply and peer in self._notices:
            self._waiting.append(self._notices.pop(peer))
        self._waiting.append(_Waiting(peer, message, None, needs))

    def add_append(self, peer: str, m: dict[str, Any], needs: int) -> bool:
        """An append in the engine's form. False: taken, but no more for this peer in this turn, please."""
        entries = m["entries"]
        append = AppendEntries(
            m["term"],
            m["commit_index"],
            m["prevLogIdx"],
            m["prevLogTerm"],
            tuple([(term, payload) for payload, _, term in entries]),
        )
        if not entries and append.commit_index > self._told.get(peer, append.commit_index):
            if not self._notices:
                self._notices_due = self._monotonic() + NOTICE_DELAY_S
            self._notices[peer] = _Waiting(peer, None, append, needs)
            self._told[peer] = append.commit_index
            return True
        if not entries and peer in self._turn_bytes:
            return True  # one with entries goes in this turn, and says as much
        self._notices.pop(peer, None)
        self._told[peer] = append.commit_index
        waiting = _Waiting(peer, None, append, needs)
        self._waiting.append(waiting)
        if not entries:
            self._turn_empty[peer] = waiting
            return True
        empty = self._turn_empty.pop(peer, None)
        if empty in self._waiting:
            self._waiting.remove(empty)
        size = self._turn_bytes.get(peer, 0) + sum(len(entry[0]) for entry in entries)
        self._turn_bytes[peer] = size
        return size < PEER_TURN_BYTES_MAX

    def send_ready(self, synced_position: int) -> dict[str, int]:
        """Send what need not wait any longer. Gives the peers that took no more, each with the index of the first
        entry that was not sent to it."""
        if self._notices and self._monotonic() >= self._notices_due:
            self._waiting.extend(self._notices.values())
            self._notices.clear()
        refused: dict[str, int] = {}
        held: list[_Waiting] = []
        for waiting in self._waiting:
            if waiting.needs > synced_position:
                held.append(waiting)
            elif waiting.append is None:
                assert waiting.message is not None
                # A reply that is not taken is lost, as it may be on any network; the peer asks again.
                self._send(waiting.peer, messages.encode(waiting.message))
            elif waiting.peer not in refused and not self._send(waiting.peer, self._encoded(waiting.append)):
                refused[waiting.peer] = waiting.append.prev_index + 1
        self._waiting = held
        return refused

    def _encoded(self, append: AppendEntries) -> bytes:
        last = self._last
        if last is not None and _same(last[0], append):
            return last[1]
        body = messages.encode(append)
        self._last = (append, body)
        return body

    def end_turn(self) -> None:
        """A new turn may take as much again for each peer; nothing large is kept in between."""
        self._turn_bytes.clear()
        self._turn_empty.clear()
        self._last = None

    def drop_other_terms(self, term: int) -> None:
        """What was promised in another term is not said any more."""
        self._notices.clear()
        self._told.clear()
        self._waiting = [w for w in self._waiting if (w.append or w.message).term == term]  # type: ignore[union-attr]

    def drop(self) -> None:
        """Say nothing of what waits."""
        self._notices.clear()
        self._told.clear()
        self._waiting.clear()

    @property
    def due(self) -> float | None:
        """When `send_ready` should be called next though nothing else happens; None: no need."""
        return self._notices_due if self._notices else None

    def __len__(self) -> int:
        """How many wait, for the disk or for a better moment."""
        return len(self._waiting) + len(self._notices)


def _same(one: AppendEntries, other: AppendEntries) -> bool:
    """Equal, without comparing payloads: in one turn of one leader the place in the log names them."""
    return (
        one.prev_index == other.prev_index
        and len(one.entries) == len(other.entries)
        and one.commit_index == other.commit_index
        and one.term == other.term
        and one.prev_term == other.prev_term
    )
