"""The sandbox provider in this process, the adapter over it, and a merchant who takes its webhooks in."""

from __future__ import annotations

import json
from contextlib import AsyncExitStack
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp
from aiohttp import web
from aiohttp.test_utils import TestServer
from multidict import CIMultiDictProxy

from services.payments.provider import Authorise, Charge, Operation, Succeeded, request_key
from services.payments.sandbox import SandboxProvider
from services.sandbox_psp.failures import Settings
from services.sandbox_psp.process import API_KEY, WEBHOOK_SECRET, Options, sandbox
from tests.cluster.harness import until

# Whoever waits for an answer that does not come waits so long; answers that come take a few milliseconds.
IMPATIENT_S = 0.3
WITHIN_S = 10.0
_orders = count(1)


def a_payment(token: str = "tok_ok", amount: int = 1000, *, order: int | None = None) -> Authorise:
    """Of an order that no other one is of, unless it is given."""
    key = request_key(next(_orders) if order is None else order, 1, Operation.AUTHORISE)
    return Authorise(key=key, amount=amount, currency="EUR", token=token, reference="Order 0A2C-4E6G")


def of(authorise: Authorise, operation: Operation, number: int = 1) -> str:
    """The key of another operation of the same payment."""
    order, attempt, _ = authorise.key.split(":")
    return request_key(int(order), int(attempt), operation, number)


class Merchant:
    """Takes webhooks in. Answers with what is next in `answers`, and then with 204."""

    def __init__(self) -> None:
        self.taken: list[tuple[CIMultiDictProxy[str], bytes]] = []
        self.answers: list[int] = []
        app = web.Application()
        app.add_routes([web.post("/webhooks", self._take)])
        self.server = TestServer(app)

    @property
    def told(self) -> list[tuple[str, str]]:
        """(kind, key) of each delivery, in the order in which they came."""
        taken = [json.loads(body) for _, body in self.taken]
        return [(event["type"], event["key"]) for event in taken]

    async def has(self, number: int) -> None:
        """Wait until so many deliveries came."""

        async def enough() -> bool:
            return len(self.taken) >= number

        await until(enough, WITHIN_S, f"{number} webhooks", poll_s=0.01)

    async def _take(self, request: web.Request) -> web.Response:
        self.taken.append((request.headers, await request.read()))
        return web.Response(status=self.answers.pop(0) if self.answers else 204)


class Psp:
    """`async with Psp(tmp_path, hold_ms=60_000, …) as psp:`; the settings are `Settings`'. Leaving it and entering
    another one with the same directory is a restart."""

    def __init__(self, path: Path, *, wants_webhooks: bool = True, **settings: Any) -> None:
        self._path = path
        self._wants_webhooks = wants_webhooks
        self._settings = Settings(**settings)
        self._stack = AsyncExitStack()
        self.merchant = Merchant()

    async def __aenter__(self) -> Psp:
        async with AsyncExitStack() as stack:
            await self.merchant.server.start_server()
            stack.push_async_callback(self.merchant.server.close)
            url = str(self.merchant.server.make_url("/webhooks")) if self._wants_webhooks else ""
            options = Options(data_dir=self._path / "psp", webhook_url=url, settings=self._settings)
            self.server = TestServer(await stack.enter_async_context(sandbox(options)))
            await self.server.start_server()
            stack.push_async_callback(self.server.close)
            self.session = await stack.enter_async_context(aiohttp.ClientSession())
            self._stack = stack.pop_all()
        self.url = str(self.server.make_url("/")).rstrip("/")
        self.provider = self.connect()
        self.patient = self.connect(timeout_s=10.0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    def connect(self, *, api_key: str = API_KEY, timeout_s: float = IMPATIENT_S) -> SandboxProvider:
        return SandboxProvider(self.session, self.url, api_key, [WEBHOOK_SECRET], timeout_s=timeout_s)

    async def ask(self, method: str, path: str, **more: Any) -> tuple[int, Any]:
        """A request with the API key: status and JSON."""
        headers = {"Authorization": f"Bearer {API_KEY}", **more.pop("headers", {})}
        async with self.session.request(method, self.url + path, headers=headers, **more) as answer:
            return answer.status, await answer.json()

    async def counted(self, what: str) -> dict[str, int]:
        _, counts = await self.ask("GET", "/control/counts")
        part: dict[str, int] = counts[what]
        return part

    async def settled(self, **expected: int) -> None:
        """Wait until the webhooks have ended like this."""

        async def like_this() -> bool:
            counts = await self.counted("webhooks")
            return {name: counts.get(name, 0) for name in expected} == expected

        await until(like_this, WITHIN_S, f"webhooks {expected}", poll_s=0.01)

    async def authorised(self, request: Authorise) -> Charge:
        """Its charge, which must be authorised at once."""
        result = await self.patient.authorise(request)
        assert isinstance(result, Succeeded), result
        return result.charge
