"""Finding orders: a user's own by the user's index, and all of them, for staff, by the index of states.

Every order stands once in the index of states. One state is one range of keys; all of them are so many ranges, read in
one transaction and merged, the newest first. Orders that need attention have an index of their own. One index drives,
and the record that is read then decides; so a page may have fewer orders than asked for, and its cursor goes on.
"""

from __future__ import annotations

import heapq
import itertools
from typing import Annotated, Final

import msgspec
from msgspec import Meta, Struct

import kvstore
from services.orders.bodies import OrderBody, order_of
from services.orders.records import (
    ATTENTION,
    STATE_INDEX,
    Order,
    decode_order,
    order_key,
    user_orders_of,
)
from services.orders.states import OrderState
from services.web.ids import ID_MAX, parse_order_number
from services.web.paging import Page, PageQuery, after_cursor, cursor_of
from services.web.problems import Problem
from services.web.reading import read_ranges
from services.web.tokens import Caller

NUMBER_CHARS_MAX: Final = 40


OrderNumber = Annotated[
    str, Meta(min_length=1, max_length=NUMBER_CHARS_MAX, description="An order's number, as people type it.")
]


class OrderQuery(PageQuery, frozen=True):
    """All conditions that are given must hold."""

    state: OrderState | None = None
    user_id: Annotated[int, Meta(ge=1, le=ID_MAX, description="For staff.")] | None = None
    number: OrderNumber | None = None
    needs_attention: Annotated[bool, Meta(description="For staff.")] | None = None


# Candidates that are looked at for one page where the index alone does not decide; what they leave is on the next one.
_LOOKED_AT_MAX: Final = 500
_READ_AT_ONCE: Final = 100  # of them: a page, where all of them match


class _Found(Struct, frozen=True):
    """Candidates in order: where each stands in its index, behind the prefix, and its order's id. `more` follow."""

    places: list[bytes]
    ids: list[int]
    more: bool


class OrderSearch:
    def __init__(self, store: kvstore.Client) -> None:
        self._store = store

    async def page(self, caller: Caller, query: OrderQuery) -> Page[OrderBody]:
        """Raises `Problem`: `forbidden`, `invalid_parameter`."""
        if not caller.is_staff:
            if query.needs_attention is not None or query.user_id not in (None, caller.user_id):
                raise Problem("forbidden", "Others' orders are for staff")
            query = msgspec.structs.replace(query, user_id=caller.user_id)
        found = await self._candidates(query)
        chosen: list[OrderBody] = []
        last, more = b"", found.more
        for at in range(0, len(found.ids), _READ_AT_ONCE):
            some = slice(at, at + _READ_AT_ONCE)
            for place, order in zip(found.places[some], await self._orders(found.ids[some]), strict=True):
                if len(chosen) == query.limit:
                    return Page(chosen, True, cursor_of(last))
                last = place
                if _matches(order, query):
                    chosen.append(order_of(order))
        return Page(chosen, more, cursor_of(last) if more else None)

    async def _candidates(self, query: OrderQuery) -> _Found:
        """By the index that leaves the fewest."""
        if query.number is not None:
            order_id = parse_order_number(query.number)
            is_there = order_id is not None and await self._store.get(order_key(order_id)) is not None
            return _Found([b""], [order_id], False) if order_id is not None and is_there else _Found([], [], False)
        if query.needs_attention:
            return await self._merged([ATTENTION], query)
        if query.user_id is not None:
            prefix = user_orders_of(query.user_id)
            look_at = query.limit if query.state is None and query.needs_attention is None else _LOOKED_AT_MAX
            start = prefix + after_cursor(query.starting_after)
            found = await self._store.range(start, kvstore.prefix_end(prefix), limit=look_at + 1, keys_only=True)
            places = [record.key[len(prefix) :] for record in found.records[:look_at]]
            ids = [int(place.rpartition(b"/")[2]) for place in places]
            return _Found(places, ids, len(found.records) > look_at)
        states = list(OrderState) if query.state is None else [query.state]
        return await self._merged([b"%b%b/" % (STATE_INDEX, state.encode()) for state in states], query)

    async def _merged(self, prefixes: list[bytes], query: OrderQuery) -> _Found:
        """Indexes whose keys end in inverted ids, as one."""
        exact = query.needs_attention is None or (query.state is None and query.user_id is None)
        look_at = query.limit if exact else _LOOKED_AT_MAX
        begin = after_cursor(query.starting_after)
        result = await self._store.txn(
            success=[
                kvstore.Range(prefix + begin, kvstore.prefix_end(prefix), limit=look_at + 1, keys_only=True)
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


def _matches(order: Order, query: OrderQuery) -> bool:
    return (
        query.state in (None, order.state)
        and query.user_id in (None, order.user_id)
        and query.needs_attention in (None, bool(order.needs_attention))
    )
