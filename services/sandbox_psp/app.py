"""The sandbox over HTTP.

| | |
|---|---|
| `POST /v1/charges` | authorise: `{amount, currency, token, reference, return_url}` |
| `POST /v1/charges/{id}/captures` | `{amount, currency}`; several, up to what was authorised |
| `POST /v1/charges/{id}/void` | `{}`; while nothing is captured |
| `POST /v1/charges/{id}/refunds` | `{amount, currency}`; several, up to what was captured |
| `GET /v1/charges/{id}`, `GET /v1/refunds/{id}` | one, as it is now |
| `GET /v1/operations?key=` | what became of the request with this Idempotency-Key |
| `GET /v1/charges`, `GET /v1/refunds` | all, oldest first: `limit`, `starting_after` |
| `POST /v1/tokens` | `{card}`, from the customer's browser, without a key: a token for a test card |
| `GET`, `POST /actions/{secret}` | where the customer approves or refuses (`decision` in a form) |
| `GET`, `PUT /control/failures` | `Settings` |
| `GET /control/counts`, `GET /control/tokens` | what went wrong so far; which tokens there are |
| `POST /control/settle` | end at once all that is pending |

Each of the first four needs an `Idempotency-Key` and is answered like the look-up of that key; one that comes again is
answered as it was, with `Idempotent-Replayed: true`. All but the customer's paths need `Authorization: Bearer` with the
API key. Errors are `{"error": {"code", "message"}}`.

Its endpoints are plain handlers with typed bodies, and not declared with `services/web/endpoints.py`: those stand for
the shop's own rules (its users' tokens, idempotency in its store, its problem bodies), and this is another company's
system, which should surprise our adapter just as a real one would.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from typing import Final

import structlog
from aiohttp import web
from aiohttp.typedefs import Middleware

from services.sandbox_psp.acquirer import Acquirer
from services.sandbox_psp.books import Books
from services.sandbox_psp.control import Control, Lists
from services.sandbox_psp.customer import Customer
from services.sandbox_psp.desk import Desk
from services.sandbox_psp.failures import Failures
from services.sandbox_psp.faults import Faults
from services.sandbox_psp.rules import Refusal
from services.sandbox_psp.webhooks import Webhooks
from services.sandbox_psp.wire import json_answer

BODY_BYTES_MAX: Final = 16 * 1024  # ten times the longest request
_OPEN: Final = ("/actions/", "/v1/tokens", "/livez", "/readyz")  # for the customer's browser, and for probes

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
log = structlog.get_logger("sandbox_psp")


def create_app(
    books: Books, failures: Failures, acquirer: Acquirer, webhooks: Webhooks | None, api_key: str, public_url: str = ""
) -> web.Application:
    """It owns none of what it is given. `public_url` is where customers reach it, if not where the request came to."""
    faults = Faults()
    desk = Desk(books, failures, acquirer, faults, public_url)
    lists, customer = Lists(books, desk), Customer(books, acquirer)
    control = Control(books, failures, acquirer, webhooks)
    app = web.Application(middlewares=[_frame(books, api_key)], client_max_size=BODY_BYTES_MAX)
    app.add_routes(
        [
            web.post("/v1/charges", desk.authorise),
            web.post("/v1/charges/{charge}/captures", desk.capture),
            web.post("/v1/charges/{charge}/void", desk.void),
            web.post("/v1/charges/{charge}/refunds", desk.refund),
            web.get("/v1/operations", desk.find),
            web.get("/v1/charges", lists.list_charges),
            web.get("/v1/charges/{charge}", lists.read_charge),
            web.get("/v1/refunds", lists.list_refunds),
            web.get("/v1/refunds/{refund}", lists.read_refund),
            web.post("/v1/tokens", customer.make_token),
            web.get("/actions/{action}", customer.show_action),
            web.post("/actions/{action}", customer.decide_action),
            web.get("/control/failures", control.read_failures),
            web.put("/control/failures", control.put_failures),
            web.get("/control/counts", control.counts),
            web.get("/control/tokens", control.tokens),
            web.post("/control/settle", control.settle),
            web.get("/livez", _alive),
            web.get("/readyz", _alive),
        ]
    )
    app.on_shutdown.append(faults.close)
    return app


def _frame(books: Books, api_key: str) -> Middleware:
    """Who asks; errors as bodies; and nothing is answered before what it says is on the disk."""
    expected = f"Bearer {api_key}".encode()

    @web.middleware
    async def frame(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            if not request.path.startswith(_OPEN):
                given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
                if not hmac.compare_digest(given, expected):
                    raise Refusal(401, "unauthorised", "Send Authorization: Bearer with the API key")
            try:
                return await handler(request)
            finally:
                await books.synced()
        except Refusal as refusal:
            return json_answer(refusal.body, refusal.http_status)
        except web.HTTPRedirection:
            raise
        except web.HTTPException as error:
            return json_answer(Refusal(error.status, "http", error.reason).body, error.status)
        except Exception as error:
            log.error("unforeseen", method=request.method, path=request.path, exc_info=error)
            return json_answer(Refusal(500, "internal", "The error is in the sandbox's log").body, 500)

    return frame


async def _alive(request: web.Request) -> web.Response:
    return json_answer(b'{"status":"ok"}')
