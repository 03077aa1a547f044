"""The interface behind which every payment provider stands.

Rules for callers
1. Each request carries our idempotency key, `order:attempt:operation` (`request_key`). It is stored **before** the
   provider is called, and a request that is sent again is sent with the same key and the same content. However often
   it arrives, a provider acts on it once.
2. An answer is one of four: `Succeeded`, `Declined`, `RequiresAction`, `Pending`. The last two end in one of the first
   two some time later; a webhook says when, and `find` tells at any time.
3. `ProviderUnknown` says nothing about what happened: ask with `find`. Never take it for a failure.
4. `ProviderRefused` says that this request did nothing.
5. A webhook's event is a reason to look, not a statement: events come twice, late, out of order or never. It names the
   key to `find`; so the webhook and whoever waits for the payment do one and the same thing.

`find` answers None while the provider has not acted on the key. That is no proof that it never will: the request may
still be on its way. Whoever has to be certain sends the same request again and goes by its answer (and, if the
payment is no longer wanted, voids it then).

Money is an integer of minor units (cents) and a currency. What an adapter must do is in docs/payments.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Final, Protocol, runtime_checkable

from msgspec import Struct

AMOUNT_MAX: Final = 2**53 - 1  # exact in JavaScript, as an order's total is
TOKEN_CHARS_MAX: Final = 200
LIST_MAX: Final = 100

_CURRENCY: Final = re.compile(r"\A[A-Z]{3}\Z")
_KEY: Final = re.compile(r"\A[0-9]{1,16}:[0-9]{1,6}:[a-z]{4,9}(-[0-9]{1,6})?\Z")


class Operation(StrEnum):
    AUTHORISE = "authorise"
    CAPTURE = "capture"
    VOID = "void"
    REFUND = "refund"


def request_key(order_id: int, attempt: int, operation: Operation, number: int = 1) -> str:
    """`order:attempt:operation`. Captures and refunds may be several: from the second on the key ends in its number,
    as in `12:1:refund-2`."""
    assert number >= 1, number
    key = f"{order_id}:{attempt}:{operation}" + (f"-{number}" if number > 1 else "")
    assert is_request_key(key), key
    return key


def is_request_key(text: str) -> bool:
    return _KEY.match(text) is not None


# --- requests ---------------------------------------------------------------------------------------------------------


class _Request(Struct, frozen=True):
    key: str

    def __post_init__(self) -> None:
        if not is_request_key(self.key):
            raise ValueError(f"{self.key!r} is no key of a request: see request_key")


class _Amount(_Request, frozen=True, kw_only=True):
    amount: int
    currency: str

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.amount <= AMOUNT_MAX:
            raise ValueError(f"an amount is 1 to {AMOUNT_MAX} minor units, not {self.amount}")
        if not _CURRENCY.match(self.currency):
            raise ValueError(f"a currency is three capital letters, not {self.currency!r}")


class Authorise(_Amount, frozen=True, kw_only=True):
    """Hold an amount on what the customer pays with. `token` stands for that; the customer's browser had it from the
    provider, so that no card number comes near us. `reference` is shown to people; after a `RequiresAction` the
    provider sends the customer on to `return_url`."""

    token: str
    reference: str
    return_url: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < len(self.token) <= TOKEN_CHARS_MAX:
            raise ValueError(f"a payment token has 1 to {TOKEN_CHARS_MAX} characters")


class Capture(_Amount, frozen=True, kw_only=True):
    """Take what was authorised, or part of it. `charge` is the provider's id."""

    charge: str


class Void(_Request, frozen=True, kw_only=True):
    """Give up an authorisation of which nothing was captured, or one that still waits for the customer."""

    charge: str


class Refund(_Amount, frozen=True, kw_only=True):
    """Give back what was captured, or part of it."""

    charge: str


# --- results ----------------------------------------------------------------------------------------------------------


class Charge(Struct, frozen=True):
    """What the provider has on its books, all in minor units: refunded ≤ captured ≤ authorised. A refund that is
    pending counts as refunded; one that failed does not. A void leaves `authorised` as it was."""

    id: str
    currency: str
    authorised: int
    captured: int
    refunded: int
    is_voided: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.refunded <= self.captured <= self.authorised:  # the provider's fault, so no assertion
            raise ValueError(f"these books do not balance: {self}")


class DeclineCode(StrEnum):
    """Why. An adapter maps what it does not know to `OTHER`, and keeps the provider's word in `detail`."""

    INSUFFICIENT_FUNDS = "insufficient_funds"
    STOLEN_CARD = "stolen_card"
    EXPIRED_CARD = "expired_card"
    INVALID_TOKEN = "invalid_token"
    ACTION_REFUSED = "action_refused"  # the customer said no, or failed to prove who they are
    VOIDED = "voided"  # given up before it was authorised
    REFUND_FAILED = "refund_failed"  # the customer's bank does not take the money back
    OTHER = "other"


class Succeeded(Struct, frozen=True, tag_field="status", tag="succeeded"):
    """Done. `charge` is the charge as it was with this answer, or, from `find`, as it is now. `refund` is the
    provider's id of a refund."""

    charge: Charge
    refund: str = ""


class Declined(Struct, frozen=True, tag_field="status", tag="declined"):
    """The answer was no, and it is final for this key. Nothing is held, taken or given back by it."""

    code: DeclineCode
    detail: str
    charge_id: str


class RequiresAction(Struct, frozen=True, tag_field="status", tag="requires_action"):
    """The customer has to open `url` first (3-D Secure)."""

    charge_id: str
    url: str


class Pending(Struct, frozen=True, tag_field="status", tag="pending"):
    """The provider does not know yet."""

    charge_id: str
    refund: str = ""


Result = Succeeded | Declined | RequiresAction | Pending


class ProviderUnknown(Exception):
    """No usable answer: the request may have been acted on, may be later, or never. `code` is stable."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(f"{detail} [{code}]")
        self.code = code
        self.detail = detail


class ProviderRefused(Exception):
    """The provider said clearly that this request did nothing. `code` is the provider's word or `refused`. The same
    request may succeed later if `is_retryable`: the provider is busy, or does not take our API key, which says nothing
    about this payment. Otherwise it is final for this request."""

    def __init__(self, code: str, detail: str, *, is_retryable: bool = False) -> None:
        super().__init__(f"{detail} [{code}]")
        self.code = code
        self.detail = detail
        self.is_retryable = is_retryable


# --- webhooks ---------------------------------------------------------------------------------------------------------


class WebhookEvent(Struct, frozen=True):
    """Something happened to what was asked for under `key`. `id` is the same each time the event is delivered; `kind`
    is the provider's word, for logs."""

    id: str
    kind: str
    key: str
    charge_id: str
    created_ms: int


class InvalidWebhook(Exception):
    """Not from the provider, or not as it sent it, or too long ago. Answer 400 and change nothing."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(f"{detail} [{code}]")
        self.code = code


# --- the interface ----------------------------------------------------------------------------------------------------


class Provider(Protocol):
    """One account with one provider. Methods may run at the same time, and retry nothing by themselves: the caller's
    durable step does. Each ends within a bound of the adapter's. `traceparent` (W3C) is passed on if given.

    The four operations raise `ProviderUnknown` and `ProviderRefused`; `find` raises `ProviderUnknown` alone."""

    @property
    def name(self) -> str:
        """Part of keys in the store: `inbox/{name}/{event}`."""

    async def authorise(self, request: Authorise, *, traceparent: str | None = None) -> Result: ...

    async def capture(self, request: Capture, *, traceparent: str | None = None) -> Result: ...

    async def void(self, request: Void, *, traceparent: str | None = None) -> Result: ...

    async def refund(self, request: Refund, *, traceparent: str | None = None) -> Result: ...

    async def find(self, key: str, *, traceparent: str | None = None) -> Result | None:
        """What became of the request with this key, as of now; None if the provider has not acted on it, or refused
        it. Reads what is true, not what a cache remembers."""

    def verify(self, headers: Mapping[str, str], body: bytes, now_s: float) -> WebhookEvent | None:
        """The event in a webhook's body; None for one that is of no concern to us. `headers` finds names in any case,
        as aiohttp's do. Raises `InvalidWebhook`."""


class ChargeEntry(Struct, frozen=True):
    """A charge with the key that it was asked for under."""

    key: str
    charge: Charge


class RefundEntry(Struct, frozen=True):
    id: str
    key: str
    charge_id: str
    amount: int
    currency: str
    status: str  # pending, succeeded or failed


@runtime_checkable
class Books(Protocol):
    """What an auditor reads: everything on the provider's books, oldest first, in pages of at most `LIST_MAX`.
    `after` is the id of the last one seen. An empty page is the end. Raises `ProviderUnknown`."""

    async def charges(self, after: str = "") -> list[ChargeEntry]: ...

    async def refunds(self, after: str = "") -> list[RefundEntry]: ...
