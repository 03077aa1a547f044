"""What may be done with a charge: pure functions from a charge and a request to the charge after it, or a refusal."""

from __future__ import annotations

from typing import Final

from msgspec import structs

from services.sandbox_psp.records import Charge, ChargeStatus, ErrorBody, ErrorDetail, Refund, RefundStatus, encode

_WAITING: Final = (ChargeStatus.REQUIRES_ACTION, ChargeStatus.PENDING)
_WITH_MONEY: Final = (ChargeStatus.CAPTURED, ChargeStatus.PARTIALLY_CAPTURED)


class Refusal(Exception):
    """The request does nothing. `code` is stable."""

    def __init__(self, http_status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.http_status = http_status
        self.code = code
        self.message = message

    @property
    def body(self) -> bytes:
        return encode(ErrorBody(ErrorDetail(self.code, self.message)))


def begin(charge: Charge, status: ChargeStatus, decline_code: str) -> Charge:
    """A new charge with its first status."""
    if status is ChargeStatus.AUTHORISED:
        return structs.replace(charge, status=status, authorised=charge.amount)
    assert status in (*_WAITING, ChargeStatus.DECLINED), status
    return structs.replace(charge, status=status, decline_code=decline_code if status is ChargeStatus.DECLINED else "")


def decide(charge: Charge, decline_code: str) -> Charge:
    """The end of waiting: authorised, or declined where there is a code."""
    assert charge.status in _WAITING, charge
    if decline_code:
        return _next(charge, status=ChargeStatus.DECLINED, decline_code=decline_code)
    return _next(charge, status=ChargeStatus.AUTHORISED, authorised=charge.amount)


def capture(charge: Charge, amount: int, currency: str) -> Charge:
    if charge.status not in (ChargeStatus.AUTHORISED, ChargeStatus.PARTIALLY_CAPTURED):
        raise _wrong_state(charge, "captured")
    _check_currency(charge, currency)
    if amount > charge.authorised - charge.captured:
        raise Refusal(409, "amount_too_large", f"{charge.authorised - charge.captured} are left to capture")
    captured = charge.captured + amount
    is_all = captured == charge.authorised
    status = ChargeStatus.CAPTURED if is_all else ChargeStatus.PARTIALLY_CAPTURED
    return _next(charge, status=status, captured=captured)


def void(charge: Charge) -> Charge:
    if charge.status not in (ChargeStatus.AUTHORISED, *_WAITING):
        raise _wrong_state(charge, "voided")
    return _next(charge, status=ChargeStatus.VOIDED)


def refund(charge: Charge, refund: Refund) -> Charge:
    """The charge after `refund` was taken in, whether it is pending or done."""
    if charge.status not in _WITH_MONEY:
        raise _wrong_state(charge, "refunded")
    _check_currency(charge, refund.currency)
    if refund.amount > charge.captured - charge.refunded:
        raise Refusal(409, "amount_too_large", f"{charge.captured - charge.refunded} are left to refund")
    return _next(charge, refunded=charge.refunded + refund.amount)


def settle_refund(charge: Charge, refund: Refund, fails: bool) -> tuple[Charge, Refund]:
    """The end of a pending refund. One that fails gives its amount back to what may be refunded."""
    assert refund.status is RefundStatus.PENDING, refund
    if not fails:
        return charge, structs.replace(refund, status=RefundStatus.SUCCEEDED)
    back = _next(charge, refunded=charge.refunded - refund.amount)
    return back, structs.replace(refund, status=RefundStatus.FAILED)


def _next(charge: Charge, **changes: object) -> Charge:
    return structs.replace(charge, version=charge.version + 1, **changes)


def _check_currency(charge: Charge, currency: str) -> None:
    if currency != charge.currency:
        raise Refusal(409, "currency_mismatch", f"The charge is in {charge.currency}, not {currency}")


def _wrong_state(charge: Charge, wish: str) -> Refusal:
    return Refusal(409, "charge_state", f"A charge that is {charge.status} cannot be {wish}")
