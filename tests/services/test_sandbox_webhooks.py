"""The sandbox provider's webhooks: each change told, signed, again where it was not taken, and as failures say."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from services.payments.provider import (
    Capture,
    Operation,
    Refund,
    RequiresAction,
    Void,
)
from services.payments.signatures import check
from services.sandbox_psp import webhooks
from services.sandbox_psp.process import WEBHOOK_SECRET
from tests.services.psp import Psp, a_payment, of


async def test_each_change_is_told(tmp_path: Path) -> None:
    async with Psp(tmp_path) as psp:
        payment, declined, voided = a_payment(), a_payment("tok_declined"), a_payment()
        thinking = a_payment("tok_requires_action")
        charge = await psp.authorised(payment)
        money: dict[str, Any] = {"charge": charge.id, "currency": "EUR"}
        await psp.patient.capture(Capture(key=of(payment, Operation.CAPTURE), amount=400, **money))
        await psp.patient.capture(Capture(key=of(payment, Operation.CAPTURE, 2), amount=600, **money))
        await psp.patient.refund(Refund(key=of(payment, Operation.REFUND), amount=600, **money))
        await psp.patient.authorise(declined)
        other = await psp.authorised(voided)
        await psp.patient.void(Void(key=of(voided, Operation.VOID), charge=other.id))
        action = await psp.patient.authorise(thinking)
        assert isinstance(action, RequiresAction)
        async with psp.session.post(action.url, data={"decision": "refuse"}):
            pass
        await psp.settled(delivered=8)
        # Copies of requests tell nothing anew.
        await psp.patient.authorise(payment)
        assert Counter(psp.merchant.told) == Counter(
            {
                ("charge.authorised", payment.key): 1,
                ("charge.partially_captured", of(payment, Operation.CAPTURE)): 1,
                ("charge.captured", of(payment, Operation.CAPTURE, 2)): 1,
                ("refund.succeeded", of(payment, Operation.REFUND)): 1,
                ("charge.declined", declined.key): 1,
                ("charge.authorised", voided.key): 1,
                ("charge.voided", of(voided, Operation.VOID)): 1,
                ("charge.declined", thinking.key): 1,
            }
        )
        assert (await psp.counted("webhooks"))["delivered"] == 8


async def test_a_merchant_who_does_not_take_it_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhooks, "BACKOFF_MIN_S", 0.01)
    async with Psp(tmp_path) as psp:
        psp.merchant.answers = [500, 302, 404]
        await psp.authorised(a_payment())
        await psp.settled(delivered=1, failed_attempts=3)
        assert len({json.loads(body)["id"] for _, body in psp.merchant.taken}) == 1
        for headers, body in psp.merchant.taken:
            check(headers["Sandbox-Signature"], [WEBHOOK_SECRET.encode()], body, time.time())


async def test_a_merchant_who_never_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhooks, "BACKOFF_MIN_S", 0.001)
    monkeypatch.setattr(webhooks, "ATTEMPTS_MAX", 3)
    async with Psp(tmp_path) as psp:
        psp.merchant.answers = [503] * 3
        await psp.authorised(a_payment())
        await psp.settled(given_up=1, failed_attempts=3)
    async with Psp(tmp_path) as psp:  # and is not bothered again
        await psp.settled(waiting=0)
        assert psp.merchant.taken == []


async def test_webhooks_that_wait_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhooks, "WAITING_MAX", 2)
    async with Psp(tmp_path, late_ms=600_000) as psp:
        for _ in range(3):
            await psp.authorised(a_payment("tok_webhook_late"))
        await psp.settled(waiting=2, overflown=1)


async def test_duplicated_and_lost_webhooks(tmp_path: Path) -> None:
    async with Psp(tmp_path) as psp:
        await psp.authorised(a_payment("tok_webhook_lost"))
        twice = a_payment("tok_webhook_duplicate")
        await psp.authorised(twice)
        await psp.merchant.has(2)
        await psp.settled(delivered=1, lost=1)
        assert psp.merchant.told == [("charge.authorised", twice.key)] * 2
        assert len({json.loads(body)["id"] for _, body in psp.merchant.taken}) == 1
        assert await psp.counted("failures") == {"webhook_lost": 1, "webhook_duplicate": 1}


async def test_late_and_reordered_webhooks(tmp_path: Path) -> None:
    async with Psp(tmp_path, late_ms=400) as psp:
        overtaken, late, next_one = a_payment("tok_webhook_reordered"), a_payment("tok_webhook_late"), a_payment()
        started = time.monotonic()
        for payment in (overtaken, late):
            await psp.authorised(payment)
        await psp.settled(waiting=2)
        await psp.authorised(next_one)
        await psp.merchant.has(3)
        assert [key for _, key in psp.merchant.told] == [next_one.key, overtaken.key, late.key]
        assert time.monotonic() - started >= 0.4


async def test_reordered_with_nothing_to_pass_it(tmp_path: Path) -> None:
    async with Psp(tmp_path, late_ms=20) as psp:
        await psp.authorised(a_payment("tok_webhook_reordered"))
        await psp.merchant.has(1)
