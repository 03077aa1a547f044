"""What the sandbox keeps, and what its journal holds: changes, each of them whole records.

A charge's status:

| status | may become |
|---|---|
| requires_action | authorised, declined (the customer decides); voided |
| pending | authorised, declined (by itself); voided |
| authorised | partially_captured, captured; voided |
| partially_captured | captured |
| captured, declined, voided | |

Refunds change the amount `refunded`, not the status. A refund is pending, succeeded or failed.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

import msgspec
from msgspec import Raw, Struct


class ChargeStatus(StrEnum):
    REQUIRES_ACTION = "requires_action"
    PENDING = "pending"
    AUTHORISED = "authorised"
    PARTIALLY_CAPTURED = "partially_captured"
    CAPTURED = "captured"
    DECLINED = "declined"
    VOIDED = "voided"


class RefundStatus(StrEnum):
    PENDING = "pending"
    SUCCEEDED = "succeeded"
    FAILED = "failed"


class OperationKind(StrEnum):
    AUTHORISE = "authorise"
    CAPTURE = "capture"
    VOID = "void"
    REFUND = "refund"


class Charge(Struct, frozen=True, omit_defaults=True):
    """Amounts are minor units. `refunded` is of refunds that are pending or have succeeded. `version` grows with each
    change. `action` is the secret part of the customer's address; answers hold the whole address instead."""

    id: str
    key: str
    status: ChargeStatus
    amount: int
    currency: str
    token: str
    reference: str
    created_ms: int
    version: int = 1
    authorised: int = 0
    captured: int = 0
    refunded: int = 0
    decline_code: str = ""
    action: str = ""
    return_url: str = ""

    def check(self) -> None:
        """The invariants of every charge at any time."""
        assert 0 <= self.refunded <= self.captured <= self.authorised <= self.amount, self
        assert self.status is not ChargeStatus.VOIDED or self.captured == 0, self
        assert (self.status is ChargeStatus.DECLINED) == (self.decline_code != ""), self


class Refund(Struct, frozen=True, omit_defaults=True):
    id: str
    key: str
    charge: str
    amount: int
    currency: str
    status: RefundStatus
    created_ms: int


class Operation(Struct, frozen=True, omit_defaults=True):
    """One request that was acted on, or refused because of what the books hold: by its key, for ever. `body` is what
    it was answered, and is again if it comes again."""

    key: str
    fingerprint: str
    kind: OperationKind
    http_status: int
    body: Raw
    charge: str = ""
    refund: str = ""


class Event(Struct, frozen=True, omit_defaults=True):
    """Something that the merchant is told by webhook. `key` is of the operation that it is the outcome of."""

    id: str
    type: str
    key: str
    charge: str
    created_ms: int
    refund: str = ""


class Change(Struct, frozen=True, omit_defaults=True):
    """One line of the journal: records that are put together, or not at all. `event_done` is the id of an event that
    was delivered, or that nobody will try again."""

    charge: Charge | None = None
    refund: Refund | None = None
    operation: Operation | None = None
    event: Event | None = None
    event_done: str = ""


# --- what goes over the wire ------------------------------------------------------------------------------------------


class ChargeBody(Struct, frozen=True):
    id: str
    key: str
    status: ChargeStatus
    amount: int
    currency: str
    reference: str
    created_ms: int
    version: int
    authorised: int
    captured: int
    refunded: int
    decline_code: str
    action_url: str


class ErrorDetail(Struct, frozen=True):
    code: str
    message: str


class ErrorBody(Struct, frozen=True):
    error: ErrorDetail


class OperationBody(Struct, frozen=True):
    """The answer to each request that acts, and to the look-up of one. `http_status` is what the request was answered;
    `charge` and `refund` are as they were with that answer or, in a look-up, as they are now."""

    key: str
    kind: OperationKind
    http_status: int
    charge: ChargeBody | None
    refund: Refund | None


def charge_body(charge: Charge, actions_url: str) -> ChargeBody:
    is_open = charge.status is ChargeStatus.REQUIRES_ACTION
    return ChargeBody(
        charge.id,
        charge.key,
        charge.status,
        charge.amount,
        charge.currency,
        charge.reference,
        charge.created_ms,
        charge.version,
        charge.authorised,
        charge.captured,
        charge.refunded,
        charge.decline_code,
        f"{actions_url}/{charge.action}" if is_open else "",
    )


encode: Final = msgspec.json.Encoder().encode
decode_change: Final = msgspec.json.Decoder(Change).decode
