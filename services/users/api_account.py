"""Endpoints of accounts, and of one's own."""

from __future__ import annotations

from functools import partial

from aiohttp import web

from services.users.audit import ActivityBody, origin_of
from services.users.bodies import (
    AcceptedBody,
    AccountBody,
    EmailInput,
    ErasureBody,
    ErasureInput,
    PasswordInput,
    ProfileInput,
    Registration,
    UserBody,
    account_body,
)
from services.users.credentials import no_account
from services.users.erasure import ExportBody
from services.users.parts import Parts
from services.users.postal import AddressBody, address_body
from services.users.records import encode
from services.web.addresses import AddressInput
from services.web.answers import CALLER_ID, json_response
from services.web.endpoints import Access, Call, Condition, delete, get, patch, post, put
from services.web.etags import check_match, etag, tagged_response
from services.web.ids import Id, timestamp
from services.web.paging import Page, PageQuery
from services.web.problems import Problem, field_problem

_PASSWORD_PROBLEMS = ("wrong_password", "sign_in_throttled", "not_found")


class AccountApi:
    def __init__(self, parts: Parts) -> None:
        self._accounts = parts.accounts

    @post(
        "/v1/users",
        {201: AccountBody},
        reads_token=False,
        problems=("email_taken", "common_password", "registration_throttled"),
    )
    async def register(self, call: Call, body: Registration) -> web.Response:
        """Register an account

        Of a customer; sign in with it then. An Authorization header is passed over.
        """
        origin = origin_of(call.request)
        user = await self._accounts.register(body.email, body.password, body.name, body.age, origin)
        call.request[CALLER_ID] = user.id
        return json_response(encode(account_body(user)), 201, {"Location": f"/user/{user.id}"})

    @get("/user/{id}", {200: UserBody, 304: None}, access=Access.SIGNED_IN)
    async def read_user(self, call: Call, id: Id) -> web.Response:
        """Read a user

        The owner's own, or any for staff; for others there is nothing there.
        """
        stored = await self._accounts.read(id) if call.caller.user_id == id or call.caller.is_staff else None
        if stored is None:
            raise Problem("not_found", "There is no such user, or none that you may read")
        user = stored.user
        return tagged_response(call.request, encode(UserBody(user.id, user.name, user.age)), stored.revision)


class MyAccountApi:
    def __init__(self, parts: Parts) -> None:
        self._accounts = parts.accounts
        self._recovery = parts.recovery
        self._postal = parts.postal
        self._audit = parts.audit
        self._erasure = parts.erasure

    @get("/v1/users/me", {200: AccountBody, 304: None}, access=Access.SIGNED_IN, problems=("not_found",))
    async def read_self(self, call: Call) -> web.Response:
        """Read one's own account"""
        stored = await self._accounts.read(call.caller.user_id)
        if stored is None:
            raise no_account()
        return tagged_response(call.request, encode(account_body(stored.user)), stored.revision)

    @patch(
        "/v1/users/me",
        {200: AccountBody},
        access=Access.SIGNED_IN,
        condition=Condition.REQUIRED,
        problems=("not_found",),
    )
    async def change_self(self, call: Call, body: ProfileInput) -> web.Response:
        """Change one's name or age

        The email and the password are changed at endpoints of their own.
        """
        if body.name is None and body.age is None:
            raise field_problem("", "missing", "There is nothing to change: send name, age, or both")
        user_id = call.caller.user_id
        check = partial(check_match, call.request)
        stored = await self._accounts.change_profile(user_id, body.name, body.age, origin_of(call.request), check)
        return json_response(encode(account_body(stored.user)), headers={"ETag": etag(stored.revision)})

    @post(
        "/v1/users/me/password",
        {204: None},
        access=Access.SIGNED_IN,
        problems=(*_PASSWORD_PROBLEMS, "common_password"),
    )
    async def change_password(self, call: Call, body: PasswordInput) -> web.Response:
        """Change one's password

        All other sessions end, and their access tokens are refused within ten seconds; this one goes on.
        """
        origin = origin_of(call.request)
        await self._accounts.change_password(call.caller, body.old_password, body.new_password, origin)
        return web.Response(status=204)

    @post(
        "/v1/users/me/email",
        {202: AcceptedBody},
        access=Access.SIGNED_IN,
        problems=(*_PASSWORD_PROBLEMS, "mail_throttled"),
    )
    async def change_email(self, call: Call, body: EmailInput) -> web.Response:
        """Change one's email

        A token goes to the new address; the email changes when `POST /v1/email-confirmations` brings it back.
        """
        origin = origin_of(call.request)
        await self._recovery.ask_for_email(call.caller.user_id, body.password, body.email, origin)
        return json_response(encode(AcceptedBody()), 202)

    @get("/v1/users/me/activity", {200: Page[ActivityBody]}, access=Access.SIGNED_IN)
    async def read_activity(self, call: Call, query: PageQuery) -> web.Response:
        """Read what happened to one's account

        Sign-ins, changes, and what staff did, newest first; kept for 180 days.
        """
        return json_response(encode(await self._audit.activity(query, call.caller.user_id)))

    @get("/v1/users/me/export", {200: ExportBody}, access=Access.SIGNED_IN, problems=("not_found",))
    async def export_self(self, call: Call) -> web.Response:
        """Export all that this service holds of oneself"""
        exported = await self._erasure.export(call.caller.user_id, origin_of(call.request))
        headers = {"Content-Disposition": 'attachment; filename="account.json"'}
        return json_response(encode(exported), headers=headers)

    @post(
        "/v1/users/me/erasure",
        {200: ErasureBody},
        access=Access.SIGNED_IN,
        problems=(*_PASSWORD_PROBLEMS, "admin_account"),
    )
    async def erase_self(self, call: Call, body: ErasureInput) -> web.Response:
        """Erase one's account

        The account is gone with the answer; access tokens are refused within ten seconds. Orders stay, without a name;
        those under way are still sent to where they were to go, and then forget it.
        """
        erased = await self._erasure.erase(call.caller.user_id, body.password, origin_of(call.request))
        dates = (erased.erased_ms, erased.free_by_ms, erased.orders_free_by_ms)
        return json_response(encode(ErasureBody(erased.id, *map(timestamp, dates))))

    @get("/v1/users/me/addresses", {200: Page[AddressBody]}, access=Access.SIGNED_IN)
    async def list_addresses(self, call: Call, query: PageQuery) -> web.Response:
        """List one's postal addresses"""
        return json_response(encode(await self._postal.page(call.caller.user_id, query)))

    @post(
        "/v1/users/me/addresses",
        {201: AddressBody},
        access=Access.SIGNED_IN,
        problems=("too_many_addresses", "not_found"),
    )
    async def add_address(self, call: Call, body: AddressInput) -> web.Response:
        """Add a postal address"""
        address = await self._postal.add(call.caller.user_id, body, origin_of(call.request))
        location = f"/v1/users/me/addresses/{address.id}"
        return json_response(encode(address_body(address)), 201, {"Location": location})

    @get("/v1/users/me/addresses/{id}", {200: AddressBody, 304: None}, access=Access.SIGNED_IN)
    async def read_address(self, call: Call, id: Id) -> web.Response:
        """Read one postal address"""
        stored = await self._postal.read(call.caller.user_id, id)
        return tagged_response(call.request, encode(address_body(stored.address)), stored.revision)

    @put(
        "/v1/users/me/addresses/{id}",
        {200: AddressBody},
        access=Access.SIGNED_IN,
        condition=Condition.REQUIRED,
    )
    async def change_address(self, call: Call, id: Id, body: AddressInput) -> web.Response:
        """Replace a postal address"""
        user_id = call.caller.user_id
        check = partial(check_match, call.request)
        address = await self._postal.change(user_id, id, body, origin_of(call.request), check)
        return json_response(encode(address_body(address)))

    @delete(
        "/v1/users/me/addresses/{id}",
        {204: None},
        access=Access.SIGNED_IN,
        condition=Condition.OFFERED,
    )
    async def delete_address(self, call: Call, id: Id) -> web.Response:
        """Delete a postal address"""
        user_id = call.caller.user_id
        check = partial(check_match, call.request)
        await self._postal.delete(user_id, id, origin_of(call.request), check)
        return web.Response(status=204)
