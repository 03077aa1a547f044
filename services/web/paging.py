"""Lists in pages: `limit` and `starting_after` in, `{data, has_more, next_cursor}` out.

A cursor is the key after which the next page begins, without the prefix that all keys of the list share: a forged one
leads nowhere but to another place of the same list.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Awaitable, Callable
from typing import Annotated, Final, Generic, TypeVar

from msgspec import Meta, Struct

import kvstore
from services.web.endpoints import Query
from services.web.problems import FieldError, Problem

T = TypeVar("T")

_LIMIT_DEFAULT: Final = 20
_LIMIT_MAX: Final = 100
_CURSOR_CHARS_MAX: Final = 700  # a key of 512 bytes
_CURSOR_PATTERN: Final = r"\A([A-Za-z0-9_-]{4})*([A-Za-z0-9_-]{2,3})?\Z"  # base64url without its padding
Limit = Annotated[int, Meta(ge=1, le=_LIMIT_MAX, description="At most so many.")]
Cursor = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=_CURSOR_CHARS_MAX,
        pattern=_CURSOR_PATTERN,
        description="The `next_cursor` of the page before.",
    ),
]


class PageQuery(Query, frozen=True):
    limit: Limit = _LIMIT_DEFAULT
    starting_after: Cursor | None = None


class Page(Struct, Generic[T], frozen=True):
    """One page of a list. `next_cursor` is there if `has_more` is true."""

    data: list[T]
    has_more: bool
    next_cursor: str | None


async def page_of(
    store: kvstore.Client,
    prefix: bytes,
    query: PageQuery,
    read: Callable[[list[kvstore.Record]], Awaitable[list[T]]],
    *,
    reverse: bool = False,
) -> Page[T]:
    """The records under `prefix` in the order of their keys, or the other way round; `read` makes of them what the page
    shows."""
    start, end = prefix, kvstore.prefix_end(prefix)
    if not reverse:
        start += after_cursor(query.starting_after)
    elif query.starting_after is not None:
        end = prefix + after_cursor(query.starting_after)[:-1]
    found = await store.range(start, end, limit=query.limit + 1, reverse=reverse)
    records = list(found.records[: query.limit])
    has_more = found.more or len(found.records) > query.limit  # large records fill a result of the store sooner
    cursor = cursor_of(records[-1].key[len(prefix) :]) if has_more else None
    return Page(await read(records), has_more, cursor)


def cursor_of(key: bytes) -> str:
    return base64.urlsafe_b64encode(key).decode().rstrip("=")


def after_cursor(cursor: str | None) -> bytes:
    """Where a page begins, without the prefix of its list. Raises `Problem` `invalid_parameter`."""
    if cursor is None:
        return b""
    try:
        return base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True) + b"\0"
    except (binascii.Error, ValueError):
        wrong = FieldError("/starting_after", "invalid_value", "This is no next_cursor of a page", "query")
        raise Problem("invalid_parameter", wrong.message, errors=(wrong,)) from None
