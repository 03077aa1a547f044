"""The application around every service's handlers: one middleware, health, and what all answers have in common.

What the middleware (`_frame`) does for each request, in one place so that it costs one coroutine:

- a request id, in the answer, the log and problems: the client's `X-Request-Id` if it is sane, else a new one
- the trace that it belongs to (`tracing.py`), in the log and in what follows from it
- a bound on requests in flight, of which probes and streams (`began_to_stream`) are none
- every error becomes a problem body; an error that nobody foresaw is logged with its story and answered without it
- the store's errors become 503: `store_unavailable` (nothing happened), `outcome_unknown` (it may have)
- one line of access log, and its part of the metrics

What each endpoint takes and gives is declared (`endpoints.py`); the application serves the document of all of them at
`/openapi.json`, and a page to read and try it at `/docs`.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec
import structlog
from aiohttp import web
from aiohttp.typedefs import Middleware
from prometheus_client import CollectorRegistry

import kvstore
from services.web import api_page, tracing
from services.web.answers import CALLER_ID, LIMIT_HEADERS, REQUEST_ID, json_response
from services.web.bodies import BODY_BYTES_MAX
from services.web.clients import TRUSTED_PROXIES
from services.web.endpoints import Api
from services.web.logs import AccessLog
from services.web.metrics import CONTENT_TYPE as METRICS_TYPE
from services.web.metrics import Metrics
from services.web.openapi import document
from services.web.problems import PROBLEMS, Problem, ProblemType

# 1,024 orders in flight fill four entries of the store's log; more would only wait longer, so say so early.
IN_FLIGHT_MAX: Final = 1024
READY_TIMEOUT_S: Final = 1.0  # a probe's answer is wanted soon; a longer outage is one
VERSION_NEEDED: Final = 2  # of the cluster: it has leases (a new one takes a moment to find out that it may)
READY_KEY: Final = b"ready"  # never written: reading it proves a quorum, whatever it holds

# These tell whether the process is well, and are asked when it is busy, too: busy is not dead.
_PROBES: Final = ("/livez", "/readyz")

_SANE_REQUEST_ID: Final = re.compile(r"\A[A-Za-z0-9._:-]{8,128}\Z")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
log = structlog.get_logger("services")

# What aiohttp itself refuses, by status.
_HTTP_PROBLEMS: Final = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}


class State:
    """What the process tells its health checks. A stream that has begun is none of the requests in flight."""

    __slots__ = ("in_flight", "stopping", "streams")

    def __init__(self) -> None:
        self.in_flight = 0
        self.streams = 0
        self.stopping = False


STATE: Final = web.AppKey("state", State)
_IS_STREAM: Final = web.RequestKey("is_stream", bool)


def began_to_stream(request: web.Request) -> None:
    """The answer to `request` has begun, and goes on until its client leaves. It gives its place among the requests in
    flight back: it waits for events, most of its time, and would keep others out. Whoever serves streams bounds them.
    """
    state = request.app[STATE]
    request[_IS_STREAM] = True
    state.in_flight -= 1
    state.streams += 1


def new_app(store: kvstore.Client, api: Api, access_log: AccessLog | None = None) -> web.Application:
    """The application of a service. It owns neither the store nor the log."""
    app = bare_app(store, access_log)
    openapi = msgspec.json.encode(document(api))

    async def read_openapi(request: web.Request) -> web.Response:
        return json_response(openapi)

    app.add_routes([web.get("/openapi.json", read_openapi), *api_page.routes(api.title), *api.routes()])
    return app


def bare_app(
    store: kvstore.Client,
    access_log: AccessLog | None = None,
    registry: CollectorRegistry | None = None,
    why_not_ready: Callable[[], str] = lambda: "",
) -> web.Application:
    """What every process answers, also one that serves no endpoints: how it is, and what it counts, `registry` with it.
    `why_not_ready` says what else keeps it from its work; empty: nothing."""
    state, metrics = State(), Metrics(registry)
    app = web.Application(middlewares=[_frame(state, metrics, access_log)], client_max_size=BODY_BYTES_MAX)
    app[STATE] = state
    app[TRUSTED_PROXIES] = ()
    health = _Health(store, state, why_not_ready)

    async def read_metrics(request: web.Request) -> web.Response:
        return web.Response(body=metrics.text(), headers={"Content-Type": METRICS_TYPE})

    app.add_routes(
        [
            web.get("/metrics", read_metrics),
            web.get("/livez", health.livez),
            web.get("/readyz", health.readyz),
            web.get("/problems/{code}", _problem_page),
        ]
    )
    return app


# --- the middleware ---------------------------------------------------------------------------------------------------


def _frame(state: State, metrics: Metrics, access_log: AccessLog | None) -> Middleware:
    @web.middleware
    async def frame(request: web.Request, handler: Handler) -> web.StreamResponse:
        started = time.perf_counter()
        request_id = request.headers.get("X-Request-Id", "")
        if not _SANE_REQUEST_ID.match(request_id):
            request_id = secrets.token_hex(12)
        request[REQUEST_ID] = request_id
        trace = tracing.begin(request.headers.get(tracing.HEADER))
        state.in_flight += 1
        metrics.began()
        response: web.StreamResponse
        try:
            if state.in_flight > IN_FLIGHT_MAX and request.path not in _PROBES:
                raise Problem("overloaded", f"{IN_FLIGHT_MAX} requests are in flight; try again in a moment")
            response = await handler(request)
        except Problem as problem:
            response = problem.response(request.path, request_id)
        except Exception as error:
            response = _problem_for(error, request, request_id).response(request.path, request_id)
        finally:
            if _IS_STREAM in request:
                state.streams -= 1
            else:
                state.in_flight -= 1
        response.headers["X-Request-Id"] = request_id
        limits = request.get(LIMIT_HEADERS)
        if limits is not None:
            response.headers.update(limits)
        resource = request.match_info.route.resource
        metrics.ended(request.method, resource.canonical if resource else None, response.status, started)
        if access_log is not None:
            user = request.get(CALLER_ID)
            access_log.add(request.method, request.path, response.status, started, request_id, user, trace)
        return response

    return frame


def _problem_for(error: Exception, request: web.Request, request_id: str) -> Problem:
    if isinstance(error, kvstore.OutcomeUnknown):
        safe = request.method in ("GET", "HEAD", "PUT") or "Idempotency-Key" in request.headers
        how = (
            "send the same request again, with the same Idempotency-Key if it had one"
            if safe
            else "read before you send it again"
        )
        return Problem("outcome_unknown", f"The store did not answer in time; {how}", retryable=safe)
    if isinstance(error, kvstore.Unavailable):
        return Problem("store_unavailable", "The store cannot be reached now, and nothing has changed; try again")
    if isinstance(error, kvstore.Refused) and error.code == "conflict":
        return Problem("contended", "Nothing has changed; try again")
    if isinstance(error, web.HTTPException):
        code = _HTTP_PROBLEMS.get(error.status, "malformed_request")
        headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else None
        return Problem(code, error.text or PROBLEMS[code].title, headers=headers)
    # Also a refusal by the store that the handler did not expect: the mistake is ours, not the client's.
    log.error("unforeseen", method=request.method, path=request.path, request_id=request_id, exc_info=error)
    return Problem("internal", "The error is in the log under this request's id")


# --- health and problem pages -----------------------------------------------------------------------------------------


class _Health:
    """`/livez`: this process turns its loop. `/readyz`: it would serve a request, or do its work, store included."""

    def __init__(self, store: kvstore.Client, state: State, why_not_ready: Callable[[], str]) -> None:
        self._store = store
        self._state = state
        self._why_not_ready = why_not_ready

    async def livez(self, request: web.Request) -> web.Response:
        return json_response(b'{"status":"ok"}')

    async def readyz(self, request: web.Request) -> web.Response:
        if self._state.stopping:
            raise Problem("shutting_down", "Send requests to another process")
        await self._store.get(READY_KEY, timeout=READY_TIMEOUT_S)
        status = await self._store.status(timeout=READY_TIMEOUT_S)
        if status.cluster_version < VERSION_NEEDED:
            raise Problem("store_unavailable", "The store cannot do all that this service needs before it is upgraded")
        why_not = self._why_not_ready()
        if why_not:
            raise Problem("store_unavailable", why_not)
        return json_response(b'{"status":"ok"}')


async def _problem_page(request: web.Request) -> web.Response:
    code = request.match_info["code"]
    kind = PROBLEMS.get(code)
    if kind is None:
        raise Problem("not_found", "There is no problem with this code")
    return json_response(msgspec.json.encode(ProblemType(code, kind.title, kind.status, kind.retryable)))
