"""The user service over HTTP; `/docs` shows every endpoint. What they do is in the modules beside this one.

An email that is taken is said to be so at registration (409): without a mail to the address there is nothing else
that an honest answer could say. Signing in, and asking for a new password, never tell whether an account exists.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import structlog
from aiohttp import web

import kvstore
from services.users.api_account import AccountApi, MyAccountApi
from services.users.api_admin import AdminApi
from services.users.api_sessions import RecoveryApi, SessionsApi
from services.users.parts import Parts, Settings
from services.users.passwords import Passwords
from services.web.app import new_app
from services.web.endpoints import Api
from services.web.idempotency import IdempotencyKeys
from services.web.limits import Limit
from services.web.logs import AccessLog
from services.web.tokens import SigningKeys, Tokens
from services.work.worker import PAUSE_S, Worker

log = structlog.get_logger("services.users")


def create_app(
    store: kvstore.Client,
    access_log: AccessLog | None = None,
    limit: Limit | None = None,
    settings: Settings | None = None,
) -> web.Application:
    tokens, passwords = Tokens(SigningKeys(store)), Passwords()
    parts = Parts(store, tokens, passwords, settings or Settings())
    api = Api("User service", "Accounts, sessions, and who may do what.", tokens, IdempotencyKeys(store), limit)
    api.add(AccountApi(parts), tag="Accounts")
    api.add(MyAccountApi(parts), tag="One's own account")
    api.add(SessionsApi(parts), tag="Sessions")
    api.add(RecoveryApi(parts), tag="Recovery by mail")
    api.add(AdminApi(parts), tag="Administration")
    app = new_app(store, api, access_log)

    async def passwords_of(_: web.Application) -> AsyncIterator[None]:
        await passwords.start()
        yield
        passwords.close()

    async def worker_of(_: web.Application) -> AsyncIterator[None]:
        working = asyncio.create_task(_keep_at_work(parts.worker))
        yield
        working.cancel()
        await asyncio.wait([working])

    app.cleanup_ctx.append(passwords_of)
    app.cleanup_ctx.append(worker_of)
    return app


async def _keep_at_work(worker: Worker) -> None:
    """Requests do not need the worker, so a mistake in it must not end without a word."""
    while True:
        try:
            await worker.run()
        except Exception as error:
            log.error("worker failed", exc_info=error)
            await asyncio.sleep(PAUSE_S)
