"""Signatures of webhooks: made, rotated, and refused where they are wrong or old."""

from __future__ import annotations

import pytest

from services.payments.provider import (
    InvalidWebhook,
)
from services.payments.signatures import SIGNATURES_MAX, TOLERANCE_S, check, sign
from services.sandbox_psp.webhooks import signature as psp_signature

NOW_S = 1_800_000_000.5
BODY = b'{"id":"evt_1"}'
NEW, OLD = b"whsec_new", b"whsec_old"


def test_a_signature_is_what_others_make_it() -> None:
    # printf '1800000000.{"id":"evt_1"}' | openssl dgst -sha256 -hmac whsec_new
    assert sign([NEW], BODY, NOW_S) == (
        "t=1800000000,v1=bcd5b8f84c1762e896c564b29f53d2d26064aba6607250fa924f75df06e0f8a4"
    )


def test_secrets_are_rotated_without_a_gap() -> None:
    check(sign([NEW], BODY, NOW_S), [NEW], BODY, NOW_S)
    check(sign([OLD], BODY, NOW_S), [NEW, OLD], BODY, NOW_S)  # the receiver knows the new one first
    check(sign([NEW, OLD], BODY, NOW_S), [OLD], BODY, NOW_S)  # or the sender does
    check(sign([NEW], BODY, NOW_S).replace(",", ", ") + ",v0=abc", [NEW], BODY, NOW_S)


@pytest.mark.parametrize(
    ("header", "code"),
    [
        (None, "signature_missing"),
        ("", "signature_malformed"),
        ("nonsense", "signature_malformed"),
        ("t=1800000000", "signature_malformed"),
        ("v1=" + "0" * 64, "signature_malformed"),
        ("t=1800000000,v1=" + "0" * 63, "signature_malformed"),
        ("t=1800000000,v1=" + "é" * 64, "signature_malformed"),
        ("t=-1,v1=" + "0" * 64, "signature_malformed"),
        ("t=1800000000,t=1800000000,v1=" + "0" * 64, "signature_malformed"),
        ("t=1800000000" + (",v1=" + "0" * 64) * (SIGNATURES_MAX + 1), "signature_malformed"),
        ("t=1800000000,v1=" + "0" * 2000, "signature_malformed"),
        ("t=1800000000,v1=" + "0" * 64, "signature_wrong"),
        (sign([OLD], BODY, NOW_S), "signature_wrong"),
        (sign([NEW], BODY + b" ", NOW_S), "signature_wrong"),
        (sign([NEW], BODY, NOW_S).replace("t=1800000000", "t=1800000001"), "signature_wrong"),
        (sign([NEW], BODY, NOW_S - TOLERANCE_S - 1), "signature_expired"),
        (sign([NEW], BODY, NOW_S + TOLERANCE_S + 1), "signature_expired"),
    ],
)
def test_signatures_that_are_refused(header: str | None, code: str) -> None:
    with pytest.raises(InvalidWebhook) as caught:
        check(header, [NEW], BODY, NOW_S)
    assert caught.value.code == code


def test_tolerance_is_a_bound() -> None:
    for ago_s in (-TOLERANCE_S, 0, TOLERANCE_S):
        check(sign([NEW], BODY, 1_800_000_000 - ago_s), [NEW], BODY, 1_800_000_000)


def test_the_sandbox_signs_as_we_check() -> None:
    """It has an implementation of its own."""
    assert psp_signature([NEW, OLD], BODY, NOW_S) == sign([NEW, OLD], BODY, NOW_S)
