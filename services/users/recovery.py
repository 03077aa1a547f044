"""Getting in again by mail: a new password for who forgot it, and another email for who is signed in.

A reset is asked for by anyone, for any email, and the answer is the same: 202, after the same reads and writes; whether
there is such an account only the worker finds out, later. Tokens are good for half an hour, once, and are void when the
password or the email changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgspec

import kvstore
from services.users.accounts import Accounts
from services.users.audit import Action, AuditLog, Origin
from services.users.credentials import (
    Credentials,
    learn_address,
    read_user,
    wrong_password,
)
from services.users.emails import email_or_none, normalise_email
from services.users.mailing import (
    CONFIRM_EMAIL,
    NOTICE_EMAIL,
    RESET,
    TOKEN_TTL_S,
    ask_for_mail,
    mail_step,
    split_token,
)
from services.users.passwords import Passwords, check_password
from services.users.records import (
    NOBODY,
    EmailChange,
    MailedToken,
    StoredUser,
    User,
    decode_email_change,
    decode_mailed,
    decode_user,
    email_change_key,
    email_key,
    encode,
    mailed_key,
    mailed_of,
    user_key,
)
from services.users.sessions import Sessions
from services.users.throttle import MAIL_ACCOUNT, MAIL_ADDRESS, SIGN_IN_PAIR, Counted, Throttle, account_name
from services.web.clients import counted_address
from services.web.ids import parse_id
from services.web.leases import SharedLease
from services.web.problems import Problem, field_problem

_LEASE_FILLS_S: Final = 1800.0


class Recovery:
    """One per process."""

    def __init__(
        self,
        store: kvstore.Client,
        passwords: Passwords,
        credentials: Credentials,
        accounts: Accounts,
        sessions: Sessions,
        throttle: Throttle,
        audit: AuditLog,
        clock_ms: Callable[[], int],
    ) -> None:
        self._store = store
        self._passwords = passwords
        self._credentials = credentials
        self._accounts = accounts
        self._sessions = sessions
        self._throttle = throttle
        self._audit = audit
        self._clock_ms = clock_ms
        # The change waits until the mail is sent, and then for as long as its token is good.
        self._lease = SharedLease(store, 2 * TOKEN_TTL_S, _LEASE_FILLS_S)

    # --- a new password -----------------------------------------------------------------------------------------------

    async def ask_for_reset(self, email: str, origin: Origin) -> None:
        """Raises `Problem` `mail_throttled`, for emails that exist and for others alike."""
        normalised = email_or_none(email)
        await self._take(account_name(normalised or email), origin)
        found = await self._store.get(email_key(normalised or ""))
        user_id = NOBODY if found is None else int(found.value)
        puts = await self._audit.puts(Action.RESET_REQUESTED, origin, actor=NOBODY, subject=user_id)
        await self._store.txn(success=[mail_step(RESET, user_id), *puts])

    async def reset(self, token: str, new: str, origin: Origin) -> None:
        """Set a new password, and end all sessions. Raises `Problem`: `invalid_mail_token`, `common_password`."""
        user_id, key = _place_of(token)
        # Before the hash, which costs 25 ms: whoever makes tokens up must not have them for nothing.
        record, owner = await self._store.get(key), await self._store.get(user_key(user_id))
        self._good(record, RESET)
        if owner is None:
            raise _invalid()
        check_password(new, normalise_email(decode_user(owner.value).email))
        password_hash = await self._passwords.hash(new)

        async def body(txn: kvstore.Transaction) -> list[str]:
            self._good(await txn.get(key), RESET)
            user = (await self._user(txn, user_id)).user
            await learn_address(txn, user_id, origin)
            address = counted_address(origin.address)
            if address is not None:
                txn.delete(Counted(SIGN_IN_PAIR, f"{account_name(normalise_email(user.email))}/{address}").key)
            action = Action.PASSWORD_RESET
            return await self._accounts.set_password(txn, user, password_hash, action, origin, actor=user_id)

        self._sessions.forget(await self._store.run_transaction(body))

    # --- another email ------------------------------------------------------------------------------------------------

    async def ask_for_email(self, user_id: int, password: str, email: str, origin: Origin) -> None:
        """Send a token to the new address. An earlier change that waits is given up. Raises `Problem`:
        `wrong_password`, `sign_in_throttled`, `mail_throttled`, `invalid_body`."""
        normalise_email(email)
        checked = await self._credentials.confirm(user_id, password, origin, "/password")
        await self._take(f"user-{user_id}", origin)

        async def body(txn: kvstore.Transaction) -> None:
            if not self._credentials.still_holds(txn, checked, await read_user(txn, user_id)):
                raise wrong_password("/password")
            change = EmailChange(email.strip(), self._clock_ms())
            txn.put(email_change_key(user_id), encode(change), lease=await self._lease.take())
            ask_for_mail(txn, CONFIRM_EMAIL, user_id)
            action = Action.EMAIL_CHANGE_REQUESTED
            await self._audit.write(txn, action, origin, actor=user_id, subject=user_id)

        await self._store.run_transaction(body)

    async def confirm_email(self, token: str, origin: Origin) -> None:
        """The account's email is from now on where the token was sent. Raises `Problem`: `invalid_mail_token`,
        `email_taken` (to who reads that mailbox)."""
        user_id, key = _place_of(token)

        async def body(txn: kvstore.Transaction) -> None:
            mailed = self._good(await txn.get(key), CONFIRM_EMAIL)
            user = (await self._user(txn, user_id)).user
            waiting = await txn.get(email_change_key(user_id))
            if waiting is None or decode_email_change(waiting.value).email != mailed.email:
                raise _invalid()
            before, after = email_key(normalise_email(user.email)), email_key(normalise_email(mailed.email))
            if after != before:
                if await txn.get(after) is not None:
                    raise Problem("email_taken", "Sign in to that account, or choose another email")
                txn.delete(before)
                txn.put(after, b"%d" % user_id)
            txn.put(user_key(user_id), encode(msgspec.structs.replace(user, email=mailed.email)))
            txn.delete(email_change_key(user_id))
            await txn.delete_range(prefix=mailed_of(user_id))
            ask_for_mail(txn, NOTICE_EMAIL, user_id, to=user.email)
            await self._audit.write(txn, Action.EMAIL_CHANGED, origin, actor=user_id, subject=user_id)

        await self._store.run_transaction(body)

    # --- inside -------------------------------------------------------------------------------------------------------

    async def _take(self, whom: str, origin: Origin) -> None:
        address = counted_address(origin.address)
        counts = [Counted(MAIL_ACCOUNT, whom), *([Counted(MAIL_ADDRESS, address)] if address else [])]
        await self._throttle.take("mail_throttled", counts)

    def _good(self, record: kvstore.Record | None, purpose: str) -> MailedToken:
        mailed = decode_mailed(record.value) if record is not None else None
        if mailed is None or mailed.purpose != purpose or self._clock_ms() >= mailed.expires_ms:
            raise _invalid()
        return mailed

    @staticmethod
    async def _user(txn: kvstore.Transaction, user_id: int) -> StoredUser:
        record = await txn.get(user_key(user_id))
        if record is None:
            raise _invalid()
        user: User = decode_user(record.value)
        return StoredUser(user, record.mod_revision)


def _place_of(token: str) -> tuple[int, bytes]:
    user, token_hash = split_token(token)
    user_id = parse_id(user) if user else None
    if user_id is None:
        raise _invalid()
    return user_id, mailed_key(user_id, token_hash)


def _invalid() -> Problem:
    return field_problem(
        "/token",
        "invalid_mail_token",
        "Ask for a new mail: this token was used, is over half an hour old, or is none",
        problem="invalid_mail_token",
    )
