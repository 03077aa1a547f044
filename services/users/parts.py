"""How the parts of the user service fit together, for its application and for commands."""

from __future__ import annotations

from collections.abc import Callable

from msgspec import Struct

import kvstore
from services.users.accounts import Accounts
from services.users.administration import Administration
from services.users.audit import OPERATOR, Action, AuditLog
from services.users.credentials import Credentials
from services.users.erasure import FORGET_KIND, Erasure, Retention
from services.users.mail import FileMailer, Mailer
from services.users.mailing import KIND, Mailing
from services.users.passwords import Passwords
from services.users.postal import PostalAddresses
from services.users.records import NOBODY, QUEUE, User
from services.users.recovery import Recovery
from services.users.sessions import Sessions
from services.users.throttle import Throttle
from services.web.ids import now_ms
from services.web.key_rotation import rotate
from services.web.tokens import Role, SigningKeys, Tokens
from services.work.worker import Worker

MAIL_DIRECTORY = "data/mail"


class Settings(Struct, frozen=True, kw_only=True):
    """What a deployment decides. `clock_ms` is for tests."""

    mailer: Mailer = FileMailer(MAIL_DIRECTORY)
    retention: Retention = Retention()
    clock_ms: Callable[[], int] = now_ms


class Parts:
    """One of each."""

    def __init__(self, store: kvstore.Client, tokens: Tokens, passwords: Passwords, settings: Settings) -> None:
        clock_ms = settings.clock_ms
        self.tokens = tokens
        self.passwords = passwords
        self.audit = AuditLog(store, clock_ms)
        throttle = Throttle(store, clock_ms)
        self.sessions = Sessions(store, tokens, self.audit, clock_ms)
        credentials = Credentials(store, passwords, throttle, self.audit)
        self.accounts = Accounts(store, passwords, credentials, self.sessions, throttle, self.audit, clock_ms)
        self.recovery = Recovery(
            store, passwords, credentials, self.accounts, self.sessions, throttle, self.audit, clock_ms
        )
        self.postal = PostalAddresses(store, self.audit, clock_ms)
        self.administration = Administration(store, self.sessions, self.audit)
        self.erasure = Erasure(store, credentials, self.sessions, self.audit, settings.retention, clock_ms)
        mailing = Mailing(store, settings.mailer, clock_ms)
        self.worker = Worker(store, {KIND: mailing.handle, FORGET_KIND: self.erasure.forget_activity}, queue=QUEUE)


async def rotate_keys(store: kvstore.Client, *, drop_old: bool) -> str:
    """For commands: a new key to sign access tokens with, and its entry in the audit log. Returns the key's id."""
    audit = AuditLog(store, now_ms)

    async def record(txn: kvstore.Transaction, kid: str) -> None:
        details = {"key": kid, "old_keys": "dropped" if drop_old else "kept until what they signed has expired"}
        await audit.write(txn, Action.KEYS_ROTATED, OPERATOR, actor=NOBODY, subject=NOBODY, details=details)

    return await rotate(store, drop_old=drop_old, also=record)


async def create_staff(
    store: kvstore.Client, email: str, password: str, name: str, age: int, role: Role, *, replace: bool
) -> User:
    """For commands. Raises `Problem`."""
    passwords = Passwords()
    try:
        accounts = Parts(store, Tokens(SigningKeys(store)), passwords, Settings()).accounts
        if replace:
            return await accounts.ensure(email, password, name, age, role)
        return await accounts.register(email, password, name, age, OPERATOR, role)
    finally:
        passwords.close()
