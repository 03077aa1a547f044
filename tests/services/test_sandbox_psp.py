"""The sandbox provider: its rules, its failures on demand, its webhooks, and its books through kills."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from services.payments.provider import (
    Authorise,
    Capture,
    Declined,
    Operation,
    ProviderRefused,
    ProviderUnknown,
    Refund,
    Result,
    Succeeded,
    Void,
)
from services.payments.sandbox import SandboxProvider
from services.sandbox_psp.failures import CARDS, OF_ANSWERS, TOKENS, Failure, Failures, Plan, Settings
from services.sandbox_psp.process import API_KEY
from services.sandbox_psp.records import OperationKind
from tests.cluster.harness import until
from tests.services.psp import WITHIN_S, Psp, a_payment, of

EUR = {"amount": 100, "currency": "EUR"}
NOT_ACTED_ON = (Failure.TIMEOUT_BEFORE, Failure.ERROR_BEFORE, Failure.RESET_BEFORE)
ACTED_ON = (Failure.TIMEOUT_AFTER, Failure.ERROR_AFTER, Failure.RESET_AFTER)


async def found(provider: SandboxProvider, key: str) -> Result:
    """What comes of the request some time soon."""
    results: list[Result] = []

    async def there() -> bool:
        result = await provider.find(key)
        results.extend([result] if result is not None else [])
        return bool(results)

    await until(there, WITHIN_S, f"{key} is acted on", poll_s=0.01)
    return results[0]


# --- the API ----------------------------------------------------------------------------------------------------------


async def test_who_may_ask(tmp_path: Path) -> None:
    async with Psp(tmp_path) as psp:
        for headers in ({}, {"Authorization": "Bearer x"}, {"Authorization": API_KEY}, {"Authorization": "Bearer é"}):
            for path in ("/v1/charges", "/v1/operations?key=1", "/control/counts", "/nowhere"):
                async with psp.session.get(psp.url + path, headers=headers) as answer:
                    assert answer.status == 401
                    assert (await answer.json())["error"]["code"] == "unauthorised"
        async with psp.session.get(psp.url + "/readyz") as answer:
            assert answer.status == 200
        assert (await psp.ask("GET", "/nowhere"))[0] == 404
        assert (await psp.ask("PUT", "/v1/charges"))[0] == 405


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 400, "malformed_json"),
        (b"\xff", 400, "malformed_json"),
        (b"[]", 422, "invalid_body"),
        (b'{"amount":0,"currency":"EUR","token":"tok_ok","reference":"r"}', 422, "invalid_body"),
        (b'{"amount":1.5,"currency":"EUR","token":"tok_ok","reference":"r"}', 422, "invalid_body"),
        (b'{"amount":1,"currency":"eur","token":"tok_ok","reference":"r"}', 422, "invalid_body"),
        (b'{"amount":1,"currency":"EUR","token":"tok_ok","reference":"r","more":1}', 422, "invalid_body"),
        (
            b'{"amount":1,"currency":"EUR","token":"tok_ok","reference":"r","return_url":"javascript:1"}',
            422,
            "invalid_body",
        ),
        (b" " * 20_000, 413, "http"),
    ],
)
async def test_bodies_that_are_refused(tmp_path: Path, body: bytes, status: int, code: str) -> None:
    async with Psp(tmp_path) as psp:
        got, answer = await psp.ask("POST", "/v1/charges", data=body, headers={"Idempotency-Key": "k"})
        assert (got, answer["error"]["code"]) == (status, code)
        assert (await psp.counted("books"))["charges"] == 0


async def test_a_key_is_needed(tmp_path: Path) -> None:
    async with Psp(tmp_path) as psp:
        body = {**EUR, "token": "tok_ok", "reference": "r"}
        for headers in ({}, {"Idempotency-Key": ""}, {"Idempotency-Key": "k" * 256}, {"Idempotency-Key": "a b"}):
            status, answer = await psp.ask("POST", "/v1/charges", json=body, headers=headers)
            assert (status, answer["error"]["code"]) == (400, "idempotency_key")
        assert (await psp.ask("GET", "/v1/operations"))[0] == 400


async def test_look_ups_and_lists(tmp_path: Path) -> None:
    async with Psp(tmp_path) as psp:
        payment = a_payment()
        charge = await psp.authorised(payment)
        assert (await psp.ask("GET", f"/v1/charges/{charge.id}"))[1]["key"] == payment.key
        assert (await psp.ask("GET", "/v1/charges/ch_9"))[0] == 404
        assert (await psp.ask("GET", "/v1/refunds/re_9"))[0] == 404
        money: dict[str, Any] = {"charge": charge.id, "amount": 1000, "currency": "EUR"}
        await psp.patient.capture(Capture(key=of(payment, Operation.CAPTURE), **money))
        await psp.patient.refund(Refund(key=of(payment, Operation.REFUND), **money))
        refund = (await psp.ask("GET", "/v1/refunds/re_0000000001"))[1]
        assert (refund["charge"], refund["amount"], refund["status"]) == (charge.id, 1000, "succeeded")
        await psp.authorised(a_payment())
        status, page = await psp.ask("GET", "/v1/charges?limit=1")
        assert (status, len(page["data"]), page["has_more"]) == (200, 1, True)
        _, page = await psp.ask("GET", f"/v1/charges?limit=1&starting_after={charge.id}")
        assert (len(page["data"]), page["has_more"]) == (1, False)
        for query in ("limit=0", "limit=101", "limit=x", "limits=1"):
            assert (await psp.ask("GET", f"/v1/charges?{query}"))[0] == 400


async def test_cards_become_tokens_without_a_key(tmp_path: Path) -> None:
    async with Psp(tmp_path) as psp:
        for card, token in CARDS.items():
            async with psp.session.post(f"{psp.url}/v1/tokens", json={"card": f"{card[:4]} {card[4:]}"}) as answer:
                assert (answer.status, await answer.json()) == (201, {"token": token})
        async with psp.session.post(f"{psp.url}/v1/tokens", json={"card": "4111111111111111"}) as answer:
            assert answer.status == 422
        assert set((await psp.ask("GET", "/control/tokens"))[1]) == set(TOKENS) >= set(CARDS.values())


async def test_what_the_state_does_not_allow(tmp_path: Path) -> None:
    async with Psp(tmp_path) as psp:
        payment = a_payment(amount=1000)
        charge = await psp.authorised(payment)

        async def refused(result: Any, code: str) -> None:
            with pytest.raises(ProviderRefused) as caught:
                await result
            assert caught.value.code == code

        def capture(number: int, amount: int, currency: str = "EUR") -> Any:
            key = of(payment, Operation.CAPTURE, number)
            return psp.patient.capture(Capture(key=key, charge=charge.id, amount=amount, currency=currency))

        def refund(number: int, amount: int, currency: str = "EUR") -> Any:
            key = of(payment, Operation.REFUND, number)
            return psp.patient.refund(Refund(key=key, charge=charge.id, amount=amount, currency=currency))

        await refused(refund(1, 1), "charge_state")
        await refused(capture(1, 1001), "amount_too_large")
        await refused(capture(2, 1, "USD"), "currency_mismatch")
        await capture(3, 700)
        await refused(capture(4, 301), "amount_too_large")
        await refused(psp.patient.void(Void(key=of(payment, Operation.VOID), charge=charge.id)), "charge_state")
        await refused(refund(2, 701), "amount_too_large")
        await refused(refund(3, 1, "USD"), "currency_mismatch")
        await refund(4, 700)
        await refused(refund(5, 1), "amount_too_large")
        # What was refused stays so: a copy that was late on its way does nothing, whatever is allowed by now.
        await refused(refund(1, 1), "charge_state")
        nobody = Void(key=of(payment, Operation.VOID, 2), charge="ch_0000000009")
        await refused(psp.patient.void(nobody), "not_found")
        (entry,) = await psp.patient.charges()
        assert (entry.charge.authorised, entry.charge.captured, entry.charge.refunded) == (1000, 700, 700)


async def test_where_the_customer_is_sent_after_the_step(tmp_path: Path) -> None:
    async with Psp(tmp_path) as psp:
        body = {**EUR, "token": "tok_requires_action", "reference": "<b>", "return_url": "https://shop.test/back?o=1"}
        status, answer = await psp.ask("POST", "/v1/charges", json=body, headers={"Idempotency-Key": "k"})
        assert status == 201
        url = answer["charge"]["action_url"]
        async with psp.session.get(url) as page:
            assert "&lt;b&gt;" in await page.text()
        async with psp.session.post(url, data={"decision": "maybe"}) as wrong:
            assert wrong.status == 422
        async with psp.session.post(url, data={"decision": "approve"}, allow_redirects=False) as sent:
            assert (sent.status, sent.headers["Location"]) == (303, "https://shop.test/back?o=1")
        async with psp.session.get(f"{psp.url}/actions/guess") as guess:
            assert guess.status == 404


# --- one charge for one key -------------------------------------------------------------------------------------------


async def test_copies_at_once_and_later_are_one_charge(tmp_path: Path) -> None:
    async with Psp(tmp_path) as psp:
        payment = a_payment()
        body = {"amount": 1000, "currency": "EUR", "token": "tok_ok", "reference": "Order 0A2C-4E6G"}

        async def ask() -> tuple[bytes, bool]:
            headers = {"Authorization": f"Bearer {API_KEY}", "Idempotency-Key": payment.key}
            async with psp.session.post(f"{psp.url}/v1/charges", json=body, headers=headers) as answer:
                assert answer.status == 201
                return await answer.read(), "Idempotent-Replayed" in answer.headers

        answers = [*await asyncio.gather(*(ask() for _ in range(50))), await ask()]
        assert len({answer for answer, _ in answers}) == 1
        assert Counter(replayed for _, replayed in answers) == {False: 1, True: 50}
        assert (await psp.counted("books")) == {"charges": 1, "refunds": 0, "operations": 1}
        # Copies of what came after it find their own answers; the first one's stays as it was.
        charge = json.loads(answers[0][0])["charge"]["id"]
        capture = Capture(key=of(payment, Operation.CAPTURE), charge=charge, amount=400, currency="EUR")
        refund = Refund(key=of(payment, Operation.REFUND), charge=charge, amount=300, currency="EUR")
        assert len({await one for one in [psp.patient.capture(capture) for _ in range(5)]}) == 1
        assert len({await one for one in [psp.patient.refund(refund) for _ in range(5)]}) == 1
        assert await ask() == (answers[0][0], True)
        (entry,) = await psp.patient.charges()
        assert (entry.charge.captured, entry.charge.refunded) == (400, 300)


async def test_a_key_is_for_one_request(tmp_path: Path) -> None:
    async with Psp(tmp_path) as psp:
        payment = a_payment(amount=1000)
        charge = await psp.authorised(payment)
        body = {"currency": "EUR", "token": "tok_ok", "reference": "Order 0A2C-4E6G"}
        for path, other in (
            ("/v1/charges", {**body, "amount": 1001}),
            (f"/v1/charges/{charge.id}/captures", {"amount": 1000, "currency": "EUR"}),
        ):
            status, answer = await psp.ask("POST", path, json=other, headers={"Idempotency-Key": payment.key})
            assert (status, answer["error"]["code"]) == (409, "idempotency_key_reused")
        (entry,) = await psp.patient.charges()
        assert (entry.charge.authorised, entry.charge.captured) == (1000, 0)


# --- failures by token ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [*NOT_ACTED_ON, *ACTED_ON])
async def test_an_answer_that_fails(tmp_path: Path, failure: Failure) -> None:
    async with Psp(tmp_path) as psp:
        payment = a_payment(f"tok_{failure}")
        with pytest.raises(ProviderUnknown):
            await psp.provider.authorise(payment)
        assert (await psp.counted("failures")) == {failure: 1}
        at_first = await psp.provider.find(payment.key)
        assert (at_first is not None) == (failure in ACTED_ON)
        again = await psp.provider.authorise(payment)
        assert isinstance(again, Succeeded)
        assert at_first in (None, again)
        assert len(await psp.provider.charges()) == 1


@pytest.mark.parametrize("operation", [Operation.CAPTURE, Operation.VOID, Operation.REFUND])
@pytest.mark.parametrize("failure", [Failure.TIMEOUT_AFTER, Failure.RESET_BEFORE])
async def test_an_answer_to_a_later_operation_that_fails(
    tmp_path: Path, operation: Operation, failure: Failure
) -> None:
    async with Psp(tmp_path) as psp:
        payment = a_payment(f"tok_{operation}_{failure}", 1000)
        charge = await psp.authorised(payment)
        money: dict[str, Any] = {"charge": charge.id, "amount": 1000, "currency": "EUR"}
        if operation is Operation.REFUND:
            await psp.provider.capture(Capture(key=of(payment, Operation.CAPTURE), **money))
        key = of(payment, operation)

        async def ask() -> Result:
            if operation is Operation.VOID:
                return await psp.provider.void(Void(key=key, charge=charge.id))
            if operation is Operation.CAPTURE:
                return await psp.provider.capture(Capture(key=key, **money))
            return await psp.provider.refund(Refund(key=key, **money))

        with pytest.raises(ProviderUnknown):
            await ask()
        assert (await psp.provider.find(key) is not None) == (failure in ACTED_ON)
        done = await ask()
        assert isinstance(done, Succeeded)
        assert await psp.provider.find(key) == done
        assert done.charge.refunded == (1000 if operation is Operation.REFUND else 0)


async def test_a_request_that_is_acted_on_after_everybody_gave_up(tmp_path: Path) -> None:
    """That nothing is found is no proof that nothing will happen; sending the request again is."""
    async with Psp(tmp_path, late_ms=600) as psp:
        alone, with_copy = a_payment("tok_acts_late"), a_payment("tok_acts_late")
        for payment in (alone, with_copy):
            with pytest.raises(ProviderUnknown):
                await psp.connect(timeout_s=0.1).authorise(payment)
            assert await psp.provider.find(payment.key) is None
        copy = await psp.provider.authorise(with_copy)
        assert isinstance(await found(psp.provider, alone.key), Succeeded)
        assert await psp.provider.find(with_copy.key) == copy
        assert len(await psp.provider.charges()) == 2


async def test_a_slow_answer(tmp_path: Path) -> None:
    async with Psp(tmp_path, slow_ms=60_000) as psp:
        payment = a_payment("tok_slow")
        with pytest.raises(ProviderUnknown):
            await psp.provider.authorise(payment)
        assert isinstance(await psp.provider.find(payment.key), Succeeded)
        await psp.ask("PUT", "/control/failures", json={"slow_ms": 50})
        started = time.monotonic()
        await psp.authorised(a_payment("tok_slow"))
        assert time.monotonic() - started >= 0.05


# --- failures by chance -----------------------------------------------------------------------------------------------


async def test_failures_are_set_and_read(tmp_path: Path) -> None:
    async with Psp(tmp_path, seed=7) as psp:
        _, before = await psp.ask("GET", "/control/failures")
        assert (before["seed"], before["rates"]) == (7, {})
        rates = {"decline": 1.0, "timeout_before": 0.5, "webhook_lost": 0.5}
        status, settings = await psp.ask("PUT", "/control/failures", json={"seed": 8, "rates": rates})
        assert (status, settings["seed"], settings["rates"]) == (200, 8, rates)
        for wrong in (
            {"rates": {"nonsense": 0.5}},
            {"rates": {"slow": 1.1}},
            {"rates": {"slow": 0.6, "error_after": 0.6}},
            {"hold_ms": -1},
            {"speed": 1},
        ):
            assert (await psp.ask("PUT", "/control/failures", json=wrong))[0] == 422
        assert (await psp.ask("GET", "/control/failures"))[1] == settings


@pytest.mark.parametrize("failure", [Failure.ERROR_BEFORE, Failure.RESET_AFTER])
async def test_a_rate_of_one_fails_everything_but_control_and_lists(tmp_path: Path, failure: Failure) -> None:
    async with Psp(tmp_path, rates={failure: 1.0}) as psp:
        payment = a_payment()
        for number in (1, 2):
            with pytest.raises(ProviderUnknown):
                await psp.provider.authorise(payment)
            assert await psp.counted("failures") == {failure: number}  # the adapter asked no second time by itself
        with pytest.raises(ProviderUnknown):
            await psp.provider.find(payment.key)
        assert len(await psp.provider.charges()) == (1 if failure in ACTED_ON else 0)
        await psp.ask("PUT", "/control/failures", json={})
        await psp.authorised(payment)
        assert len(await psp.provider.charges()) == 1


async def test_declines_by_chance_stay(tmp_path: Path) -> None:
    async with Psp(tmp_path, rates={"decline": 1.0}) as psp:
        payment = a_payment()
        declined = await psp.provider.authorise(payment)
        assert isinstance(declined, Declined)
        await psp.ask("PUT", "/control/failures", json={})
        assert await psp.provider.authorise(payment) == declined


def test_chance_is_the_seeds() -> None:
    def drawn(seed: int, keys: list[str]) -> dict[str, list[Failure | None]]:
        failures = Failures(Settings(seed=seed, rates=dict.fromkeys(OF_ANSWERS, 0.1)))
        return {key: [failures.of_answer(key, OperationKind.AUTHORISE, Plan()) for _ in range(3)] for key in keys}

    keys = [f"{number}:1:authorise" for number in range(1000)]
    assert drawn(1, keys) == drawn(1, keys[::-1])
    assert drawn(1, keys) != drawn(2, keys)
    counts = Counter(one for three in drawn(1, keys).values() for one in three)
    # 3,000 drawn at 0.1 each: a standard deviation is 16, and five of them are allowed.
    assert all(abs(counts[failure] - 300) < 82 for failure in OF_ANSWERS), counts


async def test_every_failure_at_once_and_still_one_charge_for_each_key(tmp_path: Path) -> None:
    """What a caller does who follows the rules: asks again until there is an answer."""
    rates = dict.fromkeys(OF_ANSWERS, 0.08) | {"decline": 0.2}
    async with Psp(tmp_path, seed=3, rates=rates, hold_ms=20, late_ms=20, slow_ms=20) as psp:

        async def pay(payment: Authorise) -> Result:
            for _ in range(100):
                try:
                    return await psp.patient.authorise(payment)
                except ProviderUnknown:
                    pass
            raise AssertionError("a hundred failures in a row")

        payments = [a_payment() for _ in range(100)]
        results = await asyncio.gather(*(pay(payment) for payment in payments))
        entries = await psp.patient.charges()
        assert sorted(entry.key for entry in entries) == sorted(payment.key for payment in payments)
        by_key = {entry.key: entry.charge for entry in entries}
        for payment, result in zip(payments, results, strict=True):
            assert isinstance(result, Succeeded | Declined)
            assert by_key[payment.key].authorised == (1000 if isinstance(result, Succeeded) else 0)
        assert set(await psp.counted("failures")) == set(rates)
