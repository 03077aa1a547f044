"""What schemathesis does not check by itself; loaded into it by SCHEMATHESIS_HOOKS."""

from __future__ import annotations

import json
import re
from typing import Any

import schemathesis

from services.web.etags import IF_MATCH_PATTERN

# These say that the request is not of the form that the document gives.
_OF_FORM = frozenset(
    {
        "malformed_json",
        "malformed_request",
        "invalid_body",
        "invalid_parameter",
        "unsupported_media_type",
        "idempotency_key_required",
        "invalid_idempotency_key",
        "precondition_required",
    }
)


# Two parameters that exclude each other, and two lines of the same product: no schema can say that.
_NOT_OF_SCHEMAS = frozenset({"not_combinable", "duplicate"})
_IF_MATCH = re.compile(IF_MATCH_PATTERN)


@schemathesis.check
def what_the_document_allows_is_not_malformed(
    ctx: schemathesis.CheckContext, response: schemathesis.Response, case: schemathesis.Case[Any]
) -> bool | None:
    if case.meta is None or not case.meta.generation.mode.is_positive or _has_whole_floats(case.body):
        return None
    if not _IF_MATCH.match(case.headers.get("If-Match", "*")):  # schemathesis has values of its own for this header
        return None
    if "problem+json" not in response.headers.get("content-type", [""])[0]:
        return None
    problem = json.loads(response.content)
    if any(error["code"] in _NOT_OF_SCHEMAS for error in problem["errors"]):
        return None
    assert problem["code"] not in _OF_FORM, f"allowed by the document, and refused: {problem['detail']}"
    return None


@schemathesis.check
def problems_tell_what_they_are(
    ctx: schemathesis.CheckContext, response: schemathesis.Response, case: schemathesis.Case[Any]
) -> bool | None:
    if response.status_code < 400 or "idempotent-replayed" in response.headers:  # word for word what was said then
        return None
    problem = json.loads(response.content)
    assert problem["status"] == response.status_code
    assert problem["type"] == f"/problems/{problem['code']}"
    assert [problem["request_id"]] == response.headers["x-request-id"]
    for error in problem["errors"]:
        assert error["pointer"] == "" or error["pointer"].startswith("/"), error
    return None


def _has_whole_floats(value: Any) -> bool:
    """To JSON Schema 1.0 is an integer, to us (and to whoever counts money) it is not. No schema can say that."""
    if isinstance(value, dict):
        return any(_has_whole_floats(one) for one in value.values())
    if isinstance(value, list):
        return any(_has_whole_floats(one) for one in value)
    return isinstance(value, float) and value.is_integer()
