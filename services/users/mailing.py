"""Mails as durable steps: asked for by the transaction that makes them necessary, sent by a worker.

Tokens are drawn by the worker. A step says only which kind of mail for which user, so a token stands in no record: its
hash does (`mailed/…`), written before the mail goes out. A mail that is sent again, after a worker died or the mailer
failed, carries a new token; the earlier one stays good for its time, in case it did arrive.

Who asks for a mail learns nothing about accounts: for an email that nobody has the same step is written, for user 0,
and the worker drops it.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Final

import structlog
from msgspec import Struct

import kvstore
from services.users.mail import Mail, Mailer, send
from services.users.records import (
    QUEUE,
    MailedToken,
    User,
    decode_email_change,
    decode_user,
    email_change_key,
    encode,
    mailed_key,
    secret_hash,
    user_key,
)
from services.web.ids import now_ms
from services.web.leases import SharedLease
from services.work import steps
from services.work.steps import Again, StepRun

KIND: Final = "users.mail"

# What the mail is for.
RESET: Final = "password-reset"
CONFIRM_EMAIL: Final = "email-change"
NOTICE_PASSWORD: Final = "password-changed"
NOTICE_EMAIL: Final = "email-changed"

TOKEN_TTL_S: Final = 1800  # long enough to find the mail, and no longer
WANTED_S: Final = 1800  # nobody waits for a mail that long, and a step must not outlive what it is about
_LEASE_FILLS_S: Final = 1800.0
TOKEN_CHARS_MAX: Final = 100  # ours have 60 at most

log = structlog.get_logger("services.users")


class _Text(Struct, frozen=True):
    subject: str
    text: str


_TEXTS: Final = {
    RESET: _Text(
        "Set a new password",
        "Hello {name},\n\nsomeone, probably you, asked for a new password. This code is good for 30 minutes, once:\n\n"
        "{token}\n\nIf it was not you, do nothing: your password stays as it is.\n",
    ),
    CONFIRM_EMAIL: _Text(
        "Confirm your new email address",
        "Hello {name},\n\nto use this address for your account from now on, confirm it with this code within 30 "
        "minutes:\n\n{token}\n\nIf you did not ask for this, do nothing.\n",
    ),
    NOTICE_PASSWORD: _Text(
        "Your password was changed",
        "Hello {name},\n\nyour password was changed, and your other devices were signed out. If it was not you, ask "
        "for a new password now.\n",
    ),
    NOTICE_EMAIL: _Text(
        "Your email address was changed",
        "Hello {name},\n\nyour account uses another email address from now on. If it was not you, tell the shop.\n",
    ),
}


def mail_step(purpose: str, user_id: int, to: str = "") -> kvstore.Put:
    """`to` is only for an address that the account no longer has."""
    subject = f"{purpose}/{user_id}/{secrets.token_hex(8)}"
    return steps.put(KIND, subject, queue=QUEUE, purpose=purpose, user=user_id, to=to)


def ask_for_mail(txn: kvstore.Transaction, purpose: str, user_id: int, to: str = "") -> None:
    put = mail_step(purpose, user_id, to)
    txn.put(put.key, put.value)


def split_token(token: str) -> tuple[str, str]:
    """(user, hash) of a token as it was mailed; both are empty if it can be none."""
    user, _, secret = token.strip().partition(".")
    return (user, secret_hash(secret)) if secret else ("", "")


class Mailing:
    """The handler of mail steps. One per process."""

    def __init__(self, store: kvstore.Client, mailer: Mailer, clock_ms: Callable[[], int]) -> None:
        self._store = store
        self._mailer = mailer
        self._clock_ms = clock_ms
        self._lease = SharedLease(store, TOKEN_TTL_S, _LEASE_FILLS_S)

    async def handle(self, run: StepRun) -> None:
        step = run.step
        purpose, user_id = str(step.arguments["purpose"]), int(step.arguments["user"])
        mail = None
        if now_ms() <= step.created_ms + WANTED_S * 1000:
            mail = await self._mail(purpose, user_id, step.subject, str(step.arguments["to"]))
        if mail is not None:
            try:
                await send(self._mailer, mail)
            except Exception as error:  # a deployment's own code: whatever it is, the mail is not out
                log.error("mail failed", kind=purpose, user=user_id, attempt=step.attempt, exc_info=error)
                raise Again("mailer_failed") from None
        await run.finish()

    async def _mail(self, purpose: str, user_id: int, step_id: str, to: str) -> Mail | None:
        """None where there is nothing to send any more, or never was."""
        record = await self._store.get(user_key(user_id))
        user = decode_user(record.value) if record is not None else None
        if user is None or (user.is_blocked and purpose == RESET):
            return None
        token = ""
        if purpose == CONFIRM_EMAIL:
            waiting = await self._store.get(email_change_key(user_id))
            if waiting is None:
                return None
            to = decode_email_change(waiting.value).email
        if purpose in (RESET, CONFIRM_EMAIL):
            to = to or user.email
            token = await self._draw(purpose, user, to)
            if not token:
                return None
        text = _TEXTS[purpose]
        return Mail(
            step_id,
            purpose,
            to or user.email,
            user.name,
            token,
            text.subject,
            text.text.format(name=user.name, token=token),
        )

    async def _draw(self, purpose: str, user: User, to: str) -> str:
        """A new token, whose hash is in the store. Empty if the account has gone meanwhile."""
        secret, now = secrets.token_urlsafe(32), self._clock_ms()
        mailed = MailedToken(purpose, to, now, now + TOKEN_TTL_S * 1000)
        key = mailed_key(user.id, secret_hash(secret))
        lease = await self._lease.take()
        result = await self._store.txn(
            compare=[kvstore.Compare(user_key(user.id), kvstore.Target.VERSION, kvstore.Relation.GREATER, 0)],
            success=[kvstore.Put(key, encode(mailed), lease=lease)],
        )
        return f"{user.id}.{secret}" if result.succeeded else ""
