"""ETags from a record's revision: strong, because every change of the record takes a new revision. What is put together
from several records has all of their revisions in its ETag (0: there is none).

Reading with `If-None-Match` gives 304 where the client has the newest. Writing with `If-Match` is checked against the
revision that the transaction that writes compares; checking it alone would leave a gap.
"""

from __future__ import annotations

import re
from typing import Final

from aiohttp import web

from services.web.problems import Problem

# `*`, or a list of ETags, of which ours are only some: a tag that is none of ours is one that the record does not have.
IF_MATCH_PATTERN: Final = r'^(\*|(W/)?"[!#-~]*"([ \t]*,[ \t]*(W/)?"[!#-~]*")*)$'
_IF_MATCH: Final = re.compile(IF_MATCH_PATTERN.replace("$", r"\Z"))
_TAG: Final = re.compile(r'(W/)?("[!#-~]*")')


def etag(*revisions: int) -> str:
    return f'"{"-".join(map(str, revisions))}"'


def tagged_response(request: web.Request, body: bytes, *revisions: int) -> web.Response:
    """A 200 with the record's ETag, or that of several, or 304 where the client has just that."""
    tag = etag(*revisions)
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


def check_match(request: web.Request, revision: int) -> None:
    """Raises `Problem` `precondition_failed` unless the record, which has that revision (0: there is none), is what the
    request demands: `If-Match: "7"` (as it was read; of several tags, one), `If-Match: *` (it exists), `If-None-Match:
    *` (it does not); `malformed_request` for anything else. For a write that compares that very revision again."""
    # Several lines of one header are one list.
    if_match = ", ".join(request.headers.getall("If-Match", ())).strip() or None
    if_none_match = request.headers.get("If-None-Match")
    if if_match is None and if_none_match is None and "If-Match" not in request.headers:
        return
    if if_none_match is None and if_match is not None and _IF_MATCH.match(if_match):
        # A weak tag is of no use for a write: it equals none (RFC 9110, 13.1.1).
        tags = [tag for weak, tag in _TAG.findall(if_match) if not weak]
        holds = revision > 0 and (if_match == "*" or etag(revision) in tags)
    elif "If-Match" not in request.headers and if_none_match == "*":
        holds = revision == 0
    else:
        raise Problem("malformed_request", 'Send one of: If-Match: "<ETag>", If-Match: *, If-None-Match: *')
    if not holds:
        raise Problem("precondition_failed", "Read it again, then change what you find")
