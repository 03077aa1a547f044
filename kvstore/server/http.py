"""The http door: health and metrics. (etcd's JSON API and the console are to come here.)

- `/livez`: 200 while this process answers. No answer: restart it.
- `/readyz`: 200 while it knows a leader, its disk works, it is a member, and it has applied all but `BEHIND_MAX` of
  what it knows to be committed. Else 503 and the reason: send requests elsewhere.
- `/health`: the same in the words of etcd: `{"health": "true", "reason": ""}`; an alarm makes it false, too.
- `/metrics`: for Prometheus.

No request changes anything, and no body is read.
"""

from __future__ import annotations

import asyncio
from typing import cast

from aiohttp import web
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from kvstore.env import Environment, Listener
from kvstore.server.metrics import Observed, registry_of

# A node that lags by so many entries is a second behind at most; more, and its local reads are old.
BEHIND_MAX = 10_000
# Scrapers come back within a minute, or connect anew.
KEEP_ALIVE_S = 75.0
_CLOSE_S = 1.0


class HttpDoor:
    """One per node that has an address for it."""

    def __init__(self, env: Environment, node: Observed) -> None:
        self._env = env
        self._node = node
        self._registry = registry_of(node)
        self._listener: Listener | None = None
        self._server: web.Server | None = None

    async def start(self, address: str) -> None:
        """Raises OSError where the address cannot be had."""
        server = self._server = web.Server(self._handle, keepalive_timeout=KEEP_ALIVE_S)
        self._listener = await self._env.network.listen(address, lambda: cast(asyncio.Protocol, server()))

    @property
    def address(self) -> str:
        assert self._listener is not None, "the door is not open"
        return self._listener.address

    async def stop(self) -> None:
        if self._listener is not None:
            self._listener.close()
        if self._server is not None:
            await self._server.shutdown(_CLOSE_S)

    def why_not_ready(self) -> str:
        """Empty while requests may be sent here."""
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


def _text(status: int, text: str) -> web.Response:
    return web.Response(status=status, text=text)
