"""The OpenAPI 3.1 document of a service, from its endpoints' declarations; nothing in it is written twice."""

from __future__ import annotations

import inspect
from importlib.metadata import version
from typing import Any, Final

import msgspec

from services.web.endpoints import Access, Api, Bound, Condition, Endpoint
from services.web.problems import PROBLEMS, ProblemBody

_REF: Final = "#/components/schemas/{name}"
_JSON: Final = "application/json"
_PROBLEM: Final = "application/problem+json"


def document(api: Api) -> dict[str, Any]:
    """As a value for `msgspec.json.encode`."""
    schemas = _Schemas(api)
    paths: dict[str, dict[str, Any]] = {}
    for bound in api.endpoints:
        paths.setdefault(bound.endpoint.path, {})[bound.endpoint.method.lower()] = _operation(bound, schemas)
    tags = list(dict.fromkeys(bound.tag for bound in api.endpoints))
    return {
        "openapi": "3.1.0",
        "info": {"title": api.title, "description": api.description, "version": version("kvstore")},
        "tags": [{"name": tag} for tag in tags],
        "paths": paths,
        "components": {
            "schemas": schemas.components,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}},
        },
    }


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
        self.components = {name: schema for name, schema in self._all.items() if name not in queries}

    def of(self, kind: Any) -> Any:
        return self._of[kind]

    def fields(self, kind: type) -> tuple[dict[str, Any], frozenset[str]]:
        """The fields of a struct, and which of them are required."""
        schema = self._all[kind.__name__]
        return schema["properties"], frozenset(schema.get("required", ()))


def _kinds(answer: Any) -> tuple[Any, ...]:
    """The structs that an answer may be."""
    return answer if isinstance(answer, tuple) else () if answer is None else (answer,)


def _portable(schema: Any) -> Any:
    """Patterns as ECMA-262 has them: Python's `\\A` and `\\Z` are not known there."""
    if isinstance(schema, dict):
        return {
            key: value.replace(r"\A", "^").replace(r"\Z", "$") if key == "pattern" else _portable(value)
            for key, value in schema.items()
        }
    return [_portable(value) for value in schema] if isinstance(schema, list) else schema


def _operation(bound: Bound, schemas: _Schemas) -> dict[str, Any]:
    declared = bound.endpoint
    summary, _, description = inspect.cleandoc(declared.handler.__doc__ or "").partition("\n\n")
    operation: dict[str, Any] = {
        "operationId": declared.handler.__name__,
        "tags": [bound.tag],
        "summary": " ".join(summary.split()),
        "parameters": _parameters(declared, schemas),
        "responses": _responses(declared, schemas),
        "security": [] if declared.access is Access.ANYONE else [{"token": []}],
    }
    who = "" if declared.access in (Access.ANYONE, Access.SIGNED_IN) else f"For {declared.access}."
    text = "\n\n".join(part for part in (" ".join(description.split()), who) if part)
    if text:
        operation["description"] = text
    if declared.body is not None:
        operation["requestBody"] = {"required": True, "content": {_JSON: {"schema": schemas.of(declared.body)}}}
    return operation


def _parameters(declared: Endpoint, schemas: _Schemas) -> list[dict[str, Any]]:
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": schemas.of(kind)}
        for name, kind in declared.parameters.items()
    ]
    if declared.query is not None:
        fields, required = schemas.fields(declared.query)
        parameters += [
            {"name": name, "in": "query", "required": name in required, "schema": schema}
            for name, schema in fields.items()
        ]
    if declared.idempotent:
        schema = {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]{1,255}$"}
        parameters.append(
            {
                "name": "Idempotency-Key",
                "in": "header",
                "required": True,
                "description": "A new random value for each new request; the same one when it is sent again.",
                "schema": schema,
            }
        )
    if declared.condition is not Condition.NONE:
        parameters.append(
            {
                "name": "If-Match",
                "in": "header",
                "required": declared.condition is Condition.REQUIRED,
                "description": "The ETag of the record as it was read.",
                "schema": {"type": "string", "pattern": '^(\\*|"[1-9][0-9]{0,17}")$'},
            }
        )
    return parameters


def _responses(declared: Endpoint, schemas: _Schemas) -> dict[str, Any]:
    responses: dict[str, Any] = {}
    for status, kind in declared.answers.items():
        response: dict[str, Any] = {"description": _STATUS.get(status, "Done")}
        bodies = [schemas.of(one) for one in _kinds(kind)]
        if bodies:
            response["content"] = {_JSON: {"schema": bodies[0] if len(bodies) == 1 else {"anyOf": bodies}}}
        responses[str(status)] = response
    by_status: dict[int, list[str]] = {}
    for code in sorted(declared.all_problems):
        by_status.setdefault(PROBLEMS[code].status, []).append(code)
    for status, codes in sorted(by_status.items()):
        said = "; ".join(f"`{code}`: {PROBLEMS[code].title}" for code in codes)
        responses[str(status)] = {"description": said, "content": {_PROBLEM: {"schema": schemas.of(ProblemBody)}}}
    return responses


_STATUS: Final = {200: "As it is now", 201: "Created", 202: "Accepted; it goes on", 204: "Done", 304: "Not modified"}
