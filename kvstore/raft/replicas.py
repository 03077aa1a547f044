"""Which peers the engine may send to, and which get a snapshot instead.

The engine believes that a peer is connected only while there is a connection with room, and no snapshot on its way: to
the others it sends nothing at all. So a lagging peer cannot put the whole log in memory (fault 20), and one whose log
ends before ours begins is not sent appends that it could only refuse. A peer that receives a snapshot gets signs of
life from here, so that it starts no election meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Protocol

from kvstore.env import Environment, Log
from kvstore.errors import KvError
from kvstore.raft.fsm import Checkpoint
from kvstore.raft.messages import Message, ReadProbe
from kvstore.raft.snapshot import Snapshots
from kvstore.raft.transport import Transport

# A peer that cannot take a snapshot (its disk is full) cannot take the next one either; each costs a flush here.
RETRY_S = 5.0


class EngineView(Protocol):
    @property
    def term(self) -> int: ...
    @property
    def is_leader(self) -> bool: ...
    def match_index(self, peer: str) -> int: ...
    def next_index(self, peer: str) -> int: ...
    def set_next_index(self, peer: str, index: int) -> None: ...
    def set_connected(self, peer: str, connected: bool) -> None: ...


class Replicas:
    """`send(peer, message)` sends without waiting for the log; `wake()` asks for a turn."""

    def __init__(
        self,
        engine: EngineView,
        env: Environment,
        transport: Transport,
        snapshots: Snapshots,
        send: Callable[[str, Message], None],
        wake: Callable[[], None],
        log: Log,
        *,
        heartbeat_s: float,
    ) -> None:
        self._engine = engine
        self._env = env
        self._transport = transport
        self._snapshots = snapshots
        self._send = send
        self._wake = wake
        self._log = log
        self._heartbeat_s = heartbeat_s
        self._full: set[str] = set()  # no room until the transport says `drained`
        self._wanted: set[str] = set()  # need a snapshot that is not begun yet
        self._receiving: set[str] = set()
        self._following: set[str] = set()  # have installed a snapshot, and are sent what came after it
        self._alive_due = 0.0
        self._retry_at: dict[str, float] = {}  # after a snapshot that failed; bounded by the members

    def connect(self, peer: str) -> None:
        """Tell the engine how things stand with a peer."""
        free = peer not in self._full and peer not in self._receiving and peer not in self._wanted
        self._engine.set_connected(peer, free and self._transport.connected(peer))

    def up(self, peer: str) -> None:
        self._full.discard(peer)
        self.connect(peer)

    def down(self, peer: str) -> None:
        self._full.discard(peer)
        self._engine.set_connected(peer, False)

    def took_no_more(self, peer: str, first_unsent: int) -> None:
        """An append was not taken: go on from there once there is room."""
        if self._transport.connected(peer):
            self._full.add(peer)
        self._engine.set_connected(peer, False)
        self._engine.set_next_index(peer, min(first_unsent, self._engine.next_index(peer)))

    def pause(self, peer: str) -> None:
        """Enough for one turn: the engine stops here, and goes on in the next one."""
        self._engine.set_connected(peer, False)
        self._env.scheduler.call_soon(self._resume, peer)

    def _resume(self, peer: str) -> None:
        self.connect(peer)
        self._wake()

    def needs_snapshot(self, peer: str) -> None:
        """The log begins after what a peer needs next. (Called from inside the engine: begun later, by `step`.)"""
        self._wanted.add(peer)
        self._following.discard(peer)  # the log holds that no more
        self._engine.set_connected(peer, False)

    def needed(self, flushed: int) -> int:
        """Of the log up to `flushed`, where that begins which must stay: what is to follow a snapshot would else be
        gone when it is installed, and the peer would need the next one. A peer that is away is not waited for."""
        if self._receiving:
            return 0
        self._following = {
            peer
            for peer in self._following
            if self._engine.match_index(peer) < flushed and self._transport.connected(peer)
        }
        # The last that it holds stays as well: what follows is sent with the term of the entry before it.
        return min([flushed, *map(self._engine.match_index, self._following)])

    @property
    def due(self) -> float | None:
        """When `step` should be called next though nothing else happens; None: no need."""
        return self._alive_due if self._receiving or self._wanted else None

    def step(self, now: float) -> None:
        """Once a turn of a leader."""
        self._wanted -= self._receiving
        wanted = {peer for peer in self._wanted if now >= self._retry_at.get(peer, now)}
        self._wanted -= wanted
        for peer in sorted(wanted):
            self._log.info("peer needs a snapshot", peer=peer)
            self._receiving.add(peer)
            self._snapshots.send(peer, partial(self._sent, peer))
        if (self._receiving or self._wanted) and now >= self._alive_due:
            self._alive_due = now + self._heartbeat_s
            for peer in sorted(self._receiving | self._wanted):
                self._send(peer, ReadProbe(self._engine.term, 0))

    def _sent(self, peer: str, error: KvError | None, sent: Checkpoint | None) -> None:
        self._receiving.discard(peer)
        if sent is not None:
            self._retry_at.pop(peer, None)
            self._following.add(peer)
            self._engine.set_next_index(peer, sent.index + 1)
            self._log.info("snapshot sent", peer=peer, index=sent.index)
        else:
            self._log.warning("snapshot not sent", peer=peer, error=str(error))
            # Cancelled by this node itself (it leads no more, say) says nothing about the peer.
            if error is not None and error.code != "closed":
                self._retry_at[peer] = self._env.clock.monotonic() + RETRY_S
        self.connect(peer)
        self._wake()

    def set_members(self, names: Collection[str]) -> None:
        """Who is no member any more gets no snapshot."""
        self._wanted.intersection_update(names)
        self._following.intersection_update(names)
        for peer in self._retry_at.keys() - set(names):
            del self._retry_at[peer]
        for peer in self._receiving - set(names):
            self._snapshots.cancel(peer)

    def leadership_lost(self) -> None:
        self._wanted.clear()
        self._following.clear()
        self._snapshots.cancel_all()
