"""The OpenAPI 3.1 document of a service, from its endpoints' declarations; nothing in it is written twice.

What a declaration implies is said: the headers that are heeded and given, the codes of the problems of each status, and
where to go on from an answer (`openapi_links.py`). Tests and `make fuzz` hold the services to all of it.
"""

from __future__ import annotations

import inspect
from importlib.metadata import version
from typing import Any, Final

import msgspec

from services.web.endpoints import Access, Api, Bound, Condition, Endpoint, EventStream
from services.web.etags import IF_MATCH_PATTERN
from services.web.openapi_links import links_of
from services.web.problems import PROBLEMS, ProblemBody

_REF: Final = "#/components/schemas/{name}"
_JSON: Final = "application/json"
_PROBLEM: Final = "application/problem+json"

# For whoever reads the page without having read anything else.
_ABOUT: Final = """

**Signing in.** `POST /v1/sessions` of the user service gives an access token, good for ten minutes, and a refresh
token. Send the former as `Authorization: Bearer …`; on this page press *Authorize* and paste it.

**Errors** are `application/problem+json` (RFC 9457). `code` is stable and for programs, `detail` is for people,
`errors` point at what is wrong in the body or the query, and `retryable` says whether the very same request may
succeed later. Quote `request_id` when you ask for help: it is in the log.

**Retries.** Where an `Idempotency-Key` is asked for, send a new random value with each new request, and the same one
when you send that request again: it is carried out once, and answered alike (`Idempotent-Replayed: true`).

**Changes.** Reads give an `ETag`. Send it as `If-Match` with a change, so that nobody else's change is overwritten.

**Lists** come in pages: send `next_cursor` as `starting_after` for the next one.

**Money** is an integer of minor units (cents), with a currency beside it.

**Tracing.** A `traceparent` header (W3C Trace Context) is taken, logged, and passed on to payment providers.
"""


def document(api: Api) -> dict[str, Any]:
    """As a value for `msgspec.json.encode`."""
    schemas = _Schemas(api)
    paths: dict[str, dict[str, Any]] = {}
    for bound in api.endpoints:
        paths.setdefault(bound.endpoint.path, {})[bound.endpoint.method.lower()] = _operation(bound, api, schemas)
    tags = list(dict.fromkeys(bound.tag for bound in api.endpoints))
    codes = sorted({code for bound in api.endpoints for code in bound.endpoint.all_problems})
    return {
        "openapi": "3.1.0",
        "info": {"title": api.title, "description": api.description + _ABOUT, "version": version("kvstore")},
        "tags": [{"name": tag} for tag in tags],
        "paths": paths,
        "components": {
            "schemas": schemas.components,
            "headers": _HEADERS,
            "examples": {code: _example(code) for code in codes},
            "securitySchemes": {
                "token": {
                    "type": "http",
                    "scheme": "bearer",
                    "bearerFormat": "JWT",
                    "description": "The `access_token` of `POST /v1/sessions` of the user service.",
                }
            },
        },
    }


# --- schemas ----------------------------------------------------------------------------------------------------------


class _Schemas:
    """The schemas of all types that any endpoint names, made together so that each has one name."""

    def __init__(self, api: Api) -> None:
        types: list[Any] = [ProblemBody]
        for bound in api.endpoints:
            declared = bound.endpoint
            types += [kind for answer in declared.answers.values() for kind in _kinds(answer)]
            types += [kind for kind in (declared.query, declared.body) if kind is not None]
            types += declared.parameters.values()
        unique = list(dict.fromkeys(types))
        found, components = msgspec.json.schema_components(unique, ref_template=_REF)
        self._of = dict(zip(unique, (_portable(schema) for schema in found), strict=True))
        queries = {bound.endpoint.query.__name__ for bound in api.endpoints if bound.endpoint.query is not None}
        self._all = {name: _portable(schema) for name, schema in components.items()}
        for bound in api.endpoints:
            if bound.endpoint.body is not None:
                self._all[bound.endpoint.body.__name__].update(bound.endpoint.body.schema_adds)
        self.components = {name: schema for name, schema in self._all.items() if name not in queries}

    def of(self, kind: Any) -> Any:
        return self._of[kind]

    def fields(self, kind: type) -> tuple[dict[str, Any], frozenset[str]]:
        """The fields of a struct, and which of them are required."""
        schema = self._all[kind.__name__]
        return schema["properties"], frozenset(schema.get("required", ()))


def _kinds(answer: Any) -> tuple[Any, ...]:
    """The structs that an answer may be."""
    return answer if isinstance(answer, tuple) else () if answer in (None, EventStream) else (answer,)


def _portable(schema: Any) -> Any:
    """Patterns as ECMA-262 has them, where Python's `\\A` and `\\Z` are not known; docstrings without their indent."""
    if isinstance(schema, list):
        return [_portable(value) for value in schema]
    if not isinstance(schema, dict):
        return schema
    portable = {key: _portable(value) for key, value in schema.items()}
    for key, of_text in (("pattern", _ecma), ("description", inspect.cleandoc)):
        if isinstance(portable.get(key), str):  # not so where it is the name of a field
            portable[key] = of_text(portable[key])
    return portable


def _ecma(pattern: str) -> str:
    return pattern.replace(r"\A", "^").replace(r"\Z", "$")


# --- operations -------------------------------------------------------------------------------------------------------


def _operation(bound: Bound, api: Api, schemas: _Schemas) -> dict[str, Any]:
    declared = bound.endpoint
    summary, _, description = inspect.cleandoc(declared.handler.__doc__ or "").partition("\n\n")
    operation: dict[str, Any] = {
        "operationId": declared.handler.__name__,
        "tags": [bound.tag],
        "summary": " ".join(summary.split()),
        "parameters": _parameters(declared, schemas),
        "responses": _responses(bound, api, schemas),
        "security": _security(declared),
    }
    who = "" if declared.access in (Access.ANYONE, Access.SIGNED_IN) else f"For {declared.access}."
    text = "\n\n".join(part for part in (" ".join(description.split()), who) if part)
    if text:
        operation["description"] = text
    if declared.body is not None:
        operation["requestBody"] = {"required": True, "content": {_JSON: {"schema": schemas.of(declared.body)}}}
    return operation


def _security(declared: Endpoint) -> list[dict[str, list[str]]]:
    if declared.access is not Access.ANYONE:
        return [{"token": []}]
    return [{}, {"token": []}] if declared.reads_token else []


def _parameters(declared: Endpoint, schemas: _Schemas) -> list[dict[str, Any]]:
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": schemas.of(kind)}
        for name, kind in declared.parameters.items()
    ]
    if declared.query is not None:
        fields, required = schemas.fields(declared.query)
        parameters += [
            {"name": name, "in": "query", "required": name in required, "schema": schema, **_described(schema)}
            for name, schema in fields.items()
        ]
    if declared.idempotent:
        parameters.append(
            {
                "name": "Idempotency-Key",
                "in": "header",
                "required": True,
                "description": "A new random value for each new request (by hand: make one up); the same one when it "
                "is sent again.",
                "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]{1,255}$"},
            }
        )
    if declared.condition is not Condition.NONE:
        parameters.append(
            {
                "name": "If-Match",
                "in": "header",
                "required": declared.condition is Condition.REQUIRED,
                "description": "The ETag of the record as it was read, or several, or `*` for any. `If-None-Match: *` "
                "in its place: only if there is none yet.",
                "schema": {"type": "string", "pattern": IF_MATCH_PATTERN},
            }
        )
    if 304 in declared.answers:
        parameters.append(
            {
                "name": "If-None-Match",
                "in": "header",
                "required": False,
                "description": "The ETag of what you have: 304 if that is the newest.",
                "schema": _TEXT,  # whatever is no ETag of ours is none that the client has
            }
        )
    return parameters


def _described(schema: dict[str, Any]) -> dict[str, str]:
    """A parameter's description stands beside its schema, where pages look for it."""
    options = [schema, *schema.get("anyOf", ())]
    return next(({"description": one["description"]} for one in options if "description" in one), {})


# --- responses --------------------------------------------------------------------------------------------------------


def _responses(bound: Bound, api: Api, schemas: _Schemas) -> dict[str, Any]:
    declared = bound.endpoint
    responses: dict[str, Any] = {}
    for status, kind in declared.answers.items():
        response: dict[str, Any] = {
            "description": _STATUS.get(status, "Done"),
            "headers": _references(_answer_headers(declared, status)),
        }
        bodies = [schemas.of(one) for one in _kinds(kind)]
        if bodies:
            response["content"] = {_JSON: {"schema": bodies[0] if len(bodies) == 1 else {"anyOf": bodies}}}
            links = links_of(bound, kind, api)
            if links:
                response["links"] = links
        elif kind is EventStream:
            response["content"] = {"text/event-stream": {"schema": _EVENTS}}
        responses[str(status)] = response
    by_status: dict[int, list[str]] = {}
    for code in sorted(declared.all_problems):
        by_status.setdefault(PROBLEMS[code].status, []).append(code)
    for status, codes in sorted(by_status.items()):
        responses[str(status)] = _problem(declared, status, codes, schemas)
    return responses


def _problem(declared: Endpoint, status: int, codes: list[str], schemas: _Schemas) -> dict[str, Any]:
    names = ["X-Request-Id", "RateLimit-Policy", "RateLimit", *_WITH_STATUS.get(status, ())]
    if declared.idempotent and status < 500:
        names.append("Idempotent-Replayed")
    narrowed = {"type": "object", "properties": {"status": {"const": status}, "code": {"enum": codes}}}
    return {
        "description": "; ".join(f"`{code}`: {PROBLEMS[code].title}" for code in codes),
        "headers": _references(names),
        "content": {
            _PROBLEM: {
                "schema": {"allOf": [schemas.of(ProblemBody), narrowed]},
                "examples": {code: {"$ref": f"#/components/examples/{code}"} for code in codes},
            }
        },
    }


def _answer_headers(declared: Endpoint, status: int) -> list[str]:
    names = ["X-Request-Id", "RateLimit-Policy", "RateLimit"]
    if 304 in declared.answers:
        names.append("ETag")
    elif declared.condition is not Condition.NONE and status != 204:
        names.append("ETagOfChange")
    if status == 201:
        names.append("Location")
    if declared.idempotent:
        names.append("Idempotent-Replayed")
    return names


def _references(names: list[str]) -> dict[str, Any]:
    return {_NAMES.get(name, name): {"$ref": f"#/components/headers/{name}"} for name in names}


def _header(description: str, schema: dict[str, Any], *, required: bool = False) -> dict[str, Any]:
    return {"description": description, "required": required, "schema": schema}


_TEXT: Final[dict[str, Any]] = {"type": "string"}
# Readers differ on whether a stream's schema is that of its text or of one event, so it demands neither.
_EVENTS: Final = {"description": "Server-sent events, for as long as the client stays; see the description."}
_SECONDS: Final[dict[str, Any]] = {"type": "integer", "minimum": 0}
# A revision; of what is put together from records, those of three at most, of which some may not be there.
_ETAG: Final[dict[str, Any]] = {"type": "string", "pattern": '^"(0|[1-9][0-9]{0,17})(-(0|[1-9][0-9]{0,17})){0,2}"$'}
# Those that an answer must have are required: what the document says of them is tested.
_HEADERS: Final = {
    "X-Request-Id": _header("What this request is called in the log.", _TEXT, required=True),
    "RateLimit-Policy": _header("How many requests in how many seconds; where there is a limit.", _TEXT),
    "RateLimit": _header("How many are left, and in how many seconds all are.", _TEXT),
    "ETag": _header("The record's version.", _ETAG, required=True),
    "ETagOfChange": _header("The version that the record has now.", _ETAG),
    "Location": _header("Where it can be read.", _TEXT),
    "Idempotent-Replayed": _header("`true`: the answer that was given before.", {"const": "true"}),
    "Retry-After": _header("Seconds to wait before the next attempt.", _SECONDS, required=True),
    "WWW-Authenticate": _header("What was wrong with the token.", _TEXT, required=True),
    "Allow": _header("The methods that there are.", _TEXT, required=True),
}
_NAMES: Final = {"ETagOfChange": "ETag"}
_WITH_STATUS: Final = {
    401: ("WWW-Authenticate",),
    405: ("Allow",),
    429: ("Retry-After",),
    503: ("Retry-After",),
}


def _example(code: str) -> dict[str, Any]:
    kind = PROBLEMS[code]
    body = ProblemBody(
        f"/problems/{code}",
        kind.title,
        kind.status,
        kind.title,
        "/v1/…",
        code,
        "f0e1d2c3b4a5968778695a4b",
        kind.retryable,
    )
    return {"summary": kind.title, "value": msgspec.to_builtins(body)}


_STATUS: Final = {200: "As it is now", 201: "Created", 202: "Accepted; it goes on", 204: "Done", 304: "Not modified"}
