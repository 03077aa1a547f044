"""The order service with the sandbox provider and a worker, all in this process over one embedded store."""

from __future__ import annotations

import asyncio
import random
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp
from aiohttp import ClientResponse
from aiohttp.test_utils import TestServer, unused_port

import kvstore
from services.orders.app import Settings
from services.orders.steps import OrderSteps
from services.payments.provider import Provider
from services.payments.sandbox import SandboxProvider
from services.sandbox_psp import failures
from services.sandbox_psp.process import API_KEY, WEBHOOK_SECRET, Options, sandbox
from services.work.worker import Worker
from tests.cluster.harness import until
from tests.services.shop import Person, Shop

WITHIN_S = 20.0
ADDRESS = {"name": "Ada", "line1": "1 Street", "city": "Town", "country": "DE"}


class PaidShop:
    """`async with PaidShop(store, tmp_path) as paid`; settings are those of the sandbox's failures. `paid.shop` is the
    shop as other tests have it, `paid.worker` the worker that was started last."""

    def __init__(
        self,
        store: kvstore.Client,
        path: Path,
        *,
        workers: int = 1,
        pay_within_s: float = 600.0,
        webhooks: bool = True,
        with_users: bool = False,
        **psp_settings: Any,
    ) -> None:
        self._store, self._path, self._workers = store, path, workers
        self._pay_within_s, self._webhooks, self._with_users = pay_within_s, webhooks, with_users
        self._psp_settings = failures.Settings(**psp_settings)
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> PaidShop:
        async with AsyncExitStack() as stack:
            port = unused_port()
            url = f"http://127.0.0.1:{port}/v1/webhooks/sandbox" if self._webhooks else ""
            options = Options(data_dir=self._path / "psp", webhook_url=url, settings=self._psp_settings)
            self.psp = TestServer(await stack.enter_async_context(sandbox(options)))
            await self.psp.start_server()
            stack.push_async_callback(self.psp.close)
            settings = Settings(provider=self.open_provider, pay_within_s=self._pay_within_s)
            self.shop = Shop(self._store, with_users=self._with_users, orders_settings=settings, orders_port=port)
            await stack.enter_async_context(self.shop)
            self.session = await stack.enter_async_context(aiohttp.ClientSession())
            self.provider = self.open_provider(self.session)
            self._working = [self.start_worker(number) for number in range(self._workers)]
            stack.push_async_callback(self.stop_workers)
            self._stack = stack.pop_all()
        self.staff = await self.shop.staff()
        self.buyer = await self.shop.customer()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    def open_provider(self, session: aiohttp.ClientSession) -> Provider:
        return SandboxProvider(session, str(self.psp.make_url("")), API_KEY, [WEBHOOK_SECRET], timeout_s=0.5)

    def start_worker(self, seed: int = 0) -> asyncio.Task[None]:
        steps = OrderSteps(self._store, self.provider)
        self.worker = Worker(
            self._store, steps.handlers, lease_s=2.0, chance=random.Random(seed), also_parked=steps.also_parked
        )
        return asyncio.create_task(self.worker.run())

    async def stop_workers(self) -> None:
        for task in self._working:
            task.cancel()
        if self._working:
            await asyncio.wait(self._working)
        self._working = []

    # --- what customers and staff do ----------------------------------------------------------------------------------

    async def say(self, who: Person, path: str, body: dict[str, Any] | None = None) -> ClientResponse:
        """An idempotent POST to the order service."""
        return await self.shop.orders.post(path, json=body, headers=who.once())

    async def did(self, who: Person, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        answer = await self.say(who, path, body)
        assert answer.status in (200, 201), await answer.text()
        found: dict[str, Any] = await answer.json()
        return found

    async def get(self, path: str, who: Person | None = None) -> Any:
        answer = await self.shop.orders.get(path, headers=(who or self.buyer).headers)
        assert answer.status == 200, await answer.text()
        return await answer.json()

    async def placed(
        self, lines: dict[str, int] | None = None, ship_to: dict[str, str] | None = ADDRESS
    ) -> dict[str, Any]:
        answer = await self.shop.order(self.buyer, lines or {"cup": 2}, ship_to=ship_to)
        assert answer.status == 201, await answer.text()
        order: dict[str, Any] = await answer.json()
        return order

    async def paid(self, order: dict[str, Any], token: str = "tok_ok", **more: Any) -> dict[str, Any]:
        """By the buyer; by staff where the money is to be taken later."""
        who = self.staff if more.get("capture") == "manual" else self.buyer
        return await self.did(who, f"/v1/orders/{order['id']}/payments", {"token": token, **more})

    async def becomes(self, order: dict[str, Any], **expected: Any) -> dict[str, Any]:
        """The order, once its fields are these."""
        found: dict[str, Any] = {}

        async def is_so() -> bool:
            found.update(await self.get(f"/v1/orders/{order['id']}"))
            return all(found[name] == value for name, value in expected.items())

        try:
            await until(is_so, WITHIN_S, f"an order with {expected}", poll_s=0.02)
        except AssertionError as error:
            raise AssertionError(f"{error}: {found}") from None
        return found

    async def payment_becomes(self, order: dict[str, Any], state: str, attempt: int = 1) -> dict[str, Any]:
        found: dict[str, Any] = {}

        async def is_so() -> bool:
            found.update(await self.get(f"/v1/orders/{order['id']}/payments/{attempt}"))
            return bool(found["state"] == state)

        await until(is_so, WITHIN_S, f"a payment that is {state}", poll_s=0.02)
        return found

    async def stock_of(self, sku: str) -> tuple[int, int, int]:
        """On hand, reserved, allocated."""
        records = [
            await self._store.get(f"stock/{sku}/{kind}".encode()) for kind in ("on_hand", "reserved", "allocated")
        ]
        on_hand, reserved, allocated = (int(record.value) if record is not None else 0 for record in records)
        return on_hand, reserved, allocated

    async def types_of(self, order: dict[str, Any]) -> list[str]:
        """What happened to an order, the oldest first."""
        page = await self.get(f"/v1/orders/{order['id']}/events?limit=100")
        return [event["type"] for event in reversed(page["data"])]

    async def charges(self) -> list[Any]:
        return [entry.charge for entry in await self.provider.charges()]  # type: ignore[attr-defined]
