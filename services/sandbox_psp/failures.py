"""Failures on demand: which of them meets which request or webhook.

Two ways choose one. A payment token asks for it by name (`TOKENS`), at the first arrival of its operation alone, so
that asking again gets through. Or chance does, by a rate for each kind; it is drawn from the seed, the request's key
and how often that key has arrived, so the same keys meet the same failures in whatever order they come. Each failure
is counted when it is chosen.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from enum import StrEnum
from typing import Annotated, Final

from msgspec import Meta, Struct

from services.sandbox_psp.records import ChargeStatus, Event, OperationKind

# How often a key has arrived is remembered for the last so many keys: some 10 MB.
ARRIVALS_MAX: Final = 100_000


class Failure(StrEnum):
    # of a decision
    DECLINE = "decline"
    # of an answer: at most one for each request
    TIMEOUT_BEFORE = "timeout_before"  # no answer, and it is not acted on
    TIMEOUT_AFTER = "timeout_after"  # acted on, no answer
    ACTS_LATE = "acts_late"  # no answer, and acted on `late_ms` after it came: a find before that finds nothing
    ERROR_BEFORE = "error_before"  # 500, not acted on
    ERROR_AFTER = "error_after"  # acted on, 500
    RESET_BEFORE = "reset_before"  # connection reset, not acted on
    RESET_AFTER = "reset_after"  # acted on, connection reset
    SLOW = "slow"  # acted on, and answered `slow_ms` later
    # of a webhook: at most one for each event
    WEBHOOK_DUPLICATE = "webhook_duplicate"
    WEBHOOK_LATE = "webhook_late"  # `late_ms` later
    WEBHOOK_REORDERED = "webhook_reordered"  # after the next one, or `late_ms` later if there is none
    WEBHOOK_LOST = "webhook_lost"


OF_ANSWERS: Final[tuple[Failure, ...]] = tuple(
    one for one in Failure if one is not Failure.DECLINE and not one.startswith("webhook")
)
OF_WEBHOOKS: Final[tuple[Failure, ...]] = tuple(one for one in Failure if one.startswith("webhook"))

_Milliseconds = Annotated[int, Meta(ge=0, le=600_000)]


class Settings(Struct, frozen=True, forbid_unknown_fields=True):
    """`rates` are chances from 0 to 1. A connection without an answer is held for `hold_ms`, which is longer than a
    client should wait; what is pending is settled after `settle_ms`."""

    seed: int = 0
    rates: dict[Failure, Annotated[float, Meta(ge=0, le=1)]] = {}
    slow_ms: _Milliseconds = 2_000
    hold_ms: _Milliseconds = 60_000
    late_ms: _Milliseconds = 5_000
    settle_ms: _Milliseconds = 1_000

    def __post_init__(self) -> None:
        for kinds in (OF_ANSWERS, OF_WEBHOOKS):
            if sum(self.rates.get(one, 0.0) for one in kinds) > 1.0 + 1e-9:
                raise ValueError("one request, or one webhook, has one failure: those rates may add up to 1")


class Plan(Struct, frozen=True):
    """What a token asks for. `decline` is the code with which the charge is declined, at once or after it was
    pending."""

    first: ChargeStatus = ChargeStatus.AUTHORISED
    decline: str = ""
    refund_pends: bool = False
    refund_fails: bool = False
    failure: Failure | None = None
    at: OperationKind = OperationKind.AUTHORISE


def _tokens() -> dict[str, Plan]:
    declined, pending = ChargeStatus.DECLINED, ChargeStatus.PENDING
    tokens = {
        "tok_ok": Plan(),
        "tok_requires_action": Plan(first=ChargeStatus.REQUIRES_ACTION),
        "tok_pending": Plan(first=pending),
        "tok_pending_declined": Plan(first=pending, decline="declined"),
        "tok_refund_pending": Plan(refund_pends=True),
        "tok_refund_fails": Plan(refund_pends=True, refund_fails=True),
    }
    for code in ("declined", "insufficient_funds", "stolen_card", "expired_card"):
        tokens[f"tok_{code}"] = Plan(first=declined, decline=code)
    for failure in OF_ANSWERS:
        tokens[f"tok_{failure}"] = Plan(failure=failure)
        for kind in (OperationKind.CAPTURE, OperationKind.VOID, OperationKind.REFUND):
            tokens[f"tok_{kind}_{failure}"] = Plan(failure=failure, at=kind)
    for failure in OF_WEBHOOKS:
        tokens[f"tok_{failure}"] = Plan(failure=failure)
    return tokens


TOKENS: Final = _tokens()
NO_TOKEN: Final = Plan(first=ChargeStatus.DECLINED, decline="invalid_token")

# Card numbers of nobody, for a checkout page that turns a card into a token as it would with a real provider.
CARDS: Final = {
    "4242424242424242": "tok_ok",
    "4000000000000002": "tok_declined",
    "4000000000009995": "tok_insufficient_funds",
    "4000000000009979": "tok_stolen_card",
    "4000000000000069": "tok_expired_card",
    "4000000000003220": "tok_requires_action",
    "4000000000000077": "tok_pending",
}


def plan_of(token: str) -> Plan:
    return TOKENS.get(token, NO_TOKEN)


class Failures:
    """Chooses, and counts."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.counts: Counter[Failure] = Counter()
        self._arrivals: dict[str, int] = {}

    def of_answer(self, key: str, kind: OperationKind | None, plan: Plan) -> Failure | None:
        """The failure of one arrival of the request with this key; `kind` is None for a look-up."""
        arrival = self._arrived(key if kind is not None else f"find {key}")
        if arrival == 1 and kind is plan.at and plan.failure in OF_ANSWERS:
            return self._counted(plan.failure)
        return self._counted(self._drawn(OF_ANSWERS, f"{kind} {key} {arrival}"))

    def declines(self, key: str) -> bool:
        """Whether chance declines the payment with this key. Call it once, when that is decided."""
        return self._counted(self._drawn((Failure.DECLINE,), key)) is not None

    def of_event(self, event: Event, plan: Plan) -> Failure | None:
        if plan.failure in OF_WEBHOOKS:
            return self._counted(plan.failure)
        return self._counted(self._drawn(OF_WEBHOOKS, f"{event.type} {event.key}"))

    def _arrived(self, key: str) -> int:
        arrival = self._arrivals.pop(key, 0) + 1
        self._arrivals[key] = arrival  # now the youngest
        if len(self._arrivals) > ARRIVALS_MAX:
            del self._arrivals[next(iter(self._arrivals))]
        return arrival

    def _drawn(self, kinds: tuple[Failure, ...], of: str) -> Failure | None:
        digest = hashlib.blake2b(f"{self.settings.seed} {kinds[0]} {of}".encode(), digest_size=8).digest()
        drawn = int.from_bytes(digest, "big") / 2**64
        for kind in kinds:
            drawn -= self.settings.rates.get(kind, 0.0)
            if drawn < 0:
                return kind
        return None

    def _counted(self, failure: Failure | None) -> Failure | None:
        if failure is not None:
            self.counts[failure] += 1
        return failure
