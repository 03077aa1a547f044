"""The user service over HTTP: registering, signing in, reading oneself. `/docs` shows every endpoint.

An email that is taken is said to be so at registration (409): without a mail to the address there is nothing else
that an honest answer could say. Signing in never tells whether an account exists.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated

import msgspec
from aiohttp import web
from msgspec import Meta, Struct

import kvstore
from services.users.accounts import Accounts, User
from services.users.passwords import PASSWORD_CHARS_MAX, PASSWORD_CHARS_MIN, Passwords
from services.web.answers import CALLER_ID, json_response
from services.web.app import new_app
from services.web.bodies import Name, RequestBody
from services.web.endpoints import Access, Api, Call, get, post
from services.web.etags import tagged_response
from services.web.idempotency import IdempotencyKeys
from services.web.ids import Id, timestamp
from services.web.limits import Limit
from services.web.logs import AccessLog
from services.web.problems import Problem
from services.web.tokens import TOKEN_TTL_S, Role, SigningKeys, Tokens

_encode = msgspec.json.Encoder().encode


class Registration(RequestBody, frozen=True):
    email: Annotated[str, Meta(min_length=3, max_length=254)]
    password: Annotated[str, Meta(min_length=PASSWORD_CHARS_MIN, max_length=PASSWORD_CHARS_MAX)]
    name: Name
    age: Annotated[int, Meta(ge=0, le=150)]


class Credentials(RequestBody, frozen=True):
    # Only bounded: a password that could never have been chosen is wrong, not malformed.
    email: Annotated[str, Meta(max_length=1000)]
    password: Annotated[str, Meta(max_length=1000)]


class AccountBody(Struct, frozen=True):
    id: int
    email: str
    name: str
    age: int
    role: Role
    created_at: str


class SessionBody(Struct, frozen=True):
    access_token: str
    token_type: str
    expires_in: int
    user_id: int


class UserBody(Struct, frozen=True):
    id: int
    name: str
    age: int


def create_app(
    store: kvstore.Client, access_log: AccessLog | None = None, limit: Limit | None = None
) -> web.Application:
    passwords = Passwords()
    tokens = Tokens(SigningKeys(store))
    api = Api("User service", "Accounts: register, sign in, read oneself.", tokens, IdempotencyKeys(store), limit)
    api.add(_Users(Accounts(store, passwords), tokens), tag="Accounts")
    app = new_app(store, api, access_log)

    async def passwords_of(_: web.Application) -> AsyncIterator[None]:
        await passwords.start()
        yield
        passwords.close()

    app.cleanup_ctx.append(passwords_of)
    return app


class _Users:
    def __init__(self, accounts: Accounts, tokens: Tokens) -> None:
        self._accounts = accounts
        self._tokens = tokens

    @post("/v1/users", {201: AccountBody}, problems=("email_taken", "common_password"))
    async def register(self, call: Call, body: Registration) -> web.Response:
        """Register an account"""
        user = await self._accounts.register(body.email, body.password, body.name, body.age)
        call.request[CALLER_ID] = user.id
        return json_response(_account_body(user), 201, {"Location": f"/user/{user.id}"})

    @post("/v1/sessions", {201: SessionBody}, problems=("wrong_credentials",))
    async def sign_in(self, call: Call, body: Credentials) -> web.Response:
        """Sign in

        The same answer, as late, whether the email or the password is wrong.
        """
        user = await self._accounts.sign_in(body.email, body.password)
        call.request[CALLER_ID] = user.id
        token = await self._tokens.issue(user.id, user.role)
        return json_response(_encode(SessionBody(token, "Bearer", TOKEN_TTL_S, user.id)), 201)

    @get("/v1/users/me", {200: AccountBody, 304: None}, access=Access.SIGNED_IN, problems=("not_found",))
    async def read_self(self, call: Call) -> web.Response:
        """Read one's own account"""
        stored = await self._accounts.read(call.caller.user_id)
        if stored is None:
            raise Problem("not_found", "The account is no longer there")
        return tagged_response(call.request, _account_body(stored.user), stored.revision)

    @get("/user/{id}", {200: UserBody, 304: None}, access=Access.SIGNED_IN)
    async def read_user(self, call: Call, id: Id) -> web.Response:
        """Read a user

        The owner's own, or any for staff; for others there is nothing there.
        """
        stored = await self._accounts.read(id) if call.caller.user_id == id or call.caller.is_staff else None
        if stored is None:
            raise Problem("not_found", "There is no such user, or none that you may read")
        user = stored.user
        return tagged_response(call.request, _encode(UserBody(user.id, user.name, user.age)), stored.revision)


def _account_body(user: User) -> bytes:
    return _encode(AccountBody(user.id, user.email, user.name, user.age, user.role, timestamp(user.created_ms)))
