"""When an account is erased: orders stay, and what names the person goes. That is where they were sent to, and carts.

An order that is under way still has to be sent, or to arrive. It keeps its address, and a mark (`forget_by_ms`); the
change after which nothing is under way takes the address in the same transaction (`draft.py`). What is under way for
too long loses it all the same: the account's erasure has said by when (`Retention` in the user service), and the same
step comes again then. Staff have to look at such an order: it can only be cancelled.

An order keeps its user's number, which names nobody any more; an order's history of states holds no name. The reasons
that people typed stay with the order: they are the shop's record of what it did, and staff are told not to write names
into them (docs/services.md).
"""

from __future__ import annotations

from functools import partial
from typing import Final

import kvstore
from services.orders.book import OrderBook
from services.orders.carts import active_carts_of, cart_key, carts_of
from services.orders.draft import Draft
from services.orders.records import address_key, decode_order, order_key, user_orders_of
from services.orders.states import OrderState
from services.web.ids import ID_MAX, now_ms
from services.web.reading import read_ranges
from services.work import steps
from services.work.kinds import FORGET_CUSTOMER
from services.work.steps import StepRun

# Each deletes three keys at most, well within the 1,024 operations of a transaction; orders of a hundred lines with
# long names are some 60 KB each, so 6 MB in memory.
_BATCH: Final = 100
_ENDED: Final = (OrderState.COMPLETED, OrderState.CANCELLED, OrderState.EXPIRED)

# Why staff have to look at an order: docs/services.md says what they do.
ADDRESS_ERASED: Final = "address_erased"


async def forget_customer(store: kvstore.Client, book: OrderBook, run: StepRun) -> None:
    """The handler of `FORGET_CUSTOMER`; being done twice changes nothing."""
    user_id = int(run.step.subject)
    by_ms = int(run.step.arguments.get("by_ms", run.step.due_ms))
    is_last = now_ms() >= by_ms
    some_left = await _forget_addresses(store, book, user_id, by_ms, is_last=is_last)
    await _forget_carts(store, user_id)
    if some_left and not is_last:
        await run.finish(success=[steps.put(FORGET_CUSTOMER, str(user_id), due_ms=by_ms, by_ms=by_ms)])
    else:
        await run.finish()


def forget(draft: Draft, by_ms: int, *, is_last: bool) -> None:
    """The rule for an order that has not ended."""
    draft.set(forget_by_ms=by_ms)
    if is_last and draft.has_address and draft.order.is_under_way:
        draft.forget_address()
        draft.want_attention(ADDRESS_ERASED)


async def _forget_addresses(store: kvstore.Client, book: OrderBook, user_id: int, by_ms: int, *, is_last: bool) -> bool:
    """Whether there are orders that have not ended."""
    some_left = False
    orders, after = user_orders_of(user_id), b""
    while True:
        page = await store.range(orders + after, kvstore.prefix_end(orders), limit=_BATCH, keys_only=True)
        ids = [int(record.key.rpartition(b"/")[2]) for record in page.records]
        if not ids:
            return some_left
        found = await read_ranges(store, [kvstore.Range(order_key(order_id)) for order_id in ids])
        ended: list[kvstore.Operation] = []
        for [record] in found:  # orders are never deleted, so what the index names is there
            order = decode_order(record.value)
            if order.state in _ENDED:  # for good; and none is given an address any more
                ended.append(kvstore.Delete(address_key(order.id)))
            else:
                await book.apply(order.id, partial(forget, by_ms=by_ms, is_last=is_last))
                some_left = True
        if ended:
            await store.txn(success=ended)
        if len(ids) < _BATCH:
            return some_left
        after = page.records[-1].key[len(orders) :] + b"\0"


async def _forget_carts(store: kvstore.Client, user_id: int) -> None:
    carts = carts_of(user_id)
    while (page := await store.range(prefix=carts, limit=_BATCH, keys_only=True)).records:
        places = [record.key[len(carts) :] for record in page.records]
        deletes = [(cart_key(ID_MAX - int(place)), carts + place, active_carts_of(user_id) + place) for place in places]
        await store.txn(success=[kvstore.Delete(key) for keys in deletes for key in keys])
