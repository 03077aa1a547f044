"""The rules of orders against a bank and a shelf: random commands of customers and staff, workers that do steps in any
order, lose answers, come twice and late; time that passes.

After each step everything holds that the auditor checks of a single order and of stock, and the bank's books say the
same as the order. What is refused changes nothing. In the end, when the bank answers and workers have worked, nothing
is under way any more, and nothing is kept of what was not sold.

Limits are small, so that they are met.
"""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import patch

from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

import kvstore
from services.audit import orders as _declares_the_checks  # noqa: F401
from services.audit.findings import Findings
from services.audit.places import attention_place, number_of, state_place
from services.audit.stock import PRODUCT_CHECKS, ProductStock, Promised
from services.audit.whole import ORDER_CHECKS, Case, Work
from services.orders import ending, forgetting, fulfilling, paying
from services.orders.draft import Draft, Whole, reads, whole_of
from services.orders.records import (
    CaptureMode,
    EventRecord,
    Order,
    OrderLine,
    Payment,
    Quantity,
    ShipTo,
    StockHeld,
    decode_event,
    encode,
)
from services.orders.states import OrderState
from services.web.problems import Problem
from services.work import steps
from services.work.kinds import FORGET_CUSTOMER
from services.work.steps import Step, decode_step
from tests.property.order_shelf import Account, Bank, Shelf

ORDER_ID = 12
STOCK = 100
EXPIRES_MS = 1_000
SKUS = ("cup", "pot", "tin")
ADDRESS = ShipTo("Ada", "1 Street", "12345", "Town", "DE")
FORGET_WITHIN_MS = 5_000
# A worker that makes no more headway than this has an order that never ends.
STEPS_MAX = 200

outcomes = st.sampled_from(["authorised", "action", "pending", "declined"])
quantity = st.integers(1, 3)


class OrderRules(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.shelf, self.bank = Shelf(), Bank()
        self.now_ms = 1
        limits = {"PAYMENTS_MAX": 3, "REFUNDS_MAX": 3, "CAPTURES_MAX": 3}
        self.patches = [patch.object(paying, name, value) for name, value in limits.items()]
        self.patches += [
            patch.object(fulfilling, name, 3) for name in ("SHIPMENTS_MAX", "RETURNS_MAX", "OPEN_RETURNS_MAX")
        ]
        self.patches.append(patch.object(steps, "now_ms", lambda: self.now_ms))
        for one in self.patches:
            one.start()

    def teardown(self) -> None:
        try:
            if self.shelf.records:
                self.let_it_end()
        finally:
            for one in self.patches:
                one.stop()

    @initialize(
        quantities=st.lists(quantity, min_size=1, max_size=3),
        prices=st.lists(st.integers(0, 4), min_size=3),
        capture=st.sampled_from(CaptureMode),
        begun=st.sampled_from([0, 1, 1, 1, 2, 2, 3, 4, 4, 4]),
        outcome=outcomes,
        lost=st.booleans(),
        less=st.sampled_from([0, 0, 1]),
    )
    def begin(
        self, quantities: list[int], prices: list[int], capture: CaptureMode, begun: int,
        outcome: str = "authorised", lost: bool = False, less: int = 0,
    ) -> None:  # fmt: skip
        """Some orders have come a long way already: chance would seldom take one so far."""
        self.place(quantities, prices)
        if begun >= 1:
            self.pay(capture)
        if begun == 1:
            self.work(0, outcome, less, lost=lost, twice=False)
        if begun >= 2:
            self.work_off()
        if begun >= 3:
            self.ship("cup", 1)
            self.ship("cup", 1)
        if begun >= 4:
            self.deliver(1)
            self.deliver(2)

    def place(self, quantities: list[int], prices: list[int]) -> None:
        """As `placing.py` does."""
        lines = tuple(
            OrderLine(sku, sku, count, price, count * price)
            for sku, count, price in zip(SKUS, quantities, prices, strict=False)
        )
        total = sum(line.total for line in lines)
        state, held = (
            (OrderState.PENDING_PAYMENT, StockHeld.RESERVED) if total else (OrderState.CONFIRMED, StockHeld.ALLOCATED)
        )
        order = Order(
            ORDER_ID, number_of(ORDER_ID), 7, state, "EUR", lines, total, 1, EXPIRES_MS, 1, held, events=1
        )  # fmt: skip
        writes: list[kvstore.Operation] = [
            kvstore.Put(b"order/12", encode(order)),
            kvstore.Put(state_place(order), b""),
            kvstore.Put(b"order-address/12", encode(ADDRESS)),
            kvstore.Put(b"order-event/12/000001", encode(EventRecord(ORDER_ID, 1, f"order.{state}", 1))),
        ]
        for line in lines:
            writes.append(kvstore.Put(f"stock/{line.sku}/on_hand".encode(), b"%d" % (STOCK - line.quantity)))
            writes.append(kvstore.Put(f"stock/{line.sku}/{held}".encode(), b"%d" % line.quantity))
        if total:
            writes.append(steps.put("expire", str(ORDER_ID), due_ms=EXPIRES_MS))
        self.shelf.write(writes)

    # --- what is there ------------------------------------------------------------------------------------------------

    def whole(self) -> Whole:
        found = whole_of([self.shelf.range(one).records for one in reads(ORDER_ID)])
        assert found is not None
        return found

    @property
    def order(self) -> Order:
        return self.whole().order

    def steps(self) -> list[Step]:
        return [decode_step(record.value) for record in self.shelf.prefixed(b"step/")]

    def account(self, payment: Payment) -> Account:
        return self.bank.accounts[f"{ORDER_ID}:{payment.attempt}:authorise"]

    # --- commands: done, or refused with no trace ---------------------------------------------------------------------

    def command(self, decide: Callable[[Draft], object]) -> bool:
        whole = self.whole()
        draft = Draft(whole, self.now_ms)
        try:
            decide(draft)
        except Problem as refused:
            problem = refused
        else:
            self.shelf.write(draft.operations())
            return True
        assert problem.kind.status in (404, 409, 422)
        assert whole == self.whole()  # nothing that a rule was given was changed
        return False

    @rule(capture=st.sampled_from(CaptureMode))
    def pay(self, capture: CaptureMode) -> None:
        before = self.order
        if self.command(lambda draft: paying.pay(draft, "tok", capture)):
            assert before.live_payment == 0
            assert self.now_ms < EXPIRES_MS

    @rule(attempt=st.integers(1, 3), amount=st.none() | st.integers(1, 30))
    def capture(self, attempt: int, amount: int | None) -> None:
        self.command(lambda draft: paying.capture(draft, attempt, amount))

    @rule(amount=st.none() | st.integers(1, 30))
    def refund(self, amount: int | None) -> None:
        before = self.order
        if self.command(lambda draft: paying.refund(draft, amount, "goodwill")):
            rest = before.captured - before.refunded
            assert self.order.refunded - before.refunded == (rest if amount is None else amount) <= rest

    @rule(number=st.integers(1, 4))
    def settle_outside(self, number: int) -> None:
        before = self.order
        if self.command(lambda draft: paying.settle_outside(draft, number, "by transfer")):
            assert self.order.refunded == before.refunded + self.whole().refunds[number].amount <= before.captured

    @rule(really=st.integers(0, 3))
    def cancel(self, really: int) -> None:
        if really:  # not too soon: it ends most of what could happen
            return
        before = self.order
        if self.command(lambda draft: ending.cancel(draft, "no")):
            assert not any(line.shipped for line in before.lines)
            assert self.order.state in (OrderState.CANCELLING, OrderState.CANCELLED)

    @rule(sku=st.sampled_from(SKUS), count=quantity)
    def cancel_line(self, sku: str, count: int) -> None:
        before = self.order
        if not self.command(lambda draft: ending.cancel_lines(draft, (Quantity(sku, count),), "gone")):
            return
        (line,) = [line for line in before.lines if line.sku == sku]
        worth, owed = count * line.unit_price, before.owed
        # What was paid for it goes back: of all that it cost, as far as that was taken at all, and not given back yet.
        unpaid = max(0, owed - before.captured)
        back = min(max(0, worth - unpaid), before.captured - before.refunded)
        assert self.order.refunded - before.refunded == back

    @rule(sku=st.sampled_from(SKUS), count=quantity)
    def ship(self, sku: str, count: int) -> None:
        before = self.order
        if self.command(lambda draft: fulfilling.ship(draft, (Quantity(sku, count),), "Post", "P")):
            assert before.state is OrderState.CONFIRMED
            assert before.captured >= before.owed
            assert self.whole().has_address

    @rule()
    def say_where_to(self) -> None:
        before = self.order
        if self.command(lambda draft: fulfilling.send_to(draft, ADDRESS)):
            assert before.is_under_way
            assert not 0 < before.forget_by_ms <= self.now_ms

    @rule()
    def erase_the_customer(self) -> None:
        """Or do again what follows from it: in time, or as the last time."""
        by_ms = self.order.forget_by_ms or self.now_ms + FORGET_WITHIN_MS
        is_last = self.now_ms >= by_ms
        self.command(lambda draft: forgetting.forget(draft, by_ms, is_last=is_last))
        if is_last:
            assert not self.whole().has_address

    @invariant()
    def an_erased_customers_address_is_there_while_it_is_needed(self) -> None:
        if not self.shelf.records:
            return
        whole = self.whole()
        if whole.order.forget_by_ms and not whole.order.is_under_way:
            assert not whole.has_address
        if whole.order.is_under_way and not 0 < whole.order.forget_by_ms <= self.now_ms:
            assert whole.has_address

    @rule(number=st.integers(1, 3))
    def deliver(self, number: int) -> None:
        self.command(lambda draft: fulfilling.deliver(draft, number))

    @rule(sku=st.sampled_from(SKUS), count=quantity, is_accepted=st.booleans())
    def ask_to_return(self, sku: str, count: int, is_accepted: bool) -> None:
        self.command(lambda draft: fulfilling.request_return(draft, (Quantity(sku, count),), "too blue"))
        if is_accepted:
            self.approve(self.order.returns)

    @rule(number=st.integers(1, 3))
    def approve(self, number: int) -> None:
        self.command(lambda draft: fulfilling.approve_return(draft, number, ""))

    @rule(number=st.integers(1, 3))
    def reject(self, number: int) -> None:
        self.command(lambda draft: fulfilling.reject_return(draft, number, ""))

    @rule(
        number=st.integers(1, 3),
        restocked=st.none() | st.builds(Quantity, st.sampled_from(SKUS), quantity),
        amount=st.none() | st.integers(0, 9),
    )
    def receive(self, number: int, restocked: Quantity | None, amount: int | None) -> None:
        goods = () if restocked is None else (restocked,)
        self.command(lambda draft: fulfilling.receive_return(draft, number, goods, amount, ""))

    @rule(passed_ms=st.sampled_from([1, 100, EXPIRES_MS]))
    def wait(self, passed_ms: int) -> None:
        self.now_ms += passed_ms

    @rule()
    def time_is_over(self) -> None:
        self.now_ms = max(self.now_ms, EXPIRES_MS)
        for step in self.steps():
            if step.kind == "expire" and step.due_ms <= self.now_ms:
                self.do(step, "", 0, lost=False)

    # --- workers, as `steps.py` has them ------------------------------------------------------------------------------

    @rule(
        choice=st.integers(0, 9), outcome=outcomes, less=st.sampled_from([0, 0, 0, 1]),
        lost=st.booleans(), twice=st.booleans(),
    )  # fmt: skip
    def work(self, choice: int, outcome: str, less: int, lost: bool, twice: bool) -> None:
        """A worker does a step that is due. With `lost` the bank acts, and its answer is lost; with `twice` the step
        comes again, as after a webhook."""
        due = [step for step in self.steps() if step.due_ms <= self.now_ms]
        if due:
            step = due[choice % len(due)]
            self.do(step, outcome, less, lost=lost)
            if twice:
                self.do(step, outcome, less, lost=False)

    @rule()
    def work_off(self) -> None:
        """All goes well for a while."""
        for _ in range(5):
            self.work(0, "authorised", 0, lost=False, twice=False)

    @rule(yes=st.booleans())
    def the_bank_decides(self, yes: bool) -> None:
        self.decide("pending", yes=yes)

    @rule(yes=st.booleans())
    def the_customer_decides(self, yes: bool) -> None:
        self.decide("action", yes=yes)

    @rule(really=st.integers(0, 3))
    def somebody_takes_it_at_the_bank(self, really: int) -> None:
        for payment in self.whole().payments.values():
            account = self.bank.accounts.get(f"{ORDER_ID}:{payment.attempt}:authorise")
            if account is not None and not really:
                self.bank.take_by_hand(account)

    def decide(self, who: str, *, yes: bool) -> None:
        for payment in self.whole().payments.values():
            account = self.bank.accounts.get(f"{ORDER_ID}:{payment.attempt}:authorise")
            if account is not None and account.state == who:
                self.bank.decide(account, payment.amount, yes=yes)

    def do(self, step: Step, outcome: str, less: int, *, lost: bool) -> None:
        match step.kind:
            case "expire":
                self.finish(step, ending.expire)
            case "payment":
                self.do_payment(step, outcome, less, lost=lost)
            case "refund":
                self.do_refund(step, outcome, lost=lost)
            case _:
                raise AssertionError(step)

    def do_payment(self, step: Step, outcome: str, less: int, *, lost: bool) -> None:
        attempt = int(step.subject.partition("-")[2])
        payment = self.whole().payments[attempt]
        match payment.state:
            case "created":
                self.apply(lambda draft: paying.sent(draft, attempt))
                self.do_payment(step, outcome, less, lost=lost)
            case "authorising" | "unknown":
                account = self.bank.authorise(payment.request_key, payment.amount, outcome, less)
                if lost:
                    self.apply(lambda draft: paying.lost(draft, attempt))
                else:
                    self.told(step, payment, account)
            case "requires_action":
                self.told(step, payment, self.account(payment))
            case "capturing" if (
                outcome == "declined"
                and not self.account(payment).by_hand
                and payment.request_key not in self.account(payment).done
            ):
                if not lost:
                    self.finish(step, lambda draft: paying.capture_refused(draft, attempt))
            case "capturing":
                account = self.account(payment)
                charge = self.bank.capture(payment.request_key, account, payment.capture_amount)
                if charge is None and not lost:
                    now = self.bank.charge(account)
                    self.finish(step, lambda draft: paying.capture_refused(draft, attempt, now))
                elif charge is not None and not lost:
                    self.finish(step, lambda draft: paying.captured(draft, attempt, charge))
            case "voiding":
                account = self.account(payment)
                if not self.bank.void(account) and account.captured:
                    taken = self.bank.charge(account)
                    self.finish(step, lambda draft: paying.captured(draft, attempt, taken))
                elif not lost:
                    self.finish(step, lambda draft: paying.voided(draft, attempt))
            case _:
                self.finish(step, lambda draft: None)

    def told(self, step: Step, payment: Payment, account: Account) -> None:
        attempt = payment.attempt

        def decide(draft: Draft) -> None:
            match account.state:
                case "authorised":
                    paying.authorised(draft, attempt, self.bank.charge(account))
                case "declined":
                    paying.declined(draft, attempt, "insufficient_funds", "")
                case "action":
                    if payment.state != "requires_action":
                        paying.action_required(draft, attempt, account.id, "https://bank.example")
                    else:
                        paying.wait_for_customer(draft, attempt, step.due_ms)
                case state:
                    assert state == "pending"
                    draft.due("payment", step.subject, at_ms=draft.now_ms + 1)  # the step comes again

        self.finish(step, decide)

    def do_refund(self, step: Step, outcome: str, *, lost: bool) -> None:
        whole = self.whole()
        number = int(step.subject.partition("-")[2])
        asked = whole.refunds[number]
        if asked.state != "pending":
            self.finish(step, lambda draft: None)
            return
        account = self.account(whole.payments[asked.attempt])
        ends = {"declined": "failed", "pending": "pending"}.get(outcome, "succeeded")
        state = self.bank.refund(asked.request_key, account, asked.amount, ends)
        if lost or state == "pending":
            return
        if state == "succeeded":
            self.finish(step, lambda draft: paying.refund_succeeded(draft, number, "re"))
        else:
            self.finish(step, lambda draft: paying.refund_failed(draft, number, "refund_failed"))

    def apply(self, decide: Callable[[Draft], object]) -> None:
        """What the bank says is never refused: a `Problem` fails the test."""
        draft = Draft(self.whole(), self.now_ms)
        decide(draft)
        self.shelf.write(draft.operations())

    def finish(self, step: Step, decide: Callable[[Draft], object]) -> None:
        """As `StepRun.finish`: what it changes and the end of the step are one transaction."""
        draft = Draft(self.whole(), self.now_ms)
        decide(draft)
        operations = draft.operations()
        written = {one.key if isinstance(one, kvstore.Put) else one.start for one in operations
                   if isinstance(one, kvstore.Put | kvstore.Delete)}  # fmt: skip
        self.shelf.write([*operations, *([] if step.key in written else [kvstore.Delete(step.key)])])

    # --- answers that are late, of a payment that is elsewhere by now -------------------------------------------------

    @rule(attempt=st.integers(1, 3), number=st.integers(1, 4), what=st.integers(0, 6))
    def late(self, attempt: int, number: int, what: int) -> None:
        """A step is fenced, so this happens to no worker; a rule refuses it all the same."""
        whole = self.whole()
        payment, refund = whole.payments.get(attempt), whole.refunds.get(number)
        charge = self.bank.charge(Account("ch-x", "authorised", 9, 9))
        answer, expected = [
            (lambda draft: paying.sent(draft, attempt), {"created"}),
            (lambda draft: paying.action_required(draft, attempt, "ch-x", "u"), {"authorising", "unknown"}),
            (lambda draft: paying.authorised(draft, attempt, charge), {"authorising", "unknown", "requires_action"}),
            (lambda draft: paying.declined(draft, attempt, "c", ""), {"authorising", "unknown", "requires_action"}),
            (lambda draft: paying.captured(draft, attempt, charge), {"capturing", "voiding"}),
            (lambda draft: paying.voided(draft, attempt), {"voiding"}),
            (lambda draft: paying.refund_succeeded(draft, number, "re"), {"pending"}),
        ][what]
        subject = refund if what == 6 else payment
        if subject is None or subject.state not in expected:
            assert not self.command(answer)

    # --- what always holds --------------------------------------------------------------------------------------------

    @precondition(lambda self: self.shelf.records)
    @invariant()
    def the_auditor_finds_nothing(self) -> None:
        findings = Findings()
        ORDER_CHECKS.run(self.case(), findings)
        for stock in self.stocks(self.case()):
            PRODUCT_CHECKS.run(stock, findings)
        assert not findings.kept

    @precondition(lambda self: self.shelf.records)
    @invariant()
    def the_bank_says_the_same(self) -> None:
        whole = self.whole()
        total = whole.order.total
        assert sum(account.captured for account in self.bank.accounts.values()) <= total
        assert len([one for one in self.bank.accounts.values() if one.holds or one.captured]) <= 1, "charged twice"
        for payment in whole.payments.values():
            account = self.bank.accounts.get(f"{ORDER_ID}:{payment.attempt}:authorise")
            if account is None:
                assert payment.state in ("created", "authorising", "unknown", "failed")
                assert payment.authorised == 0
                continue
            if account.by_hand:
                assert payment.captured in (0, account.captured)
            elif payment.state == "capturing":
                assert account.captured in (payment.captured, payment.captured + payment.capture_amount)
            else:
                assert account.captured == payment.captured
            if payment.state == "failed":
                assert account.state == "declined"
            if payment.state == "voided":
                assert account.state in ("voided", "declined")

    def case(self) -> Case:
        whole = self.whole()
        order = whole.order
        states = [record.key for record in self.shelf.prefixed(b"order-state/")]
        assert len(states) == 1
        attention = self.shelf.records.get(attention_place(order))
        return Case(
            key=b"order/12",
            order=order,
            payments=tuple(whole.payments.values()),
            refunds=tuple(whole.refunds.values()),
            shipments=tuple(whole.shipments.values()),
            returns=tuple(whole.returns.values()),
            events=tuple(decode_event(record.value) for record in self.shelf.prefixed(b"order-event/12/")),
            # Whoever is erased has the step that follows from it.
            work=Work(
                frozenset([f"{FORGET_CUSTOMER}/7", *(f"{step.kind}/{step.subject}" for step in self.steps())]),
                frozenset(),
            ),
            in_state_index=states == [state_place(order)],
            in_user_index=True,
            attention=attention.value.decode() if attention is not None else None,
            cart=None,
            has_address=whole.has_address,
        )

    def stocks(self, case: Case) -> list[ProductStock]:
        promised = Promised()
        promised.add(case)
        stocks = []
        for line in case.order.lines:
            numbers = [self.shelf.number(f"stock/{line.sku}/{what}".encode()) for what in
                       ("on_hand", "reserved", "allocated")]  # fmt: skip
            stocks.append(
                ProductStock(
                    line.sku, True, *numbers, STOCK, promised.reserved[line.sku], promised.allocated[line.sku],
                    promised.shipped[line.sku], promised.restocked[line.sku],
                )
            )  # fmt: skip
        return stocks

    # --- and in the end -----------------------------------------------------------------------------------------------

    def let_it_end(self) -> None:
        """The bank answers, customers are gone, time passes, workers work: then nothing is under way any more."""
        for _ in range(STEPS_MAX):
            self.the_bank_decides(False)
            due = self.steps()
            if not due:
                break
            self.now_ms = max(self.now_ms, due[0].due_ms)
            self.do(due[0], "authorised", 0, lost=False)
            self.the_auditor_finds_nothing()
            self.the_bank_says_the_same()
        assert not self.steps(), f"after {STEPS_MAX} steps there are others: {self.steps()}"
        whole = self.whole()
        order = whole.order
        assert order.refunds_pending == 0
        assert order.state is not OrderState.PENDING_PAYMENT
        failed = [refund for refund in whole.refunds.values() if refund.state == "failed"]
        if order.state is OrderState.CANCELLING:
            assert failed, "it is being cancelled, and nothing goes on"
            assert order.captured > order.refunded
        assert all(
            payment.state in ("authorised", "captured", "partially_captured", "voided", "failed")
            for payment in whole.payments.values()
        )
        if order.state is OrderState.COMPLETED:
            assert not any(one.holds for one in self.bank.accounts.values()), "money is held that nobody will take"
        if order.state in (OrderState.CANCELLED, OrderState.EXPIRED):
            assert not any(one.holds for one in self.bank.accounts.values())
            left = sum(one.captured - one.refunded for one in self.bank.accounts.values())
            assert left == sum(one.amount for one in whole.refunds.values() if one.state == "settled_outside")
            for line in order.lines:
                assert self.shelf.number(f"stock/{line.sku}/on_hand".encode()) == STOCK
