"""The rules of orders: at random (`order_rules.py`), and what that found or meets too seldom, one by one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from services.orders import paying
from services.orders.records import CaptureMode
from services.orders.states import OrderState
from tests.property.order_rules import OrderRules


@pytest.mark.timeout(120)
def test_the_rules_of_orders() -> None:
    run_state_machine_as_test(
        OrderRules,
        settings=settings(
            max_examples=150,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


# --- what it found ----------------------------------------------------------------------------------------------------


@pytest.fixture
def rules() -> Iterator[OrderRules]:
    rules = OrderRules()
    yield rules
    rules.the_auditor_finds_nothing()
    rules.the_bank_says_the_same()
    rules.teardown()


def test_goods_that_came_back_do_not_pay_for_lines_that_are_cancelled(rules: OrderRules) -> None:
    """The refund of a return was taken off what is due for a line that is cancelled later."""
    rules.begin([2, 1], [3, 4], CaptureMode.AUTOMATIC, 4)
    rules.ask_to_return("cup", 1, is_accepted=True)
    rules.receive(1, None, None)
    assert rules.order.refunded == 3
    rules.cancel_line("pot", 1)
    assert rules.order.refunded == 3 + 4


def test_what_follows_from_an_answer_is_not_refused_for_the_number_of_refunds(rules: OrderRules) -> None:
    """A capture that was under way while lines were cancelled, of an order that has had its number of refunds: the
    answer of the provider could not be written down."""
    rules.begin([2, 4], [1, 1], CaptureMode.MANUAL, 2)
    rules.capture(1, 3)
    rules.work_off()
    for _ in range(3):
        rules.refund(1)
    rules.capture(1, None)
    rules.cancel_line("pot", 2)
    rules.work_off()
    assert rules.order.refunds == 4
    assert (rules.order.captured, rules.order.refunded) == (6, 3 + 2)


def test_an_order_expires_though_its_customer_was_sent_to_the_bank_too_late(rules: OrderRules) -> None:
    """Expiry came while the provider had not answered, and was not due again when it had: the goods were reserved until
    the customer came back, perhaps for ever."""
    rules.begin([2], [3], CaptureMode.AUTOMATIC, 1, "action", lost=True)
    rules.time_is_over()
    assert rules.order.state is OrderState.PENDING_PAYMENT
    rules.let_it_end()
    assert rules.order.state is OrderState.EXPIRED


def test_a_completed_order_keeps_what_was_paid_for_it_though_a_capture_is_refused(rules: OrderRules) -> None:
    """More was being captured when its line was cancelled, and the rest delivered: all was given back."""
    rules.begin([1, 1], [3, 4], CaptureMode.MANUAL, 2)
    rules.capture(1, 3)
    rules.work_off()
    rules.capture(1, None)
    rules.cancel_line("pot", 1)
    rules.ship("cup", 1)
    rules.deliver(1)
    assert rules.order.state is OrderState.COMPLETED
    rules.work(0, "declined", 0, lost=False, twice=False)
    assert (rules.order.captured, rules.order.refunded) == (3, 0)


def test_nothing_is_held_for_an_order_that_costs_nothing_any_more(rules: OrderRules) -> None:
    """What cost anything is cancelled, the rest is delivered: the hold was neither taken nor given up."""
    rules.begin([1, 1], [0, 4], CaptureMode.MANUAL, 2)
    rules.cancel_line("pot", 1)
    rules.ship("cup", 1)
    rules.deliver(1)
    rules.work_off()
    assert rules.order.state is OrderState.COMPLETED
    assert [account.state for account in rules.bank.accounts.values()] == ["voided"]


def test_what_is_not_taken_of_a_payment_is_neither_taken_later_nor_in_the_way(rules: OrderRules) -> None:
    """A line is cancelled before the money is taken: the rest of the hold lapses at the provider, which would refuse to
    give up a charge of which something was captured."""
    rules.begin([1, 1], [3, 4], CaptureMode.MANUAL, 2)
    rules.cancel_line("pot", 1)
    rules.capture(1, None)
    rules.work_off()
    rules.ship("cup", 1)
    rules.deliver(1)
    assert rules.order.state is OrderState.COMPLETED
    (payment,) = rules.whole().payments.values()
    assert (payment.state, payment.authorised, payment.captured) == ("partially_captured", 7, 3)
    assert not rules.steps()
    assert not rules.command(lambda draft: paying.capture(draft, 1, None))


# --- what chance meets too seldom -------------------------------------------------------------------------------------


def test_a_page_of_the_bank_for_an_order_that_was_cancelled_meanwhile_is_given_up(rules: OrderRules) -> None:
    rules.begin([1], [3], CaptureMode.AUTOMATIC, 1, "action", lost=True)
    rules.cancel(0)
    assert rules.order.state is OrderState.CANCELLING
    rules.let_it_end()
    assert rules.order.state is OrderState.CANCELLED


def test_an_order_whose_refund_fails_is_not_cancelled(rules: OrderRules) -> None:
    rules.begin([1], [3], CaptureMode.AUTOMATIC, 2)
    rules.cancel(0)
    rules.work(0, "declined", 0, lost=False, twice=False)
    assert rules.order.state is OrderState.CANCELLING
    assert rules.order.needs_attention == paying.REFUND_FAILED


def test_no_more_is_captured_than_the_goods_cost_that_are_left(rules: OrderRules) -> None:
    rules.begin([1, 1], [3, 4], CaptureMode.MANUAL, 2)
    rules.cancel_line("pot", 1)
    rules.capture(1, 4)
    rules.capture(1, None)
    rules.work_off()
    assert rules.order.captured == 3
