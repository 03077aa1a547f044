"""Peers: who is connected to whom. Moves opaque bodies between the nodes of a cluster; knows nothing of Raft messages.

Each node dials every peer and sends its messages only on the connection that it dialled; it receives on those that it
accepted. So there is nothing to decide when two nodes dial at once, and each direction is first in, first out. A
message may be lost with its connection, and is never sent again here: Raft does that.

Rules
- `send` never blocks and never holds more than `queue_bytes_max` per peer: past that it returns False, and the
  handler's `peer_drained` says when the queue is below a quarter of it again.
- A newer connection of the same peer and purpose replaces the older one, which is closed before the newer one's first
  body is delivered.
- The handler is called on the event loop, never from inside a call into here (but for `accept`, see there).
- Every refusal is counted by its code in `refused`, and logged seldom (`SeldomLog`).
- Whether a name with its node id may connect is the handler's decision, asked at each handshake, in both directions.

Streams (`open_stream`, `accept_streams`) are further connections between the same nodes, both ways, for what must not
stand in the messages' way: snapshots.

TLS will be an argument of `Network.listen` and `Network.connect` in `env.py`, with the peer's certificate handed to
`TransportHandler.accept`; nothing else here depends on it.
"""

from __future__ import annotations

import asyncio
import errno
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Protocol, cast

from kvstore.env import Environment, Listener, Log, Timer
from kvstore.errors import KvError, StartupError, Unavailable, error_for
from kvstore.raft.connection import FRAME_BYTES_MAX, TICK_S, Connection, Hello, Identity, Purpose
from kvstore.seldom import SeldomLog

__all__ = ["Connection", "Identity", "Purpose", "StreamHandler", "Transport", "TransportHandler"]

QUEUE_BYTES_MAX = 16 * 1024 * 1024
# A peer that restarts is dialled again soon; one that stays away costs one attempt in two seconds.
RECONNECT_MIN_S, RECONNECT_MAX_S = 0.05, 2.0
CONNECT_TIMEOUT_S = 2.0
# What a handshake takes at most where nothing is wrong. (Two nodes that dial each other anew at each other's call must
# not do so for ever.)
HANDSHAKE_S = 0.25
# Connections that have not said who they are. Peers are few and quick; more are a port scan or a mistake.
STRANGERS_MAX = 64


class TransportHandler(Protocol):
    def accept(self, identity: Identity) -> tuple[str, str] | None:
        """May this node talk with us? None is welcome, else (error code, message): `member_unknown` or
        `node_identity_changed`. Asked for the node that we reached as well as for one that reached us, and may itself
        call `set_peers`."""

    def judge(self, identity: Identity) -> tuple[str, str] | None:
        """`accept` for a connection that is open already: the configuration may have changed. Has no effects."""

    def peer_up(self, name: str) -> None:
        """`send` to this peer works from now on."""

    def peer_down(self, name: str) -> None:
        """`send` to this peer no longer works; what was queued may be lost. Not called after `stop`, nor for a peer
        that `set_peers` dropped."""

    def peer_drained(self, name: str) -> None:
        """The queue of a peer, which had been above its low mark, is below it again."""

    def received(self, name: str, body: bytes) -> None:
        """A body from this peer. Must not raise: an exception closes the connection and goes to the loop's
        exception handler."""


class StreamHandler(Protocol):
    """One stream's user, on either side. `received` may call `stream.pause_reading()`."""

    def opened(self, stream: Connection) -> None:
        """`stream.send`, `flush`, `has_room` and `close` may be used. Opposite to messages, both sides may send."""

    def received(self, peer: str, body: bytes) -> None: ...

    def drained(self) -> None:
        """There was no room in the stream's queue; now there is."""

    def closed(self, error: KvError) -> None:
        """The stream is gone, or could not be opened; called once, last."""


class _Link:
    """Our way to one peer: the connection that we dial, again and again."""

    __slots__ = ("address", "connection", "delay_s", "dialled_at", "name", "timer")

    def __init__(self, name: str, address: str) -> None:
        self.name = name
        self.address = address
        self.connection: Connection | None = None
        self.delay_s = RECONNECT_MIN_S
        self.dialled_at = 0.0
        self.timer: Timer | None = None


class Transport:
    """All methods are to be called on the event loop.

    `refused` counts refusals by error code, ours and those of others about us. `dropped` counts open connections that
    ended otherwise than by being closed: the other side was silent (`timeout`), took nothing (`overloaded`), ….
    """

    def __init__(
        self,
        env: Environment,
        identity: Identity,
        listen_address: str,
        handler: TransportHandler,
        *,
        log: Log | None = None,
        queue_bytes_max: int = QUEUE_BYTES_MAX + 1024,  # room for two frames at their cap with their headers
        frame_bytes_max: int = FRAME_BYTES_MAX,
    ) -> None:
        self._env = env
        self.identity = identity
        self._listen_address = listen_address
        self._handler = handler
        self._log = SeldomLog(log, env.clock) if log is not None else None
        self._queue_bytes_max = queue_bytes_max
        self._frame_bytes_max = frame_bytes_max
        self._listener: Listener | None = None
        self._timer: Timer | None = None
        self._is_stopped = False
        self._links: dict[str, _Link] = {}
        self._accepted: dict[tuple[str, Purpose], Connection] = {}
        self._streams: dict[Connection, StreamHandler] = {}
        self._stream_acceptors: dict[Purpose, Callable[[str], StreamHandler]] = {}
        # Every connection that is not closed yet, strangers included: what the ticks look at.
        self._connections: dict[Connection, None] = {}
        self._strangers = 0
        self._is_flush_due = False
        self._refusals: dict[str, KvError] = {}
        self.refused: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()

    # --- start and stop -----------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Listen. Raises `StartupError(address_in_use)`, or `startup_failed` for an address that is none of ours."""
        try:
            self._listener = await self._env.network.listen(self._listen_address, self._accept)
        except OSError as error:
            code = "address_in_use" if error.errno == errno.EADDRINUSE else "startup_failed"
            raise StartupError(f"cannot listen for peers on {self._listen_address}: {error}", code=code) from error
        except ValueError as error:
            raise StartupError(f"cannot listen for peers: {error}") from error
        self._timer = self._env.scheduler.call_later(TICK_S, self._tick)

    @property
    def address(self) -> str:
        """`host:port` as bound."""
        assert self._listener is not None, "not started"
        return self._listener.address

    def stop(self) -> None:
        """Stop listening and close all connections; what is queued is still sent where the peers take it."""
        if self._is_stopped:
            return
        self._is_stopped = True
        if self._listener is not None:
            self._listener.close()
        if self._timer is not None:
            self._timer.cancel()
        for link in self._links.values():
            self._drop_link(link)
        self._links.clear()
        for connection in list(self._connections):
            connection.close(Unavailable("this node is stopping", code="shutting_down"))

    # --- peers --------------------------------------------------------------------------------------------------------

    def set_peers(self, peers: Mapping[str, str]) -> None:
        """From now on be connected with these (name -> host:port) and only these. A peer whose address changed is
        dialled anew. Connections that are open are judged again by `TransportHandler.judge`."""
        assert self.identity.name not in peers, "a node is no peer of itself"
        for name, link in list(self._links.items()):
            if peers.get(name) != link.address:
                was_up = self.connected(name)
                self._drop_link(link)
                del self._links[name]
                if was_up and name in peers:
                    self._env.scheduler.call_soon(self._report_down, name)
        for name, address in peers.items():
            if name not in self._links and not self._is_stopped:
                self._links[name] = _Link(name, address)
                self._dial(self._links[name])
        for connection in list(self._connections):
            if connection.is_open:
                assert connection.them is not None
                refusal = self._handler.judge(connection.them)
                if refusal is not None:
                    connection.abort(error_for(*refusal))

    def connected(self, peer: str) -> bool:
        """True while `send` to this peer works (but for a full queue)."""
        link = self._links.get(peer)
        return link is not None and link.connection is not None and link.connection.is_open

    def last_refusal(self, peer: str) -> KvError | None:
        """Why the last handshake with this peer failed, whichever side refused; None once one succeeded."""
        return self._refusals.get(peer)

    def send(self, peer: str, body: bytes) -> bool:
        """Queue a body for a peer. It leaves with the next `flush`, which also comes by itself at the end of the
        loop's turn. False: not connected, or the queue is full; then nothing was queued. O(1)."""
        link = self._links.get(peer)
        if link is None or link.connection is None:
            return False
        if not link.connection.send(body):
            return False
        if not self._is_flush_due:
            self._is_flush_due = True
            self._env.scheduler.call_soon(self.flush)
        return True

    def flush(self) -> None:
        """One write per peer of all that was sent to it since the last flush."""
        self._is_flush_due = False
        for link in self._links.values():
            if link.connection is not None:
                link.connection.flush()

    def _report_down(self, name: str) -> None:
        if name in self._links and not self._is_stopped and not self.connected(name):
            self._handler.peer_down(name)

    # --- dialling -----------------------------------------------------------------------------------------------------

    def _connection(self, dial: tuple[str, Purpose] | None) -> Connection:
        connection = Connection(
            self,
            self.identity,
            queue_bytes_max=self._queue_bytes_max,
            frame_bytes_max=self._frame_bytes_max,
            dial=dial,
        )
        self._connections[connection] = None
        return connection

    def _dial(self, link: _Link) -> None:
        link.timer = None
        link.dialled_at = self._env.clock.monotonic()
        link.connection = connection = self._connection((link.name, Purpose.MESSAGES))
        self._connect(link.address, connection)

    def _connect(self, address: str, connection: Connection) -> None:
        def failed(error: OSError) -> None:
            self.closed(connection, Unavailable(f"cannot reach {connection.peer} at {address}: {error}"))

        self._env.network.connect(address, lambda: connection, failed, CONNECT_TIMEOUT_S)

    def _redial_later(self, link: _Link) -> None:
        link.connection = None
        # Jitter, so that nodes that lost each other at one moment do not come back at one moment.
        delay_s = link.delay_s * (0.5 + 0.5 * self._env.chance.random())
        link.delay_s = min(RECONNECT_MAX_S, link.delay_s * 2)
        link.timer = self._env.scheduler.call_later(delay_s, self._dial, link)

    def _drop_link(self, link: _Link) -> None:
        if link.timer is not None:
            link.timer.cancel()
        if link.connection is not None:
            link.connection.close()
        link.timer = link.connection = None
        self._refusals.pop(link.name, None)

    # --- streams ------------------------------------------------------------------------------------------------------

    def open_stream(self, peer: str, purpose: Purpose, handler: StreamHandler) -> None:
        """Open a connection of its own to a peer: `handler.opened` or `handler.closed` follows. It is not dialled
        again when it is lost."""
        link = self._links.get(peer)
        if link is None or self._is_stopped:
            error = Unavailable(f"{peer} is no peer of this node", code="member_unknown")
            self._env.scheduler.call_soon(handler.closed, error)
            return
        connection = self._connection((peer, purpose))
        self._streams[connection] = handler
        self._connect(link.address, connection)

    def accept_streams(self, purpose: Purpose, acceptor: Callable[[str], StreamHandler]) -> None:
        """`acceptor(peer)` gives the handler of each stream for `purpose` that a peer opens to us."""
        self._stream_acceptors[purpose] = acceptor

    # --- connections call these ---------------------------------------------------------------------------------------

    def _accept(self) -> asyncio.Protocol:
        if self._strangers >= STRANGERS_MAX or self._is_stopped:
            self._count_refusal("", Unavailable("too many connections that have not said who they are"))
            return _Closed()
        self._strangers += 1
        return self._connection(None)

    def judge(self, connection: Connection, hello: Hello) -> tuple[str, str] | None:
        us, them = self.identity, hello.identity
        if them.cluster_id != us.cluster_id:
            return "wrong_cluster", (
                f"{them.name} is of cluster {them.cluster_id}, {us.name} of {us.cluster_id}: the initial members or "
                "the cluster token differ"
            )
        if connection.dialled and them.name != connection.peer:
            return "member_unknown", f"at the address of {connection.peer} there is {them.name}"
        if not connection.dialled and hello.to != us.name:
            return "member_unknown", f"this is {us.name}, not {hello.to}: the address is another member's"
        if them.name == us.name:
            return "node_identity_changed", f"two nodes run under the name {us.name}"
        if not connection.dialled and hello.purpose not in (Purpose.MESSAGES, *self._stream_acceptors):
            return "unknown_request", f"{us.name} takes no streams for {hello.purpose.name.lower()}"
        return self._handler.accept(them)

    def opened(self, connection: Connection) -> None:
        peer, purpose = connection.peer, connection.purpose
        if not connection.dialled:
            self._strangers -= 1
            older = self._accepted.get((peer, purpose))
            self._accepted[peer, purpose] = connection
            if older is not None:
                older.abort(Unavailable(f"{peer} opened a newer connection", code="closed"))
            self._dial_back(peer)
        if purpose is not Purpose.MESSAGES:
            handler = self._streams.get(connection)
            if handler is None:
                handler = self._streams[connection] = self._stream_acceptors[purpose](peer)
            connection.receive = handler.received
            handler.opened(connection)
            return
        connection.receive = self._handler.received
        if connection.dialled:
            link = self._links[peer]
            assert link.connection is connection, "a dropped link's connection is closed and cannot open"
            link.delay_s = RECONNECT_MIN_S
            self._refusals.pop(peer, None)
            self._handler.peer_up(peer)

    def _dial_back(self, peer: str) -> None:
        """A peer that reaches us is there: no need to wait until our next attempt is due, nor for one that was made
        when it was not there, and may be lost."""
        link = self._links.get(peer)
        if link is None:
            return
        if link.timer is not None:
            link.timer.cancel()
            self._dial(link)
        elif (
            link.connection is not None
            and not link.connection.was_open
            and self._env.clock.monotonic() - link.dialled_at > HANDSHAKE_S
        ):
            link.connection.abort(Unavailable(f"{peer} came up meanwhile and is dialled anew", code="closed"))
            self._dial(link)

    def drained(self, connection: Connection) -> None:
        handler = self._streams.get(connection)
        if handler is not None:
            handler.drained()
            return
        link = self._links.get(connection.peer)
        if link is not None and link.connection is connection:
            self._handler.peer_drained(connection.peer)

    def closed(self, connection: Connection, error: KvError) -> None:
        if connection not in self._connections:
            return  # it failed to be dialled and was dropped meanwhile
        del self._connections[connection]
        peer = connection.peer
        was_open = connection.was_open
        if not connection.dialled and not was_open:
            self._strangers -= 1
        if self._accepted.get((peer, connection.purpose)) is connection:
            del self._accepted[peer, connection.purpose]
        handler = self._streams.pop(connection, None)
        link = self._links.get(peer)
        if link is not None and link.connection is connection:
            self._redial_later(link)
        else:
            link = None
        if not self._is_stopped:
            self._account(connection, error, was_open)
            if link is not None and was_open:
                self._handler.peer_down(peer)
        if handler is not None:
            handler.closed(error)

    # --- counting and logging -----------------------------------------------------------------------------------------

    def _account(self, connection: Connection, error: KvError, was_open: bool) -> None:
        if not isinstance(error, Unavailable):
            self._count_refusal(connection.peer, error)
        elif was_open:
            if error.code != "closed":
                self.dropped[error.code] += 1
            if error.code != "closed" or connection.purpose is Purpose.MESSAGES:
                self._log_seldom("a peer connection ended", connection.peer, error)
        elif connection.dialled:
            self._log_seldom("a peer cannot be reached", connection.peer, error)
        else:
            self._count_refusal("", error)

    def _count_refusal(self, peer: str, error: KvError) -> None:
        self.refused[error.code] += 1
        if peer in self._links:
            self._refusals[peer] = error
        self._log_seldom("a peer connection was refused", peer, error)

    def _log_seldom(self, event: str, peer: str, error: KvError) -> None:
        if self._log is not None:
            self._log.warning(event, error.code, peer=peer, message=error.message)

    def _tick(self) -> None:
        self._timer = self._env.scheduler.call_later(TICK_S, self._tick)
        for connection in list(self._connections):
            connection.tick()


class _Closed(asyncio.Protocol):
    """Takes a stream that we do not want, and closes it."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).abort()  # uvloop's is none by inheritance
