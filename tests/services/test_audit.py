"""The auditor finds nothing in a store that is right, and names whatever is made wrong in one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

import kvstore
from services.__main__ import main
from services.audit import run
from services.audit.command import COULD_NOT
from services.audit.findings import CODES, KEPT_OF_CODE_MAX
from services.audit.run import CannotAudit, Report, audit
from services.payments.provider import Charge, ChargeEntry
from tests.services import damaged_addresses  # noqa: F401  more of them
from tests.services.busy_shop import FixedBooks, Snapshot, take_snapshot
from tests.services.damages import DAMAGES, Damage, Damaged


@pytest.fixture(scope="module")
def snapshot() -> Snapshot:
    return take_snapshot()


@pytest.fixture
async def damaged(store: kvstore.Client, snapshot: Snapshot) -> Damaged:
    await snapshot.restore(store)
    return Damaged(store, snapshot)


def told(report: Report) -> str:
    return "\n".join(f"{one.code} at {one.key}: {one.expected} / {one.found}" for one in report.violations)


async def test_a_busy_store_is_clean(damaged: Damaged) -> None:
    report = await damaged.audit()
    assert report.is_clean, told(report)
    assert report.checked["orders"] == len(damaged.orders)
    assert report.checked["charges on the books"] == len(damaged.charges) >= 9
    assert report.checked["refunds on the books"] == len(damaged.refunds) >= 4
    assert report.checked["payments"] > report.checked["charges on the books"]  # one is not sent yet
    assert report.books_unsettled == 0


@pytest.mark.parametrize(("code", "make"), DAMAGES, ids=[f"{code}-{make.__name__}" for code, make in DAMAGES])
async def test_what_is_wrong_is_named(damaged: Damaged, code: str, make: Damage) -> None:
    key = await make(damaged)
    report = await damaged.audit()
    assert (code, key) in {(one.code, one.key) for one in report.violations}, told(report)
    assert not report.is_clean


def test_each_check_is_shown_to_find_something() -> None:
    assert {code for code, _ in DAMAGES} == set(CODES)


# --- the run itself ---------------------------------------------------------------------------------------------------


async def test_only_so_many_violations_are_told_and_all_are_counted(damaged: Damaged) -> None:
    for number in range(KEPT_OF_CODE_MAX + 10):
        await damaged.put(f"order-state/confirmed/{number:016d}", b"")
    report = await damaged.audit()
    assert report.counts == {"state_index": KEPT_OF_CODE_MAX + 10}
    assert len(report.violations) == KEPT_OF_CODE_MAX


async def test_a_store_that_changes_meanwhile_is_seen_at_one_revision(
    damaged: Damaged, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the auditor reads first: by then all orders are gone from the store."""
    read_work = run.forgotten.read_work

    async def read_late(view: Any) -> Any:
        work = await read_work(view)
        for prefix in ("order/", "payment/", "stock/"):
            await damaged.delete_all(prefix)
        return work

    monkeypatch.setattr(run.forgotten, "read_work", read_late)
    report = await audit(damaged.store)
    assert report.is_clean, told(report)
    assert report.checked["orders"] == len(damaged.orders)


@pytest.mark.parametrize("times", [1, run.RUNS_MAX])
async def test_a_store_that_forgets_the_revision_is_audited_at_a_newer_one(
    damaged: Damaged, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    read_work, runs = run.forgotten.read_work, 0

    async def compact_then_read(view: Any) -> Any:
        nonlocal runs
        runs += 1
        if runs <= times:
            newest = (await damaged.store.put(b"other", b"")).revision
            await damaged.store.compact(newest)
        return await read_work(view)

    monkeypatch.setattr(run.forgotten, "read_work", compact_then_read)
    if times == run.RUNS_MAX:
        with pytest.raises(CannotAudit, match="history"):
            await audit(damaged.store)
    else:
        report = await audit(damaged.store)
        assert (report.is_clean, report.runs) == (True, times + 1)


async def test_an_order_that_changes_between_two_looks_is_looked_at_again(damaged: Damaged) -> None:
    """The books are ahead of what was read of the order: no violation, if they agree in the end."""
    payment, order = damaged.part("payment", "in parts"), damaged.order("in parts")

    class Ahead(FixedBooks):
        looks = 0

        async def charges(self, after: str = "") -> list[ChargeEntry]:
            self.looks += 1
            if self.looks == 2:  # the second look at the first page
                await damaged.set(payment, captured=2000)
                await damaged.set(order, captured=2000)
                self._charges[at] = after_capture
            return await super().charges(after)

    at = damaged.charge_of("in parts")
    entry = damaged.charges[at]
    after_capture = ChargeEntry(entry.key, msgspec.structs.replace(entry.charge, captured=2000))
    report = await audit(damaged.store, Ahead(damaged.charges, damaged.refunds, page=100))
    assert (report.is_clean, report.books_unsettled) == (True, 0), told(report)


async def test_charges_of_others_are_none_of_ours(damaged: Damaged) -> None:
    damaged.charges.append(ChargeEntry("invoice 7", Charge("ch_7", "EUR", 100, 100, 0)))
    report = await damaged.audit()
    assert (report.is_clean, report.checked["charges of others"]) == (True, 1)


def test_no_store_is_not_a_clean_one(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["audit", "--endpoints", "nowhere"])
    assert result.exit_code == COULD_NOT
    assert "Cannot audit" in result.stderr


def test_the_checks_are_listed() -> None:
    result = CliRunner().invoke(main, ["audit", "--list-checks"])
    assert result.exit_code == 0
    for code in CODES:
        assert code in result.stdout
