"""Finding orders: a user's own by the user's index, and all of them, for staff, by the index of states.

Every order stands once in the index of states. One state is one range of keys; all of them are so many ranges, read in
one transaction and merged, the newest first. Orders that need attention have an index of their own.
"""

from __future__ import annotations

import heapq
from typing import Annotated, Final

from msgspec import Meta

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
from services.web.problems import FieldError, Problem
from services.web.tokens import Caller

NUMBER_CHARS_MAX: Final = 40


OrderNumber = Annotated[
    str, Meta(min_length=1, max_length=NUMBER_CHARS_MAX, description="An order's number, as people type it.")
]


class OrderQuery(PageQuery, frozen=True):
    """One of `number`, `user_id` and `needs_attention` at most; each with `state` or without."""

    state: OrderState | None = None
    user_id: Annotated[int, Meta(ge=1, le=ID_MAX, description="For staff.")] | None = None
    number: Annotated[str, Meta(min_length=1, max_length=NUMBER_CHARS_MAX, description="As people type it.")] | None = (
        None
    )
    needs_attention: Annotated[bool, Meta(description="For staff.")] | None = None


# Of a user's orders, and of those that need attention, so many are looked at for one page where only one state is asked
# for; what they leave is on the next one.
_LOOKED_AT_MAX: Final = 500


class OrderSearch:
    def __init__(self, store: kvstore.Client) -> None:
        self._store = store

    async def page(self, caller: Caller, query: OrderQuery) -> Page[OrderBody]:
        """Raises `Problem`: `forbidden`, `invalid_parameter`."""
        asked = [query.user_id is not None, query.number is not None, query.needs_attention is not None]
        if sum(asked) > 1:
            message = "Send one of user_id, number and needs_attention"
            raise Problem("invalid_parameter", message, errors=(FieldError("", "invalid_value", message, "query"),))
        if not caller.is_staff:
            if query.needs_attention is not None or query.user_id not in (None, caller.user_id):
                raise Problem("forbidden", "Others' orders are for staff")
            query_user: int | None = caller.user_id
        else:
            query_user = query.user_id
        if query.number is not None:
            return await self._numbered(query, caller)
        if query_user is not None:
            return await self._filtered(user_orders_of(query_user), query)
        if query.needs_attention:
            return await self._filtered(ATTENTION, query)
        return await self._by_state(query)

    async def _numbered(self, query: OrderQuery, caller: Caller) -> Page[OrderBody]:
        order_id = parse_order_number(query.number or "")
        orders = await self._orders([order_id]) if order_id is not None else []
        found = [
            order_of(order)
            for order in orders
            if (caller.is_staff or order.user_id == caller.user_id) and query.state in (None, order.state)
        ]
        return Page(found, False, None)

    async def _filtered(self, prefix: bytes, query: OrderQuery) -> Page[OrderBody]:
        """Of an index whose keys end in the order's id, or in its inverse."""
        start = prefix + after_cursor(query.starting_after)
        look_at = query.limit if query.state is None else _LOOKED_AT_MAX
        found = await self._store.range(start, kvstore.prefix_end(prefix), limit=look_at + 1, keys_only=True)
        keys = [record.key for record in found.records[:look_at]]
        has_more = len(found.records) > look_at
        chosen: list[OrderBody] = []
        last = b""
        orders = await self._orders([_id_of(prefix, key) for key in keys])
        for key, order in zip(keys, orders, strict=True):
            if len(chosen) == query.limit:
                has_more = True
                break
            last = key
            if query.state in (None, order.state):
                chosen.append(order_of(order))
        return Page(chosen, has_more, cursor_of(last[len(prefix) :]) if has_more else None)

    async def _by_state(self, query: OrderQuery) -> Page[OrderBody]:
        states = list(OrderState) if query.state is None else [query.state]
        prefixes = [b"%b%b/" % (STATE_INDEX, state.encode()) for state in states]
        begin = after_cursor(query.starting_after)
        result = await self._store.txn(
            success=[
                kvstore.Range(prefix + begin, kvstore.prefix_end(prefix), limit=query.limit + 1, keys_only=True)
                for prefix in prefixes
            ]
        )
        ranges = [found.records for found in result.results if isinstance(found, kvstore.RangeResult)]
        merged = heapq.merge(
            *(
                [record.key[len(prefix) :] for record in records]
                for prefix, records in zip(prefixes, ranges, strict=True)
            )
        )
        ids = [tail for tail, _ in zip(merged, range(query.limit + 1), strict=False)]
        has_more = len(ids) > query.limit
        ids = ids[: query.limit]
        orders = await self._orders([ID_MAX - int(tail) for tail in ids])
        return Page([order_of(order) for order in orders], has_more, cursor_of(ids[-1]) if has_more else None)

    async def _orders(self, ids: list[int]) -> list[Order]:
        """Those that there are, in one round trip."""
        if not ids:
            return []
        result = await self._store.txn(success=[kvstore.Range(order_key(order_id)) for order_id in ids])
        found = (one.records for one in result.results if isinstance(one, kvstore.RangeResult))
        return [decode_order(records[0].value) for records in found if records]


def _id_of(prefix: bytes, key: bytes) -> int:
    tail = key[len(prefix) :]
    return ID_MAX - int(tail) if prefix == ATTENTION else int(tail.rpartition(b"/")[2])
