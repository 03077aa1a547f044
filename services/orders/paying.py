"""Rules of payments and refunds: what each command, and each answer of the provider, changes about an order.

Rules of `draft.py` hold. Money: refunded ≤ captured ≤ authorised, each of one payment and, summed, of the order; an
order has one live payment at most, and so is never paid twice. What comes of a payment that is not wanted any more
(the order was cancelled while it was on its way) is given back: a void where it is held, a refund where it was taken.

A request's key is in the store before the provider can have heard of it: it is written here, and the step that is due
with it is what calls the provider (`steps.py`).
"""

from __future__ import annotations

from typing import Final

import msgspec

from services.orders.draft import PAYMENT_STEP, REFUND_STEP, Draft, payment_subject, settle
from services.orders.records import CaptureMode, Order, Payment, Refund, StockHeld
from services.orders.states import (
    IN_FLIGHT,
    PAYMENT,
    REFUND,
    OrderEvent,
    OrderState,
    PaymentEvent,
    PaymentState,
    RefundEvent,
)
from services.payments.provider import Charge, DeclineCode, Operation, request_key
from services.web.problems import Problem, field_problem

# Twenty declined cards are no customer who looks for the right one; parts of an order are read with it, all of them.
PAYMENTS_MAX: Final = 20
REFUNDS_MAX: Final = 50
CAPTURES_MAX: Final = 20
# The provider says by webhook when the customer has been there; this is for webhooks that are lost.
ACTION_POLL_MS: Final = 15_000

REASON_CANCELLED: Final = "order_cancelled"
LATE_CAPTURE: Final = "late_capture"
REFUND_FAILED: Final = "refund_failed"
CAPTURE_REFUSED: Final = "capture_refused"


# --- what customers and staff ask for ---------------------------------------------------------------------------------


def pay(draft: Draft, token: str, capture: CaptureMode, return_url: str = "") -> Payment:
    """Begin an attempt to pay the whole. Raises `Problem`: `order_state`, `payment_in_progress`,
    `too_many_payments`."""
    order = draft.order
    if order.state is not OrderState.PENDING_PAYMENT:
        raise Problem("order_state", f"An order that is {order.state} is not to be paid")
    if draft.now_ms >= order.expires_ms:
        raise Problem("order_state", "The time to pay this order is over")
    if order.live_payment:
        raise Problem("payment_in_progress", f"Payment {order.live_payment} is not at its end yet")
    if order.payments >= PAYMENTS_MAX:
        raise Problem("too_many_payments", f"{PAYMENTS_MAX} attempts to pay this order have failed")
    attempt = order.payments + 1
    draft.set(payments=attempt)
    return _send(
        draft,
        Payment(
            order_id=order.id,
            attempt=attempt,
            state=PAYMENT.next(None, PaymentEvent.CREATE),
            amount=order.total,
            currency=order.currency,
            token=token,
            capture=capture,
            request_key=request_key(order.id, attempt, Operation.AUTHORISE),
            created_ms=draft.now_ms,
            updated_ms=draft.now_ms,
            return_url=return_url,
        ),
    )


def capture(draft: Draft, attempt: int, amount: int | None = None) -> Payment:
    """Take what is authorised and still owed, or part of it. Raises `Problem`: `order_state`, `not_found`,
    `amount_too_large`."""
    order, payment = draft.order, payment_of(draft, attempt)
    state = PAYMENT.next(payment.state, PaymentEvent.CAPTURE)
    if order.state is not OrderState.CONFIRMED:
        raise Problem("order_state", f"Nothing is taken for an order that is {order.state}")
    rest = min(payment.authorised, order.owed) - payment.captured
    amount = rest if amount is None else amount
    if rest <= 0 or amount > rest or payment.captures >= CAPTURES_MAX:
        raise _too_large(f"{max(rest, 0)} {order.currency} may still be captured")
    number = payment.captures + 1
    key = request_key(order.id, attempt, Operation.CAPTURE, number)
    return _send(
        draft,
        msgspec.structs.replace(payment, state=state, captures=number, capture_amount=amount, request_key=key),
    )


def refund(draft: Draft, amount: int | None, reason: str, return_number: int = 0) -> Refund:
    """Give back what was taken, or part of it; of the newest payment that has so much. Raises `Problem`:
    `order_state`, `amount_too_large`, `too_many_refunds`."""
    if draft.order.refunds >= REFUNDS_MAX:
        raise Problem("too_many_refunds", f"{REFUNDS_MAX} refunds were made of this order")
    return _give_back(draft, amount, reason, return_number)


def _give_back(draft: Draft, amount: int | None, reason: str, return_number: int = 0) -> Refund:
    """Without a limit: what follows from an answer of the provider, or from a cancellation, cannot be refused. There is
    one for each capture at most, and one for the cancellation."""
    order = draft.order
    rests = {payment.attempt: payment.captured - payment.refunded for payment in draft.payments.values()}
    attempt = max((attempt for attempt, rest in rests.items() if rest >= (amount or 1)), default=0)
    if not attempt:
        if not order.captured:
            raise Problem("order_state", "Nothing was captured for this order")
        raise _too_large(f"At most {max(rests.values())} {order.currency} may be refunded")
    amount = rests[attempt] if amount is None else amount
    payment = draft.payments[attempt]
    number = order.refunds + 1
    draft.set(refunds=number, refunded=order.refunded + amount, refunds_pending=order.refunds_pending + amount)
    draft.set_payment(msgspec.structs.replace(payment, refunded=payment.refunded + amount))
    draft.due(REFUND_STEP, payment_subject(order.id, number))
    return draft.set_refund(
        Refund(
            order_id=order.id,
            number=number,
            attempt=attempt,
            state=REFUND.next(None, RefundEvent.ASK),
            amount=amount,
            currency=order.currency,
            reason=reason,
            request_key=request_key(order.id, attempt, Operation.REFUND, number),
            created_ms=draft.now_ms,
            updated_ms=draft.now_ms,
            return_number=return_number,
        )
    )


def overpaid(order: Order) -> int:
    """What was taken beyond what the goods cost that were not cancelled, whatever was given back of it."""
    return max(0, order.captured - order.owed)


def to_give_back(order: Order, overpaid_before: int) -> int:
    """What has to go back since an order was overpaid by so much before: the difference, and not what was given back
    for other reasons (goods that came back, a gift)."""
    return min(overpaid(order) - overpaid_before, order.captured - order.refunded)


def withdraw(draft: Draft, payment: Payment) -> None:
    """The payment is not wanted any more: end it, or have what comes of it given back. One that is under way is looked
    at anew, since its step may have been given up."""
    if payment.state is PaymentState.CREATED:
        state = PAYMENT.next(payment.state, PaymentEvent.WITHDRAW)
        draft.set_payment(msgspec.structs.replace(payment, state=state, failure="withdrawn"))
    elif payment.state in (PaymentState.REQUIRES_ACTION, PaymentState.AUTHORISED):
        state = PAYMENT.next(payment.state, PaymentEvent.VOID)
        key = request_key(payment.order_id, payment.attempt, Operation.VOID)
        _send(draft, msgspec.structs.replace(payment, state=state, request_key=key, is_unwanted=True))
    elif payment.state in IN_FLIGHT:
        _send(draft, msgspec.structs.replace(payment, is_unwanted=True))
    elif payment.captured > payment.refunded:
        _give_back(draft, payment.captured - payment.refunded, REASON_CANCELLED)


def release(draft: Draft) -> None:
    """Give up what is held for an order that costs nothing any more: the lines that did are cancelled."""
    payment = draft.live_payment
    if payment is not None and payment.state is PaymentState.AUTHORISED and draft.order.owed == 0:
        withdraw(draft, payment)


def settle_outside(draft: Draft, number: int, note: str) -> Refund:
    """What the customer's bank did not take back was given back by other means: by transfer, in cash. Raises `Problem`:
    `not_found`, `order_state`."""
    failed = refund_of(draft, number)
    state = REFUND.next(failed.state, RefundEvent.SETTLE_OUTSIDE)
    payment = draft.payments[failed.attempt]
    rest = payment.captured - payment.refunded
    if failed.amount > rest:
        raise Problem("order_state", f"Of its payment {rest} {failed.currency} are left: another refund gave it back")
    draft.set_payment(msgspec.structs.replace(payment, refunded=payment.refunded + failed.amount))
    draft.set(refunded=draft.order.refunded + failed.amount)
    settled = draft.set_refund(msgspec.structs.replace(failed, state=state, note=note))
    settle(draft)
    return settled


# --- what became of it ------------------------------------------------------------------------------------------------


def sent(draft: Draft, attempt: int) -> None:
    """The provider may have it from now on."""
    payment = payment_of(draft, attempt)
    draft.set_payment(msgspec.structs.replace(payment, state=PAYMENT.next(payment.state, PaymentEvent.SEND)))


def lost(draft: Draft, attempt: int) -> None:
    """The provider gave no usable answer to the authorisation."""
    payment = payment_of(draft, attempt)
    if payment.state is PaymentState.AUTHORISING:
        state = PAYMENT.next(payment.state, PaymentEvent.LOSE)
        draft.set_payment(msgspec.structs.replace(payment, state=state))


def action_required(draft: Draft, attempt: int, charge: str, url: str) -> None:
    payment = payment_of(draft, attempt)
    state = PAYMENT.next(payment.state, PaymentEvent.ASK)
    draft.set_payment(msgspec.structs.replace(payment, state=state, charge=charge, action_url=url))
    wait_for_customer(draft, attempt)


def wait_for_customer(draft: Draft, attempt: int, asked_ms: int = 0) -> None:
    """The customer has not decided yet, and may never come back: until the time to pay is over the provider is asked
    again from time to time. By one step, however often it is asked in between: `asked_ms` is when the one was due that
    asked now."""
    order, payment = draft.order, payment_of(draft, attempt)
    if payment.is_unwanted or draft.now_ms >= order.expires_ms:
        withdraw(draft, payment)
    elif payment.poll_ms <= max(draft.now_ms, asked_ms):
        poll_ms = draft.now_ms + ACTION_POLL_MS
        draft.set_payment(msgspec.structs.replace(payment, poll_ms=poll_ms))
        draft.due(PAYMENT_STEP, payment_subject(order.id, attempt), at_ms=poll_ms)


def authorised(draft: Draft, attempt: int, charge: Charge) -> None:
    """The amount is held: the order is confirmed; or it is not wanted any more, or too little, and is given up. What
    was given up or taken at the provider already, by somebody else, counts as that."""
    if charge.is_voided:
        declined(draft, attempt, DeclineCode.VOIDED, "given up at the provider", charge.id)
        return
    payment = payment_of(draft, attempt)
    state = PAYMENT.next(payment.state, PaymentEvent.AUTHORISE)
    payment = draft.set_payment(
        msgspec.structs.replace(payment, state=state, charge=charge.id, authorised=charge.authorised, action_url="")
    )
    order = draft.order
    draft.set(authorised=charge.authorised)
    is_wanted = not payment.is_unwanted and order.state is OrderState.PENDING_PAYMENT
    is_wanted = is_wanted and charge.authorised >= order.total
    if is_wanted:
        confirm(draft)
    if charge.captured:
        state = PAYMENT.next(payment.state, PaymentEvent.CAPTURE)
        draft.set_payment(msgspec.structs.replace(payment, state=state, capture_amount=charge.captured))
        captured(draft, attempt, charge)
    elif not is_wanted:
        withdraw(draft, payment)
    if is_wanted and payment.capture is CaptureMode.AUTOMATIC and draft.order.captured < order.total:
        capture(draft, attempt)


def confirm(draft: Draft) -> None:
    """It is paid, or there is nothing to pay."""
    draft.hold_stock_as(StockHeld.ALLOCATED)
    draft.advance(OrderEvent.PAY)


def declined(draft: Draft, attempt: int, code: str, detail: str, charge: str = "") -> None:
    payment = payment_of(draft, attempt)
    state = PAYMENT.next(payment.state, PaymentEvent.DECLINE)
    draft.set_payment(
        msgspec.structs.replace(
            payment, state=state, failure=code, detail=detail, action_url="", charge=charge or payment.charge
        )
    )
    settle(draft)


def captured(draft: Draft, attempt: int, charge: Charge) -> None:
    """The money is ours, whoever took it: what was to be given up may have been captured at the provider. Where the
    order has ended meanwhile, it goes back."""
    payment = payment_of(draft, attempt)
    is_all = charge.captured >= charge.authorised
    overpaid_before = overpaid(draft.order)
    state = PAYMENT.next(payment.state, PaymentEvent.TAKE_ALL if is_all else PaymentEvent.TAKE_PART)
    taken = draft.order.captured + charge.captured - payment.captured
    draft.set(authorised=charge.authorised, captured=taken)
    payment = draft.set_payment(
        msgspec.structs.replace(
            payment, state=state, authorised=charge.authorised, captured=charge.captured, action_url=""
        )
    )
    if draft.order.state not in (OrderState.CONFIRMED, OrderState.COMPLETED):
        if draft.order.state is not OrderState.CANCELLING:
            draft.want_attention(LATE_CAPTURE)
        withdraw(draft, payment)
    else:
        excess = to_give_back(draft.order, overpaid_before)
        if excess > 0:  # lines were cancelled while it was being taken
            _give_back(draft, excess, REASON_CANCELLED)
    settle(draft)


def capture_refused(draft: Draft, attempt: int, charge: Charge | None = None) -> None:
    """The provider does not give what it had authorised: staff have to look, and may try again. Where the order has
    ended meanwhile, nobody has to. `charge` is how it stands: it may be refused because somebody else took it."""
    payment = payment_of(draft, attempt)
    if charge is not None and charge.captured > payment.captured:
        captured(draft, attempt, charge)
        if draft.order.state is OrderState.CONFIRMED and draft.order.captured < draft.order.owed:
            draft.want_attention(CAPTURE_REFUSED)
        return
    state = PAYMENT.next(payment.state, PaymentEvent.REFUSE_REST if payment.captured else PaymentEvent.REFUSE)
    payment = draft.set_payment(msgspec.structs.replace(payment, state=state, capture_amount=0))
    order = draft.order
    if order.state not in (OrderState.CONFIRMED, OrderState.COMPLETED):
        withdraw(draft, payment)
    elif order.captured < order.owed:
        draft.want_attention(CAPTURE_REFUSED)
    else:
        release(draft)
    settle(draft)


def voided(draft: Draft, attempt: int) -> None:
    """Nothing is held any more."""
    payment = payment_of(draft, attempt)
    state = PAYMENT.next(payment.state, PaymentEvent.END)
    draft.set_payment(msgspec.structs.replace(payment, state=state, action_url=""))
    draft.set(authorised=0)
    settle(draft)


def refund_succeeded(draft: Draft, number: int, provider_id: str) -> None:
    pending = refund_of(draft, number)
    state = REFUND.next(pending.state, RefundEvent.SUCCEED)
    draft.set_refund(msgspec.structs.replace(pending, state=state, provider_id=provider_id))
    draft.set(refunds_pending=draft.order.refunds_pending - pending.amount)
    settle(draft)


def refund_failed(draft: Draft, number: int, code: str) -> None:
    """The customer's bank does not take it back: the money is still ours, and staff have to find another way."""
    pending = refund_of(draft, number)
    state = REFUND.next(pending.state, RefundEvent.FAIL)
    draft.set_refund(msgspec.structs.replace(pending, state=state, failure=code))
    payment = draft.payments[pending.attempt]
    draft.set_payment(msgspec.structs.replace(payment, refunded=payment.refunded - pending.amount))
    order = draft.order
    draft.set(refunded=order.refunded - pending.amount, refunds_pending=order.refunds_pending - pending.amount)
    draft.want_attention(REFUND_FAILED)
    settle(draft)


# --- finding ----------------------------------------------------------------------------------------------------------


def payment_of(draft: Draft, attempt: int) -> Payment:
    """Raises `Problem` `not_found`."""
    payment = draft.payments.get(attempt)
    if payment is None:
        raise Problem("not_found", "The order has no such payment")
    return payment


def refund_of(draft: Draft, number: int) -> Refund:
    """Raises `Problem` `not_found`."""
    found = draft.refunds.get(number)
    if found is None:
        raise Problem("not_found", "The order has no such refund")
    return found


def _send(draft: Draft, payment: Payment) -> Payment:
    draft.due(PAYMENT_STEP, payment_subject(payment.order_id, payment.attempt))
    return draft.set_payment(payment)


def _too_large(detail: str) -> Problem:
    return field_problem("/amount", "amount_too_large", detail, problem="amount_too_large")
