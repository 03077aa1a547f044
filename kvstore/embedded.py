"""A store inside this process: one node without sockets, behind the same `Client`.

The only module that knows both the client and the server; it imports the server when it is asked for a store, so that
a program which only connects to a cluster loads none of it.

The node runs on the client's event loop. It is the whole of a server but for its doors: the same log, synced before a
write is acknowledged, the same state machine, the same sessions. A sole voter needs no majority but its own disk.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvstore.client.client import Client
from kvstore.client.connection import ConnectionEvents
from kvstore.client.sinks import Sink, Sinks
from kvstore.codec import ClientFrame, RawWatchEvents, SentFrame, ServerFrame, WatchEvents, decode_events
from kvstore.errors import Unavailable
from kvstore.model import Member

if TYPE_CHECKING:
    from kvstore.env import Files, LoopScheduler
    from kvstore.server.node import ServerNode

NODE_NAME = "embedded"
_ADDRESS = "embedded"
# A sole voter need not leave time for others to be heard from: it opens as fast as the engine, which wants an election
# timeout of more than three heartbeats, can be made to elect it.
_HEARTBEAT_MS, _ELECTION_MIN_MS, _ELECTION_MAX_MS = 20, 70, 80


class EmbeddedClient(Client):
    """A `Client` that brings its own store along: starting it opens the store, closing it closes the store."""

    def __init__(self, path: str, *, timeout_s: float) -> None:
        self._path = path
        self._connector_here = EmbeddedConnector()
        super().__init__((_ADDRESS,), timeout_s=timeout_s, connector=self._connector_here)
        self._scheduler: LoopScheduler | None = None

    async def start(self) -> None:
        """Open the store. Raises `StartupError`: `data_dir_in_use`, `wal_damaged`, `data_format_newer`, …"""
        if self._connector_here.node is None and not self._closed:
            await self._open_store()
        await super().start()

    async def close(self) -> None:
        """End all calls, and close the store. May be called twice."""
        try:
            await super().close()
        finally:
            await self._close_store()

    def _bind(self) -> asyncio.AbstractEventLoop:
        if self._connector_here.node is None and not self._closed:
            raise Unavailable(
                "this store is not open: use `async with kvstore.open_embedded(path) as kv`, or await it first",
                code="closed",
            )
        return super()._bind()

    async def _open_store(self) -> None:
        from kvstore.env import Environment, LoopScheduler, SystemChance, SystemClock
        from kvstore.server.assembly import build_node
        from kvstore.server.identity import cluster_id
        from kvstore.server.node import ServerOptions

        loop = asyncio.get_running_loop()
        chance = SystemChance()
        scheduler = LoopScheduler(loop)
        files = self._make_files()
        # The directory records the id that it was made with; a new one draws a token of its own.
        is_new = not files.exists(f"{self._path}/META")
        options = ServerOptions(
            name=NODE_NAME,
            data_dir=self._path,
            cluster_id=cluster_id([NODE_NAME], f"{chance.getrandbits(128):032x}") if is_new else "",
            # Used until the log holds them; a store that was closed right after its birth has none there yet.
            members=(Member(NODE_NAME, "", "", "", True),),
            heartbeat_ms=_HEARTBEAT_MS,
            election_min_ms=_ELECTION_MIN_MS,
            election_max_ms=_ELECTION_MAX_MS,
        )
        log = LibraryLog()
        node = build_node(options, Environment(SystemClock(), chance, scheduler, _NoNetwork(), files), log)
        node.on_fatal = lambda error: log.error("the embedded store has failed", code=error.code, message=error.message)
        try:
            await node.start()
        except BaseException:
            scheduler.close()
            raise
        self._scheduler = scheduler
        self._connector_here.node = node

    def _make_files(self) -> Files:
        """The file system below the store. A test of power loss gives it another."""
        from kvstore.env import SystemFiles

        return SystemFiles()

    async def _close_store(self) -> None:
        node, self._connector_here.node = self._connector_here.node, None
        scheduler, self._scheduler = self._scheduler, None
        try:
            if node is not None:
                await node.stop()
        finally:
            if scheduler is not None:
                scheduler.close()


class _NoListener:
    address = ""

    def close(self) -> None: ...


class _NoNetwork:
    """The network of a node that has no peers: nothing comes in, and nothing can be reached."""

    async def listen(self, address: str, factory: Callable[[], asyncio.Protocol]) -> _NoListener:
        return _NoListener()

    def connect(
        self,
        address: str,
        factory: Callable[[], asyncio.Protocol],
        failed: Callable[[OSError], None],
        timeout_s: float,
    ) -> None:
        asyncio.get_running_loop().call_soon(failed, OSError(errno.ENETUNREACH, "an embedded store has no network"))


class EmbeddedConnector:
    """Opens channels to a node in this process; a `connection.Connector`."""

    def __init__(self, node: ServerNode | None = None) -> None:
        self.node = node
        self._channels: set[EmbeddedChannel] = set()

    def connect(self, address: str, events: ConnectionEvents) -> None:
        asyncio.get_running_loop().call_soon(self._connect, events)

    def _connect(self, events: ConnectionEvents) -> None:
        if self.node is None:
            events.on_failed("the store is closed")
            return
        channel = EmbeddedChannel(self.node, events, self._channels.discard)
        self._channels.add(channel)
        events.on_open(channel)

    async def close(self) -> None:
        for channel in tuple(self._channels):
            channel.close("closed by this client")


class EmbeddedChannel:
    """Frames to a node in this process; a `connection.Channel`."""

    def __init__(self, node: ServerNode, events: ConnectionEvents, ended: Callable[[EmbeddedChannel], None]) -> None:
        self._node = node
        self._events = events
        self._ended = ended
        self._loop = asyncio.get_running_loop()
        self._sinks = Sinks()
        self._sending = False
        self._closed = False

    def send(self, frame: ClientFrame, sink: Sink) -> None:
        if self._closed:
            self._loop.call_soon(sink.on_lost)
            return
        self._sinks.add(frame, sink)
        self.tell(frame)

    def tell(self, frame: ClientFrame) -> None:
        if not self._closed:
            self._sending = True
            self._node.handle(frame, self._reply, self)
            self._sending = False

    def forget(self, frame_id: int) -> None:
        self._sinks.forget(frame_id)

    @property
    def silent(self) -> bool:
        return False  # a node on this loop that does not run lets nobody else run either

    def close(self, reason: str) -> None:
        """Ends it at the next turn of the loop, as a stream would."""
        if not self._closed:
            self._closed = True
            self._loop.call_soon(self._end, reason)

    def _reply(self, frame: ServerFrame) -> None:
        # A node may answer before `handle` returns; the sender of the frame must not hear of it that early.
        if self._sending:
            self._loop.call_soon(self._deliver, frame)
        else:
            self._deliver(frame)

    # --- the node's `Gate` --------------------------------------------------------------------------------------------

    @property
    def congested(self) -> bool:
        return False  # what is sent is there

    def postpone(self, work: Callable[[], object]) -> None:
        self._loop.call_soon(work)

    def push(self, frame: SentFrame) -> None:
        if isinstance(frame, RawWatchEvents):
            frame = WatchEvents(frame.id, frame.revision, decode_events(frame.events), frame.size_bytes, frame.more)
        self._loop.call_soon(self._deliver, frame)

    def _deliver(self, frame: ServerFrame) -> None:
        if not self._closed:
            self._sinks.deliver(frame)

    def _end(self, reason: str) -> None:
        self._ended(self)
        self._node.gone(self)
        self._events.on_closed(reason, "")
        self._sinks.lose()


class LibraryLog:
    """The node's structured log, handed to the standard library's logging as a library should: the program decides."""

    def __init__(self) -> None:
        self._logger = logging.getLogger("kvstore")

    def info(self, event: str, /, **fields: Any) -> None:
        self._log(logging.INFO, event, fields)

    def warning(self, event: str, /, **fields: Any) -> None:
        self._log(logging.WARNING, event, fields)

    def error(self, event: str, /, **fields: Any) -> None:
        self._log(logging.ERROR, event, fields)

    def _log(self, level: int, event: str, fields: dict[str, Any]) -> None:
        self._logger.log(level, "%s%s", event, "".join(f" {name}={value!r}" for name, value in fields.items()))


def open_embedded(path: str | os.PathLike[str], *, timeout_s: float = 5.0) -> Client:
    """A store of one node in this process, in the directory `path` (made where it is missing), behind a `Client`.

        async with kvstore.open_embedded("shop.data") as kv:
            await kv.put(b"user/1", b"...")

    Durable and transactional as a cluster is; not replicated. One process at a time may have a directory open.
    Starting raises `StartupError` where the directory is in use, damaged, or of a newer version.
    """
    return EmbeddedClient(os.fspath(path), timeout_s=timeout_s)
