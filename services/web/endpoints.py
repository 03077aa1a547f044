"""Endpoints as declarations. From one declaration come the route, every check of what a client sends, and the
endpoint's part of the OpenAPI document (`openapi.py`):

    class Orders:
        @post("/v1/orders", {201: OrderBody}, access=Access.SIGNED_IN, idempotent=True, problems=("unknown_product",))
        async def place(self, call: Call, body: Placement) -> web.Response:
            "Place an order. The docstring is the description."

    api = Api("orders", "…", tokens, keys)
    api.add(Orders(…), tag="Orders")
    app.add_routes(api.routes())

A handler's arguments say what it needs. `body` is a `RequestBody`, `query` a `Query`; any other is the part of the
path by that name. What does not fit never reaches the handler: a body or query is refused with pointers to what is
wrong, also where none is taken; a path that can name nothing is 404.
"""

from __future__ import annotations

import inspect
import re
import time
from collections.abc import Awaitable, Callable
from enum import StrEnum
from typing import Any, Final, TypeVar, get_type_hints

import msgspec
import structlog
from aiohttp import web
from msgspec import Struct

import kvstore
from services.web.answers import LIMIT_HEADERS
from services.web.bodies import BodyReader, RequestBody, field_error
from services.web.clients import client_address
from services.web.idempotency import Idempotency, IdempotencyKeys
from services.web.ids import Id, parse_id
from services.web.leases import forget_lost
from services.web.limits import Limit
from services.web.problems import PROBLEMS, Problem
from services.web.tokens import Caller, Role, Tokens

log = structlog.get_logger("services")

Handler = Callable[..., Awaitable[web.StreamResponse]]
H = TypeVar("H", bound=Handler)
# By status: a struct; several, where it is one of them; None where an answer has no body.
Answers = dict[int, Any]


class Access(StrEnum):
    """Who may ask. Handlers still check whose record it is."""

    ANYONE = "anyone"
    SIGNED_IN = "signed in"
    STAFF = "staff"
    ADMIN = "admin"


class Condition(StrEnum):
    """Whether a write heeds `If-Match`: as an offer, or as a demand (428 without)."""

    NONE = "none"
    OFFERED = "offered"
    REQUIRED = "required"


class EventStream:
    """In the place of an answer's struct: server-sent events."""


class Query(Struct, frozen=True, forbid_unknown_fields=True):
    """Base of what stands behind the `?`; each field is a parameter."""


class Endpoint(Struct, frozen=True, kw_only=True):
    """One declaration. `problems` are the codes that its handler itself may answer with."""

    method: str
    path: str
    answers: Answers
    access: Access
    reads_token: bool
    signed: bool
    idempotent: bool
    condition: Condition
    problems: tuple[str, ...]
    handler: Handler
    # Filled from the handler's signature.
    parameters: dict[str, Any] = {}
    query: type[Query] | None = None
    body: type[RequestBody] | None = None

    @property
    def all_problems(self) -> frozenset[str]:
        """Also the codes that come with what it declares, and those that every endpoint has."""
        codes = {*self.problems, *_EVERYWHERE}
        if self.reads_token:
            codes |= _WITH_TOKEN
        if self.access is not Access.ANYONE:
            codes.add("authentication_required")
        if self.access in (Access.STAFF, Access.ADMIN):
            codes.add("forbidden")
        if self.parameters:
            codes.add("not_found")
        if self.query is not None:
            codes.add("invalid_parameter")
        if self.body is not None:
            codes |= _WITH_BODY
        if self.idempotent:
            codes |= _IDEMPOTENT
        if self.condition is not Condition.NONE:
            codes |= {"malformed_request", "precondition_failed"}
        if self.condition is Condition.REQUIRED:
            codes.add("precondition_required")
        return frozenset(codes)


_EVERYWHERE: Final = frozenset(
    {"internal", "malformed_request", "overloaded", "rate_limited", "shutting_down", "store_unavailable",
     "outcome_unknown", "contended"}
)  # fmt: skip
_WITH_TOKEN: Final = frozenset({"invalid_token", "token_expired"})  # also where none is needed, if one was sent
_WITH_BODY: Final = frozenset(
    {"malformed_json", "invalid_body", "unsupported_media_type", "body_too_large", "body_timeout"}
)
_IDEMPOTENT: Final = frozenset({"idempotency_key_required", "invalid_idempotency_key", "idempotency_key_reused"})


class Call:
    """One request to an endpoint, checked."""

    __slots__ = ("_caller", "_idempotency", "is_repeated", "request")

    def __init__(self, request: web.Request) -> None:
        self.request = request
        self._caller: Caller | None = None
        self._idempotency: Idempotency | None = None
        self.is_repeated = False  # for want of a lease, which is tried once

    @property
    def caller(self) -> Caller:
        """Who asks, at an endpoint that is not for anyone."""
        assert self._caller is not None
        return self._caller

    @property
    def caller_if_any(self) -> Caller | None:
        """Who asks, where a token was sent."""
        return self._caller

    @property
    def idempotency(self) -> Idempotency:
        """At an endpoint that is `idempotent`."""
        assert self._idempotency is not None
        return self._idempotency


# --- declaring --------------------------------------------------------------------------------------------------------

_DECLARED: Final = "__endpoint__"


def endpoint(
    method: str,
    path: str,
    answers: Answers,
    *,
    access: Access = Access.ANYONE,
    reads_token: bool = True,
    signed: bool = False,
    idempotent: bool = False,
    condition: Condition = Condition.NONE,
    problems: tuple[str, ...] = (),
) -> Callable[[H], H]:
    """Without `reads_token` an Authorization header is passed over: for where one goes because one's token is stale.
    `signed`: instead of a token there is a signature over the body, which the handler reads and checks by itself. No
    limit holds those up whose signature is right; what the handler refuses is counted by address."""
    unknown = [code for code in problems if code not in PROBLEMS]
    assert not unknown, f"{method} {path} declares problems that do not exist: {unknown}"
    assert reads_token or access is Access.ANYONE, f"{path} must know who asks"
    assert not (signed and (reads_token or access is not Access.ANYONE)), f"{path} is for who signs, not for a caller"
    assert not (idempotent and access is Access.ANYONE), "an idempotency key's scope is its caller"

    def declare(handler: H) -> H:
        declared = Endpoint(
            method=method,
            path=path,
            answers=answers,
            access=access,
            reads_token=reads_token,
            signed=signed,
            idempotent=idempotent,
            condition=condition,
            problems=problems,
            handler=handler,
        )
        setattr(handler, _DECLARED, declared)
        return handler

    return declare


def get(path: str, answers: Answers, **more: Any) -> Callable[[H], H]:
    return endpoint("GET", path, answers, **more)


def post(path: str, answers: Answers, **more: Any) -> Callable[[H], H]:
    return endpoint("POST", path, answers, **more)


def put(path: str, answers: Answers, **more: Any) -> Callable[[H], H]:
    return endpoint("PUT", path, answers, **more)


def patch(path: str, answers: Answers, **more: Any) -> Callable[[H], H]:
    return endpoint("PATCH", path, answers, **more)


def delete(path: str, answers: Answers, **more: Any) -> Callable[[H], H]:
    return endpoint("DELETE", path, answers, **more)


# --- serving ----------------------------------------------------------------------------------------------------------


class Bound(Struct, frozen=True):
    """An endpoint and the object whose method handles it."""

    endpoint: Endpoint
    handler: Handler
    tag: str


class Api:
    """All endpoints of a service."""

    def __init__(
        self, title: str, description: str, tokens: Tokens, keys: IdempotencyKeys, limit: Limit | None = None
    ) -> None:
        """`limit` is that of each caller, or of each address where nobody signed in."""
        self.title = title
        self.description = description
        self.endpoints: list[Bound] = []
        self._tokens = tokens
        self._keys = keys
        self._limit = limit

    def add(self, owner: object, *, tag: str) -> None:
        """Take over all endpoints that the methods of `owner` declare, in the order of the source."""
        for name, function in vars(type(owner)).items():
            declared: Endpoint | None = getattr(function, _DECLARED, None)
            if declared is not None:
                self.endpoints.append(Bound(_with_signature(declared), getattr(owner, name), tag))

    def routes(self) -> list[web.RouteDef]:
        paths = {bound.endpoint.path for bound in self.endpoints}
        routes: list[web.RouteDef] = []
        for bound in self.endpoints:
            method, path = bound.endpoint.method, _route(bound.endpoint.path, paths)
            # A stream has no end, and so no answer to HEAD: its body could only be cut off.
            streams = EventStream in bound.endpoint.answers.values()
            more = {"allow_head": not streams} if method == "GET" else {}
            routes.append(web.route(method, path, self._serving(bound), **more))
        return routes

    def _serving(self, bound: Bound) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        """The handler that aiohttp calls: everything that can be decided beforehand is."""
        declared, handler, limit, keys = bound.endpoint, bound.handler, self._limit, self._keys
        anyone = declared.access is Access.ANYONE
        roles = _ROLES.get(declared.access)
        path_readers = [(name, _path_reader(kind)) for name, kind in declared.parameters.items()]
        read_query = _query_reader(declared.query) if declared.query is not None else None
        body_reader = BodyReader(declared.body) if declared.body is not None else None
        all_problems = declared.all_problems

        async def answer(request: web.Request) -> web.StreamResponse:
            call = Call(request)
            if not anyone or (declared.reads_token and "Authorization" in request.headers):
                call._caller = await self._caller(request)
            if limit is not None and not declared.signed:
                client = client_address(request) if call._caller is None else call._caller.user_id
                request[LIMIT_HEADERS] = limit.headers(limit.take(client))
            if roles is not None and call.caller.role not in roles:
                raise Problem("forbidden", f"This is for {declared.access}")
            arguments = {name: read(request.match_info[name]) for name, read in path_readers}
            if read_query is not None:
                arguments["query"] = read_query(request)
            elif request.query_string:
                raise _unknown_parameters(request)
            if body_reader is not None:
                body = arguments["body"] = await body_reader.read(request)
            else:
                body = None
                if request.can_read_body and not declared.signed:
                    raise Problem("malformed_request", "There is no body to this request; send it without one")
            if declared.condition is Condition.REQUIRED and "If-Match" not in request.headers:
                raise Problem("precondition_required", "Send If-Match with the ETag of what you read")
            while True:
                began_s = time.monotonic()
                try:
                    if declared.idempotent:
                        canonical = declared.path.format(**arguments) if path_readers else declared.path
                        call._idempotency = await keys.of(request, call.caller, canonical, body)
                    return await handler(call, **arguments)
                except kvstore.Refused as refusal:
                    if call.is_repeated or not forget_lost(refusal, began_s):
                        raise
                call.is_repeated = True

        async def watched(request: web.Request) -> web.StreamResponse:
            try:
                return await answer(request)
            except Problem as problem:
                if problem.code not in all_problems:  # the document would be lying
                    log.error("undeclared problem", code=problem.code, method=declared.method, path=declared.path)
                if declared.signed and limit is not None:  # as whoever guesses tokens
                    limit.take(client_address(request))
                raise

        return watched

    async def _caller(self, request: web.Request) -> Caller:
        try:
            return await self._tokens.caller(request)
        except Problem:
            if self._limit is not None:  # whoever guesses tokens is counted, too
                self._limit.take(client_address(request))
            raise


_ROLES: Final = {Access.STAFF: (Role.STAFF, Role.ADMIN), Access.ADMIN: (Role.ADMIN,)}
_IN_PATH: Final = re.compile(r"\{([a-z_]+)\}")


def _with_signature(declared: Endpoint) -> Endpoint:
    hints = get_type_hints(declared.handler, include_extras=True)
    names = list(inspect.signature(declared.handler).parameters)[2:]  # after self and call
    in_path = _IN_PATH.findall(declared.path)
    assert set(names) - {"body", "query"} == set(in_path), f"{declared.path} does not fit {names}"
    assert inspect.getdoc(declared.handler), f"{declared.method} {declared.path} has no description"
    return msgspec.structs.replace(
        declared,
        parameters={name: hints[name] for name in in_path},
        query=hints.get("query"),
        body=hints.get("body"),
    )


def _route(path: str, paths: set[str]) -> str:
    """The path as the router matches it. What another path spells out is no value of a parameter: `/things/recent` is
    no `/things/{id}`, and has none of its methods."""
    parts = path.split("/")
    spelt: dict[int, set[str]] = {}
    for other in paths:
        others = other.split("/")
        differ = [at for at, part in enumerate(parts) if len(others) == len(parts) and part != others[at]]
        if len(differ) == 1 and _IN_PATH.fullmatch(parts[differ[0]]) and not _IN_PATH.fullmatch(others[differ[0]]):
            spelt.setdefault(differ[0], set()).add(re.escape(others[differ[0]]))
    for at, words in spelt.items():
        parts[at] = f"{{{parts[at][1:-1]}:(?!(?:{'|'.join(sorted(words))})(?:/|$))[^/]+}}"
    return "/".join(parts)


def _path_reader(kind: Any) -> Callable[[str], Any]:
    """Reads a part of a path. What can name nothing is not malformed: there is nothing there."""
    if kind == Id:

        def read_id(text: str) -> int:
            value = parse_id(text)
            if value is None:
                raise _nothing_there()
            return value

        return read_id

    def read(text: str) -> Any:
        try:
            return msgspec.convert(text, kind, strict=False)
        except msgspec.ValidationError:
            raise _nothing_there() from None

    return read


def _nothing_there() -> Problem:
    return Problem("not_found", "There is nothing by this name, or nothing that you may read")


def _query_reader(kind: type[Query]) -> Callable[[web.Request], Query]:
    def read(request: web.Request) -> Query:
        given = request.query
        if len(given) != len(set(given)):
            raise Problem("invalid_parameter", "Each parameter may be sent once")
        try:
            return msgspec.convert(dict(given), kind, strict=False)
        except msgspec.ValidationError as error:
            field = field_error(str(error), "query")
            raise Problem("invalid_parameter", f"{field.pointer}: {field.message}", errors=(field,)) from None

    return read


def _unknown_parameters(request: web.Request) -> Problem:
    name = next(iter(request.query), "")
    return Problem("malformed_request", f"There is no parameter {name[:100]} here")
