"""The services as their clients meet them: over HTTP, with an Idempotency-Key, and again while they answer 503."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any, Final

import aiohttp
import msgspec

from services.demo.cluster import CannotWalk

_RETRY_WITHIN_S: Final = 15.0  # an election takes a second or so; what lasts longer is no election
_RETRY_AFTER_S: Final = 0.02  # short, because the walk measures how soon an order can be placed again
_REQUEST_TIMEOUT_S: Final = 10.0  # the services' own timeout for the store is 5 s


class Answer(msgspec.Struct, frozen=True):
    status: int
    body: Any
    replayed: bool
    attempts: int


class Shopper:
    def __init__(self, session: aiohttp.ClientSession, users_url: str, orders_url: str) -> None:
        self._session = session
        self._users_url = users_url.rstrip("/")
        self._orders_url = orders_url.rstrip("/")

    async def ready(self) -> None:
        """Raises `CannotWalk` unless both services say that they are."""
        for url in (self._users_url, self._orders_url):
            try:
                async with self._session.get(f"{url}/readyz", timeout=aiohttp.ClientTimeout(2.0)) as answer:
                    if answer.status != 200:
                        raise CannotWalk(f"{url} is not ready: {(await answer.text())[:300]}")
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                raise CannotWalk(f"{url} does not answer: {error or type(error).__name__}") from None

    async def register(self, email: str, password: str, name: str, age: int) -> int:
        body = {"email": email, "password": password, "name": name, "age": age}
        answer = await self._send("POST", f"{self._users_url}/v1/users", body, expect=(201,))
        return int(answer.body["id"])

    async def sign_in(self, email: str, password: str) -> str:
        body = {"email": email, "password": password}
        answer = await self._send("POST", f"{self._users_url}/v1/sessions", body, expect=(201,))
        return str(answer.body["access_token"])

    async def read_self(self, token: str) -> Answer:
        return await self._send("GET", f"{self._users_url}/v1/users/me", None, token, expect=(200,))

    async def put_product(self, token: str, sku: str, name: str, price: int, currency: str) -> None:
        await self.put(token, f"/v1/products/{sku}", {"name": name, "price": price, "currency": currency})

    async def add_stock(self, token: str, sku: str, delta: int, reason: str) -> None:
        await self.post(token, f"/v1/products/{sku}/stock", {"delta": delta, "reason": reason})

    async def stock(self, token: str, sku: str) -> tuple[int, int]:
        """(on hand, reserved)"""
        body = await self.get(token, f"/v1/products/{sku}/stock")
        return int(body["on_hand"]), int(body["reserved"])

    async def place_order(self, token: str, lines: dict[str, int], key: str) -> Answer:
        body = {"lines": [{"sku": sku, "quantity": quantity} for sku, quantity in lines.items()]}
        return await self._send("POST", f"{self._orders_url}/v1/orders", body, token, key, expect=(201,))

    async def read_order(self, token: str, order_id: int) -> Answer:
        return await self._send("GET", f"{self._orders_url}/v1/orders/{order_id}", None, token, expect=(200,))

    # --- what else the order service has ------------------------------------------------------------------------------

    async def get(self, token: str, path: str) -> Any:
        return (await self._send("GET", self._orders_url + path, None, token, expect=(200,))).body

    async def put(self, token: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return dict((await self._send("PUT", self._orders_url + path, body, token, expect=(200, 201))).body)

    async def post(self, token: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Once, however often it has to be sent."""
        key = uuid.uuid4().hex
        return dict((await self._send("POST", self._orders_url + path, body, token, key, expect=(200, 201))).body)

    async def events(self, token: str, order_path: str) -> AsyncGenerator[str, None]:
        """The types of what has happened to an order, and then of what happens, until the caller has enough or the
        service ends the stream. Raises `CannotWalk`."""
        url = f"{self._orders_url}{order_path}/events/stream"
        headers = {"Authorization": f"Bearer {token}"}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_REQUEST_TIMEOUT_S)
        async with self._session.get(url, headers=headers, timeout=timeout) as answer:
            if answer.status != 200:
                raise CannotWalk(f"GET {url} answered {answer.status}: {(await answer.text())[:500]}")
            async for line in answer.content:
                if line.startswith(b"event: "):
                    yield line.removeprefix(b"event: ").decode().strip()

    async def _send(
        self,
        method: str,
        url: str,
        body: dict[str, Any] | None,
        token: str | None = None,
        key: str | None = None,
        *,
        expect: tuple[int, ...],
    ) -> Answer:
        """One request, sent again while the answer says that this may help. Raises `CannotWalk` for any other."""
        headers: dict[str, str] = {}
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        if key is not None:
            headers["Idempotency-Key"] = key
        deadline = time.monotonic() + _RETRY_WITHIN_S
        attempts = 0
        while True:
            attempts += 1
            async with self._session.request(
                method, url, json=body, headers=headers, timeout=aiohttp.ClientTimeout(_REQUEST_TIMEOUT_S)
            ) as answer:
                text = await answer.text()
                if answer.status in expect:
                    replayed = answer.headers.get("Idempotent-Replayed") == "true"
                    return Answer(answer.status, msgspec.json.decode(text), replayed, attempts)
            retryable = answer.status == 503 and msgspec.json.decode(text).get("retryable") is True
            if not retryable or time.monotonic() > deadline:
                raise CannotWalk(f"{method} {url} answered {answer.status}: {text[:500]}")
            await asyncio.sleep(_RETRY_AFTER_S)
