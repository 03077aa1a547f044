"""Nothing is sent nowhere; and where it went to is forgotten with an erased customer, but not before it has arrived."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import kvstore
from services.orders import forgetting
from services.orders.forgetting import ADDRESS_ERASED
from services.orders.records import Order, address_key, decode_order, encode, order_key
from services.web.ids import now_ms
from services.web.problems import PROBLEMS
from services.work import steps
from services.work.kinds import FORGET_CUSTOMER
from services.work.steps import Step, read_step
from tests.cluster.harness import until
from tests.services.paid_shop import ADDRESS, WITHIN_S, PaidShop
from tests.services.shop import PASSWORD, problem

AN_HOUR_MS = 3_600_000


def path_of(order: dict[str, Any]) -> str:
    return f"/v1/orders/{order['id']}"


def parcel(quantity: int = 2, sku: str = "cup") -> dict[str, Any]:
    return {"lines": [{"sku": sku, "quantity": quantity}], "carrier": "Post", "tracking": "P"}


async def paid_for(paid: PaidShop, lines: dict[str, int] | None = None, **more: Any) -> dict[str, Any]:
    order = await paid.placed(lines, **more)
    await paid.paid(order)
    return await paid.becomes(order, payment_status="paid")


async def record_of(paid: PaidShop, order: dict[str, Any]) -> Order:
    record = await paid.shop.store.get(order_key(order["id"]))
    assert record is not None
    return decode_order(record.value)


async def has_address(paid: PaidShop, order: dict[str, Any]) -> bool:
    return await paid.shop.store.get(address_key(order["id"])) is not None


async def steps_of(paid: PaidShop) -> list[Step]:
    records = (await paid.shop.store.range(prefix=steps.STEPS)).records
    found = [step for record in records if (step := read_step(record)) is not None]
    return [step for step in found if step.kind == FORGET_CUSTOMER]


async def erased(paid: PaidShop, by_ms: int | None = None) -> int:
    """As if the buyer's account were, and the step were done that follows from it. By when its orders forget."""
    by_ms = now_ms() + AN_HOUR_MS if by_ms is None else by_ms
    step = steps.put(FORGET_CUSTOMER, str(paid.buyer.id), by_ms=by_ms)
    await paid.shop.store.txn(success=[step])

    async def is_done() -> bool:
        return await paid.shop.store.get(step.key) is None

    await until(is_done, WITHIN_S, "orders that forget", poll_s=0.02)
    return by_ms


# --- nothing is sent nowhere ------------------------------------------------------------------------------------------


async def test_an_order_without_an_address_is_not_shipped_until_it_has_one(paid: PaidShop) -> None:
    order = await paid_for(paid, ship_to=None)
    path = path_of(order)
    before = await record_of(paid, order)
    stock = await paid.stock_of("cup")
    headers = paid.staff.once()
    for _ in range(2):  # the refusal is an answer like others: it is replayed
        refused = await paid.shop.orders.post(f"{path}/shipments", json=parcel(), headers=headers)
        told = await problem(refused, 409, "no_delivery_address")
        assert f"POST {path}/ship-to" in told["detail"]
        assert told["retryable"] is False
    assert refused.headers["Idempotent-Replayed"] == "true"
    assert await record_of(paid, order) == before
    assert await paid.stock_of("cup") == stock
    assert await paid.get(f"{path}/shipments") == []

    await paid.did(paid.staff, f"{path}/ship-to", ADDRESS)
    await paid.did(paid.staff, f"{path}/shipments", parcel())
    assert (await paid.get(path))["fulfilment_status"] == "shipped"


async def test_an_order_that_is_not_paid_is_told_so_first(paid: PaidShop) -> None:
    order = await paid.placed(ship_to=None)
    await problem(await paid.say(paid.staff, f"{path_of(order)}/shipments", parcel()), 409, "order_state")
    await paid.paid(order, capture="manual")
    await paid.becomes(order, state="confirmed")
    await problem(await paid.say(paid.staff, f"{path_of(order)}/shipments", parcel()), 409, "not_paid")


async def test_the_document_says_so(paid: PaidShop) -> None:
    document = await (await paid.shop.orders.get("/openapi.json")).json()
    operation = document["paths"]["/v1/orders/{id}/shipments"]["post"]
    assert "no_delivery_address" in json.dumps(operation["responses"]["409"])
    assert PROBLEMS["no_delivery_address"].status == 409


async def test_what_an_older_version_shipped_in_part_to_nowhere_can_be_given_an_address_once(paid: PaidShop) -> None:
    order = await paid_for(paid)
    path = path_of(order)
    await paid.did(paid.staff, f"{path}/shipments", parcel(1))
    await paid.shop.store.delete(address_key(order["id"]))
    await problem(await paid.say(paid.staff, f"{path}/shipments", parcel(1)), 409, "no_delivery_address")
    await paid.did(paid.buyer, f"{path}/ship-to", ADDRESS)
    await problem(await paid.say(paid.buyer, f"{path}/ship-to", ADDRESS), 409, "order_state")
    await paid.did(paid.staff, f"{path}/shipments", parcel(1))


async def test_an_order_that_has_ended_is_given_no_address(paid: PaidShop) -> None:
    order = await paid.placed(ship_to=None)
    await paid.did(paid.buyer, f"{path_of(order)}/cancel", {"reason": "no"})
    await paid.becomes(order, state="cancelled")
    await problem(await paid.say(paid.staff, f"{path_of(order)}/ship-to", ADDRESS), 409, "order_state")
    assert not await has_address(paid, order)


# --- an erased customer's orders --------------------------------------------------------------------------------------


async def test_a_paid_order_of_an_erased_customer_is_sent_and_forgets_where_to_as_it_arrives(paid: PaidShop) -> None:
    order = await paid_for(paid, {"cup": 2, "pot": 1})
    path = path_of(order)
    by_ms = await erased(paid)
    assert (await record_of(paid, order)).forget_by_ms == by_ms
    assert [(step.subject, step.due_ms, step.arguments) for step in await steps_of(paid)] == [
        (str(paid.buyer.id), by_ms, {"by_ms": by_ms})
    ]
    details = await paid.get(f"{path}/details", paid.staff)
    assert details["ship_to"]["line1"] == ADDRESS["line1"]
    await paid.did(paid.staff, f"{path}/shipments", parcel())
    await paid.did(paid.staff, f"{path}/shipments", parcel(1, "pot"))
    await paid.did(paid.staff, f"{path}/shipments/1/deliver")
    assert await has_address(paid, order)  # the other one is on its way
    await paid.did(paid.staff, f"{path}/shipments/2/deliver")

    store = paid.shop.store
    record = await store.get(order_key(order["id"]))
    assert record is not None
    assert decode_order(record.value).state == "completed"
    # With the very transaction, neither before nor after.
    assert await store.get(address_key(order["id"]), revision=record.mod_revision - 1) is not None
    assert await store.get(address_key(order["id"]), revision=record.mod_revision) is None
    assert (await paid.get(f"{path}/details", paid.staff))["ship_to"] is None


async def test_a_paid_order_of_an_erased_customer_forgets_where_to_when_it_is_cancelled(paid: PaidShop) -> None:
    order = await paid_for(paid)
    await erased(paid)
    assert await has_address(paid, order)
    answer = await paid.did(paid.staff, f"{path_of(order)}/cancel", {"reason": "out of order"})
    assert answer["state"] == "cancelling"
    assert not await has_address(paid, order)  # it goes nowhere any more, even while the money is on its way
    await paid.becomes(order, state="cancelled", payment_status="refunded")


async def test_it_forgets_where_to_when_its_last_line_is_cancelled(paid: PaidShop) -> None:
    order = await paid_for(paid, {"cup": 2, "pot": 1})
    path = path_of(order)
    await paid.did(paid.staff, f"{path}/shipments", parcel())
    await erased(paid)
    await paid.did(paid.staff, f"{path}/shipments/1/deliver")
    assert await has_address(paid, order)
    await paid.did(paid.staff, f"{path}/cancel-lines", {"lines": [{"sku": "pot", "quantity": 1}], "reason": "broken"})
    assert not await has_address(paid, order)  # the refund is under way, nothing else
    await paid.becomes(order, state="completed")


async def test_an_order_that_had_ended_forgets_where_to_at_once(paid: PaidShop) -> None:
    delivered, cancelled = await paid_for(paid), await paid.placed()
    await paid.did(paid.staff, f"{path_of(delivered)}/shipments", parcel())
    await paid.did(paid.staff, f"{path_of(delivered)}/shipments/1/deliver")
    await paid.did(paid.buyer, f"{path_of(cancelled)}/cancel", {"reason": "no"})
    await paid.becomes(delivered, state="completed")
    await paid.becomes(cancelled, state="cancelled")
    assert await has_address(paid, delivered)  # who has an account may look it up
    await erased(paid)
    assert not await has_address(paid, delivered)
    assert not await has_address(paid, cancelled)
    assert await steps_of(paid) == []  # nothing comes later


async def test_an_order_that_waits_to_be_paid_may_still_be_paid_and_sent(paid: PaidShop) -> None:
    order = await paid.placed()
    await erased(paid)
    await paid.paid(order)
    await paid.becomes(order, payment_status="paid")
    await paid.did(paid.staff, f"{path_of(order)}/shipments", parcel())
    await paid.did(paid.staff, f"{path_of(order)}/shipments/1/deliver")
    await paid.becomes(order, state="completed")
    assert not await has_address(paid, order)


async def test_an_order_that_expires_forgets_where_to(store: kvstore.Client, tmp_path: Path) -> None:
    async with PaidShop(store, tmp_path, workers=0, pay_within_s=0.2) as paid:
        await paid.shop.stock(paid.staff, "cup", 10)
        order = await paid.placed()
        record = await record_of(paid, order)
        marked = encode(Order(**{**_fields(record), "forget_by_ms": now_ms() + AN_HOUR_MS}))
        await store.put(order_key(order["id"]), marked)
        worker = paid.start_worker()
        try:
            await paid.becomes(order, state="expired")
        finally:
            worker.cancel()
        assert not await has_address(paid, order)


def _fields(order: Order) -> dict[str, Any]:
    return {name: getattr(order, name) for name in order.__struct_fields__}


async def test_what_is_under_way_for_too_long_loses_its_address_and_needs_attention(paid: PaidShop) -> None:
    order = await paid_for(paid, {"cup": 2, "pot": 1})
    path = path_of(order)
    await paid.did(paid.staff, f"{path}/shipments", parcel(1))
    await erased(paid)
    await erased(paid, by_ms=now_ms())
    assert not await has_address(paid, order)
    details = await paid.get(f"{path}/details", paid.staff)
    assert (details["needs_attention"], details["ship_to"]) == (ADDRESS_ERASED, None)
    told = await problem(await paid.say(paid.staff, f"{path}/shipments", parcel(1)), 409, "no_delivery_address")
    assert "cancel" in told["detail"]
    # What the erasure has promised holds: nobody brings it back.
    await problem(await paid.say(paid.staff, f"{path}/ship-to", ADDRESS), 409, "order_state")
    rest = [{"sku": "cup", "quantity": 1}, {"sku": "pot", "quantity": 1}]
    await paid.did(paid.staff, f"{path}/cancel-lines", {"lines": rest, "reason": "nobody knows where to"})
    await paid.did(paid.staff, f"{path}/shipments/1/deliver")
    await paid.becomes(order, state="completed")


async def test_staff_may_correct_where_an_erased_customers_order_goes_while_it_is_known(paid: PaidShop) -> None:
    order = await paid_for(paid)
    await erased(paid)
    await paid.did(paid.staff, f"{path_of(order)}/ship-to", {**ADDRESS, "line1": "2 Street"})
    await paid.did(paid.staff, f"{path_of(order)}/shipments", parcel())
    await paid.did(paid.staff, f"{path_of(order)}/shipments/1/deliver")
    assert not await has_address(paid, order)


async def test_all_of_many_orders_and_twice(paid: PaidShop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forgetting, "_BATCH", 2)
    orders = [await paid.placed({"cup": 1}) for _ in range(5)]
    for order in orders[1:4]:
        await paid.did(paid.buyer, f"{path_of(order)}/cancel", {"reason": "no"})
        await paid.becomes(order, state="cancelled")
    for _ in range(2):
        by_ms = await erased(paid)
        assert [await has_address(paid, order) for order in orders] == [True, False, False, False, True]
    assert {(await record_of(paid, order)).forget_by_ms for order in (orders[0], orders[4])} == {by_ms}


async def test_an_erasure_gives_both_dates_and_the_step_that_keeps_them(store: kvstore.Client, tmp_path: Path) -> None:
    async with PaidShop(store, tmp_path, with_users=True) as paid:
        await paid.shop.stock(paid.staff, "cup", 10)
        paid.buyer = await paid.shop.register()
        order = await paid_for(paid)
        answer = await paid.shop.users.post(
            "/v1/users/me/erasure", json={"password": PASSWORD}, headers=paid.buyer.headers
        )
        assert answer.status == 200, await answer.text()
        dates = await answer.json()
        assert dates["erased_at"] < dates["free_by"] < dates["orders_free_by"]
        [step] = await steps_of(paid)
        # Its time comes: the last token of the account is not good any more.
        await store.txn(
            success=[
                kvstore.Delete(step.key),
                steps.put(FORGET_CUSTOMER, step.subject, due_ms=now_ms(), **step.arguments),
            ]
        )
        by_ms = step.arguments["by_ms"]

        async def is_marked() -> bool:
            return (await record_of(paid, order)).forget_by_ms == by_ms

        await until(is_marked, WITHIN_S, "an order that knows of it", poll_s=0.02)
        assert await has_address(paid, order)
        await paid.did(paid.staff, f"{path_of(order)}/shipments", parcel())
        await paid.did(paid.staff, f"{path_of(order)}/shipments/1/deliver")
        assert not await has_address(paid, order)


def test_an_order_of_an_older_version_has_no_customer_that_is_erased() -> None:
    older = (
        b'{"v":1,"id":12,"number":"C-1","user_id":7,"state":"confirmed","currency":"EUR","lines":[{"sku":"cup",'
        b'"name":"A cup","quantity":1,"unit_price":5,"total":5}],"total":5,"created_ms":1}'
    )
    order = decode_order(older)
    assert (order.forget_by_ms, order.is_under_way) == (0, True)
