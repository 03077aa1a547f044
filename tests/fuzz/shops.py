"""What is fuzzed: both services as they run in earnest, with the sandbox provider and a worker, over one embedded store
with a little of everything in it."""

from __future__ import annotations

import asyncio
import itertools
import re
import time
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import aiohttp
from aiohttp import web
from aiohttp.test_utils import TestServer, unused_port

import kvstore
from services.audit.run import Report, audit
from services.orders.app import Settings as OrdersSettings
from services.orders.app import create_app as create_orders
from services.orders.steps import OrderSteps
from services.payments.provider import Provider
from services.payments.sandbox import SandboxProvider
from services.sandbox_psp.process import API_KEY, WEBHOOK_SECRET, Options, sandbox
from services.users.app import create_app as create_users
from services.users.mail import FileMailer
from services.users.parts import Settings, create_staff
from services.web.runner import ServiceRunner
from services.web.tokens import Role, SigningKeys, Tokens
from services.work.worker import Worker
from tests.cluster.harness import until
from tests.services.conftest import has_leases

SERVICES: Final = ("users", "orders")
WHO: Final = ("nobody", *(role.value for role in Role))
# As the document's examples have them, so that some requests made of those find something.
_EMAIL: Final = "ada@example.com"
_PASSWORD: Final = "correct horse battery staple"
_SKUS: Final = ("mug-blue", "0", "A")
_ADDRESS: Final = {"name": "Ada", "line1": "1 Street", "city": "Town", "country": "DE"}
_WITHIN_S: Final = 20.0
_COUNTED: Final = re.compile(r'http_request_seconds_count\{method="(.+)",path="(.+)",status="(\d+)"\} (\d+)')


class FuzzedShop:
    """`async with FuzzedShop(path, for_s=60) as shop: shop.url("orders"), shop.headers("staff")`. `known` are values of
    the paths' parameters behind which there is something, for each service."""

    def __init__(self, path: Path, for_s: float) -> None:
        self.path = path
        self._for_s = for_s
        self._urls: dict[str, str] = {}
        self._tokens: dict[str, str] = {}
        self.known: dict[str, dict[str, list[int | str]]] = {"users": {"id": []}, "orders": {}}
        self._stack = AsyncExitStack()
        self._keys = itertools.count(1)

    async def __aenter__(self) -> FuzzedShop:
        async with AsyncExitStack() as stack:
            store = await stack.enter_async_context(kvstore.open_embedded(str(self.path / "store")))
            await until(lambda: has_leases(store), 10.0, "leases", poll_s=0.005)
            port = unused_port()
            webhooks = f"http://127.0.0.1:{port}/v1/webhooks/sandbox"
            psp = TestServer(
                await stack.enter_async_context(sandbox(Options(data_dir=self.path / "psp", webhook_url=webhooks)))
            )
            await psp.start_server()
            stack.push_async_callback(psp.close)

            def open_provider(session: aiohttp.ClientSession) -> Provider:
                return SandboxProvider(session, str(psp.make_url("")), API_KEY, [WEBHOOK_SECRET], timeout_s=2.0)

            users = Settings(mailer=FileMailer(str(self.path / "mail")))
            await self._serve(stack, "users", create_users(store, settings=users), 0)
            orders = OrdersSettings(provider=open_provider)
            await self._serve(stack, "orders", create_orders(store, settings=orders), port)
            session = await stack.enter_async_context(aiohttp.ClientSession())
            self._store = store
            self._provider = SandboxProvider(session, str(psp.make_url("")), API_KEY, [WEBHOOK_SECRET], timeout_s=10.0)
            steps = OrderSteps(store, open_provider(session))
            working = asyncio.create_task(Worker(store, steps.handlers, also_parked=steps.also_parked).run())
            stack.push_async_callback(_stop, working)
            await self._open_accounts(store)
            await self._fill()
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    def url(self, service: str) -> str:
        return self._urls[service]

    def headers(self, who: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._tokens[who]}"} if who in self._tokens else {}

    async def document(self, service: str) -> dict[str, dict[str, dict[str, object]]]:
        async with aiohttp.ClientSession() as session, session.get(f"{self.url(service)}/openapi.json") as answer:
            document: dict[str, dict[str, dict[str, object]]] = await answer.json()
            return document

    async def answered(self, service: str) -> Counter[tuple[str, str, int]]:
        """How often each endpoint answered with each status: (method, path, status)."""
        async with aiohttp.ClientSession() as session, session.get(f"{self.url(service)}/metrics") as answer:
            found = _COUNTED.findall(await answer.text())
        return Counter({(method, path, int(status)): int(count) for method, path, status, count in found})

    async def audited(self) -> Report:
        """What the auditor says of the store and the provider's books."""
        return await audit(self._store, self._provider)

    # --- what there is before anything is fuzzed ----------------------------------------------------------------------

    async def _serve(self, stack: AsyncExitStack, name: str, app: web.Application, port: int) -> None:
        runner = ServiceRunner(app)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", port).start()
        host, bound = runner.addresses[0][:2]
        self._urls[name] = f"http://{host}:{bound}"

    async def _open_accounts(self, store: kvstore.Client) -> None:
        """Their tokens belong to no session, so that fuzzing cannot end it, and are good until the end."""
        tokens = Tokens(SigningKeys(store), lambda: time.time() + self._for_s)
        for role in Role:
            # Staff have the password of the examples, so all that asks for it again is done as well, erasure included.
            password = _PASSWORD if role is Role.STAFF else f"the {role}'s own"
            user = await create_staff(store, f"{role}@example.com", password, "Ada", 36, role, replace=False)
            self._tokens[role.value] = await tokens.issue(user.id, role)
            self.known["users"]["id"].append(user.id)
        await create_staff(store, _EMAIL, _PASSWORD, "Ada", 36, Role.CUSTOMER, replace=False)

    async def _fill(self) -> None:
        """Products in stock, carts, and the customer's orders, some in each state that fuzzing would seldom reach."""
        async with aiohttp.ClientSession(self.url("orders")) as session:
            for sku in _SKUS:
                product = {"name": f"A {sku}", "price": 1250, "currency": "EUR"}
                async with session.put(f"/v1/products/{sku}", json=product, headers=self.headers("staff")) as answer:
                    assert answer.status == 201, await answer.text()
                await self._post(session, "staff", f"/v1/products/{sku}/stock", delta=1_000_000, reason="received")
            orders = [await self._order(session, state) for state in range(_LAST_STATE + 1) for _ in range(2)]
            carts = [(await self._post(session, "customer", "/v1/carts"))["id"] for _ in range(2)]
        self.known["orders"] = {"id": [*orders, *carts], "sku": [*_SKUS], "attempt": [1], "number": [1]}

    async def _order(self, session: aiohttp.ClientSession, state: int) -> int:
        """Placed (0), paid (1), shipped, delivered, to be returned, return approved (5)."""
        lines = [{"sku": "mug-blue", "quantity": 5}]
        placed = await self._post(session, "customer", "/v1/orders", lines=lines, ship_to=_ADDRESS)
        order = f"/v1/orders/{placed['id']}"
        if state >= 1:
            await self._post(session, "customer", f"{order}/payments", token="tok_ok")

            async def is_paid() -> bool:
                async with session.get(order, headers=self.headers("customer")) as answer:
                    return bool((await answer.json())["payment_status"] == "paid")

            await until(is_paid, _WITHIN_S, f"{order} is paid", poll_s=0.01)
        if state >= 2:
            await self._post(session, "staff", f"{order}/shipments", lines=lines, carrier="Post", tracking="1")
        if state >= 3:
            await self._post(session, "staff", f"{order}/shipments/1/deliver")
        if state >= 4:
            await self._post(session, "customer", f"{order}/returns", lines=lines, reason="too blue")
        if state >= _LAST_STATE:
            await self._post(session, "staff", f"{order}/returns/1/approve", note="as it says")
        return int(placed["id"])

    async def _post(self, session: aiohttp.ClientSession, who: str, path: str, **body: Any) -> Any:
        headers = {**self.headers(who), "Idempotency-Key": f"first-{next(self._keys)}"}
        async with session.post(path, json=body or None, headers=headers) as answer:
            assert answer.status in (200, 201), f"{path}: {await answer.text()}"
            return await answer.json()


_LAST_STATE: Final = 5


async def _stop(working: asyncio.Task[None]) -> None:
    working.cancel()
    await asyncio.wait([working])
