"""The user service over HTTP.

    POST /v1/users       register                        201 {id, email, name, age, role, created_at}
    POST /v1/sessions    sign in                         201 {access_token, token_type, expires_in, user_id}
    GET  /v1/users/me    read oneself                    200 as above
    GET  /user/{id}      owner or staff; others get 404  200 {id, name, age}

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
from services.web.app import CALLER_ID, json_response, new_app
from services.web.bodies import BodyReader, Name, RequestBody
from services.web.etags import tagged_response
from services.web.ids import parse_id, timestamp
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


def create_app(store: kvstore.Client, access_log: AccessLog | None = None) -> web.Application:
    app = new_app(store, access_log)
    passwords = Passwords()
    endpoints = _Endpoints(Accounts(store, passwords), Tokens(SigningKeys(store)))
    app.add_routes(
        [
            web.post("/v1/users", endpoints.register),
            web.post("/v1/sessions", endpoints.sign_in),
            web.get("/v1/users/me", endpoints.read_self),
            web.get("/user/{id}", endpoints.read_user),
        ]
    )

    async def passwords_of(_: web.Application) -> AsyncIterator[None]:
        await passwords.start()
        yield
        passwords.close()

    app.cleanup_ctx.append(passwords_of)
    return app


class _Endpoints:
    def __init__(self, accounts: Accounts, tokens: Tokens) -> None:
        self._accounts = accounts
        self._tokens = tokens
        self._registrations = BodyReader(Registration)
        self._credentials = BodyReader(Credentials)

    async def register(self, request: web.Request) -> web.Response:
        body = await self._registrations.read(request)
        user = await self._accounts.register(body.email, body.password, body.name, body.age)
        request[CALLER_ID] = user.id
        return json_response(_account_body(user), 201, {"Location": f"/user/{user.id}"})

    async def sign_in(self, request: web.Request) -> web.Response:
        body = await self._credentials.read(request)
        user = await self._accounts.sign_in(body.email, body.password)
        request[CALLER_ID] = user.id
        token = await self._tokens.issue(user.id, user.role)
        return json_response(_encode(SessionBody(token, "Bearer", TOKEN_TTL_S, user.id)), 201)

    async def read_self(self, request: web.Request) -> web.Response:
        caller = await self._tokens.caller(request)
        stored = await self._accounts.read(caller.user_id)
        if stored is None:
            raise Problem("not_found", "The account is no longer there")
        return tagged_response(request, _account_body(stored.user), stored.revision)

    async def read_user(self, request: web.Request) -> web.Response:
        caller = await self._tokens.caller(request)
        user_id = parse_id(request.match_info["id"])
        # Another's account and none at all look the same.
        stored = None
        if user_id is not None and (caller.user_id == user_id or caller.is_staff):
            stored = await self._accounts.read(user_id)
        if stored is None:
            raise Problem("not_found", "There is no such user, or none that you may read")
        user = stored.user
        return tagged_response(request, _encode(UserBody(user.id, user.name, user.age)), stored.revision)


def _account_body(user: User) -> bytes:
    return _encode(AccountBody(user.id, user.email, user.name, user.age, user.role, timestamp(user.created_ms)))
