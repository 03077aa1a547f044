"""Finding orders: a user's own by the user's index, and all of them, for staff, by the index of states.

Every order stands once in the index of states. One state is one range of keys; all of them are so many ranges, read in
one transaction and merged, the newest first. Orders that need attention have an index of their own. One index drives,
within what of it can have been placed in the time that is asked for, and the record that is read then decides. So a
page may have fewer orders than asked for, or none, and its cursor goes on: it has looked at `LOOKED_AT_MAX` then.

An email is one of the user service's, by its index of emails: who has none there, or has been erased, has no orders.
"""

from __future__ import annotations

import heapq
import itertools
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta, Struct

import kvstore
from services.orders.bodies import OrderBody, order_of
from services.orders.records import (
    ATTENTION,
    STATE_INDEX,
    Order,
    Sku,
    decode_order,
    inverted,
    order_key,
    user_orders_of,
)
from services.orders.states import OrderState
from services.users.emails import EMAIL_BYTES_MAX, email_or_none
from services.users.records import email_key
from services.web.ids import ID_MAX, Moment, first_id, parse_moment, parse_order_number
from services.web.paging import Page, PageQuery, after_cursor, cursor_of
from services.web.problems import FieldError, Problem
from services.web.reading import read_ranges
from services.web.tokens import Caller

NUMBER_CHARS_MAX: Final = 40


OrderNumber = Annotated[
    str, Meta(min_length=1, max_length=NUMBER_CHARS_MAX, description="An order's number, as people type it.")
]
AttentionCode = Annotated[str, Meta(max_length=64, pattern=r"\A[a-z0-9]+(_[a-z0-9]+)*\Z", examples=["refund_failed"])]
# `normalise_email` decides; the document says what comes closest.
CustomersEmail = Annotated[
    str,
    Meta(
        min_length=3,
        max_length=EMAIL_BYTES_MAX,
        description="For staff: the customer's, whole. Of one that nobody has, or has any more, there are no orders.",
        extra_json_schema={"format": "email"},
    ),
]


class OrderQuery(PageQuery, frozen=True):
    """All conditions that are given must hold."""

    state: OrderState | None = None
    user_id: Annotated[int, Meta(ge=1, le=ID_MAX, description="For staff.")] | None = None
    email: CustomersEmail | None = None
    number: OrderNumber | None = None
    sku: Annotated[Sku, Meta(description="One of its lines is of this product.")] | None = None
    placed_from: (
        Annotated[Moment, Meta(description="Placed at this moment or later. (The + of an offset is sent as %2B.)")]
        | None
    ) = None
    placed_to: Annotated[Moment, Meta(description="Placed before this moment.")] | None = None
    needs_attention: Annotated[bool, Meta(description="For staff.")] | None = None
    attention_code: Annotated[AttentionCode, Meta(description="For staff: one of the reasons is this.")] | None = None


# Candidates that are looked at for one page where the index alone does not decide; what they leave is on the next one.
LOOKED_AT_MAX: Final = 500
_READ_AT_ONCE: Final = 100  # of them: a page, where all of them match
# The indexes of states and of attention are in the order of ids, whose time is drawn in the same breath as the
# `created_ms` that decides. The two are apart by a pause of the process, or, where its clock was set back, by as much;
# clocks that are slewed as they should be never are by more than this. It costs looking at so many seconds' orders.
_ID_AND_TIME_APART_MS: Final = 5_000

_Condition = Literal["state", "user_id", "sku", "placed", "needs_attention", "attention_code"]


class _Found(Struct, frozen=True):
    """Candidates in order: where each stands in its index, behind the prefix, and its order's id. `more` follow."""

    places: list[bytes]
    ids: list[int]
    more: bool


_NOTHING: Final = _Found([], [], False)


class _Wanted(Struct, frozen=True):
    """A query with its user looked up and its moments read: placed at `oldest_ms` or later, and before `too_new_ms`."""

    query: OrderQuery
    user_id: int | None
    oldest_ms: int | None
    too_new_ms: int | None

    def matches(self, order: Order) -> bool:
        query = self.query
        return (
            query.state in (None, order.state)
            and self.user_id in (None, order.user_id)
            and query.needs_attention in (None, bool(order.needs_attention))
            and (query.attention_code is None or query.attention_code in order.attention_codes)
            and (self.oldest_ms is None or order.created_ms >= self.oldest_ms)
            and (self.too_new_ms is None or order.created_ms < self.too_new_ms)
            and (query.sku is None or any(line.sku == query.sku for line in order.lines))
        )

    def look_at(self, *decided: _Condition) -> int:
        """How many candidates of an index that decides these conditions by itself."""
        given: dict[_Condition, bool] = {
            "state": self.query.state is not None,
            "user_id": self.user_id is not None,
            "sku": self.query.sku is not None,
            "placed": self.oldest_ms is not None or self.too_new_ms is not None,
            "needs_attention": self.query.needs_attention is not None,
            "attention_code": self.query.attention_code is not None,
        }
        is_exact = all(name in decided for name, is_given in given.items() if is_given)
        return self.query.limit if is_exact else LOOKED_AT_MAX

    def by_time(self) -> tuple[bytes, bytes]:
        """Where the page begins, and before what it ends, in an index in the order of inverted times, with an id after
        a slash; empty: where the index ends."""
        begin = inverted(self.too_new_ms - 1) if self.too_new_ms is not None else b""
        end = inverted(self.oldest_ms) + b"0" if self.oldest_ms is not None else b""  # 0 follows on the slash
        return self._after_cursor(begin), end

    def by_id(self) -> tuple[bytes, bytes]:
        """The same in one of inverted ids, generously."""
        begin = end = b""
        if self.too_new_ms is not None:
            begin = inverted(min(max(first_id(self.too_new_ms + _ID_AND_TIME_APART_MS), 0), ID_MAX))
        if self.oldest_ms is not None:
            end = inverted(min(max(first_id(self.oldest_ms - _ID_AND_TIME_APART_MS), 0), ID_MAX)) + b"\0"
        return self._after_cursor(begin), end

    def _after_cursor(self, begin: bytes) -> bytes:
        return max(begin, after_cursor(self.query.starting_after))


class OrderSearch:
    def __init__(self, store: kvstore.Client) -> None:
        self._store = store

    async def page(self, caller: Caller, query: OrderQuery) -> Page[OrderBody]:
        """Raises `Problem`: `forbidden`, `invalid_parameter`."""
        if not caller.is_staff:
            of_staff = (query.needs_attention, query.attention_code, query.email)
            if of_staff != (None, None, None) or query.user_id not in (None, caller.user_id):
                raise Problem("forbidden", "Others' orders are for staff")
            query = msgspec.structs.replace(query, user_id=caller.user_id)
        wanted = await self._wanted(query)
        found = await self._candidates(wanted) if wanted is not None else _NOTHING
        chosen: list[OrderBody] = []
        looked_at = 0
        while wanted is not None and looked_at < len(found.ids) and len(chosen) < query.limit:
            size = _READ_AT_ONCE if looked_at else query.limit  # as many as are wanted; few of them may match
            for order in await self._orders(found.ids[looked_at : looked_at + size]):
                if len(chosen) == query.limit:
                    break
                looked_at += 1
                if wanted.matches(order):
                    chosen.append(order_of(order))
        more = found.more or looked_at < len(found.ids)
        return Page(chosen, more, cursor_of(found.places[looked_at - 1]) if more else None)

    async def _wanted(self, query: OrderQuery) -> _Wanted | None:
        """None where no order can be meant. Raises `Problem` `invalid_parameter`."""
        oldest_ms = _moment("placed_from", query.placed_from)
        too_new_ms = _moment("placed_to", query.placed_to)
        if oldest_ms is not None and too_new_ms is not None and oldest_ms > too_new_ms:
            raise _invalid("placed_to", "not_combinable", "placed_to is before placed_from")
        user_id = query.user_id
        if query.email is not None:
            normalised = email_or_none(query.email)
            if normalised is None:
                raise _invalid("email", "invalid_value", "This is no email address")
            record = await self._store.get(email_key(normalised))
            if record is None or user_id not in (None, int(record.value)):
                return None
            user_id = int(record.value)
        return _Wanted(query, user_id, oldest_ms, too_new_ms)

    async def _candidates(self, wanted: _Wanted) -> _Found:
        """By the index that leaves the fewest."""
        query = wanted.query
        if query.number is not None:
            order_id = parse_order_number(query.number)
            is_there = order_id is not None and await self._store.get(order_key(order_id)) is not None
            return _Found([b""], [order_id], False) if order_id is not None and is_there else _NOTHING
        if query.needs_attention or query.attention_code is not None:
            return await self._merged([ATTENTION], wanted, wanted.look_at("needs_attention"))
        if wanted.user_id is not None:
            prefix = user_orders_of(wanted.user_id)
            look_at = wanted.look_at("user_id", "placed")
            begin, end = wanted.by_time()
            if end and begin >= end:
                return _NOTHING
            until = prefix + end if end else kvstore.prefix_end(prefix)
            found = await self._store.range(prefix + begin, until, limit=look_at + 1, keys_only=True)
            places = [record.key[len(prefix) :] for record in found.records[:look_at]]
            ids = [int(place.rpartition(b"/")[2]) for place in places]
            return _Found(places, ids, len(found.records) > look_at)
        states = list(OrderState) if query.state is None else [query.state]
        prefixes = [b"%b%b/" % (STATE_INDEX, state.encode()) for state in states]
        return await self._merged(prefixes, wanted, wanted.look_at("state"))

    async def _merged(self, prefixes: list[bytes], wanted: _Wanted, look_at: int) -> _Found:
        """Indexes whose keys end in inverted ids, as one."""
        begin, end = wanted.by_id()
        if end and begin >= end:
            return _NOTHING
        result = await self._store.txn(
            success=[
                kvstore.Range(
                    prefix + begin,
                    prefix + end if end else kvstore.prefix_end(prefix),
                    limit=look_at + 1,
                    keys_only=True,
                )
                for prefix in prefixes
            ]
        )
        ranges = [found.records for found in result.results if isinstance(found, kvstore.RangeResult)]
        tails = (
            [record.key[len(prefix) :] for record in records] for prefix, records in zip(prefixes, ranges, strict=True)
        )
        places = list(itertools.islice(heapq.merge(*tails), look_at + 1))
        return _Found(places[:look_at], [ID_MAX - int(place) for place in places[:look_at]], len(places) > look_at)

    async def _orders(self, ids: list[int]) -> list[Order]:
        """Orders are never deleted, so what an index names is there."""
        found = await read_ranges(self._store, [kvstore.Range(order_key(order_id)) for order_id in ids])
        return [decode_order(records[0].value) for records in found]


def _moment(name: str, text: str | None) -> int | None:
    """In milliseconds, from 0 on: keys hold no times before 1970."""
    if text is None:
        return None
    moment_ms = parse_moment(text)
    if moment_ms is None:
        raise _invalid(name, "invalid_value", "There is no such day")
    return max(moment_ms, 0)


def _invalid(name: str, code: str, message: str) -> Problem:
    wrong = FieldError(f"/{name}", code, message, "query")
    return Problem("invalid_parameter", wrong.message, errors=(wrong,))
