"""Endpoints for staff, who may read accounts, and for admins, who may change them."""

from __future__ import annotations

from typing import Annotated

from aiohttp import web
from msgspec import Meta

from services.users.administration import UsersQuery
from services.users.audit import AuditEntryBody, origin_of
from services.users.bodies import AccountForStaffBody, BlockInput, EndedBody, RoleInput, account_for_staff
from services.users.credentials import no_account
from services.users.parts import Parts
from services.users.records import User, encode
from services.web.answers import json_response
from services.web.endpoints import Access, Call, delete, get, put
from services.web.etags import tagged_response
from services.web.ids import ID_MAX, Id
from services.web.paging import Page, PageQuery


class AuditQuery(PageQuery, frozen=True):
    user: (
        Annotated[int, Meta(ge=0, le=ID_MAX, description="About or by this one; 0: accounts that do not exist.")] | None
    ) = None


class AdminApi:
    def __init__(self, parts: Parts) -> None:
        self._accounts = parts.accounts
        self._administration = parts.administration
        self._sessions = parts.sessions
        self._audit = parts.audit

    @get("/v1/users", {200: Page[AccountForStaffBody]}, access=Access.STAFF)
    async def list_users(self, call: Call, query: UsersQuery) -> web.Response:
        """List accounts

        Newest first; those whose emails begin with `email` in the order of emails.
        """
        page = await self._administration.page(query)
        shown = [account_for_staff(user) for user in page.data]
        return json_response(encode(Page(shown, page.has_more, page.next_cursor)))

    @get("/v1/users/{id}", {200: AccountForStaffBody, 304: None}, access=Access.STAFF)
    async def read_account(self, call: Call, id: Id) -> web.Response:
        """Read an account"""
        stored = await self._accounts.read(id)
        if stored is None:
            raise no_account()
        return tagged_response(call.request, encode(account_for_staff(stored.user)), stored.revision)

    @put(
        "/v1/users/{id}/role",
        {200: AccountForStaffBody},
        access=Access.ADMIN,
        problems=("last_admin", "account_blocked"),
    )
    async def change_role(self, call: Call, id: Id, body: RoleInput) -> web.Response:
        """Give an account a role

        Its sessions end, so that no access token says otherwise for longer than ten seconds. The last admin stays one.
        """
        origin = origin_of(call.request)
        return _answer(await self._administration.change_role(id, body.role, origin, actor=call.caller.user_id))

    @put("/v1/users/{id}/block", {200: AccountForStaffBody}, access=Access.ADMIN, problems=("admin_account",))
    async def block(self, call: Call, id: Id, body: BlockInput) -> web.Response:
        """Block an account

        It cannot sign in; its sessions end. The reason is for staff, and in the account's export.
        """
        origin = origin_of(call.request)
        return _answer(await self._administration.block(id, body.reason, origin, actor=call.caller.user_id))

    @delete("/v1/users/{id}/block", {200: AccountForStaffBody}, access=Access.ADMIN)
    async def unblock(self, call: Call, id: Id) -> web.Response:
        """Unblock an account"""
        origin = origin_of(call.request)
        return _answer(await self._administration.unblock(id, origin, actor=call.caller.user_id))

    @delete("/v1/users/{id}/sessions", {200: EndedBody}, access=Access.ADMIN)
    async def end_sessions_of(self, call: Call, id: Id) -> web.Response:
        """End all sessions of a user"""
        ended = await self._sessions.end_others(id, "", origin_of(call.request), actor=call.caller.user_id)
        return json_response(encode(EndedBody(ended)))

    @get("/v1/audit", {200: Page[AuditEntryBody]}, access=Access.ADMIN)
    async def read_audit(self, call: Call, query: AuditQuery) -> web.Response:
        """Read the audit log

        Newest first; kept for 180 days.
        """
        return json_response(encode(await self._audit.page(query, query.user)))


def _answer(user: User) -> web.Response:
    return json_response(encode(account_for_staff(user)))
