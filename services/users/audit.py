"""The audit log: what was done to accounts, by whom and from where.

An entry is written by the transaction whose effect it records, so there is no effect without its entry and none twice.
What has no other effect (a wrong password) is a transaction of its own. Attempts that a throttle turned away are not
recorded one by one: the throttle bounds what an attacker can make us write, and an entry for each would undo that.

Kept for `KEPT_S`. Entries name users by id only. When an account is erased its entries stay, without address, agent
and details, until they end.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from enum import StrEnum
from typing import Final

from aiohttp import web
from msgspec import Struct

import kvstore
from services.users.records import AUDIT, AuditEntry, activity_key, activity_of, audit_key, decode_entry, encode
from services.web.answers import REQUEST_ID
from services.web.clients import client_address, user_agent
from services.web.ids import Timestamp, timestamp
from services.web.leases import SharedLease
from services.web.paging import Page, PageQuery, page_of

KEPT_S: Final = 180 * 24 * 3600.0  # half a year: intrusions are found months later, and no longer than that is needed
_LEASE_FILLS_S: Final = 24 * 3600.0
_RECORDS_EACH: Final = 3  # the entry, and its place in the activity of its subject and of its actor


class Action(StrEnum):
    REGISTERED = "registered"
    SIGNED_IN = "signed_in"
    SIGN_IN_FAILED = "sign_in_failed"
    SIGN_IN_BLOCKED = "sign_in_blocked"
    SESSION_ENDED = "session_ended"
    SESSIONS_ENDED = "sessions_ended"
    REFRESH_REUSED = "refresh_token_reused"
    PASSWORD_WRONG = "password_wrong"
    PASSWORD_CHANGED = "password_changed"
    RESET_REQUESTED = "password_reset_requested"
    PASSWORD_RESET = "password_reset"
    PROFILE_CHANGED = "profile_changed"
    ADDRESS_ADDED = "address_added"
    ADDRESS_CHANGED = "address_changed"
    ADDRESS_DELETED = "address_deleted"
    EMAIL_CHANGE_REQUESTED = "email_change_requested"
    EMAIL_CHANGED = "email_changed"
    ROLE_CHANGED = "role_changed"
    BLOCKED = "blocked"
    UNBLOCKED = "unblocked"
    KEYS_ROTATED = "signing_keys_rotated"
    EXPORTED = "exported"
    ERASED = "erased"


class Origin(Struct, frozen=True):
    """Where a request comes from, for the log."""

    address: str
    user_agent: str
    request_id: str


OPERATOR: Final = Origin("", "python -m services", "")


def origin_of(request: web.Request) -> Origin:
    return Origin(client_address(request), user_agent(request), request[REQUEST_ID])


class AuditEntryBody(Struct, frozen=True):
    """`actor` or `subject` null: nobody who signed in, no account that exists."""

    id: str
    at: Timestamp
    action: str
    actor: int | None
    subject: int | None
    address: str
    user_agent: str
    request_id: str
    details: dict[str, str]


class ActivityBody(Struct, frozen=True):
    """What happened to one's account. Where someone else did it (staff), from where is their own business."""

    at: Timestamp
    action: str
    by_me: bool
    address: str
    user_agent: str
    details: dict[str, str]


class AuditLog:
    """One per process."""

    def __init__(self, store: kvstore.Client, clock_ms: Callable[[], int]) -> None:
        self._store = store
        self._clock_ms = clock_ms
        self._lease = SharedLease(store, KEPT_S, _LEASE_FILLS_S)

    async def puts(
        self, action: Action, origin: Origin, *, actor: int, subject: int, details: dict[str, str] | None = None
    ) -> list[kvstore.Put]:
        """An entry, for the transaction that has the effect."""
        lease = await self._lease.take(_RECORDS_EACH)
        entry = AuditEntry(
            secrets.token_hex(8),
            self._clock_ms(),
            action,
            actor,
            subject,
            origin.address,
            origin.user_agent,
            origin.request_id,
            details or {},
        )
        # What nobody did is filed under its subject only: as much is written for an account that is not there.
        about = {subject, actor or subject}
        indexes = [activity_key(user_id, entry.at_ms, entry.id) for user_id in sorted(about)]
        return [
            kvstore.Put(audit_key(entry.at_ms, entry.id), encode(entry), lease=lease),
            *(kvstore.Put(key, b"", lease=lease) for key in indexes),
        ]

    async def write(
        self,
        txn: kvstore.Transaction,
        action: Action,
        origin: Origin,
        *,
        actor: int,
        subject: int,
        details: dict[str, str] | None = None,
    ) -> None:
        """The same, put into `txn`."""
        for put in await self.puts(action, origin, actor=actor, subject=subject, details=details):
            txn.put(put.key, put.value, lease=put.lease)

    async def append(self, action: Action, origin: Origin, *, actor: int, subject: int) -> None:
        """Where nothing else changes."""
        await self._store.txn(success=await self.puts(action, origin, actor=actor, subject=subject))

    async def page(self, query: PageQuery, user_id: int | None) -> Page[AuditEntryBody]:
        """All entries, or those about and by one user."""
        prefix = AUDIT if user_id is None else activity_of(user_id)

        async def read(records: list[kvstore.Record]) -> list[AuditEntryBody]:
            entries = await self.entries([record.key[len(prefix) :] for record in records])
            return [_entry_body(entry) for entry in entries]

        return await page_of(self._store, prefix, query, read)

    async def activity(self, query: PageQuery, user_id: int) -> Page[ActivityBody]:
        prefix = activity_of(user_id)

        async def read(records: list[kvstore.Record]) -> list[ActivityBody]:
            entries = await self.entries([record.key[len(prefix) :] for record in records])
            return [activity_body(entry, user_id) for entry in entries]

        return await page_of(self._store, prefix, query, read)

    async def entries(self, names: list[bytes]) -> list[AuditEntry]:
        """The entries by the ends of their keys, a hundred at most; those that are no longer there are left out."""
        if not names:
            return []
        found = await self._store.txn(success=[kvstore.Range(AUDIT + name) for name in names])
        records = [record for one in found.results if isinstance(one, kvstore.RangeResult) for record in one.records]
        return [decode_entry(record.value) for record in records]


def _entry_body(entry: AuditEntry) -> AuditEntryBody:
    return AuditEntryBody(
        entry.id,
        timestamp(entry.at_ms),
        entry.action,
        entry.actor or None,
        entry.subject or None,
        entry.address,
        entry.user_agent,
        entry.request_id,
        entry.details,
    )


def activity_body(entry: AuditEntry, user_id: int) -> ActivityBody:
    by_another = entry.actor not in (0, user_id)
    return ActivityBody(
        timestamp(entry.at_ms),
        entry.action,
        entry.actor == user_id,
        "" if by_another else entry.address,
        "" if by_another else entry.user_agent,
        entry.details,
    )
