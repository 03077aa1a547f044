"""What runs an application on aiohttp: the options that every service has, and problems for what is no request.

A request line that is too long, a header that no server should take, or no HTTP at all: aiohttp's parser refuses these
before there is a request, so no middleware sees them, and its own answer is plain text. Clients of ours read problems.
"""

from __future__ import annotations

import secrets
from typing import Final

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from services.web.problems import Problem

GRACE_S: Final = 10.0  # the store's own timeout is 5 s, so whatever runs has an answer by then
KEEPALIVE_S: Final = 75.0


class _Protocol(RequestHandler):
    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        plain = super().handle_error(request, status, exc, message)  # it logs, and knows when it is too late
        code = "malformed_request" if 400 <= status < 500 else "internal"
        request_id = secrets.token_hex(12)
        detail = "This is no request that can be read: its first line or a header is too long, or not as HTTP has it"
        response = Problem(code, detail if code == "malformed_request" else "The error is in the log").response(
            "", request_id
        )
        response.headers["X-Request-Id"] = request_id
        if not plain.keep_alive:
            response.force_close()
        return response


class _Server(web.Server):
    def __call__(self) -> RequestHandler:
        return _Protocol(self, loop=self._loop, **self._kwargs)


class ServiceRunner(web.AppRunner):
    """Runs the application of one service."""

    def __init__(self, app: web.Application) -> None:
        super().__init__(
            app,
            access_log=None,  # ours is in the application
            auto_decompress=False,  # bodies with a Content-Encoding are refused, and must not be unpacked before
            handle_signals=False,
            shutdown_timeout=GRACE_S,
            keepalive_timeout=KEEPALIVE_S,
        )

    async def _make_server(self) -> web.Server:
        server = await super()._make_server()
        server.__class__ = _Server  # aiohttp has no other way to choose the protocol
        return server
