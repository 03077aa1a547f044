"""The bank, the sale, receipts, the queue, revisions and replicas' reads: one history for each rule that breaks it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.checkers.bank import ReadAccounts, Statement, Transfer, check_bank
from tests.checkers.history import Entry
from tests.checkers.local import LocalGet, LocalSeen, check_reads
from tests.checkers.models import Add, Delete, Get, Put, Seen, Sum, Wrote
from tests.checkers.queue import LookAtQueue, PutJob, Standing, Take, check_queue
from tests.checkers.receipts import Issue, Look, Reading, check_receipts
from tests.checkers.revisions import check_revisions
from tests.checkers.sale import SoldOut, check_sale
from tests.checkers.scenario import failed, ok, unknown
from tests.checkers.verdict import Inconsistent


def bad(rule: str, judge: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(Inconsistent) as caught:
        judge(*arguments)
    assert caught.value.rule == rule, caught.value
    return caught.value.message


# --- the bank ---------------------------------------------------------------------------------------------------------

START = {"a": 10, "b": 10}
MOVE = Transfer("t1", "a", "b", 3)
BACK = Transfer("t2", "b", "a", 4)
LEDGER = {"t1": b"a b 3"}


def accounts(
    called: int, a: int, b: int, ledger: dict[str, bytes] | None = None, *, is_local: bool = False, until: int = 0
) -> Entry:
    operation = ReadAccounts(ledger is not None, is_local)
    return ok(called, until or called + 1, operation, Statement({"a": a, "b": b}, ledger))


def test_a_good_bank() -> None:
    entries = [ok(1, 2, MOVE), accounts(3, 7, 13), unknown(5, BACK), failed(6, 7, Transfer("t3", "a", "b", 1))]
    check_bank([*entries, accounts(10, 7, 13, LEDGER)], START)
    check_bank([*entries, accounts(10, 11, 9, LEDGER | {"t2": b"b a 4"})], START)


def test_money_that_comes_or_goes() -> None:
    bad("total", check_bank, [ok(1, 4, MOVE), accounts(2, 7, 10)], START)
    bad("total", check_bank, [ok(1, 2, ReadAccounts(), Statement({"a": 20}))], START)


def test_an_overdrawn_account() -> None:
    bad("overdrawn", check_bank, [accounts(1, -1, 21)], START)


def test_a_transfer_applied_twice() -> None:
    bad("balances_and_ledger", check_bank, [ok(1, 2, MOVE), accounts(3, 4, 16, LEDGER)], START)


def test_a_lost_transfer() -> None:
    bad("lost_transfer", check_bank, [ok(1, 2, MOVE), accounts(3, 10, 10, {})], START)
    # A replica may not know of it yet.
    check_bank([ok(1, 2, MOVE), accounts(3, 10, 10, {}, is_local=True)], START)


def test_a_ledger_entry_that_holds_something_else() -> None:
    bad("lost_transfer", check_bank, [ok(1, 2, MOVE), accounts(3, 7, 13, {"t1": b"a b 4"})], START)


def test_a_transfer_that_must_not_be_there() -> None:
    found = accounts(3, 7, 13, LEDGER)
    bad("failed_transfer", check_bank, [failed(1, 2, MOVE), found], START)
    bad("failed_transfer", check_bank, [found, ok(5, 6, MOVE)], START)
    bad("failed_transfer", check_bank, [found], START)


# --- receipts ---------------------------------------------------------------------------------------------------------


def issue(called: int, returned: int, receipt: str, result: Any) -> Entry:
    return ok(called, returned, Issue("c", receipt), result)


def look(called: int, value: int, receipts: str, *, is_local: bool = False, until: int = 0) -> Entry:
    return ok(called, until or called + 1, Look("c", is_local), Reading(value, frozenset(receipts)))


def counter(*entries: Entry) -> tuple[list[Entry], int, int]:
    return list(entries), 0, 1


def test_good_receipts() -> None:
    lines = [issue(1, 2, "a", 1), unknown(3, Issue("c", "b")), issue(4, 5, "d", 3), failed(6, 7, Issue("c", "e"))]
    check_receipts(*counter(*lines, look(8, 3, "abd")))
    check_receipts(*counter(*lines, look(8, 0, "", is_local=True)))


def test_an_addition_applied_twice_or_in_part() -> None:
    bad("number_and_receipts", check_receipts, *counter(issue(1, 2, "a", 1), look(3, 2, "a")))
    bad("number_and_receipts", check_receipts, *counter(issue(1, 4, "a", 1), look(2, 0, "a", is_local=True)))


def test_a_lost_receipt() -> None:
    bad("lost_receipt", check_receipts, *counter(issue(1, 2, "a", 1), look(3, 0, "")))
    broken = ok(3, 4, Look("c"), Reading(1, frozenset("a"), ("a",)))
    bad("lost_receipt", check_receipts, *counter(issue(1, 2, "a", 1), broken))


def test_a_receipt_that_must_not_be_there() -> None:
    bad("failed_receipt", check_receipts, *counter(failed(1, 2, Issue("c", "a")), look(3, 1, "a")))
    bad("failed_receipt", check_receipts, *counter(look(3, 1, "a"), issue(5, 6, "a", 1)))
    bad("failed_receipt", check_receipts, *counter(look(3, 1, "a")))


def test_a_number_given_twice() -> None:
    bad("number_given_twice", check_receipts, *counter(issue(1, 4, "a", 1), issue(2, 3, "b", 1)))


def test_numbers_that_go_back_in_real_time() -> None:
    bad("number_given_twice", check_receipts, *counter(issue(1, 2, "a", 2), issue(3, 4, "b", 1)))
    check_receipts(*counter(issue(1, 4, "a", 2), issue(2, 3, "b", 1)))


def test_a_number_out_of_bounds() -> None:
    bad("number_out_of_bounds", check_receipts, *counter(issue(1, 2, "a", 2)))
    bad("number_out_of_bounds", check_receipts, *counter(issue(1, 2, "a", 0)))


# --- the sale ---------------------------------------------------------------------------------------------------------


def sold_out(called: int, returned: int, receipt: str) -> Entry:
    return issue(called, returned, receipt, SoldOut())


def test_a_good_sale() -> None:
    check_sale([issue(1, 2, "a", 1), issue(3, 4, "b", 0), sold_out(5, 6, "d"), look(7, 0, "ab")], 2)
    # The one of unknown outcome may have taken the last unit.
    check_sale([issue(1, 2, "a", 1), unknown(3, Issue("c", "b")), sold_out(5, 6, "d"), look(7, 0, "ab")], 2)


def test_an_oversold_product() -> None:
    lines = [issue(1, 2, "a", 1), issue(3, 4, "b", 0)]
    bad("oversold", check_sale, [*lines, issue(5, 6, "d", 0)], 2)
    bad("oversold", check_sale, [issue(1, 2, "a", -1)], 2)
    bad("oversold", check_sale, [*lines, look(5, -1, "abd", is_local=True)], 2)


def test_refused_although_there_was_stock() -> None:
    bad("refused_too_early", check_sale, [issue(1, 2, "a", 1), sold_out(3, 4, "b")], 2)
    # Orders called after it was answered cannot have been before it.
    bad("refused_too_early", check_sale, [issue(1, 2, "a", 1), sold_out(3, 4, "b"), unknown(5, Issue("c", "d"))], 2)


def test_sold_after_it_was_sold_out() -> None:
    lines = [issue(1, 2, "a", 1), unknown(3, Issue("c", "b")), sold_out(4, 5, "d")]
    check_sale([*lines, look(8, 0, "ab")], 2)
    bad("sold_again", check_sale, [*lines, issue(6, 7, "e", 0)], 2)


def test_a_lost_order() -> None:
    bad("lost_receipt", check_sale, [issue(1, 2, "a", 1), look(3, 2, "")], 2)


def test_a_unit_lost_with_its_order() -> None:
    bad("number_and_receipts", check_sale, [issue(1, 2, "a", 1), look(3, 0, "a")], 2)


def test_a_refused_order_that_is_there() -> None:
    bad("failed_receipt", check_sale, [issue(1, 2, "a", 0), sold_out(3, 4, "b"), look(5, 0, "b")], 1)


def test_a_place_sold_twice() -> None:
    bad("number_given_twice", check_sale, [issue(1, 4, "a", 1), issue(2, 3, "b", 1)], 3)


# --- the queue --------------------------------------------------------------------------------------------------------


def job(called: int, returned: int, name: str) -> Entry:
    return ok(called, returned, PutJob("q", name))


def take(called: int, returned: int, taker: str, name: str | None, *, newest: bool = False) -> Entry:
    return ok(called, returned, Take("q", taker, newest), name)


def queue(called: int, waiting: str, *, is_local: bool = False, **done: str) -> Entry:
    return ok(called, called + 1, LookAtQueue("q", is_local), Standing(frozenset(waiting), done))


TWO_JOBS = [job(1, 2, "a"), job(3, 4, "b")]


def test_a_good_queue() -> None:
    none = take(0, 1, "x", None)
    check_queue([none, *TWO_JOBS, take(5, 6, "y", "a"), take(7, 8, "z", "b"), queue(9, "", a="y", b="z")])
    check_queue([*TWO_JOBS, take(5, 6, "y", "b", newest=True), queue(9, "a", b="y")])


def test_a_queue_with_unknown_outcomes() -> None:
    """The second job may have come late, the first one may have been taken early."""
    maybe = [job(1, 2, "a"), unknown(3, PutJob("q", "b")), unknown(5, Take("q", "y"))]
    check_queue([*maybe, take(6, 7, "z", "b"), queue(8, "", a="y", b="z")])
    check_queue([*maybe, take(6, 7, "z", None), queue(8, "b", a="y")])


def test_a_job_taken_twice() -> None:
    bad("taken_twice", check_queue, [*TWO_JOBS, take(5, 8, "x", "a"), take(6, 7, "y", "a")])
    bad("taken_twice", check_queue, [*TWO_JOBS, take(5, 6, "x", "a"), unknown(7, Take("q", "y")), queue(8, "b", a="y")])
    bad("taken_twice", check_queue, [*TWO_JOBS, take(5, 6, "x", None), queue(8, "b", a="x")])


def test_a_lost_job() -> None:
    bad("lost_job", check_queue, [*TWO_JOBS, queue(5, "b")])
    bad("lost_job", check_queue, [*TWO_JOBS, take(5, 6, "x", "a"), queue(7, "ab")])
    check_queue([*TWO_JOBS, queue(5, "b", is_local=True)])


def test_a_job_that_waits_and_is_done() -> None:
    bad("waiting_and_done", check_queue, [*TWO_JOBS, take(5, 8, "x", "a"), queue(6, "ab", is_local=True, a="x")])


def test_a_job_that_must_not_be_there() -> None:
    bad("failed_job", check_queue, [failed(1, 2, PutJob("q", "a")), queue(3, "a")])
    bad("failed_job", check_queue, [take(1, 2, "x", "a"), job(3, 4, "a")])
    bad("failed_job", check_queue, [queue(1, "a"), job(3, 4, "a")])
    bad("failed_job", check_queue, [*TWO_JOBS, failed(5, 6, Take("q", "x")), queue(7, "b", a="x")])


def test_jobs_out_of_order() -> None:
    bad("out_of_order", check_queue, [*TWO_JOBS, take(5, 6, "x", "b"), queue(7, "a", b="x")])
    bad("out_of_order", check_queue, [*TWO_JOBS, take(5, 6, "x", "a", newest=True), queue(7, "b", a="x")])
    bad("out_of_order", check_queue, [*TWO_JOBS, take(5, 6, "x", None), queue(7, "ab")])
    later = [take(5, 6, "x", "b"), take(7, 8, "y", "a")]
    bad("out_of_order", check_queue, [*TWO_JOBS, *later, queue(9, "", a="y", b="x")])


# --- revisions --------------------------------------------------------------------------------------------------------


def at(called: int, returned: int, revision: int, *, changed: bool = False) -> Entry:
    return ok(called, returned, "something", revision=revision, changed=changed)


def test_revisions_in_order() -> None:
    check_revisions([at(1, 2, 5, changed=True), at(3, 4, 5), at(5, 8, 7, changed=True), at(6, 7, 6, changed=True)])


def test_two_changes_of_one_revision() -> None:
    bad("revision_order", check_revisions, [at(1, 4, 5, changed=True), at(2, 3, 5, changed=True)])


def test_a_read_at_an_older_revision_than_an_acknowledged_one() -> None:
    bad("revision_order", check_revisions, [at(1, 2, 5, changed=True), at(3, 4, 4)])
    bad("revision_order", check_revisions, [at(1, 2, 5), at(3, 4, 4)])
    check_revisions([at(1, 3, 5, changed=True), at(2, 4, 4)])


def test_a_change_at_a_revision_that_was_read_before() -> None:
    bad("revision_order", check_revisions, [at(1, 2, 5), at(3, 4, 5, changed=True)])


# --- replicas ---------------------------------------------------------------------------------------------------------

K = b"k"


def local(called: int, floor: int, seen: Seen, revision: int) -> Entry:
    return ok(called, called + 1, LocalGet(K, floor), LocalSeen(seen, revision))


WRITES = [ok(1, 2, Put(K, b"a"), Wrote(3)), ok(3, 4, Put(K, b"b"), Wrote(5))]


def test_good_local_reads() -> None:
    absent = Seen(None, 0)
    count = check_reads([*WRITES, local(5, 0, absent, 2), local(7, 0, Seen(b"a", 3), 4), local(9, 3, Seen(b"b", 5), 5)])
    assert count == 3
    check_reads([*WRITES, unknown(5, Delete(K)), local(7, 0, absent, 6)])
    check_reads([unknown(1, Put(K, b"a")), local(2, 0, Seen(b"a", 9), 9)])


def test_a_local_read_that_goes_back() -> None:
    bad("local_read_went_back", check_reads, [*WRITES, local(5, 5, Seen(b"a", 3), 4)])


def test_a_replica_that_lacks_a_change() -> None:
    bad("replica_lacks_a_change", check_reads, [*WRITES, local(5, 0, Seen(b"a", 3), 5)])
    bad("replica_lacks_a_change", check_reads, [*WRITES, local(5, 0, Seen(None, 0), 7)])
    bad("replica_lacks_a_change", check_reads, [*WRITES, ok(5, 6, Get(K), Seen(b"a", 3), revision=5)])


def test_two_values_of_one_revision() -> None:
    bad("two_values_of_one_revision", check_reads, [*WRITES, local(5, 0, Seen(b"a", 5), 5)])
    sums = [ok(1, 2, Add(K, 1), Sum(1, 3)), local(3, 0, Seen(b"2", 3), 3)]
    bad("two_values_of_one_revision", check_reads, sums)


def test_a_value_of_nobody_or_of_one_that_failed() -> None:
    bad("unwritten_value", check_reads, [local(5, 0, Seen(b"x", 5), 5)])
    bad("unwritten_value", check_reads, [failed(1, 2, Put(K, b"x")), local(5, 0, Seen(b"x", 5), 5)])
    bad("unwritten_value", check_reads, [local(5, 0, Seen(b"x", 5), 5), ok(8, 9, Put(K, b"x"), Wrote(5))])
