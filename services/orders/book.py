"""Reads whole orders, and changes them: read, decide, one transaction, again if somebody was quicker.

Commands of people (`change`) come with an Idempotency-Key, whose record is part of the transaction; durable steps
(`finish`) come with a claim, which is. Either way the change is there if and only if it is known to have happened.

An order is read in one transaction; one that has grown beyond a result of the store (1 MiB) is read in pages, all at
the revision of the first. However many parts there are, and however long, an order can be read and so be changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeVar

from aiohttp import web

import kvstore
from services.orders.draft import Draft, Whole, reads, whole_of
from services.orders.records import Payment, Refund, Return, Shipment, decode_order, order_key, part_key
from services.web.answers import json_response
from services.web.endpoints import Call
from services.web.idempotency import refuse_and_store
from services.web.ids import now_ms
from services.web.problems import Problem
from services.work.steps import Again, StepRun

# Each fails only where somebody else changed that very order meanwhile: its customer, staff, a worker.
ATTEMPTS_MAX: Final = 8
_PAUSE_S: Final = 0.1

R = TypeVar("R")
# What a command did: the body of its answer, and where what it made can be read, if it made something.
Said = tuple[bytes, str]
Records = tuple[kvstore.Record, ...]
P = TypeVar("P", Payment, Refund, Return, Shipment)


class OrderBook:
    """One per process."""

    def __init__(self, store: kvstore.Client) -> None:
        self._store = store

    async def read(self, order_id: int) -> Whole | None:
        """None if there is no such order."""
        _, whole = await self._read(order_id)
        return whole

    async def read_for(self, call: Call, order_id: int) -> Whole:
        """For who asks: its owner, or staff. Raises `Problem` `not_found`: another's and none at all look the same."""
        whole = await self.read(order_id)
        if whole is None or not may_see(call, whole.order.user_id):
            raise no_order()
        return whole

    async def read_part_for(
        self, call: Call, order_id: int, kind: str, number: int, decode: Callable[[bytes], P]
    ) -> tuple[P, int]:
        """One payment, refund, shipment or return (`kind`) of an order, and its revision, for who may see the order.
        Raises `Problem` `not_found`."""
        keys = (order_key(order_id), part_key(kind, order_id, number))
        result = await self._store.txn(success=[kvstore.Range(key) for key in keys])
        orders, parts = (one.records for one in result.results if isinstance(one, kvstore.RangeResult))
        if not orders or not may_see(call, decode_order(orders[0].value).user_id):
            raise no_order()
        if not parts:
            raise Problem("not_found", f"The order has no such {kind}")
        return decode(parts[0].value), parts[0].mod_revision

    async def change(self, call: Call, order_id: int, decide: Callable[[Draft], Said]) -> web.Response:
        """Answer an idempotent command: `decide` changes the draft and says the answer, or refuses with `Problem`. An
        answer that names a place is a 201. Raises `Problem`, also `not_found` as `read_for` does."""
        idempotency = call.idempotency
        for _ in range(ATTEMPTS_MAX):
            (answered,), whole = await self._read(order_id, idempotency.read)
            if whole is None or not may_see(call, whole.order.user_id):
                raise no_order()
            if answered:
                return idempotency.replay(answered[0])
            draft = Draft(whole, now_ms(), call.caller.user_id)
            try:
                body, location = decide(draft)
            except Problem as problem:
                return await refuse_and_store(self._store, idempotency, problem, call.request)
            status = 201 if location else 200
            result = await self._store.txn(
                compare=[idempotency.absent, draft.unchanged],
                success=[*draft.operations(), idempotency.put(status, body, location)],
            )
            if result.succeeded:
                return json_response(body, status, {"Location": location} if location else None)
        raise Problem("contended", "Others kept changing this order; nothing has changed, try again")

    async def apply(self, order_id: int, decide: Callable[[Draft], object]) -> bool:
        """A change that is no command's and ends no step. False if there is no such order."""
        for _ in range(ATTEMPTS_MAX):
            whole = await self.read(order_id)
            if whole is None:
                return False
            draft = Draft(whole, now_ms())
            decide(draft)
            result = await self._store.txn(compare=[draft.unchanged], success=draft.operations())
            if result.succeeded:
                return True
        raise Again("contended", _PAUSE_S)

    async def finish(self, run: StepRun, order_id: int, decide: Callable[[Draft], object]) -> None:
        """End a step with what `decide` changes. Raises `Again` and `ClaimLost`."""
        for _ in range(ATTEMPTS_MAX):
            whole = await self.read(order_id)
            if whole is None:
                await run.finish()
                return
            draft = Draft(whole, now_ms())
            decide(draft)
            if await run.finish([draft.unchanged], draft.operations()):
                return
        raise Again("contended", _PAUSE_S)

    async def _read(self, order_id: int, *also: kvstore.Range) -> tuple[list[Records], Whole | None]:
        """What `also` finds, and the order, as of one moment."""
        order, *parts = reads(order_id)
        try:
            result = await self._store.txn(success=[*also, order, *parts])
            found = [one.records for one in result.results if isinstance(one, kvstore.RangeResult)]
        except kvstore.Refused as refused:
            if refused.code != "result_too_large":
                raise
            result = await self._store.txn(success=[*also, order])
            found = [one.records for one in result.results if isinstance(one, kvstore.RangeResult)]
            for one in parts:
                pages = self._store.scan(one.start, one.end, revision=result.revision)
                found.append(tuple([record async for record in pages]))
        return found[: len(also)], whole_of(found[len(also) :])


def may_see(call: Call, user_id: int) -> bool:
    return user_id == call.caller.user_id or call.caller.is_staff


def no_order() -> Problem:
    return Problem("not_found", "There is no such order, or none that you may read")
