"""The adapter of the sandbox (`services/sandbox_psp`), over HTTP. An example for every other one.

How answers are read
- 2xx with a body that is as it should be: a result.
- 4xx with the provider's own error body: `ProviderRefused`, nothing happened; 401, 403 and 429 are retryable. Not
  408; and not a 4xx without such a body, which comes from something in between.
- anything else, or nothing: `ProviderUnknown`. That includes a connection that could not be made: the caller asks
  with `find` all the same, and has one case less to get wrong.

Nothing is retried here. (aiohttp itself sends a GET again where a connection that was used before turns out to be dead;
a POST never.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeVar
from urllib.parse import quote

import aiohttp
import msgspec
from msgspec import Struct

from services.payments import signatures
from services.payments.provider import (
    LIST_MAX,
    Authorise,
    Capture,
    Charge,
    ChargeEntry,
    DeclineCode,
    Declined,
    InvalidWebhook,
    Pending,
    ProviderRefused,
    ProviderUnknown,
    Refund,
    RefundEntry,
    RequiresAction,
    Result,
    Succeeded,
    Void,
    WebhookEvent,
    is_request_key,
)

# A bank takes a second or two to authorise, rarely five; whoever waits at a checkout for ten has left.
TIMEOUT_S: Final = 10.0
CONNECT_TIMEOUT_S: Final = 3.0  # one lost SYN is sent again after a second, so this bears two
ANSWER_BYTES_MAX: Final = 256 * 1024  # a page of the lists is 40 KiB
SIGNATURE_HEADER: Final = "Sandbox-Signature"

_STATUS_UNCLEAR: Final = 408  # "request timeout" may come from what lies in between
# Too many requests; and a key that is not taken, which is for whoever deploys us to mend, and no customer's fault.
_STATUS_RETRYABLE: Final = (401, 403, 429)


class _Charge(Struct, frozen=True):
    """The provider's charge, as far as we read it."""

    id: str
    key: str
    status: str
    currency: str
    authorised: int
    captured: int
    refunded: int
    decline_code: str
    action_url: str


class _Refund(Struct, frozen=True):
    id: str
    key: str
    charge: str
    amount: int
    currency: str
    status: str


class _Operation(Struct, frozen=True):
    kind: str
    http_status: int
    charge: _Charge | None
    refund: _Refund | None


class _ErrorDetail(Struct, frozen=True):
    code: str
    message: str


class _Error(Struct, frozen=True):
    error: _ErrorDetail


class _Charges(Struct, frozen=True):
    data: list[_Charge]


class _Refunds(Struct, frozen=True):
    data: list[_Refund]


class _Event(Struct, frozen=True):
    id: str
    type: str
    key: str
    charge: str
    created_ms: int


T = TypeVar("T")


class SandboxProvider:
    """A `Provider` and its `Books`. It owns neither the session nor what the session holds."""

    name: Final = "sandbox"

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        api_key: str,
        webhook_secrets: Sequence[str],
        *,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        """`url` is that of the provider, without a path. Raises ValueError for an empty secret, or none."""
        if not webhook_secrets or not all(webhook_secrets):
            raise ValueError("give the secret that webhooks are signed with")
        self._session = session
        self._url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {api_key}", "Accept-Encoding": "identity"}
        self._secrets = [secret.encode() for secret in webhook_secrets]
        self._timeout = aiohttp.ClientTimeout(total=timeout_s, connect=min(timeout_s, CONNECT_TIMEOUT_S))

    # --- operations ---------------------------------------------------------------------------------------------------

    async def authorise(self, request: Authorise, *, traceparent: str | None = None) -> Result:
        body = {
            "amount": request.amount,
            "currency": request.currency,
            "token": request.token,
            "reference": request.reference,
            "return_url": request.return_url,
        }
        return await self._operate("/v1/charges", request.key, body, traceparent)

    async def capture(self, request: Capture, *, traceparent: str | None = None) -> Result:
        body = {"amount": request.amount, "currency": request.currency}
        return await self._operate(_path(request.charge, "captures"), request.key, body, traceparent)

    async def void(self, request: Void, *, traceparent: str | None = None) -> Result:
        return await self._operate(_path(request.charge, "void"), request.key, {}, traceparent)

    async def refund(self, request: Refund, *, traceparent: str | None = None) -> Result:
        body = {"amount": request.amount, "currency": request.currency}
        return await self._operate(_path(request.charge, "refunds"), request.key, body, traceparent)

    async def find(self, key: str, *, traceparent: str | None = None) -> Result | None:
        status, raw = await self._send("GET", "/v1/operations", traceparent, parameters={"key": key})
        if status == 404 and _error(raw) is not None:
            return None
        if status != 200:
            raise ProviderUnknown("lookup_failed", f"the look-up was answered with {status}")
        operation = _decode(raw, _Operation)
        if operation.http_status >= 400:
            return None
        return _result(operation)

    # --- webhooks -----------------------------------------------------------------------------------------------------

    def verify(self, headers: Mapping[str, str], body: bytes, now_s: float) -> WebhookEvent | None:
        signatures.check(headers.get(SIGNATURE_HEADER), self._secrets, body, now_s)
        try:
            event = msgspec.json.decode(body, type=_Event)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise InvalidWebhook("body_invalid", str(error)[:200]) from None
        if not is_request_key(event.key):  # of someone else who shares the account
            return None
        return WebhookEvent(event.id, event.type, event.key, event.charge, event.created_ms)

    # --- what an auditor reads ----------------------------------------------------------------------------------------

    async def charges(self, after: str = "") -> list[ChargeEntry]:
        page = await self._list("/v1/charges", after, _Charges)
        return [ChargeEntry(one.key, _charge(one)) for one in page.data]

    async def refunds(self, after: str = "") -> list[RefundEntry]:
        page = await self._list("/v1/refunds", after, _Refunds)
        return [RefundEntry(one.id, one.key, one.charge, one.amount, one.currency, one.status) for one in page.data]

    # --- one request --------------------------------------------------------------------------------------------------

    async def _operate(self, path: str, key: str, body: dict[str, Any], traceparent: str | None) -> Result:
        status, raw = await self._send("POST", path, traceparent, key=key, body=msgspec.json.encode(body))
        if 200 <= status < 300:
            return _result(_decode(raw, _Operation))
        error = _error(raw)
        if 400 <= status < 500 and status != _STATUS_UNCLEAR and error is not None:
            raise ProviderRefused(error.code, error.message, is_retryable=status in _STATUS_RETRYABLE)
        raise ProviderUnknown("provider_failed", f"the provider answered with {status}")

    async def _list(self, path: str, after: str, kind: type[T]) -> T:
        parameters = {"limit": str(LIST_MAX), "starting_after": after}
        status, raw = await self._send("GET", path, None, parameters=parameters)
        if status != 200:
            raise ProviderUnknown("lookup_failed", f"the list was answered with {status}")
        return _decode(raw, kind)

    async def _send(
        self,
        method: str,
        path: str,
        traceparent: str | None,
        *,
        parameters: dict[str, str] | None = None,
        key: str = "",
        body: bytes | None = None,
    ) -> tuple[int, bytes]:
        """Status and body of the answer. Raises `ProviderUnknown`."""
        headers = dict(self._headers)
        if key:
            headers |= {"Idempotency-Key": key, "Content-Type": "application/json"}
        if traceparent is not None:
            headers["traceparent"] = traceparent
        try:
            async with self._session.request(
                method,
                self._url + path,
                params=parameters,
                data=body,
                headers=headers,
                timeout=self._timeout,
                allow_redirects=False,  # wherever that leads, our key is not for it
            ) as answer:
                return answer.status, await _read(answer)
        except TimeoutError:
            raise ProviderUnknown("timeout", f"no answer within {self._timeout.total:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise ProviderUnknown("connection_lost", str(error)[:200] or type(error).__name__) from None


async def _read(answer: aiohttp.ClientResponse) -> bytes:
    parts, size = [], 0
    async for part in answer.content.iter_any():
        parts.append(part)
        size += len(part)
        if size > ANSWER_BYTES_MAX:
            raise ProviderUnknown("answer_too_large", f"the answer has more than {ANSWER_BYTES_MAX} bytes")
    return b"".join(parts)


# --- from their words to ours -----------------------------------------------------------------------------------------


def _path(charge: str, what: str) -> str:
    return f"/v1/charges/{quote(charge, safe='')}/{what}"


def _decode(raw: bytes, kind: type[T]) -> T:
    """An answer that cannot be read says nothing about what happened."""
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProviderUnknown("answer_invalid", str(error)[:200]) from None


def _error(raw: bytes) -> _ErrorDetail | None:
    try:
        return msgspec.json.decode(raw, type=_Error).error
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _charge(charge: _Charge) -> Charge:
    try:
        return Charge(
            charge.id, charge.currency, charge.authorised, charge.captured, charge.refunded, charge.status == "voided"
        )
    except ValueError as error:
        raise ProviderUnknown("answer_invalid", str(error)) from None


def _result(operation: _Operation) -> Result:
    charge, refund = operation.charge, operation.refund
    if charge is None or (operation.kind == "refund") != (refund is not None):
        raise ProviderUnknown("answer_invalid", f"an answer of {operation.kind} lacks its charge or refund")
    if refund is not None:
        return _refunded(charge, refund)
    if operation.kind == "authorise":
        return _authorised(charge)
    return Succeeded(_charge(charge))  # a capture and a void are done, or refused


def _authorised(charge: _Charge) -> Result:
    if charge.authorised > 0:  # also where it was captured or voided since
        return Succeeded(_charge(charge))
    if charge.status == "declined":
        return Declined(_decline_code(charge.decline_code), charge.decline_code, charge.id)
    if charge.status == "voided":
        return Declined(DeclineCode.VOIDED, charge.status, charge.id)
    if charge.status == "requires_action" and charge.action_url:
        return RequiresAction(charge.id, charge.action_url)
    if charge.status == "pending":
        return Pending(charge.id)
    raise ProviderUnknown("answer_invalid", f"a charge with the status {charge.status[:50]}")


def _refunded(charge: _Charge, refund: _Refund) -> Result:
    if refund.status == "succeeded":
        return Succeeded(_charge(charge), refund.id)
    if refund.status == "pending":
        return Pending(charge.id, refund.id)
    if refund.status == "failed":
        return Declined(DeclineCode.REFUND_FAILED, refund.status, charge.id)
    raise ProviderUnknown("answer_invalid", f"a refund with the status {refund.status[:50]}")


def _decline_code(code: str) -> DeclineCode:
    try:
        return DeclineCode(code)
    except ValueError:
        return DeclineCode.OTHER
