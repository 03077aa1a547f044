"""The http door: health and metrics. (etcd's JSON API and the console are to come here.)

- `/livez`: 200 while this process answers. No answer: restart it.
- `/readyz`: 200 while it takes requests (it is not stopping), knows a leader, its disk works, it is a member, and it
  has applied all but `BEHIND_MAX` of what it knows to be committed. Else 503 and the reason: send requests elsewhere.
- `/health`: the same in the words of etcd: `{"health": "true", "reason": ""}`; an alarm makes it false, too.
- `/metrics`: for Prometheus.

No request changes anything, and no body is read.

Connections are bounded in number and in time: one that asks nothing, asks slowly, or does not take its answer is
closed. Past `CONNECTIONS_MAX` the one that has asked nothing for longest makes room for the newest, so that a scraper
that leaks connections cannot have an orchestrator find this process dead.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

from aiohttp import web
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from kvstore.env import Environment, Listener, Timer
from kvstore.server.metrics import Observed, registry_of

# A node that lags by so many entries is a second behind at most; more, and its local reads are old.
BEHIND_MAX = 10_000
# Scrapers come back within a minute, or connect anew.
KEEP_ALIVE_S = 75.0
# A few scrapers, probes and people have one each; one costs some 50 KiB.
CONNECTIONS_MAX = 100
# From a connection's beginning to the end of its first request's headers: a few hundred bytes, usually in one packet.
# (Later ones have what is left of `KEEP_ALIVE_S`.)
HEADERS_S = 10.0
# How long an answer may find no room. The largest, metrics, fits into the system's buffers; one that waits so long has
# a reader that asked for many and takes none.
STUCK_S = 30.0
_CLOSE_S = 1.0


class HttpDoor:
    """One per node that has an address for it."""

    def __init__(self, env: Environment, node: Observed) -> None:
        self._env = env
        self._node = node
        self._registry = registry_of(node)
        self._listener: Listener | None = None
        self._server: web.Server | None = None
        self._connections: dict[_Connection, None] = {}  # the one that has asked nothing for longest comes first

    async def start(self, address: str) -> None:
        """Raises OSError where the address cannot be had."""
        server = self._server = web.Server(self._handle)
        self._listener = await self._env.network.listen(address, lambda: _Connection(self, server))

    @property
    def address(self) -> str:
        assert self._listener is not None, "the door is not open"
        return self._listener.address

    async def stop(self) -> None:
        if self._listener is not None:
            self._listener.close()
        if self._server is not None:
            self._server.pre_shutdown()  # else who asks nothing is waited for
            await self._server.shutdown(_CLOSE_S)
        for connection in tuple(self._connections):  # what it sends is not taken
            connection.abort()

    # --- what connections tell their door -----------------------------------------------------------------------------

    def opened(self, connection: _Connection) -> None:
        if len(self._connections) >= CONNECTIONS_MAX:
            next(iter(self._connections)).abort()
        self._connections[connection] = None

    def closed(self, connection: _Connection) -> None:
        self._connections.pop(connection, None)

    def later(self, delay_s: float, callback: Callable[[], object]) -> Timer:
        return self._env.scheduler.call_later(delay_s, callback)

    # --- requests -----------------------------------------------------------------------------------------------------

    def why_not_ready(self) -> str:
        """Empty while requests may be sent here."""
        if why := self._node.why_not_serving():
            return why
        status = self._node.status()
        if status.storage_error:
            return f"it takes no part any more: {status.storage_error}"
        if not status.leader:
            return "it knows no leader; see that a majority of the nodes runs"
        behind = status.commit_index - status.applied_index
        if behind > BEHIND_MAX:
            return f"it is {behind} entries behind"
        return ""

    def alarm(self) -> str:
        """Empty while there is none."""
        return ", ".join(f"alarm: {alarm}" for alarm in self._node.status().alarms)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        connection = cast(_Connection, request.protocol)
        if connection in self._connections:
            del self._connections[connection]
            self._connections[connection] = None
            connection.asked()
        if request.method not in ("GET", "HEAD"):
            return _text(405, "only GET and HEAD are known here\n")
        if request.path == "/livez":
            return _text(200, "ok\n")
        if request.path == "/readyz":
            why = self.why_not_ready()
            return _text(503 if why else 200, f"not ready: {why}\n" if why else "ok\n")
        if request.path == "/health":
            why = self.why_not_ready() or self.alarm()
            return web.json_response({"health": "false" if why else "true", "reason": why}, status=503 if why else 200)
        if request.path == "/metrics":
            body = generate_latest(self._registry)
            return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})
        return _text(404, "there are /livez, /readyz, /health and /metrics here\n")


class _Connection(web.RequestHandler):
    """aiohttp's protocol of one connection, with an end to its patience."""

    __slots__ = ("_deadline", "_door", "_stream")

    def __init__(self, door: HttpDoor, server: web.Server) -> None:
        super().__init__(server, loop=asyncio.get_running_loop(), keepalive_timeout=KEEP_ALIVE_S)
        self._door = door
        self._deadline: Timer | None = None
        self._stream: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._stream = cast(asyncio.Transport, transport)
        self._door.opened(self)
        self._within(HEADERS_S)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._stream = None
        self._within(None)
        self._door.closed(self)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._within(STUCK_S)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._within(None)

    def asked(self) -> None:
        """A request's headers are complete."""
        if not self.writing_paused:
            self._within(None)

    def abort(self) -> None:
        """Close it now, whatever it has yet to be sent; `connection_lost` follows."""
        self._door.closed(self)
        if self._stream is not None:
            self._stream.abort()

    def _within(self, seconds: float | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = None if seconds is None else self._door.later(seconds, self.abort)


def _text(status: int, text: str) -> web.Response:
    return web.Response(status=status, text=text)
