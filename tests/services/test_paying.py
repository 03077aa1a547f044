"""Orders are paid, cancelled, shipped and returned, through the services' doors, against the sandbox provider."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

import kvstore
from services.audit.run import audit
from services.orders.records import attention_key
from services.payments.provider import Operation, Void, request_key
from services.payments.sandbox import SandboxProvider
from services.sandbox_psp.process import API_KEY
from services.web.ids import timestamp
from services.work import steps
from tests.cluster.harness import until
from tests.services.paid_shop import PaidShop
from tests.services.shop import problem


async def test_an_order_is_paid_shipped_delivered_and_complete(paid: PaidShop) -> None:
    order = await paid.placed({"cup": 2, "pot": 1})
    assert await paid.stock_of("cup") == (8, 2, 0)
    payment = await paid.paid(order)
    assert (payment["state"], payment["amount"], payment["attempt"]) == ("created", 6500, 1)
    order = await paid.becomes(order, state="confirmed", payment_status="paid")
    assert (order["authorised"], order["captured"], order["expires_at"]) == (6500, 6500, None)
    assert await paid.stock_of("cup") == (8, 0, 2)

    path = f"/v1/orders/{order['id']}"
    first = {"lines": [{"sku": "cup", "quantity": 1}], "carrier": "Post", "tracking": "P 1"}
    shipment = await paid.did(paid.staff, f"{path}/shipments", first)
    assert shipment["state"] == "shipped"
    assert (await paid.get(path))["fulfilment_status"] == "partial"
    assert await paid.stock_of("cup") == (8, 0, 1)
    rest = {
        "lines": [{"sku": "cup", "quantity": 1}, {"sku": "pot", "quantity": 1}],
        "carrier": "Post",
        "tracking": "P 2",
    }
    await paid.did(paid.staff, f"{path}/shipments", rest)
    assert (await paid.get(path))["fulfilment_status"] == "shipped"
    await paid.did(paid.staff, f"{path}/shipments/1/deliver")
    assert (await paid.get(path))["state"] == "confirmed"
    await paid.did(paid.staff, f"{path}/shipments/2/deliver")
    order = await paid.get(path)
    assert (order["state"], order["fulfilment_status"]) == ("completed", "delivered")
    assert await paid.stock_of("cup") == (8, 0, 0)
    assert await paid.types_of(order) == [
        "order.pending_payment", "payment.created", "payment.authorising", "payment.authorised", "order.confirmed",
        "payment.capturing", "payment.captured", "shipment.shipped", "shipment.shipped", "shipment.delivered",
        "shipment.delivered", "order.completed",
    ]  # fmt: skip


async def test_a_partial_refund_and_a_return(paid: PaidShop) -> None:
    order = await paid.placed({"cup": 2})
    await paid.paid(order)
    await paid.becomes(order, payment_status="paid")
    path = f"/v1/orders/{order['id']}"
    lines = [{"sku": "cup", "quantity": 2}]
    await paid.did(paid.staff, f"{path}/shipments", {"lines": lines, "carrier": "Post", "tracking": "P"})
    await problem(
        await paid.say(paid.buyer, f"{path}/returns", {"lines": lines, "reason": "broken"}), 422, "not_in_order"
    )
    await paid.did(paid.staff, f"{path}/shipments/1/deliver")

    refund = await paid.did(paid.staff, f"{path}/refunds", {"amount": 500, "reason": "late"})
    assert (refund["state"], refund["amount"]) == ("pending", 500)
    await paid.becomes(order, payment_status="partially_refunded", refunded=500)
    assert (await paid.get(f"{path}/refunds/1"))["state"] == "succeeded"

    asked = await paid.did(
        paid.buyer, f"{path}/returns", {"lines": [{"sku": "cup", "quantity": 1}], "reason": "broken"}
    )
    assert asked["state"] == "requested"
    early = await paid.say(paid.staff, f"{path}/returns/1/receive", {"note": "came back"})
    await problem(early, 409, "order_state")
    await paid.did(paid.staff, f"{path}/returns/1/approve", {"note": "send it"})
    receipt = {"note": "as new", "restocked": [{"sku": "cup", "quantity": 1}]}
    received = await paid.did(paid.staff, f"{path}/returns/1/receive", receipt)
    assert (received["state"], received["refund"]) == ("received", 2)
    found = await paid.becomes(order, refunded=500 + 1250)
    assert found["return_status"] == "received"
    assert found["lines"][0]["returned"] == 1
    assert await paid.stock_of("cup") == (9, 0, 0)
    (charge,) = await paid.charges()
    assert (charge.captured, charge.refunded) == (2500, 1750)


async def test_a_refund_is_no_more_than_was_captured(paid: PaidShop) -> None:
    order = await paid.placed({"cup": 2})
    path = f"/v1/orders/{order['id']}/refunds"
    await problem(await paid.say(paid.staff, path, {"reason": "early"}), 409, "order_state")
    await paid.paid(order)
    await paid.becomes(order, payment_status="paid")
    await problem(await paid.say(paid.staff, path, {"amount": 2501, "reason": "r"}), 422, "amount_too_large")
    await paid.did(paid.staff, path, {"amount": 2000, "reason": "r"})
    await problem(await paid.say(paid.staff, path, {"amount": 501, "reason": "r"}), 422, "amount_too_large")
    await paid.did(paid.staff, path, {"reason": "the rest"})
    await paid.becomes(order, payment_status="refunded", refunded=2500)
    shipping = {"lines": [{"sku": "cup", "quantity": 1}], "carrier": "Post", "tracking": "P"}
    late = await paid.say(paid.staff, f"/v1/orders/{order['id']}/shipments", shipping)
    await problem(late, 409, "not_paid")
    await problem(await paid.say(paid.staff, path, {"amount": 1, "reason": "r"}), 422, "amount_too_large")
    await problem(await paid.say(paid.buyer, path, {"amount": 1, "reason": "r"}), 403, "forbidden")


async def test_after_a_declined_payment_another_may_be_made(paid: PaidShop) -> None:
    order = await paid.placed()
    await paid.paid(order, "tok_insufficient_funds")
    failed = await paid.payment_becomes(order, "failed")
    assert failed["failure"] == "insufficient_funds"
    assert (await paid.get(f"/v1/orders/{order['id']}"))["state"] == "pending_payment"
    second = await paid.paid(order)
    assert second["attempt"] == 2
    await paid.becomes(order, state="confirmed")


async def test_one_live_payment_at_a_time(paid: PaidShop) -> None:
    order = await paid.placed()
    await paid.paid(order, "tok_requires_action")
    again = await paid.say(paid.buyer, f"/v1/orders/{order['id']}/payments", {"token": "tok_ok"})
    await problem(again, 409, "payment_in_progress")
    await paid.payment_becomes(order, "requires_action")


@pytest.mark.parametrize("decision", ["approve", "refuse"])
async def test_the_customer_proves_who_they_are(paid: PaidShop, decision: str) -> None:
    order = await paid.placed()
    await paid.paid(order, "tok_requires_action", return_url="https://shop.example/back")
    payment = await paid.payment_becomes(order, "requires_action")
    async with paid.session.post(payment["action_url"], data={"decision": decision}, allow_redirects=False) as answer:
        assert answer.status < 400, await answer.text()
    if decision == "approve":
        await paid.becomes(order, state="confirmed", payment_status="paid")
    else:
        assert (await paid.payment_becomes(order, "failed"))["failure"] == "action_refused"


async def test_who_comes_back_from_the_bank_needs_no_webhook(store: kvstore.Client, tmp_path: Path) -> None:
    async with PaidShop(store, tmp_path, webhooks=False) as paid:
        await paid.shop.stock(paid.staff, "cup", 10)
        order = await paid.placed()
        await paid.paid(order, "tok_requires_action")
        payment = await paid.payment_becomes(order, "requires_action")
        async with paid.session.post(
            payment["action_url"], data={"decision": "approve"}, allow_redirects=False
        ) as done:
            assert done.status < 400
        await paid.did(paid.buyer, f"/v1/orders/{order['id']}/payments/1/complete")
        await paid.becomes(order, state="confirmed")


async def test_captured_by_hand_and_in_parts(paid: PaidShop) -> None:
    order = await paid.placed({"cup": 2})
    await paid.paid(order, capture="manual")
    found = await paid.becomes(order, state="confirmed", payment_status="authorised")
    path = f"/v1/orders/{order['id']}"
    shipping = {"lines": [{"sku": "cup", "quantity": 1}], "carrier": "Post", "tracking": "P"}
    await problem(await paid.say(paid.staff, f"{path}/shipments", shipping), 409, "not_paid")
    await problem(await paid.say(paid.staff, f"{path}/payments/1/capture", {"amount": 2501}), 422, "amount_too_large")
    await paid.did(paid.staff, f"{path}/payments/1/capture", {"amount": 1000})
    await paid.becomes(order, payment_status="partially_paid", captured=1000)
    await paid.did(paid.staff, f"{path}/payments/1/capture", {})
    found = await paid.becomes(order, payment_status="paid")
    assert found["captured"] == 2500
    (charge,) = await paid.charges()
    assert charge.captured == 2500


async def test_when_the_money_is_taken_is_for_staff_to_say(paid: PaidShop) -> None:
    order = await paid.placed()
    body = {"token": "tok_ok", "capture": "manual"}
    refused = await paid.say(paid.buyer, f"/v1/orders/{order['id']}/payments", body)
    await problem(refused, 403, "forbidden")
    assert await paid.get(f"/v1/orders/{order['id']}/payments") == []
    await paid.paid(order)
    await paid.becomes(order, payment_status="paid")


@pytest.mark.parametrize("status", [401, 403])
async def test_a_wrong_api_key_is_no_end_of_a_payment_or_refund(paid: PaidShop, status: int) -> None:
    order = await paid.placed()
    await paid.paid(order)
    await paid.becomes(order, payment_status="paid")
    await paid.stop_workers()
    good, asked = paid.provider, 0

    async def refuse(request: web.Request) -> web.Response:
        nonlocal asked
        asked += 1
        missing = request.method == "GET"
        error = {"error": {"code": "unauthorised", "message": "no such key"}}
        return web.json_response(error, status=404 if missing else status)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", refuse)
    async with TestServer(app) as server:
        paid.provider = SandboxProvider(paid.session, str(server.make_url("")), "sk_wrong", ["s"], timeout_s=0.5)
        paid._working = [paid.start_worker()]
        await paid.did(paid.staff, f"/v1/orders/{order['id']}/refunds", {"reason": "late", "amount": 10})
        other = await paid.placed({"cup": 1})
        await paid.paid(other)

        async def often_asked() -> bool:
            return asked >= 6

        await until(often_asked, 20.0, "a provider that was asked", poll_s=0.02)
        assert (await paid.get(f"/v1/orders/{order['id']}/refunds/1"))["state"] == "pending"
        assert (await paid.get(f"/v1/orders/{other['id']}/payments/1"))["failure"] is None
        await paid.stop_workers()
    paid.provider = good
    paid._working = [paid.start_worker()]
    await paid.becomes(order, refunded=10)
    await paid.becomes(other, payment_status="paid")


async def test_cancelled_before_it_is_paid(paid: PaidShop) -> None:
    order = await paid.placed()
    cancelled = await paid.did(paid.buyer, f"/v1/orders/{order['id']}/cancel", {"reason": "changed my mind"})
    assert cancelled["state"] == "cancelled"
    assert await paid.stock_of("cup") == (10, 0, 0)
    late = await paid.say(paid.buyer, f"/v1/orders/{order['id']}/payments", {"token": "tok_ok"})
    await problem(late, 409, "order_state")
    twice = await paid.say(paid.buyer, f"/v1/orders/{order['id']}/cancel", {"reason": "again"})
    await problem(twice, 409, "order_state")


@pytest.mark.parametrize(("capture", "status"), [("automatic", "paid"), ("manual", "authorised")])
async def test_cancelled_when_it_is_paid(paid: PaidShop, capture: str, status: str) -> None:
    order = await paid.placed()
    await paid.paid(order, capture=capture)
    await paid.becomes(order, payment_status=status)
    await paid.did(paid.buyer, f"/v1/orders/{order['id']}/cancel", {"reason": "changed my mind"})
    found = await paid.becomes(order, state="cancelled")
    assert await paid.stock_of("cup") == (10, 0, 0)
    (charge,) = await paid.charges()
    if capture == "automatic":
        assert (charge.captured, charge.refunded, found["payment_status"]) == (2500, 2500, "refunded")
    else:
        assert (charge.is_voided, found["payment_status"]) == (True, "none")


@pytest.mark.parametrize("token", ["tok_ok", "tok_timeout_after", "tok_timeout_before", "tok_pending", "tok_acts_late"])
async def test_cancelled_while_a_payment_is_on_its_way(paid: PaidShop, token: str) -> None:
    order = await paid.placed()
    await paid.paid(order, token)
    await paid.did(paid.buyer, f"/v1/orders/{order['id']}/cancel", {"reason": "changed my mind"})
    await paid.becomes(order, state="cancelled")
    assert await paid.stock_of("cup") == (10, 0, 0)
    for charge in await paid.charges():
        assert charge.captured == charge.refunded
        assert charge.is_voided or charge.captured or not charge.authorised


async def test_what_is_shipped_is_not_cancelled_but_its_other_lines_are(paid: PaidShop) -> None:
    order = await paid.placed({"cup": 2, "pot": 2})
    await paid.paid(order)
    await paid.becomes(order, payment_status="paid")
    path = f"/v1/orders/{order['id']}"
    shipping = {"lines": [{"sku": "cup", "quantity": 2}], "carrier": "Post", "tracking": "P"}
    await paid.did(paid.staff, f"{path}/shipments", shipping)
    await problem(await paid.say(paid.buyer, f"{path}/cancel", {"reason": "late"}), 409, "order_state")
    body = {"lines": [{"sku": "pot", "quantity": 2}], "reason": "broken in the warehouse"}
    await paid.did(paid.staff, f"{path}/cancel-lines", body)
    await paid.becomes(order, refunded=8000)
    await paid.did(paid.staff, f"{path}/shipments/1/deliver")
    await paid.becomes(order, state="completed", payment_status="partially_refunded")
    assert await paid.stock_of("pot") == (5, 0, 0)


async def test_a_refund_that_fails_needs_attention(paid: PaidShop) -> None:
    order = await paid.placed()
    await paid.paid(order, "tok_refund_fails")
    await paid.becomes(order, payment_status="paid")
    await paid.did(paid.staff, f"/v1/orders/{order['id']}/refunds", {"amount": 100, "reason": "late"})

    async def needing() -> list[int]:
        page = await paid.get("/v1/orders?needs_attention=true", paid.staff)
        return [one["id"] for one in page["data"]]

    await paid.becomes(order, refunded=0, payment_status="paid")
    details: dict[str, Any] = {}
    while not details.get("needs_attention"):
        details = await paid.get(f"/v1/orders/{order['id']}/details", paid.staff)
    assert details["needs_attention"] == "refund_failed"
    assert await needing() == [order["id"]]
    await paid.did(paid.staff, f"/v1/orders/{order['id']}/attended")
    assert await needing() == []


async def test_a_refund_that_fails_is_settled_outside_and_the_order_is_cancelled(paid: PaidShop) -> None:
    order = await paid.placed()
    path = f"/v1/orders/{order['id']}"
    await paid.paid(order, "tok_refund_fails")
    await paid.becomes(order, payment_status="paid")
    settled = {"note": "by transfer"}
    await problem(await paid.say(paid.staff, f"{path}/refunds/1/settle-outside", settled), 404, "not_found")
    await paid.did(paid.buyer, f"{path}/cancel", {"reason": "no"})
    early = await paid.say(paid.staff, f"{path}/refunds/1/settle-outside", settled)
    await problem(early, 409, "order_state")

    async def has_failed() -> bool:
        return bool((await paid.get(f"{path}/refunds/1"))["state"] == "failed")

    await until(has_failed, 20.0, "a refund that failed", poll_s=0.02)
    assert (await paid.get(path))["state"] == "cancelling"
    await problem(await paid.say(paid.buyer, f"{path}/refunds/1/settle-outside", settled), 403, "forbidden")
    refund = await paid.did(paid.staff, f"{path}/refunds/1/settle-outside", settled)
    assert (refund["state"], refund["note"], refund["failure"]) == ("settled_outside", "by transfer", "refund_failed")
    found = await paid.get(path)
    assert (found["state"], found["payment_status"], found["refunded"]) == ("cancelled", "refunded", 2500)
    assert await paid.stock_of("cup") == (10, 0, 0)
    await problem(await paid.say(paid.staff, f"{path}/refunds/1/settle-outside", settled), 409, "order_state")
    report = await audit(paid.shop.store, paid.provider)  # type: ignore[arg-type]
    assert report.is_clean, report.violations


async def test_what_another_refund_gave_back_is_not_settled_outside_as_well(paid: PaidShop) -> None:
    order = await paid.placed()
    path = f"/v1/orders/{order['id']}"
    await paid.paid(order, "tok_refund_fails")
    await paid.becomes(order, payment_status="paid")
    for number in (1, 2):
        await paid.did(paid.staff, f"{path}/refunds", {"reason": "goodwill"})
        await paid.becomes(order, payment_status="paid", refunded=0)

        async def has_failed(path: str = f"{path}/refunds/{number}") -> bool:
            return bool((await paid.get(path))["state"] == "failed")

        await until(has_failed, 20.0, "a refund that failed", poll_s=0.02)
    await paid.did(paid.staff, f"{path}/refunds/1/settle-outside", {"note": "by transfer"})
    twice = await paid.say(paid.staff, f"{path}/refunds/2/settle-outside", {"note": "by transfer"})
    await problem(twice, 409, "order_state")


async def test_an_order_that_is_not_paid_expires(store: kvstore.Client, tmp_path: Path) -> None:
    async with PaidShop(store, tmp_path, pay_within_s=0.3) as paid:
        await paid.shop.stock(paid.staff, "cup", 10)
        order = await paid.placed()
        assert await paid.stock_of("cup") == (8, 2, 0)
        await paid.becomes(order, state="expired")
        assert await paid.stock_of("cup") == (10, 0, 0)
        late = await paid.say(paid.buyer, f"/v1/orders/{order['id']}/payments", {"token": "tok_ok"})
        await problem(late, 409, "order_state")


async def test_an_order_expires_though_its_customer_never_came_back_from_the_bank(
    store: kvstore.Client, tmp_path: Path
) -> None:
    async with PaidShop(store, tmp_path, pay_within_s=1.0) as paid:
        await paid.shop.stock(paid.staff, "cup", 10)
        order = await paid.placed()
        await paid.paid(order, "tok_requires_action")
        await paid.payment_becomes(order, "requires_action")
        await paid.becomes(order, state="expired")
        assert await paid.stock_of("cup") == (10, 0, 0)
        assert (await paid.payment_becomes(order, "voided"))["action_url"] is None


async def test_who_approved_in_time_has_paid_though_nobody_noticed(store: kvstore.Client, tmp_path: Path) -> None:
    """No webhook came, nobody came back, and the provider was to be asked again only after the time to pay."""
    async with PaidShop(store, tmp_path, webhooks=False, pay_within_s=2.0) as paid:
        await paid.shop.stock(paid.staff, "cup", 10)
        order = await paid.placed()
        await paid.paid(order, "tok_requires_action")
        payment = await paid.payment_becomes(order, "requires_action")
        async with paid.session.post(payment["action_url"], data={"decision": "approve"}, allow_redirects=False) as yes:
            assert yes.status < 400
        assert (await paid.get(f"/v1/orders/{order['id']}"))["state"] == "pending_payment"
        await paid.becomes(order, state="confirmed", payment_status="paid")


async def test_an_order_does_not_expire_before_its_time(paid: PaidShop) -> None:
    order = await paid.placed()
    early = steps.put("expire", str(order["id"]))
    await paid.shop.store.txn(success=[early])

    async def done() -> bool:
        return await paid.shop.store.get(early.key) is None

    await until(done, 10.0, "the end of a step", poll_s=0.02)
    assert (await paid.get(f"/v1/orders/{order['id']}"))["state"] == "pending_payment"
    (left,) = (await paid.shop.store.range(prefix=steps.STEPS)).records
    assert timestamp(steps.decode_step(left.value).due_ms) == order["expires_at"]


async def test_one_step_asks_for_a_payment_however_often_its_customer_comes_back(paid: PaidShop) -> None:
    order = await paid.placed()
    await paid.paid(order, "tok_requires_action")
    await paid.payment_becomes(order, "requires_action")

    async def due() -> list[steps.Step]:
        found = (await paid.shop.store.range(prefix=steps.STEPS)).records
        return [step for step in (steps.decode_step(one.value) for one in found) if step.kind == "payment"]

    async def nothing_at_once() -> bool:
        return all(step.due_ms for step in await due())

    for _ in range(3):
        await paid.did(paid.buyer, f"/v1/orders/{order['id']}/payments/1/complete")
        await until(nothing_at_once, 10.0, "the end of a look", poll_s=0.02)
    assert len(await due()) == 1


async def test_a_payment_that_is_on_its_way_when_the_time_is_over_still_counts(
    store: kvstore.Client, tmp_path: Path
) -> None:
    async with PaidShop(store, tmp_path, pay_within_s=0.5, settle_ms=1500) as paid:
        await paid.shop.stock(paid.staff, "cup", 10)
        order = await paid.placed()
        await paid.paid(order, "tok_pending")
        other = await paid.placed()
        await paid.paid(other, "tok_pending_declined")
        await paid.becomes(order, state="confirmed")
        await paid.becomes(other, state="expired")
        assert await paid.stock_of("cup") == (8, 0, 2)


@pytest.mark.parametrize(
    "token",
    [
        *("tok_timeout_before", "tok_timeout_after", "tok_acts_late", "tok_error_before", "tok_error_after"),
        *("tok_reset_before", "tok_reset_after", "tok_slow", "tok_pending"),
        *("tok_capture_timeout_after", "tok_capture_error_before", "tok_capture_reset_after"),
        *("tok_webhook_duplicate", "tok_webhook_lost", "tok_webhook_late", "tok_webhook_reordered"),
    ],
)
async def test_whatever_the_provider_does_the_customer_pays_once(paid: PaidShop, token: str) -> None:
    order = await paid.placed()
    await paid.paid(order, token)
    await paid.becomes(order, state="confirmed", payment_status="paid")
    (charge,) = await paid.charges()
    assert (charge.authorised, charge.captured, charge.refunded) == (2500, 2500, 0)


async def test_an_order_that_costs_nothing_is_confirmed_at_once(paid: PaidShop) -> None:
    await paid.shop.stock(paid.staff, "sample", 3, price=0)
    order = await paid.placed({"sample": 1})
    assert (order["state"], order["payment_status"]) == ("confirmed", "none")
    assert await paid.stock_of("sample") == (2, 0, 1)
    shipping = {"lines": [{"sku": "sample", "quantity": 1}], "carrier": "Post", "tracking": "P"}
    await paid.did(paid.staff, f"/v1/orders/{order['id']}/shipments", shipping)
    await paid.did(paid.staff, f"/v1/orders/{order['id']}/shipments/1/deliver")
    await paid.becomes(order, state="completed")


async def test_a_step_that_is_given_up_is_shown_to_staff_who_give_it_back(
    store: kvstore.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "ATTEMPTS_MAX", 2)
    async with PaidShop(store, tmp_path, rates={"reset_before": 1.0}) as paid:
        await paid.shop.stock(paid.staff, "cup", 10)
        order = await paid.placed()
        await paid.paid(order)

        async def parked() -> list[dict[str, Any]]:
            found: list[dict[str, Any]] = (await paid.get("/v1/parked-steps", paid.staff))["data"]
            return found

        async def is_parked() -> bool:
            return bool(await parked())

        await until(is_parked, 20.0, "a parked step", poll_s=0.05)
        (step,) = await parked()
        assert (step["kind"], step["subject"], step["code"]) == ("payment", f"{order['id']}-1", "provider_unknown")
        await problem(await paid.shop.orders.get("/v1/parked-steps", headers=paid.buyer.headers), 403, "forbidden")
        async with paid.session.put(
            paid.psp.make_url("/control/failures"), json={"rates": {}}, headers={"Authorization": f"Bearer {API_KEY}"}
        ) as healed:
            assert healed.status == 200, await healed.text()
        await paid.did(paid.staff, f"/v1/parked-steps/payment/{order['id']}-1/retry")
        await paid.becomes(order, state="confirmed", payment_status="paid")
        assert await parked() == []
        again = await paid.say(paid.staff, f"/v1/parked-steps/payment/{order['id']}-1/retry")
        await problem(again, 404, "not_found")


async def test_an_order_whose_step_is_given_up_needs_attention_and_can_be_cancelled(
    store: kvstore.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "ATTEMPTS_MAX", 2)
    async with PaidShop(store, tmp_path, rates={"reset_before": 1.0}) as paid:
        await paid.shop.stock(paid.staff, "cup", 10)
        order = await paid.placed()
        await paid.paid(order)
        name = f"payment/{order['id']}-1".encode()

        async def parked() -> bool:
            return await store.get(steps.PARKED + name) is not None

        await until(parked, 20.0, "a parked step", poll_s=0.02)
        details = await paid.get(f"/v1/orders/{order['id']}/details", paid.staff)
        assert details["needs_attention"] == "provider_unknown"
        step, attention = await store.get(steps.PARKED + name), await store.get(attention_key(order["id"]))
        assert step is not None
        assert attention is not None
        assert step.mod_revision == attention.mod_revision  # one transaction
        async with paid.session.put(
            paid.psp.make_url("/control/failures"), json={"rates": {}}, headers={"Authorization": f"Bearer {API_KEY}"}
        ) as healed:
            assert healed.status == 200, await healed.text()
        await paid.did(paid.buyer, f"/v1/orders/{order['id']}/cancel", {"reason": "it takes too long"})
        await paid.becomes(order, state="cancelled")
        assert await paid.stock_of("cup") == (10, 0, 0)
        assert not await parked()


async def _at_the_provider(paid: PaidShop, what: str, body: dict[str, Any] | None = None) -> None:
    """Somebody else than us moves money of the newest charge."""
    charge = (await paid.charges())[-1]
    headers = {"Authorization": f"Bearer {API_KEY}", "Idempotency-Key": f"by-hand-{what}-{charge.id}"}
    url = paid.psp.make_url(f"/v1/charges/{charge.id}/{what}")
    async with paid.session.post(url, json=body or {}, headers=headers) as answer:
        assert answer.status == 201, await answer.text()


@pytest.mark.parametrize("what", ["void", "captures"])
async def test_what_was_done_at_the_provider_before_we_looked_counts(
    store: kvstore.Client, tmp_path: Path, what: str
) -> None:
    async with PaidShop(store, tmp_path, webhooks=False) as paid:
        await paid.shop.stock(paid.staff, "cup", 10, price=1250)
        order = await paid.placed()
        await paid.paid(order, "tok_requires_action")
        payment = await paid.payment_becomes(order, "requires_action")
        async with paid.session.post(payment["action_url"], data={"decision": "approve"}, allow_redirects=False) as yes:
            assert yes.status < 400
        await _at_the_provider(paid, what, {"amount": 2500, "currency": "EUR"} if what == "captures" else None)
        await paid.did(paid.buyer, f"/v1/orders/{order['id']}/payments/1/complete")
        if what == "captures":
            await paid.becomes(order, state="confirmed", payment_status="paid", captured=2500)
            await paid.did(paid.buyer, f"/v1/orders/{order['id']}/cancel", {"reason": "no"})
            await paid.becomes(order, state="cancelled", payment_status="refunded")
        else:
            assert (await paid.payment_becomes(order, "failed"))["failure"] == "voided"
            await paid.paid(order)
            await paid.becomes(order, state="confirmed", payment_status="paid")
        report = await audit(store, paid.provider)  # type: ignore[arg-type]
        assert report.is_clean, report.violations


async def test_a_capture_that_somebody_else_made_is_ours(paid: PaidShop) -> None:
    order = await paid.placed()
    await paid.paid(order, capture="manual")
    await paid.becomes(order, state="confirmed", payment_status="authorised")
    await _at_the_provider(paid, "captures", {"amount": 2500, "currency": "EUR"})
    await paid.did(paid.staff, f"/v1/orders/{order['id']}/payments/1/capture", {})
    await paid.becomes(order, payment_status="paid", captured=2500)
    assert (await paid.get(f"/v1/orders/{order['id']}/details", paid.staff))["needs_attention"] is None


@pytest.mark.parametrize("amount", [100, 2500])
async def test_what_somebody_else_took_of_an_order_that_is_cancelled_goes_back(paid: PaidShop, amount: int) -> None:
    order = await paid.placed()
    await paid.paid(order, capture="manual")
    await paid.becomes(order, state="confirmed", payment_status="authorised")
    await _at_the_provider(paid, "captures", {"amount": amount, "currency": "EUR"})
    await paid.did(paid.buyer, f"/v1/orders/{order['id']}/cancel", {"reason": "no"})
    await paid.becomes(order, state="cancelled", captured=amount, refunded=amount)
    (charge,) = await paid.charges()
    assert (charge.captured, charge.refunded) == (amount, amount)
    assert await paid.stock_of("cup") == (10, 0, 0)
    report = await audit(paid.shop.store, paid.provider)  # type: ignore[arg-type]
    assert report.is_clean, report.violations


async def test_a_capture_that_is_refused_needs_attention_and_has_a_way_out(paid: PaidShop) -> None:
    order = await paid.placed()
    await paid.paid(order, capture="manual")
    await paid.becomes(order, state="confirmed", payment_status="authorised")
    path = f"/v1/orders/{order['id']}"
    (charge,) = await paid.charges()
    await paid.provider.void(Void(key=request_key(order["id"], 9, Operation.VOID), charge=charge.id))
    await paid.did(paid.staff, f"{path}/payments/1/capture", {})

    async def is_refused() -> bool:
        details = await paid.get(f"{path}/details", paid.staff)
        return bool(details["needs_attention"] == "capture_refused")

    await until(is_refused, 20.0, "a capture that is refused", poll_s=0.02)
    assert (await paid.get(f"{path}/payments/1"))["state"] == "authorised"
    await paid.did(paid.buyer, f"{path}/cancel", {"reason": "no"})
    await paid.becomes(order, state="cancelled")
    assert await paid.stock_of("cup") == (10, 0, 0)
