"""Sessions: one sign-in, and the refresh tokens that follow from it one after the other.

A refresh token is `{user}.{family}.{secret}`: 128 random bits that all tokens of a session share, and 256 that are this
one's. The store holds the hash of either (the session's id is that of the family), so who reads the store can neither
refresh nor pretend that a token was reused; who knows a session's id cannot either.

Rotation
1. A refresh uses the token up: the session's record gets the hash of its successor. Successors are made of the old
   secret and a nonce, by HMAC-SHA256; the nonce is random, and kept.
2. For `GRACE_S` after that the old token gives **the same successor** again, made anew from the old secret and the
   nonce: for an answer that was lost, and for two tabs that refresh at once. No state changes then.
3. After that, or when the successor has been used, an older token of the family is a **reuse**: somebody has a copy.
   The session ends, whoever of the two came, and both have to sign in.
4. A token whose family is unknown is refused, and nothing happens.

A session ends by signing out, by its owner or an admin, with the password (change, reset), the role, a block or the
account, by a reuse, `IDLE_S` after its last refresh, `LIFE_S` after it began, or when a user opens more than
`SESSIONS_MAX`: then the one that was refreshed longest ago makes room. Its access tokens end with it, within the bound
of `services/web/ended.py` (ten seconds).
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import msgspec
from msgspec import Struct

import kvstore
from services.users.audit import Action, AuditLog, Origin
from services.users.records import (
    Session,
    User,
    decode_session,
    decode_user,
    encode,
    secret_hash,
    session_key,
    sessions_of,
    user_key,
)
from services.web.ended import ended_key
from services.web.ids import parse_id
from services.web.leases import SharedLease
from services.web.problems import Problem
from services.web.tokens import TOKEN_GONE_AFTER_S, Role, Tokens

IDLE_S: Final = 30 * 24 * 3600
LIFE_S: Final = 365 * 24 * 3600
GRACE_S: Final = 10  # a client that lost an answer asks again within its timeout
SESSIONS_MAX: Final = 20  # more devices than one person uses; all of them are ended in one transaction
REFRESH_TOKEN_CHARS_MAX: Final = 128  # ours have 83 at most

_LEASE_FILLS_S: Final = 24 * 3600.0
_ENDED_LEASE_FILLS_S: Final = 300.0


class Granted(Struct, frozen=True):
    """What a client gets: `refresh_token` is nowhere else."""

    user_id: int
    role: Role
    session_id: str
    refresh_token: str
    expires_ms: int


class Opening(NamedTuple):
    """A new session: what its client gets, the ids of those that end for it, and what is to be written."""

    granted: Granted
    ended: list[str]
    operations: list[kvstore.Put | kvstore.Delete]


class Sessions:
    """One per process."""

    def __init__(self, store: kvstore.Client, tokens: Tokens, audit: AuditLog, clock_ms: Callable[[], int]) -> None:
        self._store = store
        self._tokens = tokens
        self._audit = audit
        self._clock_ms = clock_ms
        self._lease = SharedLease(store, IDLE_S, _LEASE_FILLS_S)
        self._ended_lease = SharedLease(store, TOKEN_GONE_AFTER_S, _ENDED_LEASE_FILLS_S)

    # --- parts of others' transactions --------------------------------------------------------------------------------

    async def opening(self, user: User, others: Sequence[kvstore.Record], origin: Origin) -> Opening:
        """Begin a session, and end the stalest where there is no room. `others` are all that there are: the transaction
        that writes the operations compares that they are all."""
        now = self._clock_ms()
        family, secret = secrets.token_urlsafe(16), secrets.token_urlsafe(32)
        session = Session(
            _session_id(family),
            user.id,
            now,
            now,
            now + IDLE_S * 1000,
            secret_hash(secret),
            "",
            "",
            origin.address,
            origin.user_agent,
        )
        by_use = sorted((decode_session(record.value) for record in others), key=lambda one: one.refreshed_ms)
        stale = [one.id for one in by_use[: max(0, len(by_use) + 1 - SESSIONS_MAX)]]
        operations = await self._ending(user.id, stale)
        lease = await self._lease.take()
        operations.append(kvstore.Put(session_key(user.id, session.id), encode(session), lease=lease))
        return Opening(_granted(user, session, family, secret), stale, operations)

    async def end_all(self, txn: kvstore.Transaction, user_id: int, keep: str = "") -> list[str]:
        """End all sessions of a user but `keep`. Returns their ids, for `forget` when the transaction is done."""
        found = await txn.range(prefix=sessions_of(user_id))
        ended = [one.id for one in (decode_session(record.value) for record in found.records) if one.id != keep]
        await self._end(txn, user_id, ended)
        return ended

    def forget(self, ended: list[str]) -> None:
        """The transaction that ended them is done: refuse their access tokens here from now on."""
        self._tokens.ended.learn(ended)

    async def _end(self, txn: kvstore.Transaction, user_id: int, session_ids: list[str]) -> None:
        _write(txn, await self._ending(user_id, session_ids))

    async def _ending(self, user_id: int, session_ids: list[str]) -> list[kvstore.Put | kvstore.Delete]:
        if not session_ids:
            return []
        lease, now = await self._ended_lease.take(len(session_ids)), self._clock_ms()
        operations: list[kvstore.Put | kvstore.Delete] = []
        for session_id in session_ids:
            operations.append(kvstore.Delete(session_key(user_id, session_id)))
            operations.append(kvstore.Put(ended_key(session_id, now), b"", lease=lease))
        return operations

    # --- by themselves ------------------------------------------------------------------------------------------------

    async def refresh(self, token: str, origin: Origin) -> Granted:
        """The next tokens for a refresh token. Raises `Problem`: `invalid_refresh_token`, `refresh_token_reused`."""
        user_text, _, rest = token.partition(".")
        family, _, secret = rest.partition(".")
        user_id = parse_id(user_text)
        if user_id is None or not secret:
            raise _invalid()
        session_id = _session_id(family)

        async def body(txn: kvstore.Transaction) -> Granted | None:
            record = await txn.get(session_key(user_id, session_id))
            owner = await txn.get(user_key(user_id))
            if record is None or owner is None:
                raise _invalid()
            session, user, now = decode_session(record.value), decode_user(owner.value), self._clock_ms()
            if now >= session.expires_ms:
                raise _invalid()
            if hmac.compare_digest(secret_hash(secret), session.token_hash):
                session, successor = _rotated(session, secret, origin, now)
                txn.put(record.key, encode(session), lease=await self._lease.take())
                return _granted(user, session, family, successor)
            is_previous = hmac.compare_digest(secret_hash(secret), session.previous_hash)
            if is_previous and now <= session.refreshed_ms + GRACE_S * 1000:
                return _granted(user, session, family, _successor(secret, session.nonce))
            await self._end(txn, user_id, [session_id])
            details = {"session": session_id}
            action = Action.REFRESH_REUSED
            await self._audit.write(txn, action, origin, actor=0, subject=user_id, details=details)
            return None

        granted = await self._store.run_transaction(body)
        if granted is None:
            self.forget([session_id])
            raise Problem(
                "refresh_token_reused", "Sign in again; if it was not you who used it twice, somebody has a copy of it"
            )
        return granted

    async def of(self, user_id: int) -> list[Session]:
        """A user's sessions, the one that was refreshed last first."""
        found = await self._store.range(prefix=sessions_of(user_id))
        now = self._clock_ms()
        sessions = [decode_session(record.value) for record in found.records]
        return sorted((one for one in sessions if now < one.expires_ms), key=lambda one: -one.refreshed_ms)

    async def end(self, user_id: int, session_id: str, origin: Origin) -> None:
        """Its owner ends one. Raises `Problem` `not_found`."""

        async def body(txn: kvstore.Transaction) -> None:
            if await txn.get(session_key(user_id, session_id)) is None:
                raise Problem("not_found", "You have no such session, or it has ended")
            await self._end(txn, user_id, [session_id])
            details = {"session": session_id}
            action = Action.SESSION_ENDED
            await self._audit.write(txn, action, origin, actor=user_id, subject=user_id, details=details)

        await self._store.run_transaction(body)
        self.forget([session_id])

    async def end_others(self, user_id: int, keep: str, origin: Origin, *, actor: int) -> int:
        """End all but `keep` (all, if that is empty). How many there were."""

        async def body(txn: kvstore.Transaction) -> list[str]:
            ended = await self.end_all(txn, user_id, keep)
            if ended:
                details = {"count": str(len(ended))}
                action = Action.SESSIONS_ENDED
                await self._audit.write(txn, action, origin, actor=actor, subject=user_id, details=details)
            return ended

        ended = await self._store.run_transaction(body)
        self.forget(ended)
        return len(ended)


def _write(txn: kvstore.Transaction, operations: list[kvstore.Put | kvstore.Delete]) -> None:
    for operation in operations:
        if isinstance(operation, kvstore.Put):
            txn.put(operation.key, operation.value, lease=operation.lease)
        else:
            txn.delete(operation.start)


def _session_id(family: str) -> str:
    return hashlib.blake2b(family.encode(), digest_size=16).hexdigest()


def _successor(secret: str, nonce: str) -> str:
    made = hmac.digest(bytes.fromhex(nonce), secret.encode(), "sha256")
    return base64.urlsafe_b64encode(made).decode().rstrip("=")


def _rotated(session: Session, secret: str, origin: Origin, now: int) -> tuple[Session, str]:
    nonce = secrets.token_hex(32)
    successor = _successor(secret, nonce)
    rotated = msgspec.structs.replace(
        session,
        refreshed_ms=now,
        expires_ms=min(now + IDLE_S * 1000, session.created_ms + LIFE_S * 1000),
        token_hash=secret_hash(successor),
        previous_hash=secret_hash(secret),
        nonce=nonce,
        address=origin.address,
        user_agent=origin.user_agent,
    )
    return rotated, successor


def _granted(user: User, session: Session, family: str, secret: str) -> Granted:
    token = f"{user.id}.{family}.{secret}"
    return Granted(user.id, user.role, session.id, token, session.expires_ms)


def _invalid() -> Problem:
    return Problem("invalid_refresh_token", "The session has ended, or never was; sign in again")
