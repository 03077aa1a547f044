"""What a request carries through the layers, and answers in JSON."""

from __future__ import annotations

from typing import Final

from aiohttp import web

REQUEST_ID: Final = web.RequestKey("request_id", str)
CALLER_ID: Final = web.RequestKey("caller_id", int)  # for the access log; set where a caller is known
LIMIT_HEADERS: Final = web.RequestKey("limit_headers", dict[str, str])  # how the client stands with its rate limit


def early_headers(request: web.Request) -> dict[str, str]:
    """What every answer has, for one whose headers are sent before its handler is done (a stream)."""
    return {"X-Request-Id": request[REQUEST_ID], **request.get(LIMIT_HEADERS, {})}


def json_response(body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    """An answer that is JSON already."""
    response = web.Response(body=body, status=status, content_type="application/json", headers=headers)
    # Answers are for who asked, and change; a shared cache has no business with them.
    response.headers["Cache-Control"] = "no-store"
    return response
