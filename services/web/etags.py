"""ETags from a record's revision: strong, because every change of the record takes a new revision.

Reading with `If-None-Match` gives 304 where the client has the newest. Writing with `If-Match` is checked inside the
transaction that writes, as a compare; checking it before would leave a gap.
"""

from __future__ import annotations

import re
from typing import Final

from aiohttp import web

import kvstore
from services.web.problems import Problem

_REVISION: Final = re.compile(r'\A"([1-9][0-9]{0,17})"\Z')


def etag(revision: int) -> str:
    return f'"{revision}"'


def tagged_response(request: web.Request, body: bytes, revision: int) -> web.Response:
    """A 200 with the record's ETag, or 304 where the client has just that."""
    tag = etag(revision)
    known = request.headers.get("If-None-Match")
    # A weak compare, as RFC 9110 has it for reads.
    if known is not None and (
        known.strip() == "*" or tag in [part.strip().removeprefix("W/") for part in known.split(",")]
    ):
        response = web.Response(status=304)
    else:
        response = web.Response(body=body, content_type="application/json")
    response.headers["ETag"] = tag
    response.headers["Cache-Control"] = "private, no-cache"  # keep it, but ask each time
    return response


def precondition(request: web.Request, key: bytes) -> kvstore.Compare | None:
    """What the request demands of the record at `key` before it changes it: `If-Match: "7"` (as it was read),
    `If-Match: *` (it exists), `If-None-Match: *` (it does not); None if nothing. Raises `Problem` for any other."""
    if_match = request.headers.get("If-Match")
    if_none_match = request.headers.get("If-None-Match")
    if if_match is None and if_none_match is None:
        return None
    if if_none_match is None and if_match is not None:
        if if_match.strip() == "*":
            return kvstore.Compare(key, kvstore.Target.VERSION, kvstore.Relation.GREATER, 0)
        match = _REVISION.match(if_match.strip())
        if match is not None:
            return kvstore.Compare(key, kvstore.Target.MOD_REVISION, kvstore.Relation.EQUAL, int(match[1]))
    elif if_match is None and if_none_match == "*":
        return kvstore.Compare(key, kvstore.Target.VERSION, kvstore.Relation.EQUAL, 0)
    raise Problem("malformed_request", 'Send one of: If-Match: "<ETag>", If-Match: *, If-None-Match: *')


def check_match(request: web.Request, key: bytes, revision: int) -> None:
    """Raises `Problem` `precondition_failed` unless the record at `key`, which has that revision (0: there is none), is
    what the request demands. For a write that compares that very revision again."""
    demanded = precondition(request, key)
    if demanded is None:
        return
    if demanded.target is kvstore.Target.MOD_REVISION:
        holds = demanded.operand == revision
    else:
        holds = (revision > 0) is (demanded.relation is kvstore.Relation.GREATER)
    if not holds:
        raise Problem("precondition_failed", "Read it again, then change what you find")
