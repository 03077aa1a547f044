"""When an account is erased: orders stay, and what names the person goes. That is where they were sent to, and carts.

An order keeps its user's number, which names nobody any more; an order's history of states holds no name. The reasons
that people typed stay with the order: they are the shop's record of what it did, and staff are told not to write names
into them (docs/services.md).
"""

from __future__ import annotations

from typing import Final

import kvstore
from services.orders.carts import active_carts_of, cart_key, carts_of
from services.orders.records import address_key, user_orders_of
from services.web.ids import ID_MAX
from services.work.steps import StepRun

# Each deletes three keys at most, well within the 1,024 operations of a transaction.
_BATCH: Final = 250


async def forget_customer(store: kvstore.Client, run: StepRun) -> None:
    """The handler of `FORGET_CUSTOMER`; being done twice changes nothing."""
    user_id = int(run.step.subject)
    orders, after = user_orders_of(user_id), b""
    while True:
        page = await store.range(orders + after, kvstore.prefix_end(orders), limit=_BATCH, keys_only=True)
        ids = [int(record.key.rpartition(b"/")[2]) for record in page.records]
        if ids:
            await store.txn(success=[kvstore.Delete(address_key(order_id)) for order_id in ids])
        if len(ids) < _BATCH:
            break
        after = page.records[-1].key[len(orders) :] + b"\0"
    carts = carts_of(user_id)
    while (page := await store.range(prefix=carts, limit=_BATCH, keys_only=True)).records:
        places = [record.key[len(carts) :] for record in page.records]
        deletes = [(cart_key(ID_MAX - int(place)), carts + place, active_carts_of(user_id) + place) for place in places]
        await store.txn(success=[kvstore.Delete(key) for keys in deletes for key in keys])
    await run.finish()
