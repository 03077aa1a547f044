"""One run of the auditor over a store, and what came of it.

A run sees the store as it was at one revision. Should the store forget that revision meanwhile (compaction), it begins
again at a newer one.
"""

from __future__ import annotations

import time
from typing import Final

import msgspec
from msgspec import Struct

import kvstore
from services.audit import answers, forgotten, orders, places, stock
from services.audit.books import BooksPass
from services.audit.findings import CODES, Findings, Violation
from services.audit.orders import OrderPass
from services.audit.view import Progress, View
from services.payments.provider import Books

# A store that is compacted again in the time of a run, and again, keeps too little history for its size.
RUNS_MAX: Final = 3
_SCANNED: Final = (
    orders.ORDERS, orders.ADDRESSES, *(prefix for prefix, _ in orders.PARTS.values()), places.STATES, places.USERS,
    places.ATTENTION, stock.STOCK, stock.PRODUCTS, answers.ANSWERS, answers.CARTS, forgotten.STEPS, forgotten.PARKED,
)  # fmt: skip


class CannotAudit(Exception):
    """The message says what to do."""


class Report(Struct, frozen=True):
    """`checked` counts what was looked at, `counts` the violations of each code, of which `violations` has a bounded
    number. `books_unsettled`: charges that changed with each look."""

    revision: int
    is_clean: bool
    checks: int
    checked: dict[str, int]
    counts: dict[str, int]
    violations: list[Violation]
    with_books: bool
    books_unsettled: int
    runs: int
    duration_s: float


async def audit(store: kvstore.Client, books: Books | None = None, progress: Progress | None = None) -> Report:
    """Raises `CannotAudit`, `ProviderUnknown` and what the store raises."""
    begun_s = time.monotonic()
    for number in range(1, RUNS_MAX + 1):
        try:
            report = await _run(store, books, progress)
        except kvstore.Refused as refusal:
            if refusal.code != "revision_compacted":
                raise
        else:
            duration_s = round(time.monotonic() - begun_s, 3)
            return msgspec.structs.replace(report, runs=number, duration_s=duration_s)
    raise CannotAudit(
        f"the store forgot the revision that was audited, {RUNS_MAX} times: keep more history (--history-age)"
    )


async def _run(store: kvstore.Client, books: Books | None, progress: Progress | None) -> Report:
    findings = Findings()
    revision = (await store.range(b"order/", limit=1)).revision
    view = View(store, revision, findings, progress)
    if progress is not None:
        await view.expect(_SCANNED)
    work = await forgotten.read_work(view)
    over_orders = OrderPass(view, work, for_books=books is not None)
    await over_orders.run()
    checked = {f"{kind}s": count for kind, count in over_orders.counts.items()}
    checked["products"] = await stock.check_stock(view, over_orders.promised)
    checked["index entries"] = await places.check_indexes(view)
    checked["stored answers"] = await answers.check_answers(view)
    checked["carts"] = await answers.check_carts(view)
    checked["steps due"], checked["steps parked"] = len(work.due), len(work.parked)
    unsettled = 0
    if books is not None:
        over_books = BooksPass(store, books, findings, over_orders.charged, over_orders.refunded)
        await over_books.run()
        checked["charges on the books"], checked["refunds on the books"] = over_books.charges, over_books.refunds
        checked["charges of others"] = over_books.foreign
        unsettled = over_books.unsettled
    return Report(
        revision=revision,
        is_clean=findings.total == 0,
        checks=len(CODES),
        checked=checked,
        counts=dict(sorted(findings.counts.items())),
        violations=findings.kept,
        with_books=books is not None,
        books_unsettled=unsettled,
        runs=1,
        duration_s=0.0,
    )
