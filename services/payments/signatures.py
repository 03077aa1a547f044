"""Signatures of webhooks: a header `t=…,v1=…` with the time and HMAC-SHA256 over `t.body`, in hexadecimal.

Several secrets may be in use at once: while one is replaced the sender signs with both (`v1` twice), and the receiver
knows both. One that fits is enough. An old delivery cannot be played again: past the tolerance its time is refused,
and the time is under the signature.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Sequence
from typing import Final

from services.payments.provider import InvalidWebhook

# Clocks differ by seconds, and a delivery is retried with a new signature; so this is for a slow network alone.
TOLERANCE_S: Final = 300
# While a secret is replaced there are two. More signatures than this would only be work for us.
SIGNATURES_MAX: Final = 8
_HEADER_CHARS_MAX: Final = 1000
_TIME: Final = re.compile(r"\A[0-9]{1,12}\Z")
_SIGNATURE: Final = re.compile(r"\A[0-9a-f]{64}\Z")


def sign(secrets: Sequence[bytes], body: bytes, now_s: float) -> str:
    """The header for a delivery at `now_s`."""
    time = str(int(now_s))
    return ",".join([f"t={time}", *(f"v1={_hmac(secret, time, body)}" for secret in secrets)])


def check(header: str | None, secrets: Sequence[bytes], body: bytes, now_s: float) -> None:
    """Raises `InvalidWebhook` unless one of `secrets` made one of the signatures, at most `TOLERANCE_S` ago (or
    ahead)."""
    assert secrets, "without a secret nothing could be checked"
    assert all(secrets), "with an empty one anyone could sign"
    if header is None:
        raise InvalidWebhook("signature_missing", "The webhook is not signed")
    time, signatures = _parse(header)
    if abs(now_s - int(time)) > TOLERANCE_S:
        raise InvalidWebhook("signature_expired", f"It was signed at {time}, more than {TOLERANCE_S} s from now")
    # All are compared, in constant time each: how long it takes tells nothing.
    fits = False
    for secret in secrets:
        expected = _hmac(secret, time, body)
        for signature in signatures:
            fits |= hmac.compare_digest(expected, signature)
    if not fits:
        raise InvalidWebhook("signature_wrong", "No secret of ours made this signature for this body")


def _hmac(secret: bytes, time: str, body: bytes) -> str:
    return hmac.new(secret, time.encode() + b"." + body, hashlib.sha256).hexdigest()


def _parse(header: str) -> tuple[str, list[str]]:
    """The time as it was written, and the signatures. Other parts are for later versions, and ignored."""
    if len(header) > _HEADER_CHARS_MAX:
        raise InvalidWebhook("signature_malformed", "The signature is too long")
    parts = [part.strip().partition("=") for part in header.split(",")]
    times = [value for name, _, value in parts if name == "t"]
    signatures = [value for name, _, value in parts if name == "v1"]
    if len(times) != 1 or not _TIME.match(times[0]):
        raise InvalidWebhook("signature_malformed", "The signature has no time")
    if not 0 < len(signatures) <= SIGNATURES_MAX or not all(map(_SIGNATURE.match, signatures)):
        raise InvalidWebhook("signature_malformed", "The signature is not of a form that we know")
    return times[0], signatures
