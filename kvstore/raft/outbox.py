"""What a node has to say to its peers, until it may be said.

A message waits until all that it promises is on disk: it names the log position that it needs. Of a leader's appends to
one peer in a turn, empty ones are dropped where another carries as much (the engine sends one for each new commit
index). An append that goes to several peers is encoded once.

Bounded: in one turn at most `PEER_TURN_BYTES_MAX` of appends are taken for a peer; the caller then tells the engine
that the peer is not there, so that one lagging peer cannot put the whole log in memory (fault 20). What waits for a
slow disk is bounded by that and by the few replies that a follower owes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvstore.raft import messages
from kvstore.raft.messages import AppendEntries, Message

# Two full appends: enough to keep a connection busy for a turn, little enough to hold for each peer.
PEER_TURN_BYTES_MAX = 8 * 1024 * 1024


class _Waiting:
    __slots__ = ("append", "message", "needs", "peer")

    def __init__(self, peer: str, message: Message | None, append: AppendEntries | None, needs: int) -> None:
        self.peer = peer
        self.message = message
        self.append = append
        self.needs = needs


class Outbox:
    """`send(peer, body)` is the transport's: False if it does not take the frame."""

    def __init__(self, send: Callable[[str, bytes], bool]) -> None:
        self._send = send
        self._waiting: list[_Waiting] = []
        self._turn_bytes: dict[str, int] = {}
        self._last: tuple[AppendEntries, bytes] | None = None  # the last encoded append

    def add(self, peer: str, message: Message, needs: int) -> None:
        """Send once the log is durable up to position `needs`."""
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
        waiting = self._waiting
        for at in range(len(waiting) - 1, -1, -1):
            other = waiting[at]
            if other.peer == peer and other.append is not None:
                if not entries:
                    if other.append.entries and other.append.commit_index >= append.commit_index:
                        return True  # that one says as much
                    if not other.append.entries:
                        del waiting[at]
                elif not other.append.entries:
                    del waiting[at]
                break
        waiting.append(_Waiting(peer, None, append, needs))
        size = self._turn_bytes.get(peer, 0) + sum(len(entry[0]) for entry in entries)
        self._turn_bytes[peer] = size
        return size < PEER_TURN_BYTES_MAX

    def send_ready(self, synced_position: int) -> dict[str, int]:
        """Send what need not wait any longer. Gives the peers that took no more, each with the index of the first
        entry that was not sent to it."""
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
        self._last = None

    def drop_other_terms(self, term: int) -> None:
        """What was promised in another term is not said any more."""
        self._waiting = [w for w in self._waiting if (w.append or w.message).term == term]  # type: ignore[union-attr]

    def drop(self) -> None:
        """Say nothing of what waits."""
        self._waiting.clear()

    def __len__(self) -> int:
        return len(self._waiting)


def _same(one: AppendEntries, other: AppendEntries) -> bool:
    """Equal, without comparing payloads: in one turn of one leader the place in the log names them."""
    return (
        one.prev_index == other.prev_index
        and len(one.entries) == len(other.entries)
        and one.commit_index == other.commit_index
        and one.term == other.term
        and one.prev_term == other.prev_term
    )
