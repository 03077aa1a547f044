"""What staff and admins do with others' accounts: find, change the role, block, end sessions.

An admin's account can be neither blocked nor erased: its role is taken away first, and the last admin's cannot be. So
there is always one who can sign in. A new role or a block ends the account's sessions, so that access tokens that say
otherwise are refused within ten seconds.
"""

from __future__ import annotations

import unicodedata
from typing import Annotated

import msgspec
from msgspec import Meta

import kvstore
from services.users.accounts import move_role
from services.users.audit import Action, AuditLog, Origin
from services.users.credentials import read_user
from services.users.records import (
    EMAILS,
    NEWEST,
    User,
    decode_user,
    encode,
    roles_of,
    user_key,
    user_of_index,
)
from services.users.sessions import Sessions
from services.web.paging import Page, PageQuery, page_of
from services.web.problems import FieldError, Problem
from services.web.tokens import Role

Emails = Annotated[str, Meta(min_length=1, max_length=254, description="What their emails begin with; then in order.")]


class UsersQuery(PageQuery, frozen=True):
    """One filter at a time: each has an index of its own."""

    email: Emails | None = None
    role: Role | None = None


class Administration:
    """One per process."""

    def __init__(self, store: kvstore.Client, sessions: Sessions, audit: AuditLog) -> None:
        self._store = store
        self._sessions = sessions
        self._audit = audit

    async def page(self, query: UsersQuery) -> Page[User]:
        """Newest first; with `email`, in the order of emails. Raises `Problem` `invalid_parameter`."""
        if query.email is not None and query.role is not None:
            wrong = FieldError("/role", "not_combinable", "Filter by email or by role, not both", "query")
            raise Problem("invalid_parameter", wrong.message, errors=(wrong,))
        if query.email is not None:
            prefix = EMAILS + unicodedata.normalize("NFKC", query.email.strip()).casefold().encode("utf-8", "replace")
            return await page_of(self._store, prefix, query, self._by_email)
        prefix = NEWEST if query.role is None else roles_of(query.role)
        return await page_of(self._store, prefix, query, self._by_index)

    async def change_role(self, user_id: int, role: Role, origin: Origin, *, actor: int) -> User:
        """Raises `Problem`: `not_found`, `last_admin`, `account_blocked` (a blocked one becomes no admin)."""

        async def body(txn: kvstore.Transaction) -> tuple[User, list[str]]:
            before = (await read_user(txn, user_id)).user
            if before.role is role:
                return before, []
            if before.is_blocked and role is Role.ADMIN:
                raise Problem("account_blocked", "Unblock it first")
            user = await move_role(txn, before, role)
            txn.put(user_key(user_id), encode(user))
            details = {"from": before.role.value, "to": role.value}
            await self._audit.write(txn, Action.ROLE_CHANGED, origin, actor=actor, subject=user_id, details=details)
            return user, await self._sessions.end_all(txn, user_id)

        return self._done(await self._store.run_transaction(body))

    async def block(self, user_id: int, reason: str, origin: Origin, *, actor: int) -> User:
        """Raises `Problem`: `not_found`, `admin_account`."""

        async def body(txn: kvstore.Transaction) -> tuple[User, list[str]]:
            before = (await read_user(txn, user_id)).user
            if before.role is Role.ADMIN:
                raise Problem("admin_account", "Take the role away first")
            user = msgspec.structs.replace(before, is_blocked=True, blocked_reason=reason)
            if user == before:
                return before, []
            txn.put(user_key(user_id), encode(user))
            await self._audit.write(txn, Action.BLOCKED, origin, actor=actor, subject=user_id)
            return user, await self._sessions.end_all(txn, user_id)

        return self._done(await self._store.run_transaction(body))

    async def unblock(self, user_id: int, origin: Origin, *, actor: int) -> User:
        """Raises `Problem` `not_found`."""

        async def body(txn: kvstore.Transaction) -> tuple[User, list[str]]:
            before = (await read_user(txn, user_id)).user
            user = msgspec.structs.replace(before, is_blocked=False, blocked_reason="")
            if user != before:
                txn.put(user_key(user_id), encode(user))
                await self._audit.write(txn, Action.UNBLOCKED, origin, actor=actor, subject=user_id)
            return user, []

        return self._done(await self._store.run_transaction(body))

    def _done(self, changed: tuple[User, list[str]]) -> User:
        user, ended = changed
        self._sessions.forget(ended)
        return user

    async def _by_email(self, records: list[kvstore.Record]) -> list[User]:
        return await self._users([int(record.value) for record in records])

    async def _by_index(self, records: list[kvstore.Record]) -> list[User]:
        return await self._users([user_of_index(record.key) for record in records])

    async def _users(self, ids: list[int]) -> list[User]:
        """Those that are there still, in that order; a page's worth."""
        if not ids:
            return []
        found = await self._store.txn(success=[kvstore.Range(user_key(user_id)) for user_id in ids])
        records = [record for one in found.results if isinstance(one, kvstore.RangeResult) for record in one.records]
        return [decode_user(record.value) for record in records]
