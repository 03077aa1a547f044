"""Everything that is held of a user, to take along; and its erasure.

Erasure is one transaction: the account, its places in the indexes, sessions, addresses and mailed tokens go, and
`erased-user/{id}` comes, which keeps the id from being used again. A durable step then takes network addresses and
agents out of the audit log's entries about it. Orders stay; another step, which the order service's workers do as soon
as no token of the account is good any more, takes from them what names the person. An order that is under way keeps
where it goes to until it has arrived or ended, and no longer than `Retention.orders_s`.
Counts of attempts name the account by a hash of its email, and end within four hours; the notice of an email change
that its mailer does not take names the former email for half an hour.

What was current is still in the store's history and log until they are compacted, and in backups until they expire. How
long that takes is for the deployment to say (`Retention`); the answer gives the date by which all of it is gone, and
the date for what orders under way may keep.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgspec
from msgspec import Struct

import kvstore
from services.users.audit import Action, ActivityBody, AuditLog, Origin, activity_body
from services.users.credentials import Credentials, read_user, wrong_password
from services.users.emails import normalise_email
from services.users.postal import AddressBody, address_body
from services.users.records import (
    AUDIT,
    QUEUE,
    AuditEntry,
    ErasedUser,
    activity_of,
    addresses_of,
    decode_address,
    decode_email_change,
    decode_entry,
    decode_known,
    decode_mailed,
    decode_session,
    email_change_key,
    email_key,
    encode,
    erased_key,
    known_key,
    mailed_of,
    newest_key,
    role_key,
    sessions_of,
    user_key,
)
from services.users.sessions import Sessions
from services.users.throttle import Count, counts_of
from services.web.ids import Timestamp, timestamp
from services.web.problems import Problem
from services.web.tokens import TOKEN_GONE_AFTER_S, Role
from services.work import steps
from services.work.kinds import FORGET_CUSTOMER
from services.work.steps import StepRun

FORGET_KIND: Final = "users.forget-activity"

# The newest of them, so that the answer stays a few megabytes; the rest is in pages at /v1/users/me/activity.
ACTIVITY_MAX: Final = 5000
_BATCH: Final = 100
# The longest of what ends by itself: counts of attempts (four hours), and answers kept for idempotency (26 hours).
_TRANSIENT_S: Final = 26 * 3600


class Retention(Struct, frozen=True, kw_only=True):
    """How long the deployment keeps what is no longer current. `history_s`: as the nodes' `--history-age`; `log_s`: the
    oldest entry of their logs; `backups_s`: until the last backup of today is deleted. `orders_s` is another thing: how
    long, from when no token is good any more, an order may be under way and keep where it goes to."""

    history_s: int = 3600
    log_s: int = 24 * 3600
    backups_s: int = 30 * 24 * 3600
    orders_s: int = 90 * 24 * 3600

    def free_by_ms(self, erased_ms: int) -> int:
        """They run side by side: a backup that is taken later holds nothing of them."""
        return erased_ms + 1000 * max(self.history_s, self.log_s, self.backups_s, _TRANSIENT_S)


class SessionExport(Struct, frozen=True):
    id: str
    created_at: Timestamp
    last_used_at: Timestamp
    expires_at: Timestamp
    address: str
    user_agent: str


class MailedExport(Struct, frozen=True):
    purpose: str
    email: str
    created_at: Timestamp
    expires_at: Timestamp


class AttemptsExport(Struct, frozen=True):
    """How many attempts were counted by a rule, from one address or (empty) from all, at the time of the last; the
    number sinks with time. None is let through before `next_at`."""

    rule: str
    address: str
    level: float
    last_at: Timestamp
    next_at: Timestamp


class AccountExport(Struct, frozen=True):
    id: int
    email: str
    name: str
    age: int
    role: Role
    created_at: Timestamp
    password_changed_at: Timestamp
    is_blocked: bool
    blocked_reason: str


class ExportBody(Struct, frozen=True):
    """`activity_is_complete` is false where there is more at `/v1/users/me/activity`. Of secrets (the password, tokens)
    only hashes are held; they are left out."""

    exported_at: Timestamp
    account: AccountExport
    addresses: list[AddressBody]
    sessions: list[SessionExport]
    known_addresses: list[str]
    waiting_email: str | None
    mailed: list[MailedExport]
    attempts: list[AttemptsExport]
    activity: list[ActivityBody]
    activity_is_complete: bool


class Erasure:
    """One per process."""

    def __init__(
        self,
        store: kvstore.Client,
        credentials: Credentials,
        sessions: Sessions,
        audit: AuditLog,
        retention: Retention,
        clock_ms: Callable[[], int],
    ) -> None:
        self._store = store
        self._credentials = credentials
        self._sessions = sessions
        self._audit = audit
        self._retention = retention
        self._clock_ms = clock_ms

    async def export(self, user_id: int, origin: Origin) -> ExportBody:
        """As of one revision, but for the activity. Raises `Problem` `not_found`."""
        async with self._store.transaction() as txn:
            user = (await read_user(txn, user_id)).user
            addresses = await txn.range(prefix=addresses_of(user_id))
            sessions = await txn.range(prefix=sessions_of(user_id))
            mailed = await txn.range(prefix=mailed_of(user_id))
            known = await txn.get(known_key(user_id))
            waiting = await txn.get(email_change_key(user_id))
            counts = await counts_of(txn, normalise_email(user.email), user_id)
        activity, is_complete = await self._activity(user_id)
        await self._audit.append(Action.EXPORTED, origin, actor=user_id, subject=user_id)
        return ExportBody(
            timestamp(self._clock_ms()),
            AccountExport(
                user.id,
                user.email,
                user.name,
                user.age,
                user.role,
                timestamp(user.created_ms),
                timestamp(user.password_changed_ms or user.created_ms),
                user.is_blocked,
                user.blocked_reason,
            ),
            [address_body(decode_address(record.value)) for record in addresses.records],
            [_session_export(record) for record in sessions.records],
            list(decode_known(known.value).addresses) if known is not None else [],
            decode_email_change(waiting.value).email if waiting is not None else None,
            [_mailed_export(record) for record in mailed.records],
            [_attempts_export(count) for count in counts],
            activity,
            is_complete,
        )

    async def _activity(self, user_id: int) -> tuple[list[ActivityBody], bool]:
        prefix = activity_of(user_id)
        names: list[bytes] = []
        async for record in self._store.scan(prefix=prefix, keys_only=True):
            names.append(record.key[len(prefix) :])
            if len(names) > ACTIVITY_MAX:
                break
        entries: list[ActivityBody] = []
        for start in range(0, min(len(names), ACTIVITY_MAX), _BATCH):
            batch = await self._audit.entries(names[start : start + _BATCH])
            entries += [activity_body(entry, user_id) for entry in batch]
        return entries, len(names) <= ACTIVITY_MAX

    async def erase(self, user_id: int, password: str, origin: Origin) -> ErasedUser:
        """Raises `Problem`: `wrong_password`, `sign_in_throttled`, `admin_account`, `not_found`."""
        checked = await self._credentials.confirm(user_id, password, origin, "/password")

        async def body(txn: kvstore.Transaction) -> tuple[ErasedUser, list[str]]:
            stored = await read_user(txn, user_id)
            user = stored.user
            if not self._credentials.still_holds(txn, checked, stored):
                raise wrong_password("/password")
            if user.role is Role.ADMIN:
                raise Problem("admin_account", "Have another admin take the role away first")
            ended = await self._sessions.end_all(txn, user_id)
            for key in (
                user_key(user_id),
                email_key(normalise_email(user.email)),
                newest_key(user_id),
                role_key(user.role, user_id),
                known_key(user_id),
                email_change_key(user_id),
            ):
                txn.delete(key)
            for prefix in (addresses_of(user_id), mailed_of(user_id)):
                await txn.delete_range(prefix=prefix)
            now = self._clock_ms()
            # Until then a token that was taken along may still place an order that is sent somewhere.
            last_copy_ms = now + int(TOKEN_GONE_AFTER_S * 1000)
            orders_by_ms = last_copy_ms + self._retention.orders_s * 1000
            free_by_ms, orders_free_by_ms = map(self._retention.free_by_ms, (last_copy_ms, orders_by_ms))
            erased = ErasedUser(user_id, now, free_by_ms, orders_free_by_ms)
            txn.put(erased_key(user_id), encode(erased))
            for forget in (
                steps.put(FORGET_KIND, str(user_id), queue=QUEUE, user=user_id),
                steps.put(FORGET_CUSTOMER, str(user_id), due_ms=last_copy_ms, by_ms=orders_by_ms),
            ):
                txn.put(forget.key, forget.value)
            nowhere = Origin("", "", origin.request_id)
            await self._audit.write(txn, Action.ERASED, nowhere, actor=user_id, subject=user_id)
            return erased, ended

        erased, ended = await self._store.run_transaction(body)
        self._sessions.forget(ended)
        return erased

    async def forget_activity(self, run: StepRun) -> None:
        """The step after an erasure. Doing it twice does no more than once."""
        user_id = int(run.step.arguments["user"])
        prefix = activity_of(user_id)
        while True:
            found = await self._store.range(prefix=prefix, keys_only=True, limit=_BATCH)
            if not found.records:
                break
            await self._forget([record.key[len(prefix) :] for record in found.records], user_id)
        await run.finish()

    async def _forget(self, names: list[bytes], user_id: int) -> None:
        found = await self._store.txn(success=[kvstore.Range(AUDIT + name) for name in names])
        records = [record for one in found.results if isinstance(one, kvstore.RangeResult) for record in one.records]
        compare: list[kvstore.Compare] = []
        success: list[kvstore.Operation] = [kvstore.Delete(activity_of(user_id) + name) for name in names]
        for record in records:
            # Its lease may end meanwhile, and the entry with it: then this is done again without it.
            compare.append(
                kvstore.Compare(record.key, kvstore.Target.MOD_REVISION, kvstore.Relation.EQUAL, record.mod_revision)
            )
            forgotten = encode(_forgotten(decode_entry(record.value), user_id))
            success.append(kvstore.Put(record.key, forgotten, lease=record.lease))
        await self._store.txn(compare=compare, success=success)


def _forgotten(entry: AuditEntry, user_id: int) -> AuditEntry:
    """Without what tells of the user. What someone else did to the account is that one's doing, and stays."""
    if entry.actor not in (0, user_id):
        return entry
    return msgspec.structs.replace(entry, address="", user_agent="", details={})


def _session_export(record: kvstore.Record) -> SessionExport:
    session = decode_session(record.value)
    return SessionExport(
        session.id,
        timestamp(session.created_ms),
        timestamp(session.refreshed_ms),
        timestamp(session.expires_ms),
        session.address,
        session.user_agent,
    )


def _attempts_export(count: Count) -> AttemptsExport:
    attempts = count.attempts
    return AttemptsExport(
        count.rule, count.address, round(attempts.level, 3), timestamp(attempts.at_ms), timestamp(attempts.next_ms)
    )


def _mailed_export(record: kvstore.Record) -> MailedExport:
    mailed = decode_mailed(record.value)
    return MailedExport(mailed.purpose, mailed.email, timestamp(mailed.created_ms), timestamp(mailed.expires_ms))
