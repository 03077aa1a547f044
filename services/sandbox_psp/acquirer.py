"""What the sandbox does with a request: decides it by the rules, commits it to the books, and tells by webhook.

No double charge by construction
1. A request is known by its Idempotency-Key. Looking for the key's operation and committing a new one happen without
   giving way to another request, so two copies cannot both find nothing.
2. The operation, the charge and the event are one line of the journal: after a kill all of them are there, or none.
3. Nothing is answered before that line is on the disk; a copy that comes meanwhile waits for it, too.
4. The answer is kept with the operation for ever, refusals by the state of the books included: a late copy of a request
   that was refused finds its refusal and does nothing, whatever the state is by then.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import Callable

from msgspec import Raw, Struct, msgpack

from services.sandbox_psp import rules
from services.sandbox_psp.books import Books
from services.sandbox_psp.failures import Failures, plan_of
from services.sandbox_psp.records import (
    Change,
    Charge,
    ChargeStatus,
    Event,
    Operation,
    OperationBody,
    OperationKind,
    Refund,
    RefundStatus,
    charge_body,
    encode,
)
from services.sandbox_psp.rules import Refusal
from services.sandbox_psp.webhooks import Webhooks

_SILENT = (ChargeStatus.REQUIRES_ACTION, ChargeStatus.PENDING)  # the answer has said it; a webhook tells how it ends


class Outcome(Struct, frozen=True):
    """What an operation leads to."""

    charge: Charge
    refund: Refund | None = None


Decide = Callable[[], Outcome]


class Acquirer:
    """Acts. `webhooks` None is a merchant who wants none."""

    def __init__(self, books: Books, failures: Failures, webhooks: Webhooks | None) -> None:
        self._books = books
        self._failures = failures
        self._webhooks = webhooks
        self._timers: set[asyncio.TimerHandle] = set()

    def act(
        self, key: str, kind: OperationKind, charge_id: str, body: Struct, actions_url: str, decide: Decide
    ) -> Operation:
        """The operation with this key: the one that was, or now `decide`'s. Raises `Refusal` where nothing is kept: the
        key is of another request, there is no such charge, the books are full."""
        fingerprint = hashlib.blake2b(msgpack.encode([kind, charge_id, body]), digest_size=16).hexdigest()
        done = self._books.answered(key, fingerprint)
        if done is not None:
            return done
        try:
            outcome = decide()
        except Refusal as refusal:
            if refusal.http_status == 404:
                raise
            operation = Operation(key, fingerprint, kind, refusal.http_status, Raw(refusal.body))
            self._books.commit(Change(operation=operation))
            return operation
        charge, refund = outcome.charge, outcome.refund
        answer = OperationBody(key, kind, 201, charge_body(charge, actions_url), refund)
        operation = Operation(key, fingerprint, kind, 201, Raw(encode(answer)), charge.id, refund.id if refund else "")
        event_type = _event_type(charge, refund)
        self._commit(Change(charge, refund, operation, self._event(event_type, key, charge, refund)))
        self._settle_later(charge, refund)
        return operation

    # --- the four decisions -------------------------------------------------------------------------------------------

    def authorise(self, key: str, amount: int, currency: str, token: str, reference: str, return_url: str) -> Outcome:
        plan = plan_of(token)
        first, code = plan.first, plan.decline
        if first is ChargeStatus.AUTHORISED and self._failures.declines(key):
            first, code = ChargeStatus.DECLINED, "declined"
        charge = Charge(
            id=self._books.next_charge_id(),
            key=key,
            status=ChargeStatus.PENDING,
            amount=amount,
            currency=currency,
            token=token,
            reference=reference,
            created_ms=_now_ms(),
            # Whoever knows the address decides for the customer, so it cannot be guessed.
            action=secrets.token_urlsafe(24) if first is ChargeStatus.REQUIRES_ACTION else "",
            return_url=return_url,
        )
        return Outcome(rules.begin(charge, first, code))

    def capture(self, charge_id: str, amount: int, currency: str) -> Outcome:
        return Outcome(rules.capture(self._books.charge(charge_id), amount, currency))

    def void(self, charge_id: str) -> Outcome:
        return Outcome(rules.void(self._books.charge(charge_id)))

    def refund(self, key: str, charge_id: str, amount: int, currency: str) -> Outcome:
        charge = self._books.charge(charge_id)
        status = RefundStatus.PENDING if plan_of(charge.token).refund_pends else RefundStatus.SUCCEEDED
        refund = Refund(self._books.next_refund_id(), key, charge_id, amount, currency, status, _now_ms())
        return Outcome(rules.refund(charge, refund), refund)

    # --- what happens without the merchant ----------------------------------------------------------------------------

    def decide_action(self, action: str, approves: bool) -> Charge:
        """The customer says yes or no; only the first time counts. Raises `Refusal` 404."""
        charge = self._books.charge_of_action(action)
        if charge.status is not ChargeStatus.REQUIRES_ACTION:
            return charge
        charge = rules.decide(charge, "" if approves else "action_refused")
        self._commit(Change(charge, event=self._event(f"charge.{charge.status}", charge.key, charge)))
        return charge

    def settle(self, record_id: str) -> bool:
        """End the pending charge or refund with this id, if it is still pending."""
        refund = self._books.refunds.get(record_id)
        if refund is not None and refund.status is RefundStatus.PENDING:
            before = self._books.charge(refund.charge)
            charge, refund = rules.settle_refund(before, refund, plan_of(before.token).refund_fails)
            event = self._event(f"refund.{refund.status}", refund.key, charge, refund)
            self._commit(Change(charge, refund, event=event))
            return True
        pending = self._books.charges.get(record_id)
        if pending is not None and pending.status is ChargeStatus.PENDING:
            charge = rules.decide(pending, plan_of(pending.token).decline)
            self._commit(Change(charge, event=self._event(f"charge.{charge.status}", charge.key, charge)))
            return True
        return False

    def settle_all(self) -> int:
        """End all that is pending; how many they were."""
        return sum(self.settle(one) for one in [*self._books.charges, *self._books.refunds])

    def start(self) -> None:
        """Go on with what an earlier process left."""
        for charge in self._books.charges.values():
            self._settle_later(charge, None)
        for refund in self._books.refunds.values():
            self._settle_later(self._books.charges[refund.charge], refund)
        if self._webhooks is not None:
            self._webhooks.start()

    def close(self) -> None:
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()

    def _settle_later(self, charge: Charge, refund: Refund | None) -> None:
        if refund is not None and refund.status is RefundStatus.PENDING:
            record_id = refund.id
        elif refund is None and charge.status is ChargeStatus.PENDING:
            record_id = charge.id
        else:
            return

        def settle() -> None:
            self._timers.discard(timer)
            self.settle(record_id)

        timer = asyncio.get_running_loop().call_later(self._failures.settings.settle_ms / 1000, settle)
        self._timers.add(timer)

    def _commit(self, change: Change) -> None:
        self._books.commit(change)
        if change.event is not None and self._webhooks is not None:
            self._webhooks.deliver(change.event)

    def _event(self, event_type: str, key: str, charge: Charge, refund: Refund | None = None) -> Event | None:
        if self._webhooks is None or not event_type:
            return None
        refund_id = refund.id if refund is not None else ""
        return Event(self._books.next_event_id(), event_type, key, charge.id, _now_ms(), refund_id)


def _event_type(charge: Charge, refund: Refund | None) -> str:
    """Of an operation's own outcome; empty where nothing is final yet."""
    if refund is not None:
        return "" if refund.status is RefundStatus.PENDING else f"refund.{refund.status}"
    return "" if charge.status in _SILENT else f"charge.{charge.status}"


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
