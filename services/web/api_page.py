"""The page at `/docs`: Swagger UI, as its package carries it, over this service's own `/openapi.json`."""

from __future__ import annotations

import html
from collections.abc import Iterable
from importlib import resources
from typing import Final

from aiohttp import web

from services.web.problems import Problem

_TYPES: Final = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "favicon-32x32.png": "image/png",
}
# Nothing but what this service serves; Swagger UI sets styles of its own, and draws its icons from data: addresses.
_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; connect-src 'self'"
)
_START: Final = """
window.onload = () => SwaggerUIBundle({
  url: "/openapi.json",
  dom_id: "#page",
  deepLinking: true,
  defaultModelsExpandDepth: 0,
  displayRequestDuration: true,
  persistAuthorization: true,
  tryItOutEnabled: true,
  validatorUrl: null,
});
"""
_PAGE: Final = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="stylesheet" href="/docs/swagger-ui.css">
<link rel="icon" type="image/png" href="/docs/favicon-32x32.png">
</head>
<body>
<div id="page"></div>
<script src="/docs/swagger-ui-bundle.js"></script>
<script src="/docs/start.js"></script>
</body>
</html>
"""


def routes(title: str) -> Iterable[web.RouteDef]:
    page = _PAGE.format(title=html.escape(title)).encode()
    files: dict[str, bytes] = {"start.js": _START.encode()}  # the others are read when they are first asked for

    async def read_page(request: web.Request) -> web.Response:
        headers = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff"}
        return web.Response(body=page, content_type="text/html", charset="utf-8", headers=headers)

    async def read_file(request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if name not in files:
            if name not in _TYPES:
                raise Problem("not_found", "There is no such file")
            files[name] = resources.files("swagger_ui").joinpath("static", name).read_bytes()
        headers = {"Cache-Control": "public, max-age=86400", "X-Content-Type-Options": "nosniff"}
        return web.Response(body=files[name], content_type=_TYPES.get(name, "text/javascript"), headers=headers)

    return web.get("/docs", read_page), web.get("/docs/{name}", read_file)
