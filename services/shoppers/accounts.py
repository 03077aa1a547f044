"""Accounts of shoppers: few, because a password's hash is slow on purpose, and shared by many shoppers at once.

Each asks from an address of its own (`X-Forwarded-For`, which the services believe from this machine), as customers do
who are not all in one office. Access tokens are renewed long before they end, so that refreshing is tried as well; an
answer that was lost may cost the session, and then the account signs in again.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from random import Random
from typing import Any, Final

from services.shoppers.wire import Answer, Refused, Wire

# Where all of them live.
ADDRESS: Final = {"name": "A Shopper", "line1": "12 Bell Yard", "city": "London", "country": "GB"}

# Tokens are good for 600 s. One that is younger than this is used as it is; from then on any request may renew it.
RENEW_AFTER_S: Final = (60.0, 240.0)
# Hashes at one time: as many as there may be cores, so that nobody's request waits for all of them.
_AT_ONCE_MAX: Final = 4
_SESSION_OVER: Final = ("invalid_refresh_token", "refresh_token_reused")
_SIGNED_OUT: Final = ("invalid_token", "token_expired")


class Account:
    """One user, by its own requests."""

    def __init__(self, number: int, email: str, password: str, users: Wire, orders: Wire, chance: Random) -> None:
        """`number` decides its address."""
        self.email = email
        self.user_id = 0
        self.newest_before = 0
        """The newest order that it had before the simulation."""
        self.carts_left = 0
        """Active ones that its shoppers left behind."""
        self._password = password
        self._users = users
        self._orders = orders
        self._chance = chance
        # 198.18.0.0/15 is set aside for measurements: it is nobody's.
        self._headers = {"X-Forwarded-For": f"198.18.{number // 250}.{number % 250 + 1}"}
        self._access = ""
        self._refresh = ""
        self._renew_at = 0.0
        self._renewing = asyncio.Lock()

    async def register(self, name: str, age: int) -> None:
        """Unless the account is there: from an earlier simulation, or because the answer was lost."""
        body = {"email": self.email, "password": self._password, "name": name, "age": age}
        with contextlib.suppress(Refused):  # then it is ours: signing in will tell
            await self._users.send("POST", "/v1/users", body=body, headers=self._headers, allowed=("email_taken",))

    async def sign_in(self) -> None:
        body = {"email": self.email, "password": self._password}
        self._take(await self._users.send("POST", "/v1/sessions", body=body, headers=self._headers))

    async def token(self) -> str:
        """One that is good for a while."""
        if time.monotonic() < self._renew_at:
            return self._access
        async with self._renewing:
            if time.monotonic() >= self._renew_at:
                await self._renew()
        return self._access

    async def _renew(self) -> None:
        try:
            answer = await self._users.send(
                "POST", "/v1/sessions/refresh", body={"refresh_token": self._refresh}, headers=self._headers,
                allowed=_SESSION_OVER,
            )  # fmt: skip
        except Refused:
            await self.sign_in()
        else:
            self._take(answer)

    def _take(self, answer: Answer) -> None:
        self._access, self._refresh = answer.body["access_token"], answer.body["refresh_token"]
        self.user_id = answer.body["user_id"]
        self._renew_at = time.monotonic() + self._chance.uniform(*RENEW_AFTER_S)

    async def ask(
        self, method: str, template: str, *parts: object, allowed: tuple[str, ...] = (), **more: Any
    ) -> Answer:
        """A request to the order service. Raises `Refused`, `GaveUp`, `Broken`."""
        token = await self.token()
        more["headers"] = self._headers
        try:
            return await self._orders.send(
                method, template, *parts, token=token, allowed=(*allowed, *_SIGNED_OUT), **more
            )
        except Refused as refused:
            if refused.code not in _SIGNED_OUT:
                raise
        if token == self._access:  # the session ended meanwhile, because an answer of a refresh came too late
            self._renew_at = 0.0
        return await self._orders.send(method, template, *parts, token=await self.token(), allowed=allowed, **more)

    async def do(
        self, template: str, *parts: object, key: str, body: Any = None, allowed: tuple[str, ...] = ()
    ) -> Answer:
        """A command: POST, once, however often it has to be sent."""
        return await self.ask("POST", template, *parts, key=key, body=body, allowed=allowed)


async def open_accounts(accounts: list[Account]) -> None:
    """Register and sign in, and see which orders they have."""
    at_once = asyncio.Semaphore(_AT_ONCE_MAX)

    async def one(number: int, account: Account) -> None:
        async with at_once:
            await account.register(f"Shopper {number}", 18 + number % 60)
            await account.sign_in()
        page = (await account.ask("GET", "/v1/orders", query="?limit=1")).body
        account.newest_before = page["data"][0]["id"] if page["data"] else 0

    async with asyncio.TaskGroup() as group:
        for number, account in enumerate(accounts):
            group.create_task(one(number, account))
