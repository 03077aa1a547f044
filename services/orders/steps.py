"""What workers do for orders: talk to the payment provider, and let orders expire. One handler for each kind of step.

The rules that callers of a provider keep stand in `services/payments/provider.py`. Here they come down to this:
- a request's key and content are in the payment's record before the request goes out, and never change after;
- no usable answer is no answer: ask what became of the key; if the provider has none, send the same request again;
- a request that the provider refuses did nothing.

At most one worker is at one payment at a time, under its claim. Others may change the order meanwhile (its customer
cancels it): then the payment is not in the state any more in which it was acted upon, nothing is written, and the step
comes again at once.
"""

from __future__ import annotations

from collections.abc import Awaitable
from functools import partial
from typing import Final

import structlog

import kvstore
from services.orders import ending, paying
from services.orders.book import OrderBook
from services.orders.draft import EXPIRY_STEP, PAYMENT_STEP, REFUND_STEP, Draft
from services.orders.forgetting import forget_customer
from services.orders.records import Payment
from services.orders.records import Refund as RefundRecord
from services.orders.states import PaymentState, RefundState
from services.payments.provider import (
    Authorise,
    Capture,
    Charge,
    Declined,
    Operation,
    Pending,
    Provider,
    ProviderRefused,
    ProviderUnknown,
    Refund,
    RequiresAction,
    Result,
    Succeeded,
    Void,
    request_key,
)
from services.web.ids import now_ms, order_number
from services.web.tracing import traceparent
from services.work.kinds import FORGET_CUSTOMER
from services.work.steps import UNREADABLE, Again, Park, Step, StepRun
from services.work.worker import STORE_REFUSED, Handler

# Reason codes of steps that come again, and of those that are parked: docs/services.md lists them.
PROVIDER_UNKNOWN: Final = "provider_unknown"
PROVIDER_BUSY: Final = "provider_busy"
PROVIDER_PENDING: Final = "provider_pending"
PAYMENT_MOVED: Final = "payment_moved"
VOID_REFUSED: Final = "void_refused"
PROVIDER_REFUSED: Final = "provider_refused"  # of a payment or refund that failed

# Why a step may be parked, and what that means to staff. `internal`, an error of ours, is not among them.
PARK_REASONS: Final = {
    PROVIDER_UNKNOWN: "The provider gave no usable answer for hours. Retry when it is back.",
    PROVIDER_BUSY: "The provider took no request of ours for hours: it is too busy, or does not accept our API key;"
    " the worker's log has its word. Retry when it does.",
    PROVIDER_PENDING: "The provider has not known for hours how it ends. Ask the provider, then retry.",
    PAYMENT_MOVED: "The payment changed with each attempt. Retry.",
    VOID_REFUSED: "The provider does not give up an authorisation. Ask the provider, then retry.",
    "contended": "Others kept changing the order. Retry.",
    "mailer_failed": "The mailer takes no mail. Retry when it does.",
    STORE_REFUSED: "The store takes no such change; the worker's log says why. Mend what it meets, then retry.",
    UNREADABLE: "This version cannot read the step: a newer one wrote it, or it is damaged. Retry when all are as new.",
    "unknown_kind": "No worker knows this kind of step, perhaps since all are of an older version. Retry after that.",
}

log = structlog.get_logger("services.orders")


class OrderSteps:
    """One per worker process."""

    def __init__(self, store: kvstore.Client, provider: Provider) -> None:
        self._book = OrderBook(store)
        self._provider = provider
        self.handlers: Final[dict[str, Handler]] = {
            PAYMENT_STEP: self.do_payment,
            REFUND_STEP: self.do_refund,
            EXPIRY_STEP: self.do_expiry,
            FORGET_CUSTOMER: partial(forget_customer, store, self._book),
        }

    async def also_parked(self, step: Step, code: str) -> tuple[list[kvstore.Compare], list[kvstore.Operation]]:
        """An order of which a step is given up needs somebody to look at it."""
        if step.kind not in (PAYMENT_STEP, REFUND_STEP, EXPIRY_STEP):
            return [], []
        whole = await self._book.read(int(step.subject.partition("-")[0]))
        if whole is None:
            return [], []
        draft = Draft(whole, now_ms())
        draft.want_attention(code)
        return [draft.unchanged], draft.operations()

    async def do_expiry(self, run: StepRun) -> None:
        await self._book.finish(run, int(run.step.subject), ending.expire)

    # --- payments -----------------------------------------------------------------------------------------------------

    async def do_payment(self, run: StepRun) -> None:
        """Whatever the payment's state says is next; nothing, if it says nothing."""
        order_id, attempt = _subject(run)
        whole = await self._book.read(order_id)
        payment = whole.payments.get(attempt) if whole is not None else None
        if payment is None:  # a webhook about what is not ours
            log.warning("no such payment", order_id=order_id, attempt=attempt)
            await run.finish()
            return
        match payment.state:
            case PaymentState.CREATED:
                await self._send(run, payment)
            case PaymentState.AUTHORISING | PaymentState.UNKNOWN:
                await self._ask(run, payment)
            case PaymentState.REQUIRES_ACTION:
                await self._authorised(run, payment, await _sure(self._provider.find(payment.request_key)))
            case PaymentState.CAPTURING:
                await self._capture(run, payment)
            case PaymentState.VOIDING:
                await self._void(run, payment)
            case _:
                await run.finish()

    async def _send(self, run: StepRun, payment: Payment) -> None:
        """For the first time, so far as is known: the mark comes before the request."""

        def mark(draft: Draft) -> None:
            _still(draft, payment)
            paying.sent(draft, payment.attempt)

        await self._book.apply(payment.order_id, mark)
        whole = await self._book.read(payment.order_id)
        assert whole is not None  # orders are never deleted
        payment = whole.payments[payment.attempt]
        if payment.state is not PaymentState.AUTHORISING:
            raise Again(PAYMENT_MOVED, 0.0)
        await self._authorise(run, payment)

    async def _ask(self, run: StepRun, payment: Payment) -> None:
        """It may have been sent before: what became of it? If nothing, it goes out again."""
        result = await self._found(payment)
        if result is None:
            await self._authorise(run, payment)
        else:
            await self._authorised(run, payment, result)

    async def _found(self, payment: Payment) -> Result | None:
        try:
            return await self._provider.find(payment.request_key, traceparent=traceparent() or None)
        except ProviderUnknown as error:
            await self._lost(payment)
            raise Again(PROVIDER_UNKNOWN) from error

    async def _authorise(self, run: StepRun, payment: Payment) -> None:
        request = Authorise(
            key=payment.request_key,
            amount=payment.amount,
            currency=payment.currency,
            token=payment.token,
            reference=f"Order {order_number(payment.order_id)}",
            return_url=payment.return_url,
        )
        try:
            result = await self._provider.authorise(request, traceparent=traceparent() or None)
        except ProviderUnknown as error:
            await self._lost(payment)
            raise Again(PROVIDER_UNKNOWN) from error
        except ProviderRefused as refused:
            _again_if_retryable(refused)
            log.error("authorisation refused", key=payment.request_key, code=refused.code, detail=refused.detail)
            result = None
        await self._authorised(run, payment, result)

    async def _lost(self, payment: Payment) -> None:
        if payment.state is PaymentState.AUTHORISING:
            await self._book.apply(payment.order_id, lambda draft: paying.lost(draft, payment.attempt))

    async def _authorised(self, run: StepRun, payment: Payment, result: Result | None) -> None:
        """Write down what the provider says; None: it refused the request."""
        order_id, attempt = payment.order_id, payment.attempt

        def decide(draft: Draft) -> None:
            _still(draft, payment)
            match result:
                case Succeeded():
                    paying.authorised(draft, attempt, result.charge)
                case Declined():
                    paying.declined(draft, attempt, result.code, result.detail)
                case RequiresAction():
                    if payment.state is not PaymentState.REQUIRES_ACTION:
                        paying.action_required(draft, attempt, result.charge_id, result.url)
                    else:
                        paying.wait_for_customer(draft, attempt, run.step.due_ms)
                case Pending():
                    raise Again(PROVIDER_PENDING)
                case None:
                    paying.declined(draft, attempt, PROVIDER_REFUSED, "The provider refused the request")

        await self._book.finish(run, order_id, decide)

    async def _capture(self, run: StepRun, payment: Payment) -> None:
        request = Capture(
            key=payment.request_key, amount=payment.capture_amount, currency=payment.currency, charge=payment.charge
        )
        result: Result | None = None
        try:
            result = await self._provider.capture(request, traceparent=traceparent() or None)
        except ProviderUnknown as error:
            raise Again(PROVIDER_UNKNOWN) from error
        except ProviderRefused as refused:
            _again_if_retryable(refused)
            log.error("capture refused", key=payment.request_key, code=refused.code, detail=refused.detail)
        now = await self._charge_now(payment) if result is None else None

        def decide(draft: Draft) -> None:
            _still(draft, payment)
            match result:
                case Succeeded():
                    paying.captured(draft, payment.attempt, result.charge)
                case None | Declined():
                    paying.capture_refused(draft, payment.attempt, now)
                case _:
                    raise Again(PROVIDER_PENDING)

        await self._book.finish(run, payment.order_id, decide)

    async def _void(self, run: StepRun, payment: Payment) -> None:
        request = Void(key=payment.request_key, charge=payment.charge)
        taken: Charge | None = None
        try:
            result = await self._provider.void(request, traceparent=traceparent() or None)
        except ProviderUnknown as error:
            raise Again(PROVIDER_UNKNOWN) from error
        except ProviderRefused as refused:
            _again_if_retryable(refused)
            # Perhaps there is nothing to give up: the customer said no meanwhile, or somebody else took it.
            found = await self._now(payment)
            if isinstance(found, Succeeded) and found.charge.captured:
                taken = found.charge
            elif not (isinstance(found, Declined) or (isinstance(found, Succeeded) and found.charge.is_voided)):
                raise Park(VOID_REFUSED, f"{refused.detail} [{refused.code}]") from refused
        else:
            if isinstance(result, Pending | RequiresAction):
                raise Again(PROVIDER_PENDING)

        def decide(draft: Draft) -> None:
            _still(draft, payment)
            if taken is not None:
                paying.captured(draft, payment.attempt, taken)
            else:
                paying.voided(draft, payment.attempt)

        await self._book.finish(run, payment.order_id, decide)

    async def _now(self, payment: Payment) -> Result:
        """What has become of it by now, whoever did it."""
        key = request_key(payment.order_id, payment.attempt, Operation.AUTHORISE)
        return await _sure(self._provider.find(key, traceparent=traceparent() or None))

    async def _charge_now(self, payment: Payment) -> Charge | None:
        found = await self._now(payment)
        return found.charge if isinstance(found, Succeeded) else None

    # --- refunds ------------------------------------------------------------------------------------------------------

    async def do_refund(self, run: StepRun) -> None:
        order_id, number = _subject(run)
        whole = await self._book.read(order_id)
        asked = whole.refunds.get(number) if whole is not None else None
        if whole is None or asked is None or asked.state is not RefundState.PENDING:
            await run.finish()
            return
        result = await self._refund(asked, whole.payments[asked.attempt].charge)

        def decide(draft: Draft) -> None:
            match result:
                case Succeeded():
                    paying.refund_succeeded(draft, number, result.refund)
                case Declined():
                    paying.refund_failed(draft, number, result.code)
                case None:
                    paying.refund_failed(draft, number, PROVIDER_REFUSED)
                case _:
                    raise Again(PROVIDER_PENDING)

        await self._book.finish(run, order_id, decide)

    async def _refund(self, asked: RefundRecord, charge: str) -> Result | None:
        """None: the provider refused the request. One that is pending is asked for again by the same request."""
        request = Refund(key=asked.request_key, amount=asked.amount, currency=asked.currency, charge=charge)
        try:
            result = await self._provider.refund(request, traceparent=traceparent() or None)
            if isinstance(result, Pending):  # as it was answered first; by now it may have ended
                result = await self._provider.find(asked.request_key, traceparent=traceparent() or None) or result
        except ProviderUnknown as error:
            raise Again(PROVIDER_UNKNOWN) from error
        except ProviderRefused as refused:
            _again_if_retryable(refused)
            log.error("refund refused", key=asked.request_key, code=refused.code, detail=refused.detail)
            return None
        return result


def _again_if_retryable(refused: ProviderRefused) -> None:
    """Raises `Again`."""
    if refused.is_retryable:
        log.warning("provider took no request", code=refused.code, detail=refused.detail)
        raise Again(PROVIDER_BUSY) from refused


async def _sure(finding: Awaitable[Result | None]) -> Result:
    """Of a request that the provider has answered before."""
    try:
        result = await finding
    except ProviderUnknown as error:
        raise Again(PROVIDER_UNKNOWN) from error
    if result is None:
        raise Again(PROVIDER_UNKNOWN)
    return result


def _still(draft: Draft, payment: Payment) -> None:
    """Raises `Again` if the payment is not in the state any more in which it was acted upon."""
    if draft.payments[payment.attempt].state is not payment.state:
        raise Again(PAYMENT_MOVED, 0.0)


def _subject(run: StepRun) -> tuple[int, int]:
    order_id, _, number = run.step.subject.partition("-")
    return int(order_id), int(number)
