"""The interface for payment providers: keys, requests, signatures; and the sandbox's adapter, over the sandbox itself
and over servers that answer as nobody should."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from multidict import CIMultiDict

from services.payments import sandbox as adapter
from services.payments.provider import (
    AMOUNT_MAX,
    Books,
    Capture,
    Charge,
    DeclineCode,
    Declined,
    InvalidWebhook,
    Operation,
    Pending,
    Provider,
    ProviderRefused,
    ProviderUnknown,
    Refund,
    RequiresAction,
    Succeeded,
    Void,
    request_key,
)
from services.payments.sandbox import SandboxProvider
from services.payments.signatures import TOLERANCE_S, sign
from tests.cluster.harness import free_ports
from tests.services.psp import Psp, a_payment, of

NOW_S = 1_800_000_000.5
BODY = b'{"id":"evt_1"}'
NEW, OLD = b"whsec_new", b"whsec_old"


# --- keys and requests ------------------------------------------------------------------------------------------------


def test_keys_of_requests() -> None:
    assert request_key(12, 1, Operation.AUTHORISE) == "12:1:authorise"
    assert request_key(12, 2, Operation.REFUND, 3) == "12:2:refund-3"
    assert request_key(12, 1, Operation.CAPTURE, 1) == "12:1:capture"


@pytest.mark.parametrize(
    "wrong",
    [
        {"amount": 0},
        {"amount": AMOUNT_MAX + 1},
        {"currency": "eur"},
        {"currency": "EURO"},
        {"key": "12:authorise"},
        {"key": "12:1:authorise\n"},
        {"token": ""},
        {"token": "x" * 201},
    ],
)
def test_requests_that_are_none(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        msgspec.structs.replace(a_payment(), **wrong)


def test_books_that_do_not_balance() -> None:
    Charge("ch_1", "EUR", 100, 100, 100)
    with pytest.raises(ValueError, match="balance"):
        Charge("ch_1", "EUR", 100, 50, 51)
    with pytest.raises(ValueError, match="balance"):
        Charge("ch_1", "EUR", 100, 101, 0)


# --- the adapter over the sandbox -------------------------------------------------------------------------------------


async def test_a_payment_from_authorisation_to_refunds(tmp_path: Path) -> None:
    async with Psp(tmp_path) as psp:
        provider: Provider = psp.patient
        payment = a_payment(amount=1000)
        assert await provider.find(payment.key) is None
        authorised = await provider.authorise(payment)
        assert isinstance(authorised, Succeeded)
        charge = authorised.charge
        assert charge == Charge(charge.id, "EUR", 1000, 0, 0)
        capture = Capture(key=of(payment, Operation.CAPTURE), charge=charge.id, amount=600, currency="EUR")
        assert await provider.capture(capture) == Succeeded(Charge(charge.id, "EUR", 1000, 600, 0))
        rest = Capture(key=of(payment, Operation.CAPTURE, 2), charge=charge.id, amount=400, currency="EUR")
        assert await provider.capture(rest) == Succeeded(Charge(charge.id, "EUR", 1000, 1000, 0))
        for number, after in ((1, 300), (2, 600)):
            refund = Refund(key=of(payment, Operation.REFUND, number), charge=charge.id, amount=300, currency="EUR")
            refunded = await provider.refund(refund)
            assert refunded == Succeeded(Charge(charge.id, "EUR", 1000, 1000, after), f"re_{number:010d}")
            assert await provider.find(refund.key) == refunded
        # What is found is what is true now, also of the first request.
        assert await provider.find(payment.key) == Succeeded(Charge(charge.id, "EUR", 1000, 1000, 600))


async def test_a_void(tmp_path: Path) -> None:
    async with Psp(tmp_path) as psp:
        payment = a_payment()
        charge = await psp.authorised(payment)
        void = Void(key=of(payment, Operation.VOID), charge=charge.id)
        voided = Succeeded(msgspec.structs.replace(charge, is_voided=True))
        assert await psp.patient.void(void) == voided
        assert await psp.patient.find(void.key) == voided
        assert await psp.patient.find(payment.key) == voided
        with pytest.raises(ProviderRefused) as caught:
            await psp.patient.capture(
                Capture(key=of(payment, Operation.CAPTURE), charge=charge.id, amount=1, currency="EUR")
            )
        assert caught.value.code == "charge_state"
        assert not caught.value.is_retryable
        assert await psp.patient.find(of(payment, Operation.CAPTURE)) is None


@pytest.mark.parametrize(
    ("token", "code"),
    [
        ("tok_declined", DeclineCode.OTHER),
        ("tok_insufficient_funds", DeclineCode.INSUFFICIENT_FUNDS),
        ("tok_stolen_card", DeclineCode.STOLEN_CARD),
        ("tok_expired_card", DeclineCode.EXPIRED_CARD),
        ("tok_of_nobody", DeclineCode.INVALID_TOKEN),
    ],
)
async def test_declines(tmp_path: Path, token: str, code: DeclineCode) -> None:
    async with Psp(tmp_path) as psp:
        payment = a_payment(token)
        result = await psp.patient.authorise(payment)
        assert isinstance(result, Declined)
        assert result.code is code
        assert await psp.patient.find(payment.key) == result


async def test_pending_payments_and_refunds_end_some_day(tmp_path: Path) -> None:
    async with Psp(tmp_path, settle_ms=600_000) as psp:
        good, bad = a_payment("tok_pending"), a_payment("tok_pending_declined")
        for payment in (good, bad):
            pending = await psp.patient.authorise(payment)
            assert isinstance(pending, Pending)
            assert await psp.patient.find(payment.key) == pending
        refunds = []
        for token in ("tok_refund_pending", "tok_refund_fails"):
            payment = a_payment(token)
            charge = await psp.authorised(payment)
            money: dict[str, Any] = {"charge": charge.id, "amount": 1000, "currency": "EUR"}
            await psp.patient.capture(Capture(key=of(payment, Operation.CAPTURE), **money))
            refunds.append(of(payment, Operation.REFUND))
            refund = await psp.patient.refund(Refund(key=refunds[-1], **money))
            assert refund == Pending(charge.id, f"re_{len(refunds):010d}")
        assert (await psp.ask("POST", "/control/settle"))[1] == {"settled": 4}
        assert isinstance(await psp.patient.find(good.key), Succeeded)
        declined = await psp.patient.find(bad.key)
        assert isinstance(declined, Declined)
        assert isinstance(await psp.patient.find(refunds[0]), Succeeded)
        failed = await psp.patient.find(refunds[1])
        assert isinstance(failed, Declined)
        assert failed.code is DeclineCode.REFUND_FAILED
        books = await psp.patient.charges()
        assert [one.charge.refunded for one in books] == [0, 0, 1000, 0]


async def test_a_step_of_the_customer(tmp_path: Path) -> None:
    async with Psp(tmp_path) as psp:
        for decision, kind in (("approve", Succeeded), ("refuse", Declined)):
            payment = a_payment("tok_requires_action")
            result = await psp.patient.authorise(payment)
            assert isinstance(result, RequiresAction)
            async with psp.session.get(result.url) as page:
                assert "Approve" in await page.text()
            assert await psp.patient.find(payment.key) == result
            for _ in range(2):  # people click twice
                async with psp.session.post(result.url, data={"decision": decision}) as answer:
                    assert answer.status == 200
            assert isinstance(await psp.patient.find(payment.key), kind)
            url = result.url
        async with psp.session.post(url, data={"decision": "approve"}) as answer:
            assert "declined" in await answer.text()  # too late to change one's mind


async def test_voided_while_the_customer_thinks(tmp_path: Path) -> None:
    async with Psp(tmp_path) as psp:
        payment = a_payment("tok_requires_action")
        result = await psp.patient.authorise(payment)
        assert isinstance(result, RequiresAction)
        await psp.patient.void(Void(key=of(payment, Operation.VOID), charge=result.charge_id))
        async with psp.session.post(result.url, data={"decision": "approve"}) as answer:
            assert "voided" in await answer.text()
        found = await psp.patient.find(payment.key)
        assert isinstance(found, Declined)
        assert found.code is DeclineCode.VOIDED


async def test_the_books_are_read_in_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "LIST_MAX", 2)
    async with Psp(tmp_path) as psp:
        books: Books = psp.patient
        payments = [a_payment() for _ in range(5)]
        for payment in payments:
            await psp.authorised(payment)
        seen: list[str] = []
        after = ""
        while page := await books.charges(after):
            assert len(page) <= 2
            seen += [one.key for one in page]
            after = page[-1].charge.id
        assert seen == [payment.key for payment in payments]
        assert await books.refunds() == []


async def test_what_the_provider_says_by_webhook(tmp_path: Path) -> None:
    async with Psp(tmp_path) as psp:
        payment = a_payment()
        charge = await psp.authorised(payment)
        await psp.merchant.has(1)
        headers, body = psp.merchant.taken[0]
        signed_s = int(headers["Sandbox-Signature"].partition(",")[0][2:])
        event = psp.provider.verify(headers, body, signed_s)
        assert event is not None
        assert (event.kind, event.key, event.charge_id) == ("charge.authorised", payment.key, charge.id)
        with pytest.raises(InvalidWebhook, match="signature_expired"):
            psp.provider.verify(headers, body, signed_s + TOLERANCE_S + 1)
        with pytest.raises(InvalidWebhook, match="signature_wrong"):
            psp.provider.verify(headers, body.replace(charge.id.encode(), b"ch_0000000009"), signed_s)
        other = SandboxProvider(psp.session, psp.url, "", ["whsec_other"])
        with pytest.raises(InvalidWebhook, match="signature_wrong"):
            other.verify(headers, body, signed_s)


def signed(body: bytes) -> CIMultiDict[str]:
    return CIMultiDict({"sandbox-signature": sign([NEW], body, NOW_S)})


async def test_webhooks_that_are_signed_and_make_no_sense() -> None:
    async with aiohttp.ClientSession() as session:
        provider = SandboxProvider(session, "http://127.0.0.1", "", [NEW.decode()])
        for body in (b"", b"{", b"[]", b'{"id": 1}', b"\xff"):
            with pytest.raises(InvalidWebhook, match="body_invalid"):
                provider.verify(signed(body), body, NOW_S)
        # An account may have other users, with keys of their own.
        body = b'{"id":"evt_1","type":"charge.authorised","key":"subscription 5","charge":"ch_1","created_ms":1}'
        assert provider.verify(signed(body), body, NOW_S) is None
        for secrets in ([], [""], ["good", ""]):
            with pytest.raises(ValueError):
                SandboxProvider(session, "http://127.0.0.1", "", secrets)


# --- refusals, and answers that say nothing ---------------------------------------------------------------------------


async def test_a_wrong_api_key_refuses_requests_but_says_nothing_about_earlier_ones(tmp_path: Path) -> None:
    async with Psp(tmp_path) as psp:
        stranger = psp.connect(api_key="sk_other")
        payment = a_payment()
        with pytest.raises(ProviderRefused) as refused:
            await stranger.authorise(payment)
        assert refused.value.code == "unauthorised"
        with pytest.raises(ProviderUnknown) as unknown:
            await stranger.find(payment.key)
        assert unknown.value.code == "lookup_failed"
        assert await psp.patient.find(payment.key) is None


@asynccontextmanager
async def answering(
    status: int, body: bytes, **headers: str
) -> AsyncIterator[tuple[SandboxProvider, list[web.Request]]]:
    """The adapter over a server that answers everything alike; and what that was asked."""
    asked: list[web.Request] = []

    async def answer(request: web.Request) -> web.Response:
        asked.append(request)
        return web.Response(status=status, body=body, headers=headers)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    async with TestServer(app) as server, aiohttp.ClientSession() as session:
        url = str(server.make_url("/"))
        yield SandboxProvider(session, url, "sk", ["whsec"], timeout_s=10.0), asked


ERROR = b'{"error":{"code":"some_rule","message":"No"}}'
CHARGE = (
    b'{"id":"ch_1","key":"1:1:authorise","status":"%s","currency":"EUR","authorised":%d,"captured":%d,"refunded":0,'
    b'"decline_code":"","action_url":""}'
)
OPERATION = b'{"kind":"%s","http_status":201,"charge":%s,"refund":null}'


@pytest.mark.parametrize(
    ("status", "body", "code"),
    [
        (500, ERROR, "provider_failed"),
        (503, b"", "provider_failed"),
        (408, ERROR, "provider_failed"),
        (404, b"<html>", "provider_failed"),  # not the provider's own word
        (400, b"{}", "provider_failed"),
        (302, b"", "provider_failed"),
        (201, b"", "answer_invalid"),
        (201, b"\xff", "answer_invalid"),
        (201, b"{}", "answer_invalid"),
        (201, OPERATION % (b"authorise", b"null"), "answer_invalid"),
        (201, OPERATION % (b"refund", CHARGE % (b"captured", 5, 5)), "answer_invalid"),
        (201, OPERATION % (b"authorise", CHARGE % (b"captured", 5, 6)), "answer_invalid"),
        (201, OPERATION % (b"authorise", CHARGE % (b"strange", 0, 0)), "answer_invalid"),
        (201, OPERATION % (b"authorise", CHARGE % (b"requires_action", 0, 0)), "answer_invalid"),
        (201, b" " * (adapter.ANSWER_BYTES_MAX + 1), "answer_too_large"),
    ],
)
async def test_answers_that_say_nothing(status: int, body: bytes, code: str) -> None:
    async with answering(status, body, Location="/elsewhere") as (provider, asked):
        with pytest.raises(ProviderUnknown) as caught:
            await provider.authorise(a_payment())
        assert caught.value.code == code
        assert len(asked) == 1  # neither retried nor followed


@pytest.mark.parametrize(("status", "is_retryable"), [(400, False), (409, False), (422, False), (429, True)])
async def test_refusals(status: int, is_retryable: bool) -> None:
    async with answering(status, ERROR) as (provider, asked):
        with pytest.raises(ProviderRefused) as caught:
            await provider.authorise(a_payment())
        assert (caught.value.code, caught.value.is_retryable) == ("some_rule", is_retryable)
        assert len(asked) == 1
        with pytest.raises(ProviderUnknown):  # a look-up that is refused says nothing about what is looked up
            await provider.find("1:1:authorise")


async def test_what_goes_out() -> None:
    async with answering(201, OPERATION % (b"authorise", CHARGE % (b"authorised", 5, 0))) as (provider, asked):
        payment = a_payment()
        parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
        await provider.authorise(payment, traceparent=parent)
        await provider.void(Void(key=of(payment, Operation.VOID), charge="ch/../1?x"))
        first, second = asked
        assert first.headers["Idempotency-Key"] == payment.key
        assert first.headers["traceparent"] == parent
        assert first.headers["Authorization"] == "Bearer sk"
        assert second.rel_url.raw_path == "/v1/charges/ch%2F..%2F1%3Fx/void"
        assert "traceparent" not in second.headers


async def test_nobody_there() -> None:
    (port,) = free_ports(1)
    async with aiohttp.ClientSession() as session:
        provider = SandboxProvider(session, f"http://127.0.0.1:{port}", "sk", ["whsec"])
        with pytest.raises(ProviderUnknown) as caught:
            await provider.authorise(a_payment())
        assert caught.value.code == "connection_lost"
        for ask in (provider.find("1:1:authorise"), provider.charges(), provider.refunds()):
            with pytest.raises(ProviderUnknown):
                await ask
