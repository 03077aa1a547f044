"""The sandbox provider's books through restarts, kills, torn writes and failing disks; and its process."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import threading
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from services.payments.provider import (
    Authorise,
    Capture,
    Operation,
    ProviderRefused,
    ProviderUnknown,
    Refund,
    RequiresAction,
    Succeeded,
    Void,
)
from services.payments.sandbox import SandboxProvider
from services.sandbox_psp.failures import Failure, Settings
from services.sandbox_psp.journal import FILE_NAME, Journal, JournalDamaged
from services.sandbox_psp.process import API_KEY, Options, run, settings_of
from services.web.serve import CannotServe
from tests.cluster.harness import until
from tests.services.processes import ServiceProcess
from tests.services.psp import WITHIN_S, Psp, a_payment, of


async def test_everything_is_there_after_a_restart(tmp_path: Path) -> None:
    payment, late, thinking = a_payment(), a_payment("tok_webhook_late"), a_payment("tok_requires_action")
    pending = a_payment("tok_pending")
    async with Psp(tmp_path, late_ms=600_000, settle_ms=600_000) as psp:
        charge = await psp.authorised(payment)
        money: dict[str, Any] = {"charge": charge.id, "amount": 1000, "currency": "EUR"}
        await psp.patient.capture(Capture(key=of(payment, Operation.CAPTURE), **money))
        await psp.patient.refund(Refund(key=of(payment, Operation.REFUND), **money))
        with pytest.raises(ProviderRefused):
            await psp.patient.void(Void(key=of(payment, Operation.VOID), charge=charge.id))
        action = await psp.patient.authorise(thinking)
        assert isinstance(action, RequiresAction)
        await psp.patient.authorise(pending)
        await psp.settled(delivered=3)
        await psp.authorised(late)
        books = await psp.ask("GET", "/v1/charges"), await psp.ask("GET", "/v1/refunds")
        counted = await psp.counted("books")
    async with Psp(tmp_path, settle_ms=10, late_ms=0) as psp:
        again = await psp.ask("GET", "/v1/charges"), await psp.ask("GET", "/v1/refunds")
        addresses = r"http://127\.0\.0\.1:\d+"  # the port is another one
        assert _without(addresses, again) == _without(addresses, books)
        assert await psp.counted("books") == counted
        with pytest.raises(ProviderRefused, match="charge_state"):
            await psp.patient.void(Void(key=of(payment, Operation.VOID), charge=charge.id))
        async with psp.session.post(
            f"{psp.url}/actions/{action.url.rpartition('/')[2]}", data={"decision": "approve"}
        ) as answer:
            assert answer.status == 200
        # What was under way goes on: the webhook that was to be late, what is pending.
        await psp.merchant.has(3)
        assert {key for _, key in psp.merchant.told} == {late.key, thinking.key, pending.key}
        assert (await psp.authorised(a_payment())).id == "ch_0000000005"


def _without(pattern: str, value: Any) -> Any:
    return re.sub(pattern, "", repr(value))


async def test_a_torn_line_is_cut_off_and_damage_is_not(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME

    async def records(*more: bytes) -> list[bytes]:
        """What is there, before more is written."""
        read: list[bytes] = []
        journal = Journal(tmp_path, read.append)
        for record in more:
            journal.append(record)
        await journal.close()
        return read

    assert await records(b"one", b"two", b"three") == []
    whole = path.read_bytes()
    for cut in range(len(whole) - 1, len(whole) - len(b"00000000 three\n"), -1):
        path.write_bytes(whole[:cut])
        assert await records(b"four") == [b"one", b"two"]
        assert await records() == [b"one", b"two", b"four"]
    for damaged in (whole.replace(b"one", b"0ne"), b"\n" + whole, whole[1:]):
        path.write_bytes(damaged)
        with pytest.raises(JournalDamaged, match="line 1 is damaged"):
            await records()


async def test_nothing_is_answered_before_it_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writing, may_write = threading.Event(), threading.Event()
    write = Journal._write

    def slowly(journal: Journal, data: bytes) -> None:
        writing.set()
        assert may_write.wait(WITHIN_S)
        write(journal, data)

    async with Psp(tmp_path) as psp:
        payment = a_payment()
        monkeypatch.setattr(Journal, "_write", slowly)
        first = asyncio.ensure_future(psp.patient.authorise(payment))
        assert await asyncio.to_thread(writing.wait, WITHIN_S)
        others = [asyncio.ensure_future(ask) for ask in (psp.patient.authorise(payment), psp.patient.find(payment.key))]
        answered, _ = await asyncio.wait([first, *others], timeout=0.2)
        assert not answered
        assert psp.merchant.taken == []
        may_write.set()
        results = await asyncio.gather(first, *others)
        assert isinstance(results[0], Succeeded)
        assert results == [results[0]] * 3
        await psp.merchant.has(1)


async def test_after_a_failed_write_nothing_is_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise OSError("no space")

    kept, lost = a_payment(), a_payment()
    psp = Psp(tmp_path, wants_webhooks=False)
    async with psp:
        await psp.authorised(kept)
        with monkeypatch.context() as broken:
            broken.setattr(Journal, "_write", fail)
            with pytest.raises(ProviderUnknown):
                await psp.patient.authorise(lost)
        for ask in (psp.patient.authorise(lost), psp.patient.find(lost.key), psp.patient.find(kept.key)):
            with pytest.raises(ProviderUnknown):
                await ask
    async with Psp(tmp_path) as again:
        assert isinstance(await again.patient.find(kept.key), Succeeded)
        assert await again.patient.find(lost.key) is None


async def test_one_charge_for_each_key_across_a_kill(tmp_path: Path) -> None:
    """Copies of many payments at once, and kill -9 in the middle; then all of them once more."""
    payments = [a_payment() for _ in range(100)]
    psp = ServiceProcess("sandbox-psp", None, tmp_path, "--data-dir", str(tmp_path / "psp"))
    answered: dict[str, str] = {}
    unknown: set[str] = set()
    killed: list[int] = []
    async with aiohttp.ClientSession() as session:
        provider = SandboxProvider(session, psp.url, API_KEY, ["whsec"])

        async def pay(payment: Authorise) -> None:
            try:
                result = await provider.authorise(payment)
            except ProviderUnknown:
                unknown.add(payment.key)
                return
            assert isinstance(result, Succeeded)
            assert answered.setdefault(payment.key, result.charge.id) == result.charge.id
            if len(answered) == 40 and not killed:  # in the second round, too, there may be 40 for a while
                assert psp.process is not None
                killed.append(psp.process.pid)
                os.kill(psp.process.pid, signal.SIGKILL)

        async with psp:
            await asyncio.gather(*(pay(payment) for payment in payments for _ in range(3)))
            assert len(answered) >= 40
            assert unknown - set(answered), "the kill came too late to cut anything off"
        before = dict(answered)
        with (tmp_path / "psp" / FILE_NAME).open("ab") as journal:
            journal.write(b'0a1b2c3d {"charge":{"id":"ch_00')  # a write that the kill cut in two
        async with psp:
            for key, charge in before.items():
                result = await provider.find(key)
                assert isinstance(result, Succeeded)
                assert result.charge.id == charge
            await asyncio.gather(*(pay(payment) for payment in payments for _ in range(2)))
            entries, after = [], ""
            while page := await provider.charges(after):
                entries += page
                after = page[-1].charge.id
            assert sorted(entry.key for entry in entries) == sorted(payment.key for payment in payments)
            assert {entry.key: entry.charge.id for entry in entries} == answered
            assert before.items() <= answered.items()
            assert await psp.stop() == 0


def test_the_process_refuses_what_cannot_work(tmp_path: Path) -> None:
    def refused(code: str, **options: Any) -> None:
        with pytest.raises(CannotServe) as caught:
            run(Options(data_dir=tmp_path, **options))
        assert caught.value.code == code

    journal = Journal(tmp_path, lambda _: None)
    refused("journal_unusable")
    refused("address_not_loopback", host="0.0.0.0")
    refused("default_secrets", host="0.0.0.0", insecure=True)
    refused("default_secrets", host="0.0.0.0", insecure=True, api_key="sk_other")
    asyncio.run(journal.close())
    assert settings_of(3, ("slow=0.25", "decline=1")) == Settings(
        seed=3, rates={Failure.SLOW: 0.25, Failure.DECLINE: 1}
    )
    for wrong in ("nonsense=0.5", "slow=2", "slow=", "slow"):
        with pytest.raises(ValueError):
            settings_of(0, (wrong,))


async def test_connections_fail_in_earnest_too(tmp_path: Path) -> None:
    """Resets and held connections over the loop of the real process, and an end that waits for none of them."""
    psp = ServiceProcess("sandbox-psp", None, tmp_path, "--data-dir", str(tmp_path / "psp"))
    async with psp, aiohttp.ClientSession() as session:
        impatient = SandboxProvider(session, psp.url, API_KEY, ["whsec"], timeout_s=0.3)
        for failure in ("reset_after", "timeout_after"):
            payment = a_payment(f"tok_{failure}")
            with pytest.raises(ProviderUnknown):
                await impatient.authorise(payment)
            assert isinstance(await impatient.find(payment.key), Succeeded)
        patient = SandboxProvider(session, psp.url, API_KEY, ["whsec"])
        held = asyncio.ensure_future(patient.authorise(a_payment("tok_timeout_after")))

        async def is_held() -> bool:
            return len(await patient.charges()) == 3

        await until(is_held, WITHIN_S, "the third charge")
        assert await psp.stop() == 0
        with pytest.raises(ProviderUnknown):
            await held
