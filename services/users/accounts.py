"""Accounts: registering, signing in, the profile, the password, the role.

An account is its record and its places in three indexes (`records.py`), written in one transaction under compares, so
two people cannot register one email at the same moment, whichever processes they met. Password hashing happens before
and outside of any transaction; the transaction then checks that the password is still the one that was verified.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgspec
import structlog

import kvstore
from services.users.audit import OPERATOR, Action, AuditLog, Origin
from services.users.credentials import (
    Checked,
    Credentials,
    Seen,
    learned,
    no_account,
    ranges_of,
    read_user,
    wrong_password,
)
from services.users.emails import normalise_email
from services.users.mailing import NOTICE_PASSWORD, ask_for_mail
from services.users.passwords import Passwords, check_password
from services.users.records import (
    StoredUser,
    User,
    decode_user,
    email_key,
    encode,
    erased_key,
    mailed_of,
    newest_key,
    role_key,
    roles_of,
    user_key,
)
from services.users.sessions import Granted, Sessions
from services.users.throttle import REGISTRATION, Counted, Throttle, record_of
from services.web.clients import counted_address
from services.web.ids import Ids
from services.web.problems import Problem
from services.web.tokens import Caller, Role

# An attempt fails only where two processes drew one id, or the password changed while it was verified; never so often.
_ATTEMPTS_MAX: Final = 8

log = structlog.get_logger("services.users")


class Accounts:
    """One per process."""

    def __init__(
        self,
        store: kvstore.Client,
        passwords: Passwords,
        credentials: Credentials,
        sessions: Sessions,
        throttle: Throttle,
        audit: AuditLog,
        clock_ms: Callable[[], int],
    ) -> None:
        self._store = store
        self._passwords = passwords
        self._credentials = credentials
        self._sessions = sessions
        self._throttle = throttle
        self._audit = audit
        self._clock_ms = clock_ms
        self._ids = Ids(clock_ms)

    # --- registering and signing in -----------------------------------------------------------------------------------

    async def register(
        self, email: str, password: str, name: str, age: int, origin: Origin, role: Role = Role.CUSTOMER
    ) -> User:
        """Create an account. Raises `Problem`: `email_taken`, `common_password`, `invalid_body`,
        `registration_throttled`."""
        normalised = normalise_email(email)
        check_password(password, normalised)
        address = counted_address(origin.address)
        await self._throttle.take("registration_throttled", [Counted(REGISTRATION, address)] if address else [])
        # Also where the email is taken: so the answer's time tells no more than the answer.
        password_hash = await self._passwords.hash(password)
        by_email = email_key(normalised)
        for _ in range(_ATTEMPTS_MAX):
            now = self._clock_ms()
            user = User(self._ids.next(), email.strip(), name, age, role, password_hash, now, password_changed_ms=now)
            result = await self._store.txn(
                compare=account_absent(user),
                success=[
                    *account_puts(user),
                    *await self._audit.puts(Action.REGISTERED, origin, actor=user.id, subject=user.id),
                ],
                failure=[kvstore.Range(by_email)],
            )
            if result.succeeded:
                return user
            found = result.results[0]
            assert isinstance(found, kvstore.RangeResult)
            if found.records:
                raise Problem("email_taken", "Sign in, or register with another email")
        raise RuntimeError(f"no free user id after {_ATTEMPTS_MAX} draws")

    async def sign_in(self, email: str, password: str, origin: Origin) -> Granted:
        """Begin a session. Raises `Problem`: `wrong_credentials`, `sign_in_throttled`, `account_blocked` (only to who
        knows the password)."""
        for _ in range(_ATTEMPTS_MAX):
            checked = await self._credentials.check(email, password, origin)
            if checked.user.is_blocked:
                await self._credentials.take_back(checked)
                user_id = checked.user.id
                await self._audit.append(Action.SIGN_IN_BLOCKED, origin, actor=user_id, subject=user_id)
                raise Problem("account_blocked", "Ask the shop why")
            renewed = await self._renewed(checked.user, password)
            granted = await self._open(checked, renewed, origin)
            if granted is not None:
                return granted
            await self._credentials.take_back(checked)
        raise Problem("contended", "The account kept changing; try again")

    async def _renewed(self, user: User, password: str) -> str:
        """The hash to keep: of today's parameters, where it was made with older ones."""
        return await self._passwords.hash(password) if self._passwords.outdated(user.password_hash) else ""

    async def _open(self, checked: Checked, renewed_hash: str, origin: Origin) -> Granted | None:
        """All that a sign-in changes, in one round trip: under compares with all that was read before the password was
        checked. Where any of it has changed since, it is read again by the same request, and tried again with that.
        None, and nothing is changed, if the account is not as it was checked."""
        user_id, seen, taken = checked.user.id, checked.seen, list(checked.taken)
        for attempt in range(1, _ATTEMPTS_MAX + 1):
            stored = seen.stored
            if stored is None or stored.user.is_blocked or stored.user.password_hash != checked.user.password_hash:
                return None
            opening = await self._sessions.opening(stored.user, seen.sessions.records, origin)
            details = {"session": opening.granted.session_id}
            action = Action.SIGNED_IN
            now = self._clock_ms()
            success: list[kvstore.Operation] = [
                *opening.operations,
                *(one.lowered(now) for one in taken),
                *await self._audit.puts(action, origin, actor=user_id, subject=user_id, details=details),
            ]
            if checked.pair is not None:
                success.append(kvstore.Delete(checked.pair.key))
            if renewed_hash:
                renewed = msgspec.structs.replace(stored.user, password_hash=renewed_hash)
                success.append(kvstore.Put(user_key(user_id), encode(renewed)))
            learns = learned(user_id, seen.addresses, origin)
            if learns is not None:
                success.append(learns)
            result = await self._store.txn(
                compare=[*seen.unchanged(user_id), *(one.unchanged for one in taken)],
                success=success,
                failure=[*ranges_of(user_id), *(kvstore.Range(one.counted.key) for one in taken)],
            )
            if result.succeeded:
                self._sessions.forget(opening.ended)
                if renewed_hash:
                    log.info("rehashed", user=user_id)
                return opening.granted
            found = len(ranges_of(user_id))
            seen = Seen.of(result.results[:found])
            again = [one.again(record_of(record)) for one, record in zip(taken, result.results[found:], strict=True)]
            taken = [one for one in again if one is not None]
            await self._store.wait_for_others(attempt)
        raise Problem("contended", "The account kept changing; try again")

    # --- the account --------------------------------------------------------------------------------------------------

    async def read(self, user_id: int) -> StoredUser | None:
        record = await self._store.get(user_key(user_id))
        return None if record is None else StoredUser(decode_user(record.value), record.mod_revision)

    async def change_profile(
        self, user_id: int, name: str | None, age: int | None, origin: Origin, check: Callable[[int], None]
    ) -> StoredUser:
        """Change what is not None. `check` refuses by the revision that the record has, and no other is replaced."""
        for _ in range(_ATTEMPTS_MAX):
            stored = await self.read(user_id)
            if stored is None:
                raise no_account()
            check(stored.revision)
            user, key = stored.user, user_key(user_id)
            changed = msgspec.structs.replace(
                user, name=user.name if name is None else name, age=user.age if age is None else age
            )
            puts = await self._audit.puts(Action.PROFILE_CHANGED, origin, actor=user_id, subject=user_id)
            result = await self._store.txn(
                compare=[kvstore.Compare(key, kvstore.Target.MOD_REVISION, kvstore.Relation.EQUAL, stored.revision)],
                success=[kvstore.Put(key, encode(changed)), *puts],
            )
            if result.succeeded:
                return StoredUser(changed, result.revision)
        raise Problem("contended", "The account kept changing; try again")

    async def change_password(self, caller: Caller, old: str, new: str, origin: Origin) -> None:
        """Ends all other sessions. Raises `Problem`: `wrong_password`, `sign_in_throttled`, `common_password`."""
        checked = await self._credentials.confirm(caller.user_id, old, origin, "/old_password")
        check_password(new, normalise_email(checked.user.email), "/new_password")
        password_hash = await self._passwords.hash(new)

        async def body(txn: kvstore.Transaction) -> list[str]:
            stored = await read_user(txn, caller.user_id)
            if not self._credentials.still_holds(txn, checked, stored):
                raise wrong_password("/old_password")  # another change was faster
            action = Action.PASSWORD_CHANGED
            return await self.set_password(
                txn, stored.user, password_hash, action, origin, actor=caller.user_id, keep=caller.session_id
            )

        self._sessions.forget(await self._store.run_transaction(body))

    async def set_password(
        self,
        txn: kvstore.Transaction,
        user: User,
        password_hash: str,
        action: Action,
        origin: Origin,
        *,
        actor: int,
        keep: str = "",
    ) -> list[str]:
        """A new password, and what goes with the old one: mailed tokens, and all sessions but `keep`. Returns those."""
        changed = msgspec.structs.replace(user, password_hash=password_hash, password_changed_ms=self._clock_ms())
        txn.put(user_key(user.id), encode(changed))
        await txn.delete_range(prefix=mailed_of(user.id))
        ask_for_mail(txn, NOTICE_PASSWORD, user.id)
        await self._audit.write(txn, action, origin, actor=actor, subject=user.id)
        return await self._sessions.end_all(txn, user.id, keep)

    # --- for operators ------------------------------------------------------------------------------------------------

    async def ensure(self, email: str, password: str, name: str, age: int, role: Role) -> User:
        """The account with this email, with this password and role from now on, not blocked; created if need be."""
        try:
            return await self.register(email, password, name, age, OPERATOR, role)
        except Problem as problem:
            if problem.code != "email_taken":
                raise
        password_hash = await self._passwords.hash(password)

        async def body(txn: kvstore.Transaction) -> tuple[User, list[str]]:
            found = await txn.get(email_key(normalise_email(email)))
            if found is None:
                raise Problem("contended", "The account was just erased; run this again")
            before = (await read_user(txn, int(found.value))).user
            user = msgspec.structs.replace(before, name=name, age=age, is_blocked=False, blocked_reason="")
            user = await move_role(txn, user, role)
            action = Action.PASSWORD_CHANGED
            ended = await self.set_password(txn, user, password_hash, action, OPERATOR, actor=0)
            if before.role is not role:
                details = {"from": before.role.value, "to": role.value}
                await self._audit.write(txn, Action.ROLE_CHANGED, OPERATOR, actor=0, subject=user.id, details=details)
            return user, ended

        user, ended = await self._store.run_transaction(body)
        self._sessions.forget(ended)
        return user


def account_absent(user: User) -> list[kvstore.Compare]:
    """That neither this account nor another with its email exists, and that its id was never used."""
    return [_absent(email_key(normalise_email(user.email))), _absent(user_key(user.id)), _absent(erased_key(user.id))]


def account_puts(user: User) -> list[kvstore.Put]:
    """The record of a new account, and its places in the indexes."""
    return [
        kvstore.Put(user_key(user.id), encode(user)),
        kvstore.Put(email_key(normalise_email(user.email)), b"%d" % user.id),
        kvstore.Put(newest_key(user.id), b""),
        kvstore.Put(role_key(user.role, user.id), b""),
    ]


async def move_role(txn: kvstore.Transaction, user: User, role: Role) -> User:
    """`user` with that role, and its place in the index of roles; the caller puts the record. Raises `Problem`
    `last_admin`: of two admins who take the role from each other at once, one keeps it."""
    if user.role is role:
        return user
    if user.role is Role.ADMIN:
        admins = await txn.range(prefix=roles_of(Role.ADMIN), limit=2, keys_only=True)
        if admins.count < 2:
            raise Problem("last_admin", "Make someone else an admin first")
    txn.delete(role_key(user.role, user.id))
    txn.put(role_key(role, user.id), b"")
    return msgspec.structs.replace(user, role=role)


def _absent(key: bytes) -> kvstore.Compare:
    return kvstore.Compare(key, kvstore.Target.VERSION, kvstore.Relation.EQUAL, 0)
