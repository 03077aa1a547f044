"""A campaign must be able to fail: what it judges by itself is shown to find what it is for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import aiohttp
import pytest

import kvstore
from services.payments.provider import Authorise, Capture, Operation, Succeeded, request_key
from services.sandbox_psp.failures import Failure
from services.shoppers.command import ShoppersReport
from services.web.ids import now_ms
from services.work import steps
from tests.chaos.campaign import Violation
from tests.chaos_shop.campaign import Campaign, Figures, Options, under_way
from tests.chaos_shop.provider import RATES, ProviderControl
from tests.chaos_shop.report import Terminal, markdown, report_of, summary
from tests.cluster.harness import until
from tests.services.conftest import has_leases
from tests.services.psp import Psp


def shoppers(**changes: Any) -> ShoppersReport:
    fields: dict[str, Any] = {
        "passed": True, "seed": 1, "lasted_s": 600.0, "visits": 3000, "orders_placed": 2000, "orders_read_back": 2000,
        "requests": 50_000, "outcomes": {"delivered": 1}, "problems": {}, "endpoints": [], "errors": 0, "stories": [],
    }  # fmt: skip
    return ShoppersReport(**{**fields, **changes})


def finished(**changes: Any) -> Campaign:
    """A campaign that went as it must, but for `changes` of its figures."""
    campaign = Campaign(Options(), Path(), Terminal(None))  # type: ignore[arg-type]  # it says nothing
    fields: dict[str, Any] = {
        "kills": {"a worker": 50}, "failures": dict.fromkeys(map(str, Failure), 20), "confirmed_after": 50,
        "shoppers": shoppers(), "audit": {"is_clean": True, "checks": 30, "checked": {"orders": 2000}},
    }  # fmt: skip
    campaign.figures = Figures(**{**fields, **changes})
    campaign.kills.update(campaign.figures.kills)
    return campaign


def test_a_campaign_that_is_as_it_must_be() -> None:
    report = report_of(finished(), "command", "now")
    assert report.is_good
    assert all(is_good for _, _, is_good in summary(report))
    assert "As it must be" in markdown(report)


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({"kills": {"a worker": 49}}, "at least 50 kills"),
        ({"shoppers": shoppers(orders_placed=1999)}, "at least 2000 orders"),
        ({"failures": {**dict.fromkeys(map(str, Failure), 20), "acts_late": 19}}, "each failure"),
        ({"failures": {}}, "each failure"),
        ({"confirmed_after": 49}, "50 orders confirmed"),
    ],
)
def test_a_target_that_is_missed(changes: dict[str, Any], missed: str) -> None:
    report = report_of(finished(**changes), "command", "now")
    assert not report.is_good
    (text,) = [target.text for target in report.targets if not target.kept]
    assert missed in text
    assert "**no**" in markdown(report)


@pytest.mark.parametrize("rule", ["parked for no listed reason", "steps are still due", "paid twice"])
def test_a_violation_is_in_the_summary(rule: str) -> None:
    campaign = finished()
    campaign.violations.append(Violation(rule, "so it is"))
    report = report_of(campaign, "command", "now")
    assert not report.is_good
    assert [is_good for _, _, is_good in summary(report)].count(False) == 1


def test_what_was_not_looked_at_is_not_good() -> None:
    report = report_of(finished(shoppers=None, audit=None), "command", "now")
    assert not report.is_good
    assert {"not read back", "not asked"} <= {measured for _, measured, _ in summary(report)}


def test_every_failure_of_the_provider_has_a_chance() -> None:
    assert {str(kind) for kind in Failure} == {kind for kind, rate in RATES.items() if rate > 0}


async def test_what_is_under_way(tmp_path: Path) -> None:
    async with kvstore.open_embedded(str(tmp_path / "store")) as store:
        await until(lambda: has_leases(store), 10.0, "leases", poll_s=0.005)
        await _is_under_way(store)


async def _is_under_way(store: kvstore.Client) -> None:
    later_ms = now_ms() + 3_600_000
    await store.txn(success=[steps.put("expire", "1", due_ms=later_ms)])
    assert await under_way(store) == []  # that is not to be done yet
    await store.txn(success=[steps.put("payment", "1-1")])
    assert await under_way(store) == ["payment 1-1, attempt 0 []"]
    step = steps.decode_step((await store.range(prefix=steps.STEPS)).records[0].value)
    async with store.lease(5.0) as lease:
        (record,) = (await store.range(step.key)).records
        run = await steps.StepRun.claim(store, step, record.mod_revision, lease.id)
        assert run is not None
        assert len(await under_way(store)) == 2
        await run.again("provider_unknown", 3600.0)
    assert await under_way(store) == ["payment 1-1, attempt 1 [provider_unknown]"]


async def test_orders_that_were_paid_twice_are_found_in_the_providers_books(tmp_path: Path) -> None:
    async with Psp(tmp_path) as psp, aiohttp.ClientSession() as session:
        control = ProviderControl(session, psp.url)
        for order, attempt, captured in ((1, 1, True), (2, 1, True), (2, 2, False), (3, 1, True), (3, 2, True)):
            done = await psp.patient.authorise(an_authorisation(order, attempt))
            assert isinstance(done, Succeeded)
            if captured:
                key = request_key(order, attempt, Operation.CAPTURE)
                await psp.patient.capture(Capture(key=key, amount=1000, currency="EUR", charge=done.charge.id))
        assert await control.paid_twice() == ["3"]


async def test_failures_are_counted_over_restarts_of_the_provider(tmp_path: Path) -> None:
    async with aiohttp.ClientSession() as session:
        control = ProviderControl(session, "")
        for order in (1, 2):
            async with Psp(tmp_path, slow_ms=0) as psp:
                control.url = psp.url
                await psp.patient.authorise(an_authorisation(order, 1, "tok_slow"))
                await control.ends()
        assert await control.look() is None  # it is down
    assert (control.counts["slow"], control.counts["decline"]) == (2, 0)


def an_authorisation(order: int, attempt: int, token: str = "tok_ok") -> Authorise:
    key = request_key(order, attempt, Operation.AUTHORISE)
    return Authorise(key=key, amount=1000, currency="EUR", token=token, reference="Order")
