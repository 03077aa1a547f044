"""Customers, staff, workers and a provider that fails, all at once over one embedded store; then the auditor.

It also looks while they are at it: at one revision everything holds at any time, whoever is in the middle of what.
"""

from __future__ import annotations

import asyncio
import random
import uuid
from collections import Counter
from pathlib import Path
from typing import Any, Final

import pytest

import kvstore
from services.audit.run import Report, audit
from services.orders import paying
from services.sandbox_psp.process import API_KEY
from services.work import steps as work_steps
from tests.cluster.harness import until
from tests.services.paid_shop import ADDRESS, PaidShop

ACTORS: Final = 8
ACTIONS_EACH: Final = 80
PAY_WITHIN_S: Final = 1.0  # some expire while others are at them
THINK_S: Final = 0.04  # people are slower than workers, mostly
SKUS: Final = ("cup", "pot", "tin")
TOKENS: Final = (
    *["tok_ok"] * 6, "tok_requires_action", "tok_requires_action", "tok_pending", "tok_pending_declined",
    "tok_declined", "tok_refund_pending", "tok_refund_fails", "tok_timeout_after", "tok_acts_late",
    "tok_webhook_duplicate",
)  # fmt: skip
RATES: Final = {
    "timeout_after": 0.01, "error_before": 0.05, "error_after": 0.05, "reset_before": 0.05, "reset_after": 0.05,
    "webhook_duplicate": 0.1, "webhook_reordered": 0.1, "webhook_lost": 0.1,
}  # fmt: skip
# What these commands may be refused with. (Others keep changing one order: that is what is done here.)
REFUSALS: Final = {
    "order_state", "payment_in_progress", "too_many_payments", "amount_too_large", "not_found", "not_paid",
    "invalid_body", "not_in_order", "insufficient_stock", "contended", "too_many_refunds", "cart_ordered",
    "cart_changed", "no_delivery_address",
}  # fmt: skip


class Crowd:
    """People who do whatever comes to their minds, by a seed."""

    def __init__(self, paid: PaidShop, seed: int) -> None:
        self.paid = paid
        self.chance = random.Random(seed)
        self.orders: list[int] = []
        self.done: Counter[str] = Counter()

    async def act(self) -> None:
        for _ in range(ACTIONS_EACH):
            if len(self.orders) < ACTORS or self.chance.random() < 0.08:
                await self._place()
            else:
                await self._at(self.chance.choice(self.orders[-12:]))
            await asyncio.sleep(self.chance.uniform(0.0, THINK_S))

    async def _place(self) -> None:
        lines = self._some(self.chance.randint(1, 3))
        body: dict[str, Any] = {"lines": lines}
        if self.chance.random() < 0.3:
            cart = await self.paid.did(self.paid.buyer, "/v1/carts")
            for line in lines:
                answer = await self.paid.shop.orders.put(
                    f"/v1/carts/{cart['id']}/lines/{line['sku']}",
                    json={"quantity": line["quantity"]},
                    headers=self.paid.buyer.headers,
                )
                assert answer.status == 200, await answer.text()
            body = {"cart_id": cart["id"]}
        if self.chance.random() < 0.9:
            body["ship_to"] = ADDRESS
        for order in await self._say("place", "/v1/orders", body, by_staff=False):
            if order["id"] not in self.orders:
                self.orders.append(order["id"])

    async def _at(self, order: int) -> None:
        chance, path = self.chance, f"/v1/orders/{order}"
        number = chance.randint(1, 2)
        amount = {} if chance.random() < 0.5 else {"amount": chance.randint(1, 3000)}
        some = {"lines": self._some(1)}
        likely: list[str] = []
        if chance.random() < 0.7:  # what could be next, by what it looks like; others may be quicker
            found = await self.paid.get(path)
            likely = _next(found)
            rests = [{"sku": line["sku"], "quantity": line["quantity"] - line["shipped"]} for line in found["lines"]]
            some = {"lines": [one for one in rests if one["quantity"]] or some["lines"]}
        commands: list[tuple[str, str, dict[str, Any] | None, bool, int]] = [
            ("pay", "/payments", payment := self._payment(), payment["capture"] == "manual", 8),
            ("complete", f"/payments/{number}/complete", None, False, 1),
            ("capture", f"/payments/{number}/capture", amount, True, 3),
            ("refund", "/refunds", {"reason": "goodwill", **amount}, True, 1),
            ("cancel", "/cancel", {"reason": "no"}, False, 1),
            ("cancel lines", "/cancel-lines", {**some, "reason": "gone"}, True, 2),
            ("say where to", "/ship-to", ADDRESS, False, 1),
            ("ship", "/shipments", {**some, "carrier": "Post", "tracking": "P"}, True, 8),
            ("deliver", f"/shipments/{number}/deliver", None, True, 5),
            ("return", "/returns", {**some, "reason": "too blue"}, False, 5),
            ("approve", f"/returns/{number}/approve", {"note": "fine"}, True, 4),
            ("receive", f"/returns/{number}/receive", {"note": "fine", "restocked": some["lines"]}, True, 4),
            ("attend", "/attended", None, True, 1),
            ("3-D Secure", "", None, False, 2),
        ]
        commands = [command for command in commands if command[0] in likely] or commands
        name, rest, body, by_staff, _ = chance.choices(commands, [weight for *_, weight in commands])[0]
        if name == "3-D Secure":
            await self._visit_the_bank(path)
        else:
            await self._say(name, path + rest, body, by_staff=by_staff)

    async def _say(self, name: str, path: str, body: dict[str, Any] | None, *, by_staff: bool) -> list[dict[str, Any]]:
        """Send it, now and then twice at once under one key. The answers, if it was done: alike."""
        who = self.paid.staff if by_staff else self.paid.buyer
        key = uuid.UUID(int=self.chance.getrandbits(128)).hex
        times = 2 if self.chance.random() < 0.2 else 1
        answers = await asyncio.gather(
            *(self.paid.shop.orders.post(path, json=body, headers=who.once(key)) for _ in range(times))
        )
        bodies = [await answer.json(content_type=None) for answer in answers]
        codes = {body.get("code") for body, answer in zip(bodies, answers, strict=True) if answer.status >= 400}
        assert codes <= REFUSALS, (name, bodies)
        if "contended" not in codes:  # that is not remembered: the other one may have been done
            assert all(body == bodies[0] for body in bodies if not codes), (name, bodies)
        self.done[name if not codes else f"{name} refused"] += 1
        return [] if codes else bodies

    async def _visit_the_bank(self, path: str) -> None:
        for payment in await self.paid.get(f"{path}/payments"):
            if payment["action_url"]:
                decision = {"decision": self.chance.choice(["approve", "approve", "refuse"])}
                async with self.paid.session.post(payment["action_url"], data=decision, allow_redirects=False):
                    self.done["3-D Secure"] += 1

    def _some(self, count: int) -> list[dict[str, Any]]:
        return [{"sku": sku, "quantity": self.chance.randint(1, 2)} for sku in self.chance.sample(SKUS, count)]

    def _payment(self) -> dict[str, Any]:
        return {"token": self.chance.choice(TOKENS), "capture": self.chance.choice(["automatic", "manual"])}


def _next(order: dict[str, Any]) -> list[str]:
    """What is not refused of it, as far as it can be seen."""
    lines = order["lines"]
    if order["state"] == "pending_payment":
        return ["pay", "3-D Secure"]
    if order["captured"] < order["total"]:
        return ["capture"] if order["authorised"] else []
    if any(line["returned"] < line["delivered"] for line in lines):
        return ["return", "approve", "receive", "refund"]
    if any(line["delivered"] < line["shipped"] for line in lines):
        return ["deliver"]
    return ["ship", "say where to"]


def told(report: Report) -> str:
    return "\n".join(f"{one.code} at {one.key}: {one.expected} / {one.found}" for one in report.violations)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("seed", [1, 2])
async def test_whoever_races_whom_the_auditor_finds_nothing(
    store: kvstore.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(work_steps, "BACKOFF_MIN_S", 0.05)
    monkeypatch.setattr(work_steps, "BACKOFF_MAX_S", 0.5)
    monkeypatch.setattr(paying, "ACTION_POLL_MS", 300)
    async with PaidShop(
        store, tmp_path, workers=2, pay_within_s=PAY_WITHIN_S, rates=RATES, seed=seed, late_ms=300, settle_ms=200
    ) as paid:
        for sku, stock, price in (("cup", 60, 1250), ("pot", 40, 4000), ("tin", 30, 0)):
            await paid.shop.stock(paid.staff, sku, stock, price=price)
        crowd = Crowd(paid, seed)
        acting = asyncio.gather(*(crowd.act() for _ in range(ACTORS)))
        looks = 0
        while not acting.done():
            meanwhile = await audit(store, paid.provider if looks % 2 else None)  # type: ignore[arg-type]
            assert meanwhile.is_clean, told(meanwhile)
            looks += 1
            await asyncio.wait((acting,), timeout=0.5)
        await acting

        async def tell_the_provider(method: str, path: str) -> None:
            headers = {"Authorization": f"Bearer {API_KEY}"}
            url = paid.psp.make_url(path)
            async with paid.session.request(method, url, json={}, headers=headers) as answer:
                assert answer.status == 200, await answer.text()

        left: dict[str, list[bytes]] = {}

        async def nothing_is_under_way() -> bool:
            await tell_the_provider("POST", "/control/settle")
            left.update(keys=[record.key async for record in store.scan(prefix=work_steps.STEPS, keys_only=True)])
            return not left["keys"]

        await tell_the_provider("PUT", "/control/failures")  # none any more
        try:
            await until(nothing_is_under_way, 40.0, "the end of all steps", poll_s=0.1)
        except AssertionError as error:
            raise AssertionError(f"{error}: {left}") from None
        report = await audit(store, paid.provider)  # type: ignore[arg-type]
        assert report.is_clean, told(report)
        assert report.checked["orders"] == len(crowd.orders)
        assert report.checked["steps parked"] == 0
        states = Counter[str]()
        async for record in store.scan(prefix=b"order-state/", keys_only=True):
            states[record.key.split(b"/")[1].decode()] += 1
        assert not states["pending_payment"], states  # one whose refund failed may be cancelling: staff have to look
        assert states["completed"] > 0
        assert states["cancelled"] + states["expired"] > 0
        assert report.checked["refunds on the books"] > 0
        assert report.checked["returns"] > 0
