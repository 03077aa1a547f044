"""Endpoints of sessions, and of getting in again by mail."""

from __future__ import annotations

from typing import Annotated

from aiohttp import web
from msgspec import Meta

import kvstore
from services.users.audit import origin_of
from services.users.bodies import (
    AcceptedBody,
    Credentials,
    EmailConfirmation,
    EndedBody,
    RefreshInput,
    ResetInput,
    ResetRequest,
    SessionBody,
    SessionItem,
    SessionList,
)
from services.users.parts import Parts
from services.users.records import Session, encode
from services.users.sessions import GRACE_S, Granted
from services.web.answers import CALLER_ID, json_response
from services.web.endpoints import Access, Call, delete, get, post
from services.web.ids import now_ms, timestamp
from services.web.problems import Problem
from services.web.tokens import TOKEN_TTL_S

SessionId = Annotated[str, Meta(pattern=r"\A[0-9a-f]{32}\Z")]


class SessionsApi:
    def __init__(self, parts: Parts) -> None:
        self._accounts = parts.accounts
        self._sessions = parts.sessions
        self._tokens = parts.tokens

    @post(
        "/v1/sessions",
        {201: SessionBody},
        reads_token=False,
        problems=("wrong_credentials", "sign_in_throttled", "account_blocked"),
    )
    async def sign_in(self, call: Call, body: Credentials) -> web.Response:
        """Sign in

        The same answer, as late, whether the email or the password is wrong. The access token is good for ten
        minutes; the refresh token, once, for thirty days. An Authorization header is passed over.
        """
        granted = await self._accounts.sign_in(body.email, body.password, origin_of(call.request))
        return await self._answer(call, granted, 201)

    @post(
        "/v1/sessions/refresh",
        {200: SessionBody},
        reads_token=False,
        problems=("invalid_refresh_token", "refresh_token_reused"),
    )
    async def refresh(self, call: Call, body: RefreshInput) -> web.Response:
        """Get new tokens for a refresh token

        It is used up; the answer holds its successor. Sent again within ten seconds it gives the same successor: for an
        answer that was lost. Sent again later, or after its successor was used, it ends the session, because somebody
        may have a copy. An Authorization header is passed over.
        """
        try:
            granted = await self._sessions.refresh(body.refresh_token, origin_of(call.request))
        except kvstore.OutcomeUnknown:
            again = f"Send the same request again within {GRACE_S} s: whether it was done or not, that is safe"
            raise Problem("outcome_unknown", again, retryable=True) from None
        return await self._answer(call, granted, 200)

    @get("/v1/sessions", {200: SessionList}, access=Access.SIGNED_IN)
    async def list_sessions(self, call: Call) -> web.Response:
        """List one's sessions

        The one that was used last first; at most twenty.
        """
        sessions = await self._sessions.of(call.caller.user_id)
        return json_response(encode(SessionList([_item(one, call.caller.session_id) for one in sessions])))

    @delete("/v1/sessions", {200: EndedBody}, access=Access.SIGNED_IN)
    async def end_other_sessions(self, call: Call) -> web.Response:
        """End all sessions but this one

        Their access tokens are refused within ten seconds.
        """
        caller = call.caller
        origin = origin_of(call.request)
        ended = await self._sessions.end_others(caller.user_id, caller.session_id, origin, actor=caller.user_id)
        return json_response(encode(EndedBody(ended)))

    @delete("/v1/sessions/current", {204: None}, access=Access.SIGNED_IN, problems=("not_found",))
    async def sign_out(self, call: Call) -> web.Response:
        """Sign out"""
        if not call.caller.session_id:
            raise Problem("not_found", "This access token belongs to no session")
        await self._sessions.end(call.caller.user_id, call.caller.session_id, origin_of(call.request))
        return web.Response(status=204)

    @delete("/v1/sessions/{id}", {204: None}, access=Access.SIGNED_IN)
    async def end_session(self, call: Call, id: SessionId) -> web.Response:
        """End one of one's sessions

        Its access tokens are refused within ten seconds.
        """
        await self._sessions.end(call.caller.user_id, id, origin_of(call.request))
        return web.Response(status=204)

    async def _answer(self, call: Call, granted: Granted, status: int) -> web.Response:
        call.request[CALLER_ID] = granted.user_id
        token = await self._tokens.issue(granted.user_id, granted.role, granted.session_id)
        left_s = max(0, granted.expires_ms - now_ms()) // 1000
        body = SessionBody(
            token, "Bearer", TOKEN_TTL_S, granted.user_id, granted.refresh_token, left_s, granted.session_id
        )
        return json_response(encode(body), status)


class RecoveryApi:
    def __init__(self, parts: Parts) -> None:
        self._recovery = parts.recovery

    @post("/v1/password-resets", {202: AcceptedBody}, reads_token=False, problems=("mail_throttled",))
    async def ask_for_reset(self, call: Call, body: ResetRequest) -> web.Response:
        """Ask for a new password by mail

        The same answer, as late, whether there is such an account or not.
        """
        await self._recovery.ask_for_reset(body.email, origin_of(call.request))
        return json_response(encode(AcceptedBody()), 202)

    @post(
        "/v1/password-resets/completion",
        {204: None},
        reads_token=False,
        problems=("invalid_mail_token", "common_password"),
    )
    async def reset_password(self, call: Call, body: ResetInput) -> web.Response:
        """Set a new password with the token from the mail

        All sessions end, and their access tokens are refused within ten seconds.
        """
        await self._recovery.reset(body.token, body.password, origin_of(call.request))
        return web.Response(status=204)

    @post(
        "/v1/email-confirmations",
        {204: None},
        reads_token=False,
        problems=("invalid_mail_token", "email_taken"),
    )
    async def confirm_email(self, call: Call, body: EmailConfirmation) -> web.Response:
        """Confirm a new email with the token from the mail"""
        await self._recovery.confirm_email(body.token, origin_of(call.request))
        return web.Response(status=204)


def _item(session: Session, current: str) -> SessionItem:
    return SessionItem(
        session.id,
        timestamp(session.created_ms),
        timestamp(session.refreshed_ms),
        timestamp(session.expires_ms),
        session.address,
        session.user_agent,
        session.id == current,
    )
