"""Access tokens: JWTs of ten minutes, signed with a random key that the store keeps; and who a request comes from.

Rules:
1. No default secret. The first process that needs a key makes one and creates it in the store under an
   absent-compare, so that any number of processes starting at once end with the same one.
2. Algorithm, audience and issuer are pinned at verification; `kid` in the token's header only picks among the keys
   in the store.
3. Keys are cached for `CURRENT_AGE_S`. An unknown `kid` makes the cache read the store again, at most once per
   `REFRESH_INTERVAL_S`, so that forged tokens cannot load the store.
4. Tokens of a session that has ended are refused: see `ended.py` for how soon.
5. A token that was verified once is not verified again until it expires: a bounded cache by the whole token, signature
   included, emptied when the keys change.

HS256, because whoever verifies can read the store and so could sign as well: a key pair would protect nothing more.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import Callable
from enum import StrEnum
from typing import Final, NamedTuple

import jwt
import msgspec
from aiohttp import web
from msgspec import Struct

import kvstore
from services.web.answers import CALLER_ID
from services.web.ended import EndedSessions
from services.web.ids import now_ms, parse_id
from services.web.problems import Problem

TOKEN_TTL_S: Final = 600
ALGORITHM: Final = "HS256"
ISSUER: Final = "users"
AUDIENCE: Final = "services"
REFRESH_INTERVAL_S: Final = 1.0
CURRENT_AGE_S: Final = 60.0
_CLOCK_SKEW_S: Final = 5  # between the machines of two services
# A token is good for so long after it was issued, by any process's clock.
TOKEN_GONE_AFTER_S: Final = TOKEN_TTL_S + 2 * _CLOCK_SKEW_S
_VERIFIED_MAX: Final = 8192  # some 5 MiB; more users than that within ten minutes are verified anew, 40 µs each
_TOKEN_CHARS_MAX: Final = 4096  # ours have some 300

KEY_PREFIX: Final = b"signing-key/"
CURRENT_KEY: Final = b"signing-key-current"


class Role(StrEnum):
    CUSTOMER = "customer"
    STAFF = "staff"
    ADMIN = "admin"


class Caller(NamedTuple):
    """Who sent a request."""

    user_id: int
    role: Role
    session_id: str = ""  # of whoever signed in; a service's own token has none
    good_until_s: float = math.inf  # by the clock of the process that verified the token

    @property
    def is_staff(self) -> bool:
        return self.role is not Role.CUSTOMER


class SigningKey(Struct, frozen=True, tag_field="v", tag=1):
    """One key as the store keeps it. Anyone who can read the store can sign: guard the store."""

    kid: str
    algorithm: str
    secret: bytes
    created_ms: int


_decode_key = msgspec.json.Decoder(SigningKey).decode


class SigningKeys:
    """The keys in the store, cached. One per process."""

    def __init__(self, store: kvstore.Client, clock_s: Callable[[], float] = time.monotonic) -> None:
        self.store = store
        self._clock_s = clock_s
        self._keys: dict[str, SigningKey] = {}
        self._current = ""
        self._loaded_at = float("-inf")
        self._loading = asyncio.Lock()
        self.generation = 0  # counts changes of the set of keys

    def known(self, kid: str) -> SigningKey | None:
        return self._keys.get(kid)

    async def find(self, kid: str) -> SigningKey | None:
        """The key with that id; asks the store about an unknown one, but not more often than the interval."""
        if self._clock_s() - self._loaded_at > CURRENT_AGE_S:  # it may have been rotated out
            await self._refresh(CURRENT_AGE_S)
        key = self._keys.get(kid)
        if key is None:
            await self._refresh(REFRESH_INTERVAL_S)
            key = self._keys.get(kid)
        return key

    async def current(self) -> SigningKey:
        """The key to sign with; made now if the store has none yet."""
        if not self._current or self._clock_s() - self._loaded_at > CURRENT_AGE_S:
            await self._refresh(CURRENT_AGE_S if self._current else 0.0)
        if not self._current:
            await self._create()
            await self._refresh(0.0)
        return self._keys[self._current]

    async def _refresh(self, at_most_every_s: float) -> None:
        async with self._loading:  # who waited here finds what the other has just read
            if self._clock_s() - self._loaded_at < at_most_every_s:
                return
            found = await self.store.txn(
                success=[
                    kvstore.Range(KEY_PREFIX, kvstore.prefix_end(KEY_PREFIX)),
                    kvstore.Range(CURRENT_KEY),
                ]
            )
            keys, current = found.results
            assert isinstance(keys, kvstore.RangeResult)
            assert isinstance(current, kvstore.RangeResult)
            decoded = [_decode_key(record.value) for record in keys.records]
            fresh = {key.kid: key for key in decoded}
            if fresh != self._keys:
                self._keys = fresh
                self.generation += 1
            self._current = current.records[0].value.decode() if current.records else ""
            self._loaded_at = self._clock_s()

    async def _create(self) -> None:
        key = SigningKey(secrets.token_hex(8), ALGORITHM, secrets.token_bytes(32), now_ms())
        await self.store.txn(
            compare=[kvstore.Compare(CURRENT_KEY, kvstore.Target.VERSION, kvstore.Relation.EQUAL, 0)],
            success=[
                kvstore.Put(KEY_PREFIX + key.kid.encode(), msgspec.json.encode(key)),
                kvstore.Put(CURRENT_KEY, key.kid.encode()),
            ],
        )  # where the compare fails another process was first, and its key is as good


class Tokens:
    """Issues and verifies access tokens. One per process."""

    def __init__(self, keys: SigningKeys, clock_s: Callable[[], float] = time.time) -> None:
        self._keys = keys
        self._clock_s = clock_s
        self.ended = EndedSessions(keys.store, TOKEN_GONE_AFTER_S)
        self._verified: dict[str, Caller] = {}
        self._generation = 0

    async def issue(self, user_id: int, role: Role, session_id: str = "") -> str:
        key = await self._keys.current()
        now = int(self._clock_s())
        claims = {
            "iss": ISSUER,
            "aud": AUDIENCE,
            "sub": str(user_id),
            "role": role.value,
            "iat": now,
            "exp": now + TOKEN_TTL_S,
            "jti": secrets.token_hex(8),
        }
        if session_id:
            claims["sid"] = session_id
        return jwt.encode(claims, key.secret, algorithm=ALGORITHM, headers={"kid": key.kid})

    async def caller(self, request: web.Request) -> Caller:
        """Who sent `request`. Raises `Problem` with status 401."""
        caller = await self.verify(request.headers.get("Authorization"))
        request[CALLER_ID] = caller.user_id
        return caller

    async def verify(self, header: str | None) -> Caller:
        """Who an Authorization header speaks for. Raises `Problem` with status 401."""
        if header is None:
            raise _refuse("authentication_required", "Send an access token: Authorization: Bearer …")
        scheme, _, token = header.partition(" ")
        if scheme.lower() != "bearer" or not token or not token.isascii() or len(token) > _TOKEN_CHARS_MAX:
            raise _refuse("invalid_token", "The Authorization header holds no bearer token")
        if self._generation != self._keys.generation:
            self._verified.clear()
            self._generation = self._keys.generation
        caller = self._verified.get(token)
        if caller is None:
            caller = await self._verify(token)
        elif self._clock_s() >= caller.good_until_s:
            del self._verified[token]
            raise _refuse("token_expired", "Refresh your session, or sign in again")
        if caller.session_id and await self.ended.has(caller.session_id):
            raise _refuse("invalid_token", "The session of this token has ended; sign in again")
        return caller

    async def is_still_good(self, caller: Caller) -> bool:
        """Whether the token that `caller` came with would be taken now: for an answer that goes on for long."""
        if self._clock_s() >= caller.good_until_s:
            return False
        return not (caller.session_id and await self.ended.has(caller.session_id))

    async def _verify(self, token: str) -> Caller:
        try:
            kid = jwt.get_unverified_header(token).get("kid")
        except jwt.InvalidTokenError:
            kid = None
        key = await self._keys.find(kid) if isinstance(kid, str) else None
        if key is None:
            raise _refuse("invalid_token", "The token was not signed by a key that is in use")
        try:
            claims = jwt.decode(
                token,
                key.secret,
                algorithms=[ALGORITHM],
                audience=AUDIENCE,
                issuer=ISSUER,
                # Its times are checked below, with our clock.
                options={"require": ["exp", "iat", "sub", "aud", "iss"], "verify_exp": False, "verify_iat": False},
            )
            user_id = parse_id(claims["sub"])
            role = Role(claims["role"])
            session_id = str(claims.get("sid", ""))
            expires_at = float(claims["exp"])
        except (jwt.InvalidTokenError, KeyError, TypeError, ValueError):
            raise _refuse("invalid_token", "The token's signature or claims are not right") from None
        if user_id is None:
            raise _refuse("invalid_token", "The token names no user")
        good_until_s = expires_at + _CLOCK_SKEW_S
        if self._clock_s() >= good_until_s:
            raise _refuse("token_expired", "Refresh your session, or sign in again")
        caller = Caller(user_id, role, session_id, good_until_s)
        if len(self._verified) >= _VERIFIED_MAX:
            self._verified.clear()  # simpler than an order of use, and as good: most are verified once
        self._verified[token] = caller
        return caller


def _refuse(code: str, detail: str) -> Problem:
    challenge = (
        "Bearer" if code == "authentication_required" else f'Bearer error="invalid_token", error_description="{detail}"'
    )
    return Problem(code, detail, headers={"WWW-Authenticate": challenge})
