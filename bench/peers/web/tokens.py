"""The peers' check of access tokens: the rules of `services/web/tokens.py`, with keys from wherever a peer has them.

Algorithm, audience and issuer pinned; the session must not have ended; what was verified once is not verified again
until it expires. The keys and the sessions that ended are read again every `LOOK_EVERY_S` seconds: `is_stale` says
when, and `learn` takes them over.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import jwt

from services.web.tokens import ALGORITHM, AUDIENCE, ISSUER

LOOK_EVERY_S = 5.0
_CLOCK_SKEW_S = 5
_VERIFIED_MAX = 8192
_OPTIONS = {"require": ["exp", "iat", "sub", "aud", "iss"], "verify_exp": False, "verify_iat": False}


class Caller(NamedTuple):
    user_id: int
    role: str
    session_id: str


class Refused(Exception):
    """The answer is 401; the text is the problem's code."""


class TokenCheck:
    """One per process."""

    def __init__(self, clock_s: Callable[[], float] = time.time) -> None:
        self._clock_s = clock_s
        self._keys: dict[str, bytes] = {}
        self._ended: Collection[str] = frozenset()
        self._looked_at_s = float("-inf")
        self._verified: dict[str, tuple[Caller, float]] = {}

    def is_stale(self) -> bool:
        return self._clock_s() - self._looked_at_s >= LOOK_EVERY_S

    def learn(self, keys: Mapping[str, bytes], ended: Collection[str]) -> None:
        if keys != self._keys:
            self._keys = dict(keys)
            self._verified.clear()
        self._ended = frozenset(ended)
        self._looked_at_s = self._clock_s()

    def caller(self, header: str | None) -> Caller:
        """Who an Authorization header speaks for. Raises `Refused`."""
        if header is None:
            raise Refused("authentication_required")
        scheme, _, token = header.partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise Refused("invalid_token")
        seen = self._verified.get(token)
        if seen is None:
            seen = self._verify(token)
        elif self._clock_s() >= seen[1]:
            del self._verified[token]
            raise Refused("token_expired")
        caller = seen[0]
        if caller.session_id in self._ended:
            raise Refused("invalid_token")
        return caller

    def _verify(self, token: str) -> tuple[Caller, float]:
        try:
            key = self._keys[jwt.get_unverified_header(token)["kid"]]
            claims = jwt.decode(
                token,
                key,
                algorithms=[ALGORITHM],
                audience=AUDIENCE,
                issuer=ISSUER,
                options=_OPTIONS,  # type: ignore[arg-type]
            )
            caller = Caller(int(claims["sub"]), str(claims["role"]), str(claims.get("sid", "")))
            good_until_s = float(claims["exp"]) + _CLOCK_SKEW_S
        except (jwt.InvalidTokenError, KeyError, TypeError, ValueError):
            raise Refused("invalid_token") from None
        if self._clock_s() >= good_until_s:
            raise Refused("token_expired")
        if len(self._verified) >= _VERIFIED_MAX:
            self._verified.clear()
        self._verified[token] = (caller, good_until_s)
        return caller, good_until_s
