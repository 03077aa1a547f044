"""The auditor finds nothing in a store that is right, and names whatever is made wrong in one."""

from __future__ import annotations

import pytest

import kvstore
from services.audit.run import Report, audit
from tests.services.busy_shop import FixedBooks, Snapshot, take_snapshot


@pytest.fixture(scope="module")
def snapshot() -> Snapshot:
    return take_snapshot()


@pytest.fixture
async def audited(store: kvstore.Client, snapshot: Snapshot) -> kvstore.Client:
    await snapshot.restore(store)
    return store


def told(report: Report) -> str:
    return "\n".join(f"{one.code} at {one.key}: {one.expected} / {one.found}" for one in report.violations)


async def test_a_busy_store_is_clean(audited: kvstore.Client, snapshot: Snapshot) -> None:
    report = await audit(audited, FixedBooks(snapshot.charges, snapshot.refunds))
    assert report.is_clean, told(report)
    assert report.checked["orders"] == len(snapshot.orders)
    assert report.checked["charges on the books"] == len(snapshot.charges) >= 9
